"""Few tokens times weights of 2 to 8 bits in groups on a CPU, read as packed: FBGEMM's embedding bags.

An output is a sum over groups: scale times the sum of inputs times integers. The inner sums are those of an embedding
bag in which inputs are rows (of an input's integers for all outputs), weighted by the input; a group is a bag. FBGEMM
has bags for rows of 2, 4 and 8 bits, made for tables of recommenders (Khudia et al., 2021, arXiv:2101.05615; Guan et
al., 2019, arXiv:1911.02079). Each row's own scale and bias are 1 and -2^(bits-1) here, so that they sum the integers as
they are. The sums are of float32, as those of the product by the dequantized weight, in another order and a few times
as inexact: what is summed is x * (q + 2^(bits-1)), and then taken off again.

The kernels take one bag after another: so many tokens take so many times as long, and beyond `TOKENS` a dequantized
weight is no slower. Rows of 2 and 4 bits are summed by one thread. In 16 bits only one token alone is taken: its sums
are more exact than those of a weight rounded to 16 bits, and several are to be as in plain transformers.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pipeline.layers import kernels
from pipeline.layers.constants import constant
from pipeline.layers.packing import pack_unsigned, unpack_unsigned

TOKENS = {torch.float32: 8, torch.bfloat16: 1, torch.float16: 1}
"""How many are taken at most, by their dtype, which is that of the scales."""
KERNELS = {width: f"embedding_bag_{name}_rowwise_offsets" for width, name in ((2, "2bit"), (4, "4bit"), (8, "byte"))}
"""By the bits that an integer takes in a row."""


class Packed(NamedTuple):
    """A weight [out, in] as the kernels read it, `width` bits an integer.

    `rows`: uint8 [in, bytes], an input's integers for all outputs, then what they are scaled by and begin at.
    `scales`: float32 [groups, 1, out]. `zeros`: scale times zero point, [groups, out]; None on a symmetric grid.
    """

    width: int
    rows: Tensor
    scales: Tensor
    zeros: Tensor | None


def width_of(bits: int) -> int:
    """Bits that an integer of `bits` takes in the kernel's rows."""
    return next(width for width in KERNELS if bits <= width)


def reads(x: Tensor, bits: int, scales: Tensor) -> bool:
    """Whether `product` can take x [..., in] at weights of `bits` with `scales` [out, groups]."""
    return (
        x.dtype == scales.dtype
        and 0 < x.numel() <= TOKENS.get(x.dtype, 0) * x.shape[-1]
        and not (x.requires_grad and torch.is_grad_enabled())
        and kernels.choose(x.device, torch.float32, 1) in kernels.FBGEMM
        and works(width_of(bits))
    )


def pack(integers: Tensor, bits: int, scale: Tensor, zero_point: Tensor | None) -> Packed:
    """int8 [out, in] of `bits`, scales and int8 zero points [out, groups] -> what the kernels read."""
    width, least = width_of(bits), -(1 << (bits - 1))
    unsigned = integers.t().contiguous().view(torch.uint8) - least  # bytes wrap around
    data = pack_unsigned(unsigned, width).view(torch.uint8)  # of inputs
    ends = _ends(width, least)
    rows = data.new_empty(len(data), data.shape[1] + len(ends))
    rows[:, : data.shape[1]] = data
    rows[:, data.shape[1] :] = ends
    scales = scale.t().float().contiguous()
    return Packed(width, rows, scales.unsqueeze(1), None if zero_point is None else zero_point.t() * scales)


def unpack(packed: Packed, begin: int, end: int) -> Tensor:
    """Outputs `begin` to `end` of what was packed, each integer plus 2^(bits-1): uint8 [end - begin, in]."""
    each = 32 // packed.width
    first, last = begin // each, -(-end // each)
    words = packed.rows[:, 4 * first : 4 * last].contiguous().view(torch.int32)
    unsigned = unpack_unsigned(words, packed.width, each * (last - first))
    return unsigned[:, begin - each * first : end - each * first].t().contiguous()


def product(x: Tensor, bias: Tensor | None, packed: Packed) -> Tensor:
    """x [..., in] times the weight of `packed`, plus bias [out], summed in float32: [..., out] in the dtype of x."""
    groups, _, outputs = packed.scales.shape
    inputs = x.shape[-1]
    tokens, size = x.numel() // inputs, inputs // groups
    # All tokens of a group one after another: what is read of its rows is still at hand for the next.
    weights = x.detach().float().reshape(tokens, groups, size).transpose(0, 1)
    sums = _sums(packed, weights.flatten().contiguous(), *_bags(inputs, size, tokens)).view(groups, tokens, -1)
    if sums.shape[-1] > outputs:  # the integers of a row fill whole words
        sums = sums[..., :outputs]
    y = sums.mul_(packed.scales).sum(0)
    if packed.zeros is not None:
        y.addmm_(weights.sum(-1).t(), packed.zeros, alpha=-1)
    return (y if bias is None else y.add_(bias)).view(*x.shape[:-1], outputs).to(x.dtype)


def _sums(packed: Packed, weights: Tensor, places: Tensor, begins: Tensor) -> Tensor:
    """Sums of rows at `places`, each times its weight, from each of `begins` to the next: float32 [bags, outputs]."""
    kernel = getattr(torch.ops.quantized, KERNELS[packed.width])
    found: Tensor = kernel(packed.rows, places, begins, False, 0, False, weights, None, True)
    return found


@constant
def _bags(inputs: int, size: int, tokens: int) -> tuple[Tensor, Tensor]:
    """Where the rows of each bag are, and where bags begin: int32 [tokens * inputs], [tokens * groups + 1]."""
    with torch.inference_mode(False), torch.device("cpu"):
        places = torch.arange(inputs, dtype=torch.int32).view(-1, 1, size).expand(-1, tokens, -1)
        return places.flatten().contiguous(), torch.arange(0, tokens * inputs + 1, size, dtype=torch.int32)


@constant
def _ends(width: int, least: int) -> Tensor:
    """The bytes of a row's scale and bias."""
    with torch.inference_mode(False), torch.device("cpu"):
        kind = torch.float32 if width == 8 else torch.float16
        return torch.tensor([1, least], dtype=kind).view(torch.uint8)


@constant
def works(width: int) -> bool:
    """Whether the kernel for rows of such integers is here and right: for one token and for several, some of whose
    outputs are padding."""
    with torch.inference_mode(False), torch.device("cpu"):
        integers = (torch.arange(5 * 24) % (1 << width)).view(5, 24).sub(1 << (width - 1)).to(torch.int8)
        x = torch.arange(3 * 24, dtype=torch.float32).mul(1.3).cos().view(3, 24)
        ones = torch.ones(5, 3)
        try:
            packed = pack(integers, width, ones, None)
            found = torch.cat([product(x[:1], None, packed), product(x, None, packed)])
        except (RuntimeError, AttributeError, NotImplementedError):
            return False
        want = x.double() @ integers.t().double()
        return torch.allclose(found.double(), torch.cat([want[:1], want]), atol=1e-3)
