"""What all quantized layers share: a large weight is decoded some rows at a time."""

import pytest
import torch
from torch import nn

from pipeline.errors import LeanfitError
from pipeline.layers import kernels, quantized
from pipeline.layers.fake import fake_quantize_layers
from pipeline.layers.schemes import KINDS, quantize_layers, require_finite
from pipeline.memory.measure import measure_peak

CASES = {
    "packed": ("weight_only", {"bits": 4, "group_size": 32}),
    "3 bits with zero points": ("weight_only", {"bits": 3, "group_size": 24, "symmetric": False}),
    "nf4": ("nf4", {"block_size": 64, "double_quant": True}),
    "nf4, blocks over the ends of rows": ("nf4", {"block_size": 36, "double_quant": False}),
    "nf4, blocks of whole rows": ("nf4", {"block_size": 480, "double_quant": True}),
    "fp8": ("fp8", {}),
    "fp8, tokens too": ("fp8", {"activations": "dynamic"}),
}


def made(case, outputs=100, bias=True):
    scheme, settings = CASES[case]
    torch.manual_seed(0)
    return KINDS[scheme, nn.Linear].from_float(nn.Linear(96, outputs, bias=bias), **settings)


@pytest.mark.parametrize("case", CASES)
def test_rows_are_decoded_as_in_the_whole(case):
    layer = made(case)
    whole = layer.dequantized()
    for begin, end in ((0, 100), (0, 1), (17, 64), (64, 100), (99, 100)):
        assert torch.equal(layer.decoded_rows(begin, end), whole[begin:end])


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_a_product_in_parts_is_that_of_the_whole(monkeypatch, case, bias):
    layer, x = made(case, bias=bias), torch.randn(2, 10, 96)
    want = layer(x)
    calls = []
    decoded = type(layer).decoded_rows
    monkeypatch.setattr(quantized, "DECODED", 96 * 32)
    monkeypatch.setattr(type(layer), "decoded_rows", lambda *a: calls.append(a[1:]) or decoded(*a))
    torch.testing.assert_close(layer(x), want, rtol=1e-6, atol=1e-6)
    assert calls == [(0, 32), (32, 64), (64, 96), (96, 100)]


def test_a_gradient_to_the_input_takes_the_whole(monkeypatch):
    layer, x = made("packed"), torch.randn(2, 10, 96, requires_grad=True)
    monkeypatch.setattr(quantized, "DECODED", 96 * 32)
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, layer.dequantized().sum(0).expand_as(x))


def test_no_more_than_a_part_is_held_beside_the_outputs():
    layer = KINDS["weight_only", nn.Linear].from_float(nn.Linear(512, 8192, bias=False), bits=4, group_size=64)
    x = torch.randn(16, 512)
    with torch.no_grad(), measure_peak("cpu") as peak:
        layer(x)
    outputs, part = 4 * 16 * 8192, 4 * quantized.DECODED
    assert outputs + part < peak.bytes < outputs + 3 * part
    assert 3 * part < 4 * layer.rows * layer.columns


FLOAT = {
    nn.Linear: (lambda: nn.Linear(32, 24), [(0, 32), (2, 0, 32), (32,)]),
    nn.Conv2d: (lambda: nn.Conv2d(8, 16, 3), [(0, 8, 6, 6), (8, 6, 6)]),
    nn.Embedding: (lambda: nn.Embedding(20, 32), [(0, 3), (3, 0), ()]),
    nn.EmbeddingBag: (lambda: nn.EmbeddingBag(20, 32), [(0, 3)]),
}
SETTINGS = {
    "nf4": {"block_size": 16, "double_quant": True},
    "nf4_adapted": {"block_size": 16, "double_quant": True, "rank": 4, "scaling": 2.0},
    "weight_only": {"bits": 4, "symmetric": False},
}


@pytest.mark.parametrize(("scheme", "kind"), KINDS, ids=lambda part: getattr(part, "__name__", part))
def test_outputs_have_the_shape_that_a_float_layer_gives_where_inputs_are_none_or_one(scheme, kind):
    """None: as what is sent to an expert may be."""
    build, shapes = FLOAT[kind]
    layer = build()
    made = KINDS[scheme, kind].from_float(layer, **SETTINGS.get(scheme, {}))
    for shape in shapes:
        x = torch.zeros(shape, dtype=torch.int64 if "Embedding" in kind.__name__ else torch.float32)
        for kernel in (None, *(kernels.KERNELS if scheme.startswith("int8") and kind is nn.Linear else ())):
            if kernel in (None, "float") or kernels.works(kernel, torch.device("cpu")):
                with kernels.forced(kernel):
                    assert made(x).shape == layer(x).shape


def test_flat_tokens_that_share_a_scale_may_be_none():
    assert KINDS["int8", nn.Linear].from_float(nn.Linear(32, 24), share_flat=True)(torch.zeros(0, 32)).shape == (0, 24)


@pytest.mark.parametrize(
    ("layer", "scheme", "told"),
    [
        (nn.Conv1d(4, 4, 3), "int8", "1 (Conv1d) has no 'int8' form; Conv2d, Linear have one"),
        (nn.Embedding(8, 4), "int8", "1 (Embedding) has no 'int8' form; Conv2d, Linear have one"),
        (nn.Linear(4, 4), "int9", "there is no scheme 'int9'; there are "),
    ],
    ids=["convolution over time", "table", "scheme"],
)
@pytest.mark.parametrize("quantize", [quantize_layers, fake_quantize_layers])
def test_a_layer_without_such_a_form_is_named_and_nothing_is_changed(quantize, layer, scheme, told):
    model = nn.Sequential(nn.Linear(4, 4), layer)
    settings = {"share_flat": False} if quantize is fake_quantize_layers else {}
    with pytest.raises(LeanfitError) as refused:
        quantize(model, ["0", "1"], scheme, **settings)
    assert str(refused.value).startswith(told)
    assert type(model[0]) is nn.Linear


def test_a_name_that_is_no_layer_s_is_told_with_what_was_probably_meant():
    model = nn.ModuleDict({"up": nn.Linear(4, 4), "act": nn.ReLU()})
    for name, meant in (("down", ""), ("uo", "; did you mean 'up'?"), ("act", ""), ("", "")):
        with pytest.raises(LeanfitError) as refused:
            require_finite(model, ["up", name], "int8")
        assert str(refused.value) == f"int8: the model has no layer {name!r} with a weight{meant}"
