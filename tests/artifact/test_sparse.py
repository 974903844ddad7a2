import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.artifact import sparse


@settings(deadline=None, max_examples=80)
@given(st.integers(1, 9), st.integers(1, 33), st.floats(0, 1), st.sampled_from([32, 8, 4]), st.integers(0, 2**31))
def test_bitmask_and_values_come_back(rows, columns, density, bits, seed):
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(rows, columns, generator=generator) < density
    dense = torch.randn(rows, columns, generator=generator)
    if bits != 32:
        dense = (dense * 2).round().clamp(-8, 7).to(torch.int8)
    dense = dense * mask
    bitmask, values = sparse.encode(dense, mask, bits)
    assert bitmask.numel() + values.numel() * values.element_size() == sparse.encoded_bytes(mask, bits)
    assert np.array_equal(bitmask.numpy(), np.packbits(mask.numpy().ravel(), bitorder="little"))
    back, kept = sparse.decode(bitmask, values, (rows, columns), bits)
    assert torch.equal(back, dense)
    assert torch.equal(kept, mask)


def test_parts_that_do_not_fit_are_refused():
    bitmask, values = sparse.encode(torch.ones(4, 4), torch.ones(4, 4, dtype=torch.bool), 32)
    with pytest.raises(ValueError, match="bitmask"):
        sparse.decode(bitmask, values, (8, 4), 32)
    with pytest.raises(ValueError, match="values"):
        sparse.decode(bitmask, values[1:], (4, 4), 32)
