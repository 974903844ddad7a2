"""Fused kernels beside the layers they stand in for: in Triton's interpreter, through its compiler, and on a GPU."""

import copy
import importlib.util
import multiprocessing
import os
import pickle
from concurrent.futures import ProcessPoolExecutor
from unittest import mock

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from pipeline.layers import fused, kernels
from pipeline.layers.fused import FusedLinear, Product, nearly
from pipeline.layers.lora import LowRank, NF4AdaptedLinear
from pipeline.layers.schemes import KINDS

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CASES = [
    *[("weight_only", {"bits": bits}) for bits in (2, 3, 4, 8)],
    *[("weight_only", {"bits": bits, "group_size": 32}) for bits in (2, 3, 4, 8)],
    *[("weight_only", {"bits": bits, "group_size": 24, "symmetric": False}) for bits in (2, 3, 4, 8)],
    ("weight_only", {"bits": 4, "symmetric": False}),
    ("nf4", {"block_size": 32, "double_quant": True}),
    ("nf4", {"block_size": 32, "double_quant": False}),
    ("nf4", {"block_size": 6, "double_quant": True}),
    ("fp8", {}),
    ("fp8", {"activations": "dynamic"}),
    ("fp8", {"activations": "dynamic", "share_flat": True}),
    ("int8", {}),
    ("int8", {"share_flat": True}),
    ("int8_static", {"input_scale": torch.tensor([0.013])}),
]
SHAPES = ((1, 1), (2, 3), (2,), (13,))


def named(value):
    return ",".join(f"{key}={entry}" for key, entry in value.items()) if isinstance(value, dict) else None


def made(scheme, settings, features, outputs, dtype, bias=True):
    torch.manual_seed(0)
    return KINDS[scheme, nn.Linear].from_float(nn.Linear(features, outputs, bias=bias).to(dtype), **settings)


def computed(layer, x):
    """What the layer gives by torch's operators, its integers exact."""
    with kernels.forced("reference"):
        return layer(x)


