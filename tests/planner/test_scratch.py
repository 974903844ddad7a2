"""What operators hold inside on a CPU: predicted, and as real ones do."""

import pytest
import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from pipeline.memory.measure import measure_peak
from pipeline.planner import scratch
from pipeline.planner.fakes import fake_batch, inside, tracing
from pipeline.planner.live import Live
from pipeline.planner.supposed import Supposing
from pipeline.precision import cpu_kernels

NATIVE = [dtype for dtype in cpu_kernels.NARROW if cpu_kernels.native(dtype)]
OPERATORS = {
    "sum of two": lambda wide, narrow, mask: wide + narrow,
    "written in place": lambda wide, narrow, mask: wide.add_(narrow),
    "written in place in fewer bits": lambda wide, narrow, mask: narrow.add_(wide),
    "a row for all": lambda wide, narrow, mask: wide - narrow[:1],
    "compared": lambda wide, narrow, mask: wide < narrow,
    "three": lambda wide, narrow, mask: torch.addcmul(wide, narrow, wide),
    "times a mask": lambda wide, narrow, mask: wide * mask,
    "masked": lambda wide, narrow, mask: wide.masked_fill(mask, 0.0),
    "chosen by a mask": lambda wide, narrow, mask: torch.where(mask, wide, wide),
    "of one dtype": lambda wide, narrow, mask: narrow * narrow,
}


def held(function, made):
    """(predicted, measured) bytes at the peak of `function` of what `made` makes."""
    with tracing(), Supposing(inside) as live:
        given = made()
        live.hold(given, "given")
        before = live.timeline.peak().bytes
        kept = function(*given)
        predicted = live.timeline.peak().bytes - before
        del kept
    given = made()
    function(*[tensor.clone() for tensor in given])  # what a kernel makes once
    with measure_peak("cpu") as peak:
        kept = function(*given)
    del kept
    return predicted, peak.bytes


@pytest.mark.parametrize("name", OPERATORS)
def test_an_elementwise_operator_of_several_dtypes_copies_what_is_of_another(name):
    def made():
        return torch.ones(64, 256), torch.ones(64, 256, dtype=torch.float16), torch.ones(64, 256, dtype=torch.bool)

    predicted, measured = held(OPERATORS[name], made)
    assert measured > 0 or name == "written in place"
    assert predicted == measured


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "mean", [torch.mean, lambda x: x.mean(-1, keepdim=True), lambda x: F.adaptive_avg_pool2d(x, 1)]
)
def test_a_mean_of_16_bits_is_taken_of_a_copy_in_32(dtype, mean):
    predicted, measured = held(mean, lambda: (torch.ones(8, 4, 16, 16, dtype=dtype),))
    assert measured > 0
    assert predicted == measured


@pytest.mark.skipif(not NATIVE, reason="this CPU multiplies no 16-bit matrices")
@pytest.mark.parametrize("tokens", [1, 8, 64, 800])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_the_tiles_of_a_16_bit_product_are_found_by_trying(tokens, bias, context):
    for dtype in NATIVE:

        def made(dtype=dtype):
            given = [torch.ones(1, tokens, 192, dtype=dtype), torch.ones(576, 192, dtype=dtype)]
            return [*given, torch.ones(576, dtype=dtype)] if bias else given

        with context():
            predicted, measured = held(F.linear, made)
        assert predicted == measured


@pytest.mark.skipif(not NATIVE, reason="this CPU has no 16-bit convolutions")
@pytest.mark.parametrize("padding", [1, "same"])
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_the_blocks_of_a_16_bit_convolution_are_found_by_trying(padding, context):
    def made():
        return torch.ones(4, 24, 12, 12, dtype=NATIVE[0]), torch.ones(40, 24, 3, 3, dtype=NATIVE[0])

    with context():
        predicted, measured = held(lambda x, weight: F.conv2d(x, weight, padding=padding), made)
    assert predicted == measured


def test_what_is_too_large_to_be_tried_is_not_and_counts_as_nothing():
    with tracing(), Live(inside) as live:
        given = torch.empty(1, 1 << 14, dtype=torch.bfloat16), torch.empty(1 << 14, 1 << 14, dtype=torch.bfloat16)
        torch.mm(*given)
        assert live.timeline.peak().bytes == sum(tensor.nbytes for tensor in given) + 2 * (1 << 14)


def test_what_draws_at_random_is_not_tried():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    with tracing(), Live(inside):
        weights = torch.empty(8, 16)
        torch.multinomial(weights, 2)
        F.fractional_max_pool2d(torch.empty(1, 2, 8, 8), 2, output_size=4)
    assert torch.equal(torch.rand(3), expected)


def test_what_cannot_be_tried_with_zeros_counts_as_nothing():
    with tracing(), Live(inside) as live:
        given = torch.empty(16, 16)
        made = torch.cholesky_inverse(given)
        assert live.timeline.peak().bytes == given.nbytes + made.nbytes
    with pytest.raises(RuntimeError, match="singular"):
        torch.cholesky_inverse(torch.zeros(16, 16))


def test_a_checkpointed_block_keeps_the_state_of_the_generator():
    def block(x):
        return checkpoint(lambda inputs: F.dropout(inputs, 0.5).tanh(), x.requires_grad_(), use_reentrant=False)

    before = torch.get_rng_state()
    predicted, measured = held(block, lambda: [torch.ones(4, 4)])
    assert predicted == measured > before.nbytes
    with tracing():
        block(torch.ones(4, 4)).sum().backward()  # runs it again, with that state
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    assert torch.equal(torch.rand(3), expected)  # the real generator is as it was


