"""What the quantizers share: what they touch, what they refuse, and what they say."""

import re

import pytest
import torch
from torch import nn

from pipeline.compression.int4 import Int4
from pipeline.compression.int8 import Int8, quantize_int8
from pipeline.compression.int8_weight_only import Int8WeightOnly
from pipeline.compression.magnitude import prune_magnitude
from pipeline.compression.sparsegpt import prune_sparsegpt
from pipeline.compression.wanda import prune_wanda
from pipeline.errors import LeanfitError
from pipeline.layers.quantized import quantized_layers
from pipeline.layers.sparsity import has_masks
from pipeline.models.architecture import describe
from tests.tiny import context, efficientnet, opt, token_batches
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


@pytest.mark.parametrize(
    ("sparsity", "pattern", "told"),
    [
        (1.0, None, "sparsity=1.0 must be at least 0 and less than 1"),
        (-0.1, None, "sparsity=-0.1 must be at least 0 and less than 1"),
        (0.5, "x", "pattern=x must be N:M such as 2:4"),
        (0.5, "4:2", "pattern=4:2 prunes nothing: N:M keeps N of each M, as 2:4 does"),
        (0.6, "2:5", "pattern=2:5: 5 does not divide 32 columns"),
    ],
)
@pytest.mark.parametrize("prune", [prune_magnitude, prune_wanda, prune_sparsegpt])
def test_pruners_called_from_python_refuse_what_is_no_target(prune, sparsity, pattern, told):
    model = opt(False)
    layers = ["model.decoder.layers.0.fc1"]
    calibrated = () if prune is prune_magnitude else (token_batches(), describe(model))
    with pytest.raises(ValueError, match=f"^{re.escape(told)}$"):
        prune(model, layers, sparsity, *calibrated, pattern=pattern)
    assert not has_masks(model)