@pytest.fixture(scope="module")
def interpreter():
    """A process in which Triton interprets kernels, on tensors of the CPU: it is told so before it is imported."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        with mock.patch.dict(os.environ, TRITON_INTERPRET="1"):
            pool.submit(os.getpid).result()
        yield lambda function, *arguments: pool.submit(function, *arguments).result()


def compare_layer(scheme, settings, features, dtypes, shapes):
    for dtype in dtypes:
        for shape in shapes:
            layer = made(scheme, settings, features, 19, dtype, bias=len(shape) > 1)
            x = torch.randn(*shape, features).to(dtype)
            want, found = computed(layer, x), layer.fused_product(x, layer.bias)
            assert found.dtype == dtype
            assert found.shape == want.shape
            # The interpreter cuts numbers to bfloat16 where compiled kernels round them: weights, and the results.
            assert nearly(found, want, 3 if dtype == torch.bfloat16 else 1), (dtype, shape, found, want)


@needs_triton
@pytest.mark.parametrize(("scheme", "settings"), CASES, ids=named)
def test_a_kernel_gives_what_the_layer_gives(interpreter, scheme, settings):
    interpreter(compare_layer, scheme, settings, 96, (torch.float32,), SHAPES)
    interpreter(compare_layer, scheme, settings, 96, (torch.float16,), SHAPES[:1])
    if "activations" not in settings:  # what is cut to bfloat16 and then cast to eight bits may be a whole step off
        interpreter(compare_layer, scheme, settings, 96, (torch.bfloat16,), SHAPES[:1])


@needs_triton
@pytest.mark.parametrize(
    ("scheme", "settings"), [case for case in CASES if not {"group_size", "block_size"} & set(case[1])], ids=named
)
@pytest.mark.parametrize("features", [5, 97, 1100])
def test_rows_of_any_length_are_read_to_their_end(interpreter, scheme, settings, features):
    interpreter(compare_layer, scheme, settings, features, (torch.float32,), SHAPES[:2])


DECODED = [case for case in CASES if case[0] in ("weight_only", "nf4") or case == ("fp8", {})]


def single_weights(scheme, settings, dtypes, device="cpu"):
    """Tokens that are 1 in one place and 0 elsewhere: each gives a column of the weight, in which nothing is added."""
    for dtype in dtypes:
        layer = made(scheme, settings, 96, 19, dtype, bias=False).to(device)
        for tokens in torch.eye(96, dtype=dtype, device=device).split(16):
            places = tokens.argmax(1)
            assert torch.equal(layer.fused_product(tokens, None), layer.dequantized()[:, places].t())


@needs_triton
@pytest.mark.parametrize(("scheme", "settings"), DECODED, ids=named)
def test_a_weight_is_decoded_to_the_bit(interpreter, scheme, settings):
    interpreter(single_weights, scheme, settings, (torch.float32, torch.float16))


def odd_tokens():
    torch.manual_seed(0)
    x = torch.randn(4, 64)
    x[0, 3], x[1, 3], x[2], x[3] = torch.nan, torch.inf, 1e-42, 0
    layer = made("int8", {}, 64, 8, torch.float32)
    y = layer.fused_product(x, layer.bias)
    assert y[0].isnan().all()
    assert not torch.isfinite(y[1]).any()
    torch.testing.assert_close(y[2:], layer.bias.expand(2, 8))
    layer = made("fp8", {"activations": "dynamic"}, 64, 8, torch.float32)
    y = layer.fused_product(x, layer.bias)
    assert y[:2].isnan().all()
    torch.testing.assert_close(y[2:], layer.bias.expand(2, 8))


@needs_triton
def test_what_is_not_a_number_stays_so_and_the_tiniest_does_not_become_so(interpreter):
    interpreter(odd_tokens)


def every_float8():
    """Through a layer whose weight is the identity, at a scale of 1 in all: the cast of the activations alone."""
    numbers = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    numbers = numbers[numbers.isfinite()].sort().values
    between = torch.cat((numbers, (numbers[1:] + numbers[:-1]) / 2, numbers[1:] * 0.999, torch.tensor([1e-4, -3e-4])))
    x = torch.cat((between, torch.tensor([448.0]))).view(1, -1)
    layer = made("fp8", {"activations": "dynamic"}, x.numel(), x.numel(), torch.float32, bias=False)
    layer.weight = torch.eye(x.numel()).to(torch.float8_e4m3fn)
    layer.weight_scale = torch.ones(x.numel(), 1)
    assert torch.equal(layer.fused_product(x, None), x.to(torch.float8_e4m3fn).float())


@needs_triton
def test_activations_are_cast_to_float8_as_torch_casts(interpreter):
    interpreter(every_float8)


class Recorded:
    """A kernel that only writes down how it is started, and what is compiled for it."""

    def __init__(self):
        self.starts, self.direct = [], []

    def __getitem__(self, grid):
        def start(*arguments, **options):
            self.starts.append((grid, arguments, options))
            return _Compiled(self, grid)

        return start


class _Compiled:
    def __init__(self, kernel, grid):
        self.kernel, self.grid = kernel, grid

    def __getitem__(self, grid):
        assert grid == self.grid
        return lambda *arguments: self.kernel.direct.append((grid, arguments, {}))


def test_what_was_compiled_is_started_directly_for_the_same_sizes_and_aligned_tensors(monkeypatch):
    kernel = Recorded()
    monkeypatch.setattr(fused, "_kernel", lambda name: kernel)
    layer = made("weight_only", {"bits": 4, "group_size": 32}, 64, 20, torch.float32)
    room = torch.randn(3 * 64 + 1)
    one, three, shifted = room[:64].view(1, 64), room[:-1].view(3, 64), room[1:65].view(1, 64)
    for x in (one, one, three, one, three, shifted, shifted, one.view(1, 1, 64)):
        assert layer.fused_product(x, layer.bias).shape == (*x.shape[:-1], 20)
    layer.fused_product(one, None)
    assert [arguments[0].shape[0] for _, arguments, _ in kernel.starts] == [1, 3, 1, 1, 1]
    assert [grid for grid, _, _ in kernel.starts] == [(3, 1, 1)] * 5
    assert len(kernel.direct) == 4
    first, again = kernel.starts[0][1], kernel.direct[0][1]
    assert len(first) == len(again)
    assert all(a is b for a, b in zip(first[:5], again[:5], strict=True))
    assert first[6:] == again[6:]
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert other.product.made_of == layer.product.made_of
        assert other.product._compiled == {}


POINTERS = {
    torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.int8: "*i8", torch.int32: "*i32",
    torch.float8_e4m3fn: "*fp8e4nv",
}  # fmt: skip


@needs_triton
@pytest.mark.parametrize(("scheme", "settings"), CASES, ids=named)
@pytest.mark.parametrize("tokens", [1, 3])
def test_the_compiler_takes_each_kernel_for_a_gpu_that_is_not_there(scheme, settings, tokens, monkeypatch, tmp_path):
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    real, recorded = fused._kernel, Recorded()
    monkeypatch.setattr(fused, "_kernel", lambda name: recorded)
    layer = made(scheme, settings, 192, 20, torch.bfloat16)
    layer.fused_product(torch.ones(tokens, 192, dtype=torch.bfloat16), layer.bias)
    _, arguments, options = recorded.starts[0]
    kernel = real(layer.product.name)
    assert len(arguments) == len(kernel.params)
    signature, constants, aligned = {}, {}, {}
    for place, (parameter, value) in enumerate(zip(kernel.params, arguments, strict=True)):
        if parameter.is_constexpr or value is None:
            signature[parameter.name], constants[parameter.name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name], aligned[(place,)] = POINTERS[value.dtype], [["tt.divisibility", 16]]
        else:
            signature[parameter.name] = "i32"
    source = ASTSource(kernel, signature, constexprs=constants, attrs=aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    assert layer.product.name in compiled.asm["ptx"]
    assert compiled.asm["cubin"]
    assert compiled.metadata.shared < 48 * 1024


@pytest.mark.parametrize(("scheme", "settings"), CASES, ids=named)
def test_on_a_cpu_nothing_is_fused_and_no_layer_says_so(scheme, settings):
    layer = made(scheme, settings, 192, 20, torch.float32)
    assert fused.NAME not in layer.kernel
    for name in (None, fused.NAME):
        with kernels.forced(name):
            assert not layer.fuses(torch.ones(1, 192))


@pytest.mark.parametrize(("scheme", "settings"), CASES, ids=named)
def test_fake_tensors_of_a_gpu_are_left_to_operators_which_can_be_traced(scheme, settings):
    settings = {name: value for name, value in settings.items() if name != "input_scale"}
    linear = nn.Linear(192, 20, bias=False, device="meta")
    with FakeTensorMode():
        linear.weight = nn.Parameter(torch.empty(20, 192, device="cuda", dtype=torch.bfloat16))
        layer = KINDS[scheme, nn.Linear](linear, **settings)
        x = torch.empty(2, 1, 192, device="cuda", dtype=torch.bfloat16)
        assert not layer.fuses(x)
        assert layer.named("operators") == "operators"


def test_layouts_that_the_kernels_cannot_read_have_none():
    assert made("weight_only", {"bits": 4, "group_size": 3}, 6, 2, torch.float32).product is None
    assert made("weight_only", {"bits": 3, "group_size": 4}, 8, 2, torch.float32).product is None
    assert made("nf4", {"block_size": 7, "double_quant": True}, 14, 2, torch.float32).product is None
    assert made("nf4", {"block_size": 64, "double_quant": True}, 96, 2, torch.float32).product is None
    assert made("weight_only", {"bits": 8, "group_size": 3}, 6, 2, torch.float32).product is not None


def test_a_kernel_that_does_not_compile_or_is_wrong_does_not_work(monkeypatch):
    device = torch.device("cpu")
    monkeypatch.setattr(Product, "__call__", mock.Mock(side_effect=RuntimeError("no compiler")))
    assert not fused.works.__wrapped__("int8", (), device, torch.float32)

    def almost(self, x, *tensors, setting=()):
        y = torch.zeros(*x.shape[:-1], self.outputs)
        return y

    monkeypatch.setattr(Product, "__call__", almost)
    assert not fused.works.__wrapped__("int8", (), device, torch.float32)
    layer, x = fused.small_layer("int8", 19, 200, torch.float32)
    right = computed(layer, x)
    monkeypatch.setattr(Product, "__call__", lambda self, x, *tensors, setting=(): right[: x.shape[0]])
    assert fused.works.__wrapped__("int8", (), device, torch.float32)


GPU_SIZES = ((768, 768), (6144, 514), (192, 5))  # programs go once along a row, often, and less than once


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@needs_triton
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("scheme", "settings"), CASES, ids=named)
def test_on_a_gpu_kernel_and_layer_give_the_same(scheme, settings, dtype):
    group = settings.get("group_size") or settings.get("block_size")
    odd = ((5, 3), (97, 130)) if group is None else ((6 * group, 21),)
    for inputs, outputs in (*GPU_SIZES, *odd):
        if group is not None and inputs % group:
            continue
        layer = made(scheme, settings, inputs, outputs, dtype, bias=outputs % 2 == 0)
        x = torch.randn(17, inputs).to(dtype)
        wants = {tokens: computed(layer, x[:tokens]) for tokens in (1, 2, 3, 16)}
        layer = layer.cuda()
        assert layer.kernel.startswith("triton up to 16 tokens, then ")
        for tokens, want in wants.items():
            part = x[:tokens].cuda()
            assert layer.fuses(part)
            with torch.inference_mode():
                found = layer(part)
            assert nearly(found.cpu(), want), (inputs, outputs, tokens)
            if scheme in ("weight_only", "nf4"):  # cuBLAS may add parts of a sum in 16 bits
                assert nearly(found, computed(layer, part), 3), (inputs, outputs, tokens)
        assert not layer.fuses(x.cuda())
        assert not layer.fuses(x[:1].cuda().requires_grad_())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@needs_triton
@pytest.mark.parametrize(("scheme", "settings"), DECODED, ids=named)
def test_on_a_gpu_a_weight_is_decoded_to_the_bit(scheme, settings):
    single_weights(scheme, settings, DTYPES, "cuda")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@needs_triton
def test_on_a_gpu_unaligned_tokens_other_streams_and_new_weights_are_met():
    layer = made("weight_only", {"bits": 4, "group_size": 32}, 64, 40, torch.float32).cuda()
    other = made("weight_only", {"bits": 4, "group_size": 32}, 64, 40, torch.float32).cuda()
    room = torch.randn(65, device="cuda")
    with torch.inference_mode():
        for x in (room[:64].view(1, 64), room[1:].view(1, 64), room[:64].view(1, 64)):
            assert nearly(layer(x), computed(layer, x))
        other.weight_packed.bitwise_xor_(0x11111111)
        layer.load_state_dict(other.state_dict())
        assert nearly(layer(x), computed(other, x))
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            later = layer(x * 2)
        stream.synchronize()
        assert nearly(later, computed(other, x * 2))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = layer(x)
        x.mul_(3)
        graph.replay()
        torch.cuda.synchronize()
        assert nearly(captured, computed(other, x))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@needs_triton
def test_on_a_gpu_an_adapter_over_nf4_decodes_by_the_kernel_and_trains_by_the_operators():
    base = made("nf4", {"block_size": 32, "double_quant": True}, 64, 40, torch.float32)
    layer = NF4AdaptedLinear.over(base, LowRank(4, 1.0))
    layer.reset_adapter(torch.Generator().manual_seed(0))
    nn.init.normal_(layer.lora_B)
    layer = layer.cuda()
    assert isinstance(layer, FusedLinear)
    x = torch.randn(2, 64, device="cuda")
    with torch.no_grad():
        assert nearly(layer(x), computed(layer, x))
    layer(x.requires_grad_()).sum().backward()
    assert x.grad is not None
