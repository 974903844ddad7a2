import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.layers.packing import pack_int32, unpack_int32
from pipeline.layers.quantize import dequantize_rows, quantize_rows

shapes = st.tuples(st.integers(1, 5), st.integers(1, 70))


@settings(deadline=None, max_examples=60)
@given(shapes, st.sampled_from([4, 8]), st.integers(0, 2**31))
def test_packing_equals_compressed_tensors_and_comes_back(shape, bits, seed):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), shape, generator=generator, dtype=torch.int8)
    packed = pack_int32(values, bits)
    assert torch.equal(packed, pack_to_int32(values, bits))
    assert torch.equal(unpack_int32(packed, bits, shape[1]), values)
    assert torch.equal(unpack_from_int32(packed, bits, torch.Size(shape)), values)


@settings(deadline=None, max_examples=60)
@given(
    st.integers(1, 6), st.integers(1, 6), st.sampled_from([8, 4]), st.floats(1e-6, 1e6), st.integers(0, 2**31),
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
)  # fmt: skip
def test_rounding_error_is_half_a_step_and_zeros_stay_zero(rows, groups, bits, size, seed, dtype):
    weight = (torch.randn(rows, groups * 8, generator=torch.Generator().manual_seed(seed)) * size).to(dtype)
    weight[0] = 0
    integers, scale = quantize_rows(weight, bits, 8)
    assert scale.shape == (rows, groups)
    assert scale.dtype == dtype
    assert (scale > 0).all()
    step = scale.double().repeat_interleave(8, 1)
    error = (weight.double() - integers.double() * step).abs()
    # A clipped end of the 4-bit range is half a step further off, and a rounded scale moves the end by its own error.
    bound = 0.5 if bits == 8 else 0.55
    slack = 1 + 130 * torch.finfo(dtype).eps
    assert (error <= bound * step * slack + 127 * step * torch.finfo(dtype).eps).all()
    assert (integers[weight == 0] == 0).all()
    assert dequantize_rows(integers, scale).dtype == dtype
