"""The Llama that is built: grouped queries, default feed-forward width, and its problems."""

import dataclasses

import pytest
import torch

from pipeline.data.base import DataSpec
from pipeline.models.llama import Llama

SPEC = DataSpec(vocabulary=256, sequence_length=16)
SMALL = Llama(
    name="llama",
    layers=2,
    heads=4,
    key_value_heads=2,
    width=32,
    intermediate=None,
    dropout=0.0,
    tie_embeddings=True,
)


def test_keys_and_values_are_shared_by_groups_of_queries() -> None:
    model = SMALL.build(SPEC)
    attention = model.model.layers[0].self_attn
    assert attention.q_proj.weight.shape == (32, 32)
    assert attention.k_proj.weight.shape == attention.v_proj.weight.shape == (16, 32)
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert model(input_ids=torch.zeros(2, 16, dtype=torch.long)).logits.shape == (2, 16, 256)


@pytest.mark.parametrize(
    ("width", "asked", "expected"), [(32, None, 128), (256, None, 704), (768, None, 2048), (32, 40, 40)]
)
def test_feed_forward_width(width: int, asked: int | None, expected: int) -> None:
    with torch.device("meta"):
        model = dataclasses.replace(SMALL, width=width, intermediate=asked).build(SPEC)
    assert model.model.layers[0].mlp.up_proj.weight.shape == (expected, width)
    assert model.model.layers[0].mlp.up_proj.weight.device.type == "meta"


def test_no_byte_is_padding() -> None:
    model = SMALL.build(SPEC)
    assert model.get_input_embeddings().padding_idx is None
    assert (model.config.bos_token_id, model.config.eos_token_id, model.config.pad_token_id) == (None, None, None)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"heads": 5, "key_value_heads": 5},
            "model.heads=5 does not divide model.width=32; choose one of 1, 2, 4, 8, 16, 32",
        ),
        ({"key_value_heads": 3}, "model.key_value_heads=3 does not divide model.heads=4; choose one of 1, 2, 4"),
        ({"key_value_heads": 8}, "model.key_value_heads=8 does not divide model.heads=4; choose one of 1, 2, 4"),
        ({"width": 12}, "model.width=12 gives model.heads=4 heads of 3, an odd size"),
    ],
)
def test_problems_name_key_value_and_fix(changes: dict[str, int], words: str) -> None:
    found = dataclasses.replace(SMALL, **changes).problems()
    assert len(found) == 1
    assert found[0].startswith(words)
    assert SMALL.problems() == []
