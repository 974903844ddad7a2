import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from pipeline.layers.schemes import KINDS


@pytest.mark.parametrize("groups", [1, 4, 8])
@pytest.mark.parametrize("bias", [True, False])
def test_int8_convolution_sums_integers_per_sample(groups, bias):
    torch.manual_seed(0)
    conv = nn.Conv2d(8, 16, 3, stride=2, padding=1, groups=groups, bias=bias)
    layer = KINDS["int8", nn.Conv2d].from_float(conv)
    x = torch.randn(3, 8, 9, 9) * torch.tensor([1.0, 10.0, 0.1]).view(3, 1, 1, 1)
    step = x.abs().amax((1, 2, 3), keepdim=True) / 127.5
    q = (x / step).round().clamp(-128, 127).double()
    want = (
        F.conv2d(q, layer.weight.double(), None, 2, 1, 1, groups) * layer.weight_scale.double().view(1, -1, 1, 1) * step
    )
    if bias:
        want = want + conv.bias.double().view(1, -1, 1, 1)
    torch.testing.assert_close(layer(x).double(), want, rtol=1e-5, atol=1e-5)
    assert ((layer(x) - conv(x)).norm() / conv(x).norm()) < 0.03


@pytest.mark.parametrize(("bits", "error"), [(8, 0.02), (4, 0.25)])
def test_weight_only_convolution_is_the_dequantized_one(bits, error):
    torch.manual_seed(0)
    conv = nn.Conv2d(6, 6, 3, padding="same", groups=6)
    layer = KINDS["weight_only", nn.Conv2d].from_float(conv, bits=bits, group_size=64)
    x = torch.randn(2, 6, 5, 5)
    torch.testing.assert_close(layer(x), F.conv2d(x, layer.dequantized(), conv.bias, 1, "same", 1, 6))
    assert ((layer(x) - conv(x)).norm() / conv(x).norm()) < error


@pytest.mark.parametrize(
    ("scheme", "settings"),
    [
        ("int8", {}),
        ("int8_static", {}),
        ("weight_only", {"bits": 4}),
        ("nf4", {"block_size": 16, "double_quant": False}),
        ("fp8", {}),
    ],
)
def test_a_quantized_convolution_tells_its_geometry_to_the_module_around_it(scheme, settings):
    """MobileNets pad by it before they call the layer, as TensorFlow does."""
    conv = nn.Conv2d(4, 6, (3, 1), stride=2, padding=(1, 0), dilation=(2, 1), groups=2)
    layer = KINDS[scheme, nn.Conv2d].from_float(conv, **settings)
    for name in ("kernel_size", "stride", "padding", "dilation", "groups", "in_channels", "out_channels"):
        assert getattr(layer, name) == getattr(conv, name)


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
@pytest.mark.parametrize("padding", [(1, 2), "same"])
def test_a_quantized_convolution_pads_as_the_float_one_does(mode, padding):
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 6, 3, padding=padding, dilation=(1, 2), padding_mode=mode)
    x = torch.randn(2, 4, 9, 9)
    exact = copy.deepcopy(conv)
    layer = KINDS["weight_only", nn.Conv2d].from_float(conv, bits=4)
    exact.weight.data = layer.dequantized()
    torch.testing.assert_close(layer(x), exact(x))
    for scheme in ("int8", "fp8"):
        made = KINDS[scheme, nn.Conv2d].from_float(conv)
        assert (made(x) - conv(x)).norm() / conv(x).norm() < 0.05
        assert made(x[0]).shape == conv(x[0]).shape
