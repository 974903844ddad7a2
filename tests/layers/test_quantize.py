"""Rounding to nearest: what is checked before it. Grids, scales and packing: test_packing.py, test_methods.py."""

import math

import pytest
import torch

from pipeline.layers.quantize import is_finite


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_one_value_that_is_not_finite_is_found_wherever_it_is(dtype, bad):
    weight = torch.nn.Parameter(torch.randn(37, 11).to(dtype))
    assert is_finite(weight)
    assert is_finite(weight[:0])
    for place in (0, 203, 406):
        hit = weight.detach().clone()
        hit.view(-1)[place] = bad
        assert not is_finite(hit)
        assert not is_finite(hit.t())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_values_whose_squares_overflow_are_finite(dtype):
    weight = torch.full((37, 11), torch.finfo(dtype).max, dtype=dtype)
    assert is_finite(weight)
    weight[3, 5] = -math.inf
    assert not is_finite(weight)
