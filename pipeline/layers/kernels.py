"""int8 W8A8 products behind one adapter: which kernel a device has, whether it is exact, and how each is called.

One arithmetic, whatever the kernel. Activations: scale s = max|x| / 127.5 over a token, q = round(x / s) in
[-128, 127], the dynamic symmetric quantization of compressed-tensors (static: a given s for all tokens). Result:
(sum_k q_k w_k) * w_scale * s + bias, the sum in exact integers. Kernels differ only in the rounding of the final float
products.

- `fbgemm`: FBGEMM's int8 GEMM, fed integers at scale 1 and zero point 128. The fastest at every batch where the CPU has
  VNNI. Without it FBGEMM adds pairs of products in saturating 16 bits, which is not exact: the probe finds out.
- `fbgemm_split`: the same where there is no VNNI. max(q, 0) and max(-q, 0) go as two rows, at zero point 0: a pair of
  products is then at most 128 * (127 + 127) = 32512, which 16 bits hold. At batch 1 the weights are read once for both.
- `int_mm`: `torch._int_mm`, on CUDA with its limits on shapes (padded), and on CPUs without FBGEMM.
- `reference`: the integers carried in a float matrix product, in slices of 1024 so that each sum is below 2^24.
- `float`: (q s) times (w w_scale) in a float product, operation for operation what compressed-tensors computes, so that
  plain transformers gives the same logits bit for bit. Exact integers cannot: they differ from it in the seventh digit,
  which moves a few activations of the next layer over a rounding edge, by a whole step, about 1e-3 of an output each.

Up to `INTEGER_ROWS` tokens at once (decoding, where a layer waits for its weights) the integer kernels run. Above,
where weights are read once for many tokens, `float` does; but where integers are much faster (`fbgemm`, and `int_mm` on
CUDA) only up to `FLOAT_ROWS`.

Few tokens on a GPU are multiplied by the same arithmetic in one kernel where that runs (`fused.py`).

Weights alone in int8 (`weight_only_token`): the same product of integers makes one of floats, for one token.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from ctypes import c_float
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.layers.constants import constant

ACTIVATION_LEVELS = 127.5
SMALLEST = 1e-30
"""Peak below which a token counts as zero: keeps x / s finite."""
EXACT_SLICE = 1024
INTEGER_ROWS = 16
FLOAT_ROWS = 1024

NUDGE = 2**-22
"""Beyond what an inverse and a product with it, both rounded to float32, can be off."""

_forced: str | None = None


class Packed:
    """A kernel's own copy of a layer's weights. Rebuilt on demand: copied and pickled empty, never saved."""

    def __init__(self) -> None:
        self.value: Any = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Packed:
        return Packed()

    def __reduce__(self) -> tuple[type[Packed], tuple[()]]:
        return Packed, ()


@contextmanager
def forced(kernel: str | None) -> Iterator[None]:
    """Within the context every int8 product runs by `kernel`, and no fused one (`fused.py`) unless it is "triton".

    To compare kernels. None: the usual choice.
    """
    global _forced
    before, _forced = _forced, kernel
    try:
        yield
    finally:
        _forced = before


def forced_kernel() -> str | None:
    """The kernel that `forced` is entered with, which may be one of `fused.py` too. "float" concerns whatever computes
    as plain transformers does there."""
    return _forced


def choose(device: torch.device, dtype: torch.dtype, rows: int) -> str:
    """Name of the kernel that multiplies `rows` tokens of activations of `dtype` on `device`."""
    if _forced is not None:
        return _forced
    if torch.compiler.is_compiling():
        return "float"
    kernel = _integer_kernel(device) if dtype != torch.float64 else "reference"
    if rows <= INTEGER_ROWS:
        return kernel
    fast = kernel == "fbgemm" or (kernel == "int_mm" and device.type == "cuda")
    return kernel if fast and rows > FLOAT_ROWS else "float"


def is_cpu(device: torch.device) -> bool:
    """Whether what lies on `device` is computed by a CPU: a plan for a GPU has its tensors there too."""
    return device.type == "cpu"


def _integer_kernel(device: torch.device) -> str:
    if is_cpu(device):
        return _cpu_kernel()
    return "int_mm" if device.type == "cuda" and works("int_mm", device) else "reference"


@constant
def _cpu_kernel() -> str:
    device = torch.device("cpu")
    return next((name for name in ("fbgemm", "fbgemm_split", "int_mm") if works(name, device)), "reference")


@constant
def works(kernel: str, device: torch.device) -> bool:
    """Whether `kernel` runs here and is exact on the largest integers, alike signs and mixed ones."""
    signs = torch.tensor([1, -1], dtype=torch.int8).repeat(32)
    rows = torch.stack([signs.abs() * 127, signs * 127, signs.abs() * -128, signs.roll(1) * 64]).to(device)
    weight = torch.stack([signs.abs() * 127, signs * -127, signs.abs() * -127] + [signs * 127] * 13).to(device)
    ones = torch.ones(16, 1, device=device)
    try:
        found = _PRODUCTS[kernel](rows.float(), weight, ones, Packed())
    except (RuntimeError, AttributeError, NotImplementedError, AssertionError):
        return False
    return torch.equal(found.cpu(), (rows.cpu().long() @ weight.cpu().long().t()).float())


def int8_linear(
    x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, packed: Packed, share_flat: bool = False
) -> Tensor:
    """Linear layer in W8A8: x [..., in], weight int8 [out, in], weight_scale [out, 1], bias [out] -> [..., out].

    `share_flat`: an x of two dimensions takes one activation scale for all its rows, as compressed-tensors does.
    No gradient flows.
    """
    kernel = choose(x.device, x.dtype, x.numel() // x.shape[-1])
    if kernel in FBGEMM:
        if packed.value is None:
            packed.value = fbgemm_pack(weight, weight_scale)
        steps, sums = fbgemm_sums(x, kernel, packed.value, share_flat)
        return rescaled(x, steps, sums, bias)
    rows = _rows(x)
    step = _peaks(rows, share_flat and x.ndim == 2).div_(ACTIVATION_LEVELS)
    if kernel == "float":
        values = integers_of(rows / step).mul_(step)
        wide = weight.to(rows.dtype) * weight_scale.to(rows.dtype)
        y = F.linear(values, wide, None if bias is None else bias.to(rows.dtype))
    else:
        sums = _PRODUCTS[kernel](rows / step, weight, weight_scale, packed)
        y = sums.mul_(step) if bias is None else torch.addcmul(bias.to(sums.dtype), sums, step)
    return y.view(*x.shape[:-1], len(weight)).to(x.dtype)


def int8_linear_static(
    x: Tensor, weight: Tensor, weight_scale: Tensor, input_scale: Tensor, bias: Tensor | None, packed: Packed
) -> Tensor:
    """Linear layer in W8A8 with one activation scale for all inputs, `input_scale` [1]; the rest as `int8_linear`."""
    kernel = choose(x.device, x.dtype, x.numel() // x.shape[-1])
    rows = _rows(x)
    step = input_scale.to(rows.dtype)
    steps_of = rows / step
    if kernel in FBGEMM:
        if packed.value is None:
            packed.value = fbgemm_pack(weight, weight_scale.double() * input_scale.double())
        if kernel == "fbgemm":
            y = _fbgemm(steps_of, 128, packed.value)
        else:
            halves = _fbgemm(torch.minimum(torch.stack((steps_of, -steps_of)), _signed_limits(3)), 0, packed.value)
            y = halves[0].sub_(halves[1])
        y = y if bias is None else y.add_(bias)
    elif kernel == "float":
        y = F.linear(
            integers_of(steps_of).mul_(step),
            weight.to(rows.dtype) * weight_scale.to(rows.dtype),
            None if bias is None else bias.to(rows.dtype),
        )
    else:
        y = _PRODUCTS[kernel](steps_of, weight, weight_scale, packed).mul_(step)
        y = y if bias is None else y.add_(bias)
    return y.view(*x.shape[:-1], len(weight)).to(x.dtype)


def fbgemm_sums(x: Tensor, kernel: str, packed: Any, share_flat: bool) -> tuple[Tensor | None, Tensor]:
    """(steps, sums times weight scales): what `rescaled` makes the layer's output of.

    `fbgemm`: [tokens or 1, 1] and [tokens, out]; but for one token None and [..., out], the step multiplied in.
    `fbgemm_split`: a first dimension of 2 before these, the positive part and the negative one with its step below
    zero; but for one token [1, 2] and [2, out].
    """
    if x.numel() == x.shape[-1]:
        return _one_token_sums(x, kernel, packed)
    rows = _rows(x)
    peaks = _peaks(rows, share_flat and x.ndim == 2)
    if kernel == "fbgemm":
        steps = peaks.div_(ACTIVATION_LEVELS)
        return steps, _fbgemm(rows / steps, 128, packed)
    steps = peaks / _signed_levels(3)
    return steps, _fbgemm(torch.minimum(rows / steps, _signed_limits(3)), 0, packed)


def _one_token_sums(x: Tensor, kernel: str, packed: Any) -> tuple[Tensor | None, Tensor]:
    """As few operators as there can be: a product leaves the caches cold, and each costs about 5 microseconds then."""
    if x.dtype != torch.float32 or x.requires_grad:
        x = x.detach().float()
    if kernel == "fbgemm":
        return None, token_product(x if x.ndim > 1 else x.view(1, -1), packed)
    row = x if x.ndim == 2 else x.reshape(1, -1)
    steps = row.abs().max() / _signed_levels(2)
    # A token of zeros is 0 / 0 here: fmin makes a limit of it, which a step of zero then takes back.
    return steps.view(1, 2), _fbgemm(torch.fmin(row / steps, _signed_limits(2)), 0, packed)


def is_fast_token(x: Tensor, features: int) -> bool:
    """Whether `token_product` can take x as it is. Asked at every layer of a token, so not by way of `choose`."""
    return (
        x.is_cpu
        and x.numel() == features
        and x.dtype is torch.float32
        and x.ndim > 1
        and not x.requires_grad
        and _forced is None
        and _cpu_kernel() == "fbgemm"
    )


def token_product(x: Tensor, packed: Any) -> Tensor:
    """One float32 token x [1, ..., in] times `packed` weights, the bias left out: [1, ..., out] (`fbgemm`)."""
    return _fbgemm(x, 128, packed, token_step(peak(x)))


def peak(x: Tensor) -> float:
    """Largest magnitude in x; not a number where x has one that is not."""
    low, high = torch.aminmax(x)
    return max(high.item(), -low.item())


def token_step(peak: float) -> float:
    """The step for FBGEMM to quantize a float32 token by, so that its integers are those of quotients.

    FBGEMM multiplies by the step's inverse. That can go the other way only for inputs within 1e-7 of themselves of an
    edge between two integers. Most are nowhere near; but the peak is half-way between two, and a quotient says to which
    of them it goes. The step is off by so little that the product agrees.
    """
    peak = max(peak, SMALLEST)
    step = c_float(peak / ACTIVATION_LEVELS).value
    return step * (1 - NUDGE) if c_float(peak / step).value >= ACTIVATION_LEVELS else step * (1 + NUDGE)


def reads_integers(x: Tensor, scales: Tensor) -> bool:
    """Whether `weight_only_token` can take x [..., in] at weights with `scales` [out, groups]."""
    return (
        x.numel() == x.shape[-1]
        and x.dtype == scales.dtype == torch.float32
        and scales.shape[1] == 1
        and not (x.requires_grad and torch.is_grad_enabled())
        and choose(x.device, x.dtype, 1) in FBGEMM
    )


def weight_only_token(x: Tensor, bias: Tensor | None, packed: Any) -> Tensor:
    """float32 token x [..., in] times `packed` int8 weights [out, in] with their scales, plus bias: [..., out].

    x = step (d1 + d2 / base + d3 / base^2), digits of int8, as floats are split into slices whose products sum exactly
    (Ozaki et al., 2012, "Error-free transformations of matrix multiplication by using fast routines of matrix
    multiplication and its applications", Numerical Algorithms 59). The digits are three rows of one product, which
    reads the weights once, as int8. What is cut off of an input is at most 2^-24 of the token's peak (`fbgemm`), or
    2^-20 (`fbgemm_split`, where digits of 7 bits at zero point 64 keep a pair of products within 16 bits).
    """
    zero_point, levels, base, places = _digits(choose(x.device, x.dtype, 1))
    row = x.detach().reshape(1, -1)
    step = row.abs().max() / levels  # zeros are 0 / 0 below: some integers, which a step of zero then takes back
    rest = row / step
    first = rest.round()
    rest = (rest - first).mul_(base)
    second = rest.round()
    sums = _fbgemm(torch.cat((first, second, (rest - second).mul_(base))), zero_point, packed)
    steps = places * step
    y = torch.mm(steps, sums) if bias is None else torch.addmm(bias, steps, sums)
    return y.view(*x.shape[:-1], -1)


def rescaled(x: Tensor, steps: Tensor | None, sums: Tensor, bias: Tensor | None) -> Tensor:
    """The layer's output, of the shape and dtype that `x` asks for, from what `fbgemm_sums` returned."""
    if bias is not None and bias.dtype != torch.float32:
        bias = bias.float()
    if steps is None:  # one token, and its sums have its shape
        y = sums if bias is None else sums + bias
        if x.ndim == 1:
            y = y.view(-1)
        return y if x.dtype == torch.float32 else y.to(x.dtype)
    if steps.shape[-1] == 2:  # one token: the two signs and the bias are one small product
        y = torch.mm(steps, sums) if bias is None else torch.addmm(bias, steps, sums)
    else:
        if sums.ndim == 3:
            steps, sums = steps[0], sums[0] - sums[1]
        y = sums * steps if bias is None else torch.addcmul(bias, sums, steps)
    if x.ndim != 2:
        y = y.view(*x.shape[:-1], y.shape[-1])
    return y if x.dtype == torch.float32 else y.to(x.dtype)


def _rows(x: Tensor) -> Tensor:
    """x as [tokens, in], in float32 or float64, outside of autograd."""
    rows = x.detach().reshape(-1, x.shape[-1])
    return rows if rows.dtype in (torch.float32, torch.float64) else rows.float()


def _peaks(rows: Tensor, shared: bool) -> Tensor:
    """Largest magnitude of each token, or of all together: [tokens or 1, 1]."""
    peaks = rows.abs().amax().view(1, 1) if shared and len(rows) else rows.abs().amax(-1, keepdim=True)
    return peaks.clamp_min_(SMALLEST)


@constant
def _signed_levels(dimensions: int) -> Tensor:
    """Levels of the two signs, along the first of `dimensions`."""
    with torch.inference_mode(False), torch.device("cpu"):
        levels = torch.tensor([ACTIVATION_LEVELS, -ACTIVATION_LEVELS], dtype=torch.float32)
        return levels.view(-1, *[1] * (dimensions - 1))


@constant
def _signed_limits(dimensions: int) -> Tensor:
    """The largest integers of the two signs, along the first of `dimensions`."""
    with torch.inference_mode(False), torch.device("cpu"):
        return torch.tensor([127.0, 128.0], dtype=torch.float32).view(-1, *[1] * (dimensions - 1))


@constant
def _digits(kernel: str) -> tuple[int, Tensor, Tensor, Tensor]:
    """Of a kernel's digits: their zero point, the largest, how many of a digit's steps the one before has, and their
    places' worth [1, 3]."""
    zero_point = 128 if kernel == "fbgemm" else 64
    largest = zero_point - 1
    base = 2.0 * largest  # what rounding leaves, half a step at most, is all levels of the next digit
    with torch.inference_mode(False), torch.device("cpu"):
        places = torch.tensor([[1.0, 1 / base, 1 / base**2]])
        return zero_point, torch.tensor(float(largest)), torch.tensor(base), places


def _fbgemm(rows: Tensor, zero_point: int, packed: Any, step: float = 1.0) -> Tensor:
    """FBGEMM rounds `rows` / `step` to integers itself (half to even), and multiplies each sum by the step and by its
    row's weight scale.

    torch asks each argument for `__torch_function__`, which an object of TorchScript, as `packed` is, answers with a
    C++ exception: 10 microseconds, 30 where the caches are cold, of the 75 that a token's product takes. It does not
    ask while such functions are disabled. Nor does `_op` look whether an argument is a stand-in of torch.export's.
    """
    with torch._C.DisableTorchFunctionSubclass():
        product: Tensor = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32.default._op(
            rows, step, zero_point, packed
        )
    return product


def fbgemm_pack(weight: Tensor, weight_scale: Tensor) -> Any:
    """FBGEMM's own form of int8 [out, in] and its scales [out, 1]."""
    if torch.backends.quantized.engine not in ("x86", "fbgemm"):
        raise RuntimeError("FBGEMM is not this build's quantized engine")
    with warnings.catch_warnings():
        # Quantized tensors are deprecated; one is made only to hand FBGEMM its weights, and `works` guards the day
        # they are gone.
        warnings.simplefilter("ignore")
        zeros = torch.zeros(weight.shape[0], dtype=torch.int64)
        tensor = torch._make_per_channel_quantized_tensor(weight.contiguous(), weight_scale.double().view(-1), zeros, 0)
        return torch.ops.quantized.linear_prepack(tensor, None)


def _fbgemm_product(rows: Tensor, weight: Tensor, weight_scale: Tensor, packed: Packed) -> Tensor:
    return _fbgemm(rows, 128, fbgemm_pack(weight, weight_scale))


def _split_product(rows: Tensor, weight: Tensor, weight_scale: Tensor, packed: Packed) -> Tensor:
    signed = torch.minimum(torch.stack((rows, -rows)), _signed_limits(3))
    halves = _fbgemm(signed, 0, fbgemm_pack(weight, weight_scale))
    return halves[0] - halves[1]


def integers_of(rows: Tensor) -> Tensor:
    """Activations over their step -> integers in [-128, 127], still in float."""
    return rows.round().clamp_(-128, 127)


def _int_mm_product(rows: Tensor, weight: Tensor, weight_scale: Tensor, packed: Packed) -> Tensor:
    integers = integers_of(rows).to(torch.int8)
    if rows.device.type == "cuda":
        tokens, features, outputs = rows.shape[0], rows.shape[1], weight.shape[0]
        # cuBLAS wants more than 16 rows, and multiples of 8 for the other two.
        integers = F.pad(integers, (0, -features % 8, 0, max(0, 17 - tokens)))
        weight = F.pad(weight, (0, -features % 8, 0, -outputs % 8))
        sums = torch._int_mm(integers, weight.t())[:tokens, :outputs]
    else:
        sums = torch._int_mm(integers, weight.t())  # the transposed view: a copy is slower
    return sums.to(rows.dtype) * weight_scale.to(rows.dtype).view(1, -1)


def _reference_product(rows: Tensor, weight: Tensor, weight_scale: Tensor, packed: Packed) -> Tensor:
    integers = integers_of(rows)
    sums = torch.zeros(rows.shape[0], weight.shape[0], dtype=rows.dtype, device=rows.device)
    for start in range(0, rows.shape[1], EXACT_SLICE):
        part = slice(start, start + EXACT_SLICE)
        sums += integers[:, part] @ weight[:, part].to(rows.dtype).t()
    return sums * weight_scale.to(rows.dtype).view(1, -1)


_PRODUCTS: dict[str, Callable[[Tensor, Tensor, Tensor, Packed], Tensor]] = {
    "fbgemm": _fbgemm_product,
    "fbgemm_split": _split_product,
    "int_mm": _int_mm_product,
    "reference": _reference_product,
}
FBGEMM = ("fbgemm", "fbgemm_split")
KERNELS = (*_PRODUCTS, "float")
