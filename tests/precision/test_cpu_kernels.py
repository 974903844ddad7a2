"""The 16-bit kernels against float64, against torch's own 16-bit kernels, and in how they come and go.

Every test acts as if the CPU had no 16-bit instructions, so that the same kernels are tested on every machine.
"""

import threading

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from pipeline.precision import cpu_kernels
from pipeline.precision.cpu_kernels import KERNELS, sixteen_bit_kernels

DTYPES = [torch.float16, torch.bfloat16]


@pytest.fixture(autouse=True)
def no_native_kernels(monkeypatch):
    monkeypatch.setattr(cpu_kernels, "native", lambda dtype: dtype not in cpu_kernels.NARROW)


def installed():
    # torch itself has no CPU kernel for this one, which makes ours visible.
    return torch._C._dispatch_has_kernel_for_dispatch_key("aten::convolution", "CPU")


def attention(**settings):
    return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, **settings)


def masked(q, k, v):
    mask = torch.zeros(q.shape[-2], k.shape[-2], dtype=q.dtype).masked_fill(
        torch.eye(q.shape[-2], k.shape[-2]) > 0, -1.0
    )
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def bool_masked(q, k, v):
    mask = torch.ones(q.shape[-2], k.shape[-2]).tril(1).bool()
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


QKV = [(2, 4, 24, 16)] * 3
PRODUCTS = {
    "linear": (F.linear, [(3, 7, 33), (17, 33), (17,)]),
    "linear without bias": (F.linear, [(5, 33), (17, 33)]),
    "matmul": (torch.matmul, [(2, 3, 9, 21), (21, 6)]),
    "operator": (lambda a, b: a @ b, [(4, 9, 21), (4, 21, 6)]),
    "transposed": (lambda a, b: a.t() @ b.t(), [(21, 9), (6, 21)]),
    "mm": (torch.mm, [(9, 21), (21, 6)]),
    "addmm": (lambda c, a, b: torch.addmm(c, a, b, beta=0.5, alpha=2.0), [(9, 6), (9, 21), (21, 6)]),
    "addmm of a row": (torch.addmm, [(1, 6), (9, 21), (21, 6)]),
    "bmm": (torch.bmm, [(4, 9, 21), (4, 21, 6)]),
    "baddbmm": (lambda c, a, b: torch.baddbmm(c, a, b, beta=0.5, alpha=2.0), [(4, 9, 6), (4, 9, 21), (4, 21, 6)]),
    "einsum": (lambda a, b: torch.einsum("bij,bkj->bik", a, b), [(4, 9, 21), (4, 6, 21)]),
    "tensordot": (lambda a, b: torch.tensordot(a, b, dims=2), [(4, 9, 21), (9, 21, 6)]),
    "conv1d": (lambda x, w, b: F.conv1d(x, w, b, stride=2, padding=1), [(2, 6, 20), (8, 6, 3), (8,)]),
    "conv2d": (lambda x, w: F.conv2d(x, w, padding=1, dilation=2), [(2, 6, 9, 9), (8, 6, 3, 3)]),
    "conv2d depthwise": (lambda x, w: F.conv2d(x, w, groups=6), [(2, 6, 9, 9), (6, 1, 3, 3)]),
    "conv2d transposed": (F.conv_transpose2d, [(2, 6, 5, 5), (6, 8, 3, 3)]),
    "conv3d": (F.conv3d, [(1, 3, 6, 6, 6), (4, 3, 3, 3, 3)]),
    "attention": (attention(), QKV),
    "attention, causal and scaled": (attention(is_causal=True, scale=0.2), QKV),
    "attention, float mask": (masked, QKV),
    "attention, bool mask": (bool_masked, QKV),
    "attention, grouped": (attention(enable_gqa=True), [(2, 4, 24, 16), (2, 2, 24, 16), (2, 2, 24, 16)]),
    "attention, fewer queries": (attention(), [(2, 4, 5, 16), (2, 4, 24, 16), (2, 4, 24, 16)]),
}


def operands(shapes, dtype):
    torch.manual_seed(0)
    return [torch.randn(shape).to(dtype) for shape in shapes]


