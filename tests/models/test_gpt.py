"""The GPT that is built: sizes, layers, seeds, and that no byte is special."""

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from pipeline.data.base import DataSpec
from pipeline.errors import ConfigError
from pipeline.models.gpt import GPT

SPEC = DataSpec(vocabulary=256, sequence_length=16)
SMALL = GPT(name="gpt", layers=2, heads=2, width=32, dropout=0.0, activation="gelu", tie_embeddings=True)


def test_sizes_are_the_ones_asked_for() -> None:
    model = SMALL.build(SPEC)
    width, layers = 32, 2
    # Attention 4 w^2, feed-forward 8 w^2, with biases and two norms a block; positions are offset by two in OPT.
    block = 12 * width**2 + (4 + 4 + 1) * width + 2 * 2 * width
    expected = layers * block + (256 + 16 + 2) * width + 2 * width
    assert sum(parameter.numel() for parameter in model.parameters()) == expected
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert model.training
    linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
    assert len(linears) == 6 * layers + 1
    assert model(input_ids=torch.zeros(3, 16, dtype=torch.long)).logits.shape == (3, 16, 256)


def test_weights_follow_the_global_seed() -> None:
    def build(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return torch.cat([parameter.detach().flatten() for parameter in SMALL.build(SPEC).parameters()])

    assert torch.equal(build(1), build(1))
    assert not torch.equal(build(1), build(2))


def test_no_byte_has_a_dead_embedding_or_ends_a_text() -> None:
    model = SMALL.build(SPEC)
    embeddings = model.get_input_embeddings()
    assert bool((embeddings.weight.norm(dim=1) > 0).all())
    model(input_ids=torch.arange(256).view(16, 16)).logits.square().sum().backward()
    # OPT's default padding index would leave the gradient of byte 1's row at zero.
    assert bool((embeddings.weight.grad.norm(dim=1) > 0).all())
    generation = model.generation_config
    assert (generation.eos_token_id, generation.bos_token_id, generation.pad_token_id) == (None, None, None)


def test_saving_and_loading_keeps_logits_and_special_ids(tmp_path: Path) -> None:
    model = SMALL.build(SPEC).eval()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    ids = torch.arange(32).view(2, 16)
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=ids).logits, model(input_ids=ids).logits)
    assert (loaded.config.pad_token_id, loaded.config.bos_token_id, loaded.config.eos_token_id) == (None, None, None)


@pytest.mark.parametrize("tied", [True, False])
def test_tie_embeddings_decides_whether_head_and_embedding_are_one(tied: bool) -> None:
    model = dataclasses.replace(SMALL, tie_embeddings=tied).build(SPEC)
    assert (model.lm_head.weight is model.get_input_embeddings().weight) is tied


def test_it_sees_no_later_token() -> None:
    model = SMALL.build(SPEC).eval()
    ids = torch.randint(256, (1, 16))
    changed = ids.clone()
    changed[0, 10:] = (changed[0, 10:] + 1) % 256
    with torch.no_grad():
        before, after = model(input_ids=ids).logits, model(input_ids=changed).logits
    assert torch.allclose(before[0, :10], after[0, :10], atol=1e-6)
    assert not torch.allclose(before[0, 10:], after[0, 10:], atol=1e-3)


def test_dropout_acts_in_training_alone() -> None:
    model = dataclasses.replace(SMALL, dropout=0.5).build(SPEC)
    ids = torch.randint(256, (1, 16))
    assert not torch.equal(model(input_ids=ids).logits, model(input_ids=ids).logits)
    model.eval()
    assert torch.equal(model(input_ids=ids).logits, model(input_ids=ids).logits)


def test_on_meta_nothing_is_allocated() -> None:
    with torch.device("meta"):
        model = dataclasses.replace(SMALL, layers=48, width=16384, heads=128).build(SPEC)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}


def test_data_without_tokens_is_refused() -> None:
    with pytest.raises(ConfigError, match="a language model needs text"):
        SMALL.build(DataSpec(classes=10, channels=1, image_size=32))


def test_heads_that_do_not_divide_the_width_are_named_with_the_ones_that_do() -> None:
    assert dataclasses.replace(SMALL, heads=3, width=8).problems() == [
        "model.heads=3 does not divide model.width=8; choose one of 1, 2, 4, 8"
    ]
    assert SMALL.problems() == []
