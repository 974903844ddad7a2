"""Loss scaling where ranks hold shards: an overflow that one of them sees is one for all.

As torch's scaler (Micikevicius et al., 2018, arXiv:1710.03740) but for gradients in shards: torch's kernel takes either
these or whole tensors, and tensor parallelism leaves both. Whole gradients alone go torch's way, for ranks that hold
whole models have summed them already, infinities too.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.parallelism.shards import is_sharded, local


class Scaler(torch.amp.GradScaler):
    """Halves the scale and skips the step on all ranks alike, and counts such steps."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.skipped: Tensor | int = 0
        """Steps so far whose gradients overflowed, on the device."""

    def update(self, new_scale: float | Tensor | None = None) -> None:
        before = self._scale.clone() if self._scale is not None else None
        super().update(new_scale)
        if before is not None and self._scale is not None:
            self.skipped = self.skipped + (self._scale < before).long()

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "skipped": int(self.skipped)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.skipped = state_dict.get("skipped", 0)

    def _unscale_grads_(
        self, optimizer: torch.optim.Optimizer, inv_scale: Tensor, found_inf: Tensor, allow_fp16: bool
    ) -> dict[torch.device, Tensor]:
        weights = [weight for group in optimizer.param_groups for weight in group["params"]]
        gradients = [weight.grad for weight in weights if weight.grad is not None]
        if not is_sharded(gradients):
            return super()._unscale_grads_(optimizer, inv_scale, found_inf, allow_fp16)
        alike: dict[tuple[torch.device, torch.dtype], list[Tensor]] = defaultdict(list)
        for gradient in gradients:
            alike[gradient.device, gradient.dtype].append(local(gradient))
        for (device, _), some in alike.items():  # those of shards that lie in the host's memory are there
            found = torch.zeros_like(found_inf, device=device)
            torch._amp_foreach_non_finite_check_and_unscale_(some, found, inv_scale.to(device))
            found_inf += found.to(found_inf.device)
        dist.all_reduce(found_inf, op=dist.ReduceOp.MAX)
        return {found_inf.device: found_inf}