def test_what_an_operator_holds_inside_goes_by_its_name():
    with tracing(), Live(inside) as live:
        x = torch.ones(64, 256, dtype=torch.float16)
        kept = x.mean(-1)
    assert live.timeline.peak().operator == "aten::mean"
    del kept


def test_labels_that_are_the_inputs_are_one_tensor_in_plans_too():
    ids = torch.ones(2, 3, dtype=torch.int64)
    with tracing():
        made = fake_batch({"input_ids": ids, "labels": ids, "attention_mask": ids.clone()})
    assert made["labels"] is made["input_ids"]
    assert made["attention_mask"] is not made["input_ids"]


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("masked", [False, True])
def test_attention_whose_queries_share_one_key_is_computed_step_by_step(masked, context):
    def made():
        query, key, value = (torch.ones(8, heads, 64, 24) for heads in (4, 1, 1))
        return query, key, value, torch.ones(8, 1, 64, 64, dtype=torch.bool)

    def attention(query, key, value, mask):
        with context():
            return F.scaled_dot_product_attention(query, key, value, mask if masked else None, is_causal=not masked)

    predicted, measured = held(attention, made)
    assert predicted == pytest.approx(measured, rel=0.001)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("shape", [(8, 4, 128, 32), (2, 2, 600, 16), (4, 2, 1, 64)])
def test_attention_holds_buffers_of_its_own(dtype, causal, shape):
    def made():
        return [torch.ones(shape, dtype=dtype) for _ in range(3)]

    def attended(query, key, value):
        with torch.inference_mode():
            mask = None if causal else torch.ones(1, 1, shape[2], shape[2], dtype=torch.bool)
            return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=causal)

    predicted, measured = held(attended, made)
    assert predicted == measured
    assert measured > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_backward_pass_of_attention_does_too(dtype):
    def made():
        return [torch.ones(4, 4, 128, 32, dtype=dtype, requires_grad=True) for _ in range(3)]

    def trained(query, key, value):
        y = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return torch.autograd.grad(y, (query, key, value), torch.ones_like(y))

    predicted, measured = held(trained, made)
    assert predicted == measured


def test_the_blocks_of_a_convolution_in_32_bits_in_its_backward_pass_are_found_by_trying():
    def made():
        return [torch.ones(16, 24, 12, 12, requires_grad=True), torch.ones(40, 24, 3, 3, requires_grad=True)]

    def trained(x, weight):
        y = F.conv2d(x, weight)
        return torch.autograd.grad(y, (x, weight), torch.ones_like(y))

    predicted, measured = held(trained, made)
    assert predicted == measured


@pytest.mark.skipif(not NATIVE, reason="this CPU multiplies no 16-bit matrices itself")
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize(("rows", "inner", "columns"), [(4000, 1024, 2500), (200, 2048, 5120), (4096, 512, 4096)])
def test_parts_of_a_long_product_hold_what_it_holds(rows, inner, columns, turned, monkeypatch):
    def made():
        left = torch.ones(inner, rows, dtype=NATIVE[0]).t() if turned else torch.ones(rows, inner, dtype=NATIVE[0])
        return left, torch.ones(columns, inner, dtype=NATIVE[0]), torch.ones(columns, dtype=NATIVE[0])

    tried, parts = watched(monkeypatch)
    predicted, measured = held(lambda left, weight, bias: F.linear(left, weight, bias), made)
    assert predicted == measured
    assert len(parts) == 2
    assert len(tried) in (2, 3)  # whole too, where two parts hold more than one


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("heads", "groups", "length"), [(8, 8, 512), (4, 4, 777), (12, 3, 640)])
def test_one_head_and_two_hold_what_long_attention_holds(heads, groups, length, dtype, monkeypatch):
    def made():
        sizes = (heads, groups, groups)
        return tuple(torch.ones(2, length, n, 64, dtype=dtype, requires_grad=True) for n in sizes)

    def attention(*projected):
        queries, keys, values = (tensor.transpose(1, 2) for tensor in projected)
        out = F.scaled_dot_product_attention(queries, keys, values, is_causal=True, enable_gqa=True)
        return torch.autograd.grad(out.sum(), projected) if heads == groups else out

    tried, parts = watched(monkeypatch)
    predicted, measured = held(attention, made)
    assert predicted == pytest.approx(measured, rel=0.001)
    assert len(parts) == len(tried) == (4 if heads == groups else 2)


def watched(monkeypatch):
    """What is tried, and what of that in parts, where little is long."""
    tried, parts = [], []
    real = scratch._tried

    def trying(func, kinds, *rest):
        tried.append(kinds)
        return real(func, kinds, *rest)

    def by_parts(way):
        return lambda kinds, trial: way(kinds, lambda cut: parts.append(cut) or trial(cut))

    monkeypatch.setattr(scratch, "LONG", 1 << 20)
    monkeypatch.setattr(scratch, "_tried", trying)
    monkeypatch.setattr(scratch, "_of_product", by_parts(scratch._of_product))
    monkeypatch.setattr(scratch, "_of_attention", by_parts(scratch._of_attention))
    return tried, parts


@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("spread", [False, True])
@pytest.mark.parametrize("training", [True, False])
def test_a_batch_norm_makes_the_gradient_of_its_input_twice_where_all_lies_alike(order, spread, training):
    def made():
        images = torch.empty(12, 64, 16, 16, memory_format=order).fill_(1)
        of_output = torch.ones(12, 64, 1, 1).expand(12, 64, 16, 16) if spread else torch.ones_like(images)
        return of_output, images, *(torch.ones(64) for _ in range(5))

    def backward(*given):
        return torch.ops.aten.native_batch_norm_backward(*given, training, 1e-5, [True, True, True])

    predicted, measured = held(backward, made)
    assert predicted == pytest.approx(measured, rel=0.01)
