"""Losses by slices: torch's own values and gradients, and of the logits nothing held but their gradient."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from pipeline.layers import sliced_loss
from pipeline.layers.distillation import logits_loss
from pipeline.layers.sliced_loss import IGNORED, cross_entropy, sum_over_rows
from pipeline.memory.measure import measure_peak

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def rows(count, classes, dtype=torch.float32, left_out=3):
    torch.manual_seed(0)
    targets = torch.randint(classes, (count,))
    targets[1::left_out] = IGNORED
    return torch.randn(count, classes).mul(4).to(dtype).requires_grad_(), targets


def by_torch(logits, targets, reduction="mean"):
    return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), targets, reduction=reduction)


@settings(deadline=None, max_examples=60)
@given(
    count=st.integers(1, 70),
    classes=st.integers(1, 40),
    dtype=st.sampled_from(DTYPES),
    smallest=st.sampled_from([0, 50, 2**20]),
    reduction=st.sampled_from(["mean", "sum"]),
    scale=st.sampled_from([1.0, 65536.0]),
)
def test_values_are_torchs_and_gradients_are_to_the_bit(count, classes, dtype, smallest, reduction, scale):
    logits, targets = rows(count, classes, dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sliced_loss, "SMALLEST", smallest)
        found = cross_entropy(logits, targets, reduction)
        (gradient,) = torch.autograd.grad(found * scale, logits)
    expected = by_torch(logits, targets, reduction)
    assert found.dtype == expected.dtype
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(gradient, torch.autograd.grad(expected * scale, logits)[0])


def test_where_every_row_is_left_out_the_mean_is_no_number_as_torch_has_it():
    logits = torch.zeros(3, 4)
    targets = torch.full((3,), IGNORED)
    assert cross_entropy(logits, targets).isnan()
    assert by_torch(logits, targets).isnan()
    assert cross_entropy(logits, targets, "sum").item() == 0


def test_a_target_that_is_no_class_is_an_error():
    with pytest.raises(IndexError, match="Target 4 is out of bounds"):
        cross_entropy(torch.zeros(2, 4), torch.tensor([0, 4]))


def test_a_graph_that_is_kept_gives_the_same_gradient_again(monkeypatch):
    monkeypatch.setattr(sliced_loss, "SMALLEST", 20)
    logits, targets = rows(9, 5)
    loss = cross_entropy(logits, targets)
    first = torch.autograd.grad(loss, logits, retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(loss, logits)[0])


def test_a_gradient_of_the_gradient_is_refused_not_wrong(monkeypatch):
    monkeypatch.setattr(sliced_loss, "SMALLEST", 20)
    logits, targets = rows(9, 5)
    with pytest.raises(RuntimeError, match="no second derivative"):
        cross_entropy(logits, targets).backward(create_graph=True)


def test_at_most_so_many_slices_and_none_of_fewer_logits_than_are_worth_it():
    seen = []

    def total(part):
        seen.append(len(part))
        return part.sum()

    sum_over_rows(total, torch.zeros(2**8, 2**12))
    assert seen == [2**8]
    seen.clear()
    sum_over_rows(total, torch.zeros(1000, 2**12))
    assert seen == [256, 256, 256, 232]
    seen.clear()
    sum_over_rows(total, torch.zeros(100, 2**18))
    assert seen == [7] * 14 + [2]
    seen.clear()
    assert sum_over_rows(total, torch.zeros(0, 7)).item() == 0


@pytest.mark.parametrize(("dtype", "most"), [(torch.bfloat16, 4.8), (torch.float16, 4.8), (torch.float32, 8.8)])
def test_beside_the_logits_their_gradient_is_held_and_a_slice(dtype, most):
    logits, targets = rows(2**11, 2**13, dtype)
    with measure_peak("cpu", [logits, targets]) as peak:
        cross_entropy(logits, targets).backward()
    assert peak.bytes < most * logits.numel()
    logits.grad = None
    with measure_peak("cpu", [logits, targets]) as whole:
        by_torch(logits, targets).backward()
    assert whole.bytes > 1.8 * peak.bytes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_teachers_logits_are_not_copied_whole(dtype):
    student, _ = rows(2**11, 2**13, dtype)
    teacher = student.detach().flip(0)
    with measure_peak("cpu", [student, teacher]) as peak:
        logits_loss(student, teacher, temperature=2.0).backward()
    # Student, teacher, gradient; and of a slice, a sixteenth, what KL takes.
    assert peak.bytes < (3 * dtype.itemsize + 3) * student.numel()