def run(function, tensors):
    """Output and gradients, for an upstream gradient that is exact in 16 bits."""
    leaves = [tensor.clone().requires_grad_() for tensor in tensors]
    out = function(*leaves)
    torch.manual_seed(1)
    out.backward(torch.randint(-2, 3, out.shape).to(out.dtype))
    return [out.detach(), *(leaf.grad for leaf in leaves)]


def assert_near(got, exact, dtype, units):
    """Within `units` roundings of the result's largest magnitude."""
    for mine, reference in zip(got, exact, strict=True):
        assert mine.dtype == dtype
        assert mine.shape == reference.shape
        bound = units * torch.finfo(dtype).eps * reference.abs().max()
        assert (mine.double() - reference.double()).abs().max() <= bound


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", PRODUCTS)
def test_outputs_and_gradients_are_within_one_rounding_of_float64(name, dtype):
    function, shapes = PRODUCTS[name]
    tensors = operands(shapes, dtype)
    exact = run(function, [tensor.double() for tensor in tensors])
    with sixteen_bit_kernels():
        got = run(function, tensors)
    # Attention's backward pass reads the rounded output; everything else is rounded once.
    assert_near(got, exact, dtype, 2.0 if "attention" in name else 0.51)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", PRODUCTS)
def test_outputs_and_gradients_agree_with_torchs_own_kernels(name, dtype):
    function, shapes = PRODUCTS[name]
    tensors = operands(shapes, dtype)
    native = run(function, tensors)
    with sixteen_bit_kernels():
        got = run(function, tensors)
    assert_near(got, native, dtype, 4.0)
    assert [mine.stride() for mine in got] == [theirs.stride() for theirs in native]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_attention_with_dropout_draws_what_torchs_own_kernels_draw(dtype):
    tensors = operands(QKV, dtype)

    def dropped(q, k, v):
        torch.manual_seed(5)
        return F.scaled_dot_product_attention(q, k, v, dropout_p=0.5)

    native = run(dropped, tensors)
    with sixteen_bit_kernels():
        got = run(dropped, tensors)
    assert_near(got, native, dtype, 4.0)


def test_multi_head_attention_module_is_served_too():
    module = nn.MultiheadAttention(32, 4, batch_first=True)
    data = torch.randn(2, 8, 32)
    exact, _ = module(data, data, data)
    with sixteen_bit_kernels(), torch.autocast("cpu", torch.float16):
        out, _ = module(data, data, data)
    assert out.dtype == torch.float16
    assert torch.allclose(out.float(), exact, atol=2e-3)


@pytest.mark.parametrize("name", ["linear", "matmul", "baddbmm", "conv2d", "einsum"])
def test_second_derivatives_are_those_of_float64(name):
    function, shapes = PRODUCTS[name]

    def penalty(tensors):
        leaves = [tensor.clone().requires_grad_() for tensor in tensors]
        out = function(*leaves)
        first = torch.autograd.grad(out.square().sum(), leaves, create_graph=True)
        sum(grad.double().square().sum() for grad in first).backward()
        return [leaf.grad for leaf in leaves]

    tensors = [tensor / 8 for tensor in operands(shapes, torch.float16)]
    exact = penalty([tensor.double() for tensor in tensors])
    with sixteen_bit_kernels():
        got = penalty(tensors)
    for mine, reference in zip(got, exact, strict=True):
        assert (mine - reference).abs().max() <= 0.01 * reference.abs().max()


def test_sums_are_made_in_float32_and_rounded_once():
    # In float16, 2048 + 1 is 2048: a float16 sum of 4,096 ones would stop there.
    with sixteen_bit_kernels():
        out = torch.ones(1, 4096).half() @ torch.ones(4096, 1).half()
    assert out.item() == 4096


def test_a_result_beyond_float16_is_infinite():
    with sixteen_bit_kernels():
        assert (torch.full((1, 2), 300.0).half() @ torch.full((2, 1), 300.0).half()).isinf()


