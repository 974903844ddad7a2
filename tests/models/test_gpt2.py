"""GPT-2 as OPT, beside transformers' own GPT-2 on the same weights."""

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from pipeline.data.base import DataSpec
from pipeline.layers.offload import place_of
from pipeline.layers.select import select
from pipeline.models.architecture import describe
from pipeline.models.byte_tokenizer import byte_tokenizer
from pipeline.models.gpt2 import rewritten
from pipeline.models.hf import HuggingFace

SPEC = DataSpec(vocabulary=256, sequence_length=24)
SIZES = {"vocab_size": 256, "n_positions": 32, "n_embd": 32, "n_layer": 3, "n_head": 4}


def gpt2(**settings):
    """Weights far from what training begins with: zero biases and norms of one would hide much."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(**{**SIZES, **settings})).eval()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def directory_of(model, path):
    model.save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    return HuggingFace(name="hf", pretrained=str(path))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"n_inner": 80, "activation_function": "relu"},
        {"tie_word_embeddings": False},
        {"scale_attn_by_inverse_layer_idx": True},
        {"scale_attn_weights": False},
        {"pad_token_id": 7},
    ],
    ids=str,
)
@torch.no_grad()
def test_logits_and_generated_text_are_those_of_gpt2(settings, tmp_path):
    model = gpt2(**settings)
    tokens = torch.randint(256, (3, 24))
    expected, continued = model(tokens).logits, model.generate(tokens[:1, :5], max_new_tokens=12, do_sample=False)
    opt = directory_of(model, tmp_path).build(SPEC).eval()
    assert type(opt).__name__ == "OPTForCausalLM"
    assert (opt(tokens).logits - expected).abs().max() < 1e-5 * expected.abs().max()
    assert torch.equal(opt.generate(tokens[:1, :5], max_new_tokens=12, do_sample=False), continued)
    assert len(select(opt, describe(opt)).layers) == 3 * 6


def test_every_weight_gets_the_gradient_it_has_in_gpt2():
    model = gpt2(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    tokens = torch.randint(256, (2, 24))
    model(tokens, labels=tokens).loss.backward()
    held = {name: parameter.grad for name, parameter in model.named_parameters()}
    opt = rewritten(model)
    opt(tokens, labels=tokens).loss.backward()
    for number, layer in enumerate(opt.model.decoder.layers):
        fused = torch.cat([getattr(layer.self_attn, f"{part}_proj").weight.grad for part in "qkv"])
        torch.testing.assert_close(fused.t(), held[f"transformer.h.{number}.attn.c_attn.weight"])
        torch.testing.assert_close(layer.fc1.weight.grad.t(), held[f"transformer.h.{number}.mlp.c_fc.weight"])
    torch.testing.assert_close(opt.lm_head.weight.grad, held["transformer.wte.weight"])
    assert not opt.model.decoder.embed_positions.weight.grad[:2].any()
    assert sum(p.numel() for p in opt.parameters()) == sum(g.numel() for g in held.values()) + 2 * 32


def test_weights_may_lie_in_files_and_nowhere(tmp_path):
    hf = directory_of(gpt2(), tmp_path / "model")
    held = hf.build(SPEC).state_dict()
    (tmp_path / "files").mkdir()
    laid = hf.build_offloaded(SPEC, torch.float32, tmp_path / "files")
    assert all(place_of(parameter) == tmp_path / "files" for parameter in laid.parameters())
    assert all(torch.equal(held[name], tensor) for name, tensor in laid.state_dict().items())
    with torch.device("meta"):
        shapes = hf.build(SPEC).state_dict()
    assert {name: tensor.shape for name, tensor in shapes.items()} == {n: tensor.shape for n, tensor in held.items()}
    assert {tensor.device.type for tensor in shapes.values()} == {"meta"}


@pytest.mark.parametrize("settings", [{"layer_norm_epsilon": 1e-6}, {"add_cross_attention": True}], ids=str)
def test_what_opt_cannot_say_stays_gpt2(settings, tmp_path):
    hf = directory_of(gpt2(**settings), tmp_path)
    assert type(hf.build(SPEC)) is GPT2LMHeadModel
    assert hf.note() is None


def test_the_run_says_so(tmp_path):
    assert directory_of(gpt2(), tmp_path).note() == (
        f"model.pretrained={tmp_path} is a GPT-2 and is run as OPT, the same function with linear layers"
    )
