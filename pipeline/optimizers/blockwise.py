"""Optimizer state in one byte a value: block-wise dynamic quantization and the AdamW that keeps its state so.

Dettmers et al., 2022, "8-bit Optimizers via Block-wise Quantization" (arXiv:2110.02861).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn import functional
from torch.utils._python_dispatch import _disable_current_modes

from pipeline.parallelism.shards import as_part_of, local

SLICE = 1 << 17
"""Elements of a tensor that are decoded at a time, so that float32 copies stay small beside the state."""
CODES = ("exp_avg", "exp_avg_sq")


def kept(make: Callable[..., Any]) -> Callable[..., Any]:
    """`make`, called once for each of its arguments; with real tensors also where it is first called in a trace."""

    def real(*arguments: Any) -> Any:
        with _disable_current_modes():
            return make(*arguments)

    return functools.cache(functools.wraps(make)(real))


@kept
def dynamic_map(signed: bool) -> Tensor:
    """The 256 values of dynamic tree quantization in [-1, 1] or [0, 1], rising.

    Decades 10^-6 ... 1; a decade has twice as many values as the one below it (1 ... 64 of a sign; 2 ... 128 without),
    the centres of equal parts of its span; besides 0 and 1.
    """
    values = [0.0, 1.0]
    for decade in range(7):
        parts = 2 ** (decade + (not signed))
        edges = torch.linspace(0.1, 1, parts + 1, dtype=torch.float64)
        centres = 10.0 ** (decade - 6) * (edges[:-1] + edges[1:]) / 2
        values += centres.tolist()
        if signed:
            values += (-centres).tolist()
    return torch.tensor(sorted(values), dtype=torch.float32)


@kept
def _tables(signed: bool, device: torch.device) -> tuple[Tensor, Tensor]:
    """(the map; for each of the 65536 bfloat16 numbers, as a signed integer + 32768, the nearest value's index).

    A look-up costs a twentieth of a binary search. Rounding to bfloat16 first moves a value by 0.4% at most, where
    neighbours in the map are 1.4% apart or more.
    """
    values = dynamic_map(signed)
    patterns = torch.arange(-32768, 32768, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).float()
    nearest = torch.bucketize(patterns.nan_to_num(0.0), (values[1:] + values[:-1]) / 2)
    return values.to(device), nearest.to(torch.uint8).to(device)


def encode(values: Tensor, block: int, signed: bool) -> tuple[Tensor, Tensor]:
    """(codes uint8 [..., n], scales float32 [..., ceil(n / block)]) of float32 `values` [..., n]."""
    count = values.shape[-1]
    blocks = functional.pad(values, (0, -count % block)).view(*values.shape[:-1], -(-count // block), block)
    scales = blocks.abs().amax(-1)
    unit = blocks / scales.clamp_min(torch.finfo(torch.float32).tiny).unsqueeze(-1)
    patterns = unit.bfloat16().view(torch.int16).flatten(-2)[..., :count].to(torch.int32).add_(32768)
    _, nearest = _tables(signed, values.device)
    return nearest.index_select(0, patterns.flatten()).view(values.shape), scales


def decode(codes: Tensor, scales: Tensor, block: int, signed: bool) -> Tensor:
    """float32 [..., n] of what `encode` gave; where a block held NaN or infinity, NaN."""
    values, _ = _tables(signed, codes.device)
    count = codes.shape[-1]
    found = values.index_select(0, codes.flatten().to(torch.int32)).view(codes.shape)
    blocks = functional.pad(found, (0, -count % block)).view(*codes.shape[:-1], -(-count // block), block)
    whole: Tensor = blocks.mul_(scales.unsqueeze(-1)).flatten(-2)
    return whole[..., :count]


class AdamWBlockwise(torch.optim.Optimizer):
    """AdamW with 2 + 8 / `block` bytes of state a parameter; vectors, and tensors of fewer than `min_elements`, have 8.

    No block goes from one row of a weight (its first dimension) to the next. So a rank that holds some of the rows
    computes what is computed of them on one device, and the state has the weight's rows too. Weights may have any float
    dtype; the step is computed in float32.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        betas: tuple[float, float],
        eps: float,
        block: int,
        min_elements: int,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.block, self.min_elements = block, min_elements

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    self._step(weight, group)
        return loss

    def _step(self, weight: Tensor, group: dict[str, Any]) -> None:
        state = self.state[weight]
        if not state:
            state.update(self._fresh(weight))
        state["step"] += 1
        held = local(weight.detach())
        whole = held.contiguous()
        rows, gradients = _by_rows(whole), _by_rows(local(weight.grad))  # type: ignore[arg-type]
        parts = {name: _by_rows(local(value)) for name, value in state.items() if name != "step"}
        stride = max(1, SLICE // max(1, rows.shape[1]))
        for start in range(0, len(rows), stride):
            some = slice(start, start + stride)
            self._update(
                rows[some],
                gradients[some].float(),
                {name: value[some] for name, value in parts.items()},
                state["step"],
                group,
            )
        if not held.is_contiguous():  # then `whole` is a copy
            held.copy_(whole)

    def _fresh(self, weight: Tensor) -> dict[str, Any]:
        small = weight.ndim < 2 or weight.numel() < self.min_elements
        here = local(weight.detach()).contiguous()
        state: dict[str, Any] = {"step": 0}
        for name in CODES:
            if small:
                state[name] = _as_held(torch.zeros_like(here, dtype=torch.float32), weight, weight.shape)
                continue
            zero = int(torch.searchsorted(dynamic_map(name == "exp_avg"), 0.0))
            codes = torch.full_like(here, zero, dtype=torch.uint8)
            state[name] = _as_held(codes, weight, weight.shape)
            blocks = -(-weight.shape[1:].numel() // self.block)
            scales = torch.zeros(len(here), blocks, device=here.device)
            state[f"{name}_scale"] = _as_held(scales, weight, torch.Size((len(weight), blocks)))
        return state

    def _update(
        self, weight: Tensor, gradient: Tensor, state: dict[str, Tensor], steps: int, group: dict[str, Any]
    ) -> None:
        """Some rows, in place: `weight` and the state's tensors [n, m], `gradient` float32 [n, m]."""
        beta1, beta2 = group["betas"]
        mean, square = (self._read(state, name) for name in CODES)
        mean.lerp_(gradient, 1 - beta1)
        square.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        root = (square / (1 - beta2**steps)).sqrt_().add_(group["eps"])
        wide = weight.float()
        wide.mul_(1 - group["lr"] * group["weight_decay"])
        wide.addcdiv_(mean, root, value=-group["lr"] / (1 - beta1**steps))
        weight.copy_(wide)
        for name, value in zip(CODES, (mean, square), strict=True):
            if state[name].dtype == torch.uint8:
                codes, scales = encode(value, self.block, name == "exp_avg")
                state[name].copy_(codes)
                state[f"{name}_scale"].copy_(scales)

    def _read(self, state: dict[str, Tensor], name: str) -> Tensor:
        codes = state[name]
        if codes.dtype != torch.uint8:
            return codes
        return decode(codes, state[f"{name}_scale"], self.block, name == "exp_avg")

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch does, but with the state's own dtypes: torch would turn codes and scales into the weights' dtype."""
        super().load_state_dict(state_dict)
        order = [index for group in state_dict["param_groups"] for index in group["params"]]
        weights = [weight for group in self.param_groups for weight in group["params"]]
        for index, weight in zip(order, weights, strict=True):
            for name, value in state_dict["state"].get(index, {}).items():
                if isinstance(value, Tensor):
                    self.state[weight][name] = value.detach().clone().to(weight.device)


def _by_rows(tensor: Tensor) -> Tensor:
    """[rows, all else], a view where `tensor` is contiguous; vectors have rows of one value."""
    if tensor.ndim == 0:
        return tensor.reshape(1, 1)
    return tensor.reshape(len(tensor), tensor.shape[1:].numel())


def _as_held(part: Tensor, weight: Tensor, shape: torch.Size) -> Tensor:
    """`part` as this rank's part of a tensor of that shape, which is spread by rows as `weight` is, or whole as it."""
    return as_part_of(part, weight, shape) if isinstance(weight, DTensor) else part