@pytest.mark.parametrize("added", [(6,), (1, 6), (700, 6), (700, 1)])
def test_slices_of_rows_give_what_one_piece_gives(monkeypatch, added):
    left, right, bias = operands([(700, 21), (21, 6), added], torch.float16)
    with sixteen_bit_kernels():
        whole = [left @ right, torch.addmm(bias, left, right)]
        monkeypatch.setattr(cpu_kernels, "ROW_ELEMENTS", 1)
        sliced = [left @ right, torch.addmm(bias, left, right)]
    for mine, reference in zip(sliced, whole, strict=True):
        assert torch.allclose(mine, reference, atol=2e-3)


@pytest.mark.parametrize("shapes", [[(0, 4), (4, 3)], [(3, 0), (0, 4)], [(3, 4), (4, 0)]])
def test_empty_operands_give_what_float32_gives(shapes):
    left, right = operands(shapes, torch.float16)
    with sixteen_bit_kernels():
        assert torch.equal(left @ right, (left.float() @ right.float()).half())


def test_shapes_that_do_not_fit_give_torchs_own_error():
    left, right = operands([(3, 4), (5, 6)], torch.float16)
    with sixteen_bit_kernels():
        with pytest.raises(RuntimeError, match="cannot be multiplied"):
            left @ right
        with pytest.raises(RuntimeError, match=r"must be a matrix|2-D"):
            torch.mm(left, torch.randn(5).half())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64, torch.complex64], ids=str)
def test_other_dtypes_keep_torchs_kernels_bit_for_bit(dtype):
    left, right = torch.randn(9, 21).mul(8).to(dtype), torch.randn(21, 6).mul(8).to(dtype)
    outside = left @ right
    with sixteen_bit_kernels():
        assert torch.equal(left @ right, outside)


def test_only_dtypes_without_native_kernels_are_served(monkeypatch):
    monkeypatch.setattr(cpu_kernels, "native", lambda dtype: dtype != torch.float16)
    seen = []

    def spy(original, left, right):
        seen.append(left.dtype)
        return original(left.float(), right.float()).to(left.dtype)

    monkeypatch.setitem(KERNELS, "mm", (spy, 0))
    with sixteen_bit_kernels():
        torch.ones(2, 2).half() @ torch.ones(2, 2).half()
        torch.ones(2, 2).bfloat16() @ torch.ones(2, 2).bfloat16()
        torch.ones(2, 2) @ torch.ones(2, 2)
    assert seen == [torch.float16]


def test_nothing_is_registered_where_both_dtypes_are_native(monkeypatch):
    monkeypatch.setattr(cpu_kernels, "native", lambda dtype: True)
    with sixteen_bit_kernels():
        assert not installed()


def test_kernels_go_with_the_last_exit_and_after_an_error():
    assert not installed()
    with sixteen_bit_kernels():
        with sixteen_bit_kernels():
            assert installed()
        assert installed()
    assert not installed()
    with pytest.raises(ZeroDivisionError), sixteen_bit_kernels():
        raise ZeroDivisionError
    assert not installed()
    with sixteen_bit_kernels():
        assert installed()


def test_other_threads_see_the_kernels():
    out = []
    with sixteen_bit_kernels():
        thread = threading.Thread(target=lambda: out.append(installed()))
        thread.start()
        thread.join()
    assert out == [True]


def test_autocast_saves_16_bit_tensors_for_the_backward_pass():
    saved = []
    model = nn.Sequential(nn.Linear(32, 64), nn.Linear(64, 16))

    def pack(tensor):
        saved.append(tensor.dtype)
        return tensor

    with (
        sixteen_bit_kernels(),
        torch.autocast("cpu", torch.float16),
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
    ):
        model(torch.randn(8, 32))
    assert saved
    assert set(saved) == {torch.float16}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_autocast_gradients_arrive_in_float32_on_float32_weights(dtype):
    model = nn.Linear(32, 8)
    with sixteen_bit_kernels():
        with torch.autocast("cpu", dtype):
            out = model(torch.randn(4, 32))
        out.float().square().sum().backward()
    assert out.dtype == dtype
    assert model.weight.dtype == model.weight.grad.dtype == torch.float32
