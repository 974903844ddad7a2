"""Optimizer state in one byte a value: block-wise dynamic quantization and the AdamW that keeps its state so.

Dettmers et al., 2022, "8-bit Optimizers via Block-wise Quantization" (arXiv:2110.02861).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import _disable_current_modes

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
    """(codes uint8 [n], scales float32 [ceil(n / block)]) of float32 `values` [n]."""
    count = len(values)
    rows = functional.pad(values, (0, -count % block)).view(-1, block)
    scales = rows.abs().amax(1)
    unit = rows / scales.clamp_min(torch.finfo(torch.float32).tiny).unsqueeze(1)
    patterns = unit.bfloat16().view(torch.int16).flatten()[:count].to(torch.int32).add_(32768)
    _, nearest = _tables(signed, values.device)
    return nearest.index_select(0, patterns), scales


def decode(codes: Tensor, scales: Tensor, block: int, signed: bool) -> Tensor:
    """float32 [n] of what `encode` gave; where a block held NaN or infinity, NaN."""
    values, _ = _tables(signed, codes.device)
    count = len(codes)
    rows = functional.pad(values.index_select(0, codes.to(torch.int32)), (0, -count % block)).view(-1, block)
    return rows.mul_(scales.unsqueeze(1)).flatten()[:count]


class AdamWBlockwise(torch.optim.Optimizer):
    """AdamW with 2 + 8 / `block` bytes of state a parameter; tensors of fewer than `min_elements` have 8.

    Weights may have any float dtype; the step is computed in float32.
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
        self.stride = max(1, SLICE // block) * block

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
        whole = weight.detach().contiguous()
        flat, gradients = whole.view(-1), weight.grad.reshape(-1)  # type: ignore[union-attr]
        for start in range(0, len(flat), self.stride):
            part = slice(start, start + self.stride)
            self._update(flat[part], gradients[part].float(), state, part, group)
        if not weight.is_contiguous():  # then `whole` is a copy
            weight.copy_(whole)

    def _fresh(self, weight: Tensor) -> dict[str, Any]:
        count, small = weight.numel(), weight.numel() < self.min_elements
        state: dict[str, Any] = {"step": 0}
        for name in CODES:
            if small:
                state[name] = torch.zeros(count, dtype=torch.float32, device=weight.device)
            else:
                zero = int(torch.searchsorted(dynamic_map(name == "exp_avg"), 0.0))
                state[name] = torch.full((count,), zero, dtype=torch.uint8, device=weight.device)
                state[f"{name}_scale"] = torch.zeros(-(-count // self.block), device=weight.device)
        return state

    def _update(
        self, weight: Tensor, gradient: Tensor, state: dict[str, Any], part: slice, group: dict[str, Any]
    ) -> None:
        """One slice, in place: `weight` [n], `gradient` float32 [n], and the state's values there."""
        beta1, beta2 = group["betas"]
        mean, square = (self._read(state, name, part) for name in CODES)
        mean.lerp_(gradient, 1 - beta1)
        square.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        root = (square / (1 - beta2 ** state["step"])).sqrt_().add_(group["eps"])
        wide = weight.float()
        wide.mul_(1 - group["lr"] * group["weight_decay"])
        wide.addcdiv_(mean, root, value=-group["lr"] / (1 - beta1 ** state["step"]))
        weight.copy_(wide)
        for name, value in zip(CODES, (mean, square), strict=True):
            self._write(state, name, part, value)

    def _blocks(self, part: slice) -> slice:
        return slice(part.start // self.block, -(-part.stop // self.block))

    def _read(self, state: dict[str, Any], name: str, part: slice) -> Tensor:
        codes: Tensor = state[name][part]
        if codes.dtype != torch.uint8:
            return codes
        return decode(codes, state[f"{name}_scale"][self._blocks(part)], self.block, name == "exp_avg")

    def _write(self, state: dict[str, Any], name: str, part: slice, value: Tensor) -> None:
        if state[name].dtype == torch.uint8:
            codes, scales = encode(value, self.block, name == "exp_avg")
            state[name][part], state[f"{name}_scale"][self._blocks(part)] = codes, scales

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch does, but with the state's own dtypes: torch would turn codes and scales into the weights' dtype."""
        super().load_state_dict(state_dict)
        order = [index for group in state_dict["param_groups"] for index in group["params"]]
        weights = [weight for group in self.param_groups for weight in group["params"]]
        for index, weight in zip(order, weights, strict=True):
            for name, value in state_dict["state"].get(index, {}).items():
                if isinstance(value, Tensor):
                    self.state[weight][name] = value.detach().clone().to(weight.device)
