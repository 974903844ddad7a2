"""Packing and rounding, against compressed-tensors and by their own laws, for arbitrary weights."""

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.layers.packing import pack_int32, unpack_int32
from pipeline.layers.quantize import Grid, quantize_rows

shapes = st.tuples(st.integers(1, 5), st.integers(1, 70))


@settings(deadline=None, max_examples=60)
@given(shapes, st.integers(1, 8), st.integers(0, 2**31))
def test_packing_equals_compressed_tensors_and_comes_back(shape, bits, seed):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), shape, generator=generator, dtype=torch.int8)
    packed = pack_int32(values, bits)
    assert torch.equal(packed, pack_to_int32(values, bits))
    assert torch.equal(unpack_int32(packed, bits, shape[1]), values)
    assert torch.equal(unpack_from_int32(packed, bits, torch.Size(shape)), values)


WEIGHTS = (
    st.integers(1, 6), st.integers(1, 6), st.sampled_from([8, 4, 3, 2]), st.floats(1e-6, 1e6), st.integers(0, 2**31),
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
)  # fmt: skip


def weights(rows, groups, size, seed, dtype):
    weight = (torch.randn(rows, groups * 8, generator=torch.Generator().manual_seed(seed)) * size).to(dtype)
    weight[0] = 0
    return weight


@settings(deadline=None, max_examples=60)
@given(*WEIGHTS)
def test_rounding_error_is_half_a_step_and_zeros_stay_zero(rows, groups, bits, size, seed, dtype):
    weight = weights(rows, groups, size, seed, dtype)
    made = quantize_rows(weight, Grid(bits, 8))
    assert made.scale.shape == (rows, groups)
    assert made.scale.dtype == dtype
    assert made.zero_point is None
    assert (made.scale > 0).all()
    step = made.scale.double().repeat_interleave(8, 1)
    error = (weight.double() - made.integers.double() * step).abs()
    # A clipped end of a range below 8 bits is half a step further off; a rounded scale moves the end by its own error.
    bound = 0.5 if bits == 8 else 0.55
    slack = 1 + 130 * torch.finfo(dtype).eps
    assert (error <= bound * step * slack + 127 * step * torch.finfo(dtype).eps).all()
    assert (made.integers[weight == 0] == 0).all()
    assert made.dequantized().dtype == dtype


@settings(deadline=None, max_examples=60)
@given(*WEIGHTS, st.floats(-3, 3))
def test_zero_points_divide_the_range_and_keep_zero_exactly(rows, groups, bits, size, seed, dtype, shift):
    weight = weights(rows, groups, size, seed, dtype)
    weight[1:] += shift * size
    weight[:, ::5] = 0
    grid = Grid(bits, 8, symmetric=False)
    made = quantize_rows(weight, grid)
    assert made.zero_point.dtype == torch.int8
    assert (made.zero_point >= grid.low).all()
    assert (made.zero_point <= grid.high).all()
    back = made.dequantized().double()
    assert (back[weight == 0] == 0).all()
    step = made.scale.double().repeat_interleave(8, 1)
    # Zero points are rounded too, which may clip an end by half a step.
    error = (back - weight.double()).abs()
    assert (error <= step * (1.01 + 2**bits * torch.finfo(dtype).eps)).all()


def test_a_group_size_that_does_not_divide_is_an_error():
    with pytest.raises(ValueError, match="group_size=3 does not divide 8 columns"):
        quantize_rows(torch.ones(2, 8), Grid(4, 3))
