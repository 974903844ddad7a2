"""Muon and Adafactor over weights in shards: what a step asks of a whole matrix is put together for it.

torch's own step whole weights, and these do too where a weight is no DTensor. State has the names and the values that
it would have on one device, so a checkpoint of either goes on as the other.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from pipeline.optimizers.stepping import only
from pipeline.parallelism.shards import as_part_of, is_sharded, local, part_of, square_sums, total_norm


class Spread(torch.optim.Optimizer):
    """Goes before one of torch's: that steps all weights but those in shards, which `_step` steps, one at a time."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        weights = [(weight, group) for group in self.param_groups for weight in group["params"]]
        if not is_sharded(weight for weight, _ in weights):
            return super().step(closure)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for weight, group in weights:
            if isinstance(weight.grad, DTensor):
                self._step(weight, weight.grad, group)
            elif weight.grad is not None:
                with only(self, weight):
                    super().step()
        return loss

    def _step(self, weight: DTensor, gradient: DTensor, group: dict[str, Any]) -> None:
        raise NotImplementedError


class Muon(Spread, torch.optim.Muon):
    """Momentum stays in shards. The update is gathered, a matrix at a time, and made orthogonal on each rank."""

    def _step(self, weight: DTensor, gradient: DTensor, group: dict[str, Any]) -> None:
        state = self.state[weight]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(gradient)
        momentum: DTensor = state["momentum_buffer"].lerp_(gradient, 1 - group["momentum"])
        update = cast(DTensor, gradient.lerp(momentum, group["momentum"])) if group["nesterov"] else momentum
        local(weight).mul_(1 - group["lr"] * group["weight_decay"])
        local(weight).add_(part_of(_orthogonal(update.full_tensor(), group), weight))


def _orthogonal(update: Tensor, group: dict[str, Any]) -> Tensor:
    """What Muon adds to a weight for the whole `update`: its own step of a weight of zeros, without momentum."""
    weight = nn.Parameter(torch.zeros_like(update))
    weight.grad = update
    kept = ("lr", "ns_coefficients", "eps", "ns_steps", "adjust_lr_fn")
    settings = {name: group[name] for name in kept}
    torch.optim.Muon([weight], **settings, weight_decay=0.0, momentum=0.0, nesterov=False).step()  # type: ignore[no-untyped-call]
    return weight.detach()


class Adafactor(Spread, torch.optim.Adafactor):
    """A matrix's means of rows and columns are whole on each rank; those of single values, for vectors, in shards."""

    def _step(self, weight: DTensor, gradient: DTensor, group: dict[str, Any]) -> None:
        """As torch's, in its order; sums go over the ranks."""
        state = self.state[weight]
        if not state:
            state.update(_fresh(gradient))
        state["step"] += 1
        steps, (least, least_scale) = state["step"].item(), group["eps"]
        least = torch.finfo(weight.dtype).eps if least is None else least
        rate = min(float(group["lr"]), steps**-0.5) * max(least_scale, _root_mean_square(weight))
        local(weight).mul_(1 - group["lr"] * group["weight_decay"])
        variance = _variance(state, gradient, steps ** group["beta2_decay"], least)
        update = variance.clamp_(min=least * least).rsqrt_().mul_(local(gradient))
        large = max(1.0, _root_mean_square(as_part_of(update, weight)) / group["d"])
        local(weight).add_(update, alpha=-rate / large)


def _fresh(gradient: DTensor) -> dict[str, Any]:
    state: dict[str, Any] = {"step": torch.tensor(0.0)}
    if gradient.ndim < 2:
        return {**state, "variance": torch.zeros_like(gradient)}
    rows, columns = list(gradient.shape), list(gradient.shape)
    rows[-1] = columns[-2] = 1
    near = gradient.to_local()
    return {**state, "row_var": near.new_zeros(rows), "col_var": near.new_zeros(columns)}


def _variance(state: dict[str, Any], gradient: DTensor, weight: float, least: float) -> Tensor:
    """The running mean of squared gradients, this rank's part, after `gradient` has entered it with `weight`."""
    if gradient.ndim < 2:
        mean = local(state["variance"])
        return mean.lerp_(local(gradient).square(), weight).clone()
    rows: Tensor = state["row_var"].lerp_(square_sums(gradient, -1).div_(gradient.size(-1)), weight)
    columns: Tensor = state["col_var"].lerp_(square_sums(gradient, -2).div_(gradient.size(-2)), weight)
    # Not as a product of matrices: of a weight with one row, ranks without it have no part of `columns` either.
    estimate = part_of(rows, gradient) * part_of(columns, gradient)
    return estimate.div_(part_of(rows.mean(dim=-2, keepdim=True).clamp_(min=least), gradient))


def _root_mean_square(spread: DTensor) -> float:
    return float(total_norm([spread]) / spread.numel() ** 0.5)
