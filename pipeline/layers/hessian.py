"""What GPTQ, SparseGPT and Wanda take from a layer's inputs: the Hessian X^T X, its inverse's factor, input norms.

For a layer y = W x the squared error of the output is quadratic in W, with the same Hessian for each row: the sum of
x x^T over the tokens (Frantar et al., 2023, arXiv:2210.17323). A convolution is a layer over its patches. Sums are kept
in float32, or in float64 where the model is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.errors import LeanfitError
from pipeline.layers.blockwise import Segment
from pipeline.layers.pulse import alike
from pipeline.layers.quantize import wide

ROWS = 4096
"""Tokens that are converted to float32 at once."""


class InputSums:
    """Sums over tokens of a layer's inputs: of x x^T [columns, columns] if `full`, else of x^2 [columns].

    `columns` are the inputs of a linear layer, or channel times kernel position of a convolution, all groups of it.
    """

    def __init__(self, columns: int, *, full: bool, name: str) -> None:
        self.columns, self.full, self.name = columns, full, name
        self.sums: Tensor | None = None
        self.tokens = 0

    def add(self, rows: Tensor) -> None:
        """Add float32 or float64 [tokens, columns]."""
        if self.sums is None:
            shape = (self.columns, self.columns) if self.full else (self.columns,)
            self.sums = torch.zeros(shape, dtype=rows.dtype, device=rows.device)
        if self.full:
            self.sums.addmm_(rows.t(), rows)
        else:
            self.sums += rows.square().sum(0)
        self.tokens += rows.shape[0]

    def mean(self) -> Tensor:
        """The mean over tokens.

        Raises:
            LeanfitError: NaN or infinity.
        """
        assert self.sums is not None
        mean = self.sums / self.tokens
        if not torch.isfinite(mean).all():
            raise LeanfitError(f"the calibration inputs of {self.name} hold NaN or infinity")
        return mean


def collect(segment: Segment, layers: Sequence[str], *, full: bool) -> dict[str, InputSums]:
    """{layer: sums of its inputs} after one pass of the calibration set through `segment`, of those that it reached.

    Layers that are given the same tensor (query, key and value; gate and up) share one `InputSums`. Pop each entry when
    its layer is done, so that its memory goes.
    """
    found: dict[str, InputSums] = {}
    last: list[tuple[Tensor, int, InputSums]] = []

    def observer(name: str) -> Callable[[Tensor], None]:
        layer = segment.root.get_submodule(name)

        def see(x: Tensor) -> None:
            shared = last[0][2] if isinstance(layer, nn.Linear) and last and _same(x, *last[0][:2]) else None
            sums = found.setdefault(name, shared or InputSums(_columns(layer), full=full, name=name))
            if sums is shared:
                return
            for rows in input_rows(layer, x):
                sums.add(rows)
            if isinstance(layer, nn.Linear):
                last[:] = [(x, _version(x), sums)]

        return see

    segment.observe({name: observer(name) for name in layers})
    return found


def _same(x: Tensor, seen: Tensor, version: int) -> bool:
    """Whether `x` is what was `seen` at that version: hooks are given a new view of the same memory each time."""
    alike = x.data_ptr() == seen.data_ptr() and x.shape == seen.shape and x.stride() == seen.stride()
    return alike and x.dtype == seen.dtype and version == _version(x)


def _version(x: Tensor) -> int:
    """How often the tensor was written to; made under inference mode, it is not counted and taken for constant."""
    return 0 if x.is_inference() else x._version


def _columns(layer: nn.Module) -> int:
    if isinstance(layer, nn.Conv2d):
        return layer.in_channels * math.prod(layer.kernel_size)
    return cast(nn.Linear, layer).in_features


def input_rows(layer: nn.Module, x: Tensor) -> Iterator[Tensor]:
    """The inputs of nn.Linear or nn.Conv2d as rows [tokens, columns], float32 at least, some at a time.

    A convolution's rows are its patches, in the order of its flattened kernels: weight.flatten(1) times a row is an
    output, before the bias (of a grouped one: group by group).
    """
    x = wide(x)
    if not isinstance(layer, nn.Conv2d):
        yield from torch.split(x.reshape(-1, x.shape[-1]), ROWS)
        return
    kernel, dilation = layer.kernel_size, layer.dilation
    zeros = layer.padding_mode == "zeros"
    padding: Any = layer.padding
    if isinstance(padding, str) or not zeros:  # which unfolding does not know
        x = F.pad(x, layer._reversed_padding_repeated_twice, mode="constant" if zeros else layer.padding_mode)
        padding = 0
    for image in alike(torch.split(x if x.ndim == 4 else x.unsqueeze(0), 1)):
        patches = F.unfold(image, kernel, dilation=dilation, padding=padding, stride=cast(Any, layer.stride))
        yield patches[0].t()


def inverse_factor(hessian: Tensor, damping: float) -> tuple[Tensor, float]:
    """Upper triangular U with U^T U = inverse of (`hessian` + damping * its mean diagonal), and the damping used.

    `hessian` [n, n], symmetric, float32 or float64. The damping is raised tenfold until the matrix is positive definite
    beyond rounding. An input that is always zero is independent of all others, and stays so.

    One Cholesky decomposition, H = R R^T with R upper triangular, and U = R^-1, instead of the usual three steps
    (decompose, invert, decompose): the same matrix with less rounding.
    """
    diagonal = hessian.diagonal()
    mean = diagonal.mean()
    mean = torch.where(mean > 0, mean, 1.0)
    # Small, so that a pruner finds nothing worth keeping there, and not 0 where there is no damping.
    filled = torch.where(diagonal == 0, 1e-6 * mean, diagonal)
    eps = torch.finfo(hessian.dtype).eps
    while True:
        damped = hessian.clone()
        damped.diagonal().copy_(filled + damping * mean)
        lower, info = torch.linalg.cholesky_ex(damped.flip(0, 1))
        pivots = lower.diagonal().square() / damped.diagonal().flip(0)
        if int(info) == 0 and float(pivots.min()) > eps:
            break
        damping = 10 * damping if damping else 1e-4
    identity = torch.eye(len(hessian), dtype=hessian.dtype, device=hessian.device)
    return torch.linalg.solve_triangular(lower, identity, upper=False).flip(0, 1), damping


def damping_facts(used: Mapping[str, float], asked: float) -> dict[str, Any]:
    """JSON for a link's detail: the largest damping of any layer, and {layer: damping} of those that needed more."""
    return {
        "damping_largest": max(used.values(), default=asked),
        "damping_raised": {name: damping for name, damping in used.items() if damping > asked},
    }
