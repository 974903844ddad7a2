"""What the quantizers share: what they touch, what they refuse, and what they say."""

import pytest
import torch
from torch import nn

from pipeline.compression.int4 import Int4
from pipeline.compression.int8 import Int8, quantize_int8
from pipeline.compression.int8_weight_only import Int8WeightOnly
from pipeline.errors import LeanfitError
from pipeline.layers.quantized import quantized_layers
from tests.tiny import context, efficientnet, opt
from tests.tiny import odd_llama as llama


def int4(group_size, ignore=()):
    return Int4(name="int4", bits=4, group_size=group_size, symmetric=True, embeddings=False, ignore=ignore)


QUANTIZERS = [
    Int8(name="int8", ignore=()),
    Int8WeightOnly(name="int8_weight_only", embeddings=False, ignore=()),
    int4(16, ()),
]


@pytest.mark.parametrize("method", QUANTIZERS, ids=lambda m: m.name)
@pytest.mark.parametrize("tied", [True, False])
def test_language_models_keep_embeddings_and_vocabulary_in_float(method, tied):
    model = opt(tied)
    ids = torch.randint(0, 64, (2, 16))
    before = model(input_ids=ids).logits
    made = method.finalize(model, context(model))
    assert len(quantized_layers(made)) == 12
    assert isinstance(made.lm_head, nn.Linear)
    detail = method.detail(made, context(made))
    assert detail["layers"] == 12
    assert list(detail["left_in_float"]) == ["lm_head"]
    assert set(detail["bits"].values()) == {4 if method.name == "int4" else 8}
    after = made(input_ids=ids).logits
    error = ((after - before).norm() / before.norm()).item()
    assert 0 < error < (0.3 if method.name == "int4" else 0.04)


@pytest.mark.parametrize("method", QUANTIZERS, ids=lambda m: m.name)
def test_classifiers_are_quantized_with_their_head(method):
    model = efficientnet()
    x = torch.randn(2, 1, 16, 16)
    before = model(pixel_values=x).logits
    method = method if method.name != "int4" else int4(4, ())
    assert method.preflight(model, context(model)) == []
    made = method.finalize(model, context(model))
    assert not [m for m in made.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert ((made(pixel_values=x).logits - before).norm() / before.norm()) < 0.6


@pytest.mark.parametrize("method", QUANTIZERS, ids=lambda m: m.name)
def test_a_nan_weight_is_an_error_that_names_the_layer(method):
    model = opt()
    model.model.decoder.layers[1].fc2.weight.data[3, 4] = float("nan")
    with pytest.raises(LeanfitError, match=r"model\.decoder\.layers\.1\.fc2.*NaN"):
        method.finalize(model, context(model))
    assert not quantized_layers(model)


def test_preflight_works_on_meta_and_names_key_value_and_fix():
    with torch.device("meta"):
        model = llama()
    problems = int4(64, ()).preflight(model, context(model, "p4"))
    assert len(problems) == 1
    assert "compression.p4.group_size=64" in problems[0]
    assert "(48)" in problems[0]
    assert "choose one of 16" in problems[0]
    assert int4(16, ()).preflight(model, context(model)) == []


@pytest.mark.parametrize("method", [Int8(name="int8", ignore=("*.fc3",)), int4(16, ("fc11",))])
def test_a_pattern_that_matches_nothing_is_a_problem(method):
    model = opt()
    problems = method.preflight(model, context(model))
    assert len(problems) == 1
    assert "did you mean" in problems[0]


def test_ignored_layers_stay_and_ignoring_all_is_a_problem():
    model = opt()
    method = Int8(name="int8", ignore=("self_attn", "*.layers.0.fc1"))
    made = method.finalize(model, context(model))
    assert sorted(quantized_layers(made)) == [f"model.decoder.layers.{n}" for n in ("0.fc2", "1.fc1", "1.fc2")]
    problems = Int8(name="int8", ignore=("*",)).preflight(opt(), context(opt()))
    assert "no layer" in problems[0]
    assert "quantized already" in method.preflight(made, context(made))[0]
    with pytest.raises(LeanfitError, match="no layer"):
        quantize_int8(opt(), [])
