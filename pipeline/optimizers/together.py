"""Several optimizers as one: a single list of groups, one state and one step, as schedules and checkpoints expect."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from pipeline.precision.plugins import kernels


class Together(torch.optim.Optimizer):
    """Steps each of `optimizers` on its own parameter groups. Their groups and state live here."""

    def __init__(self, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        groups = [{**group, "of": i} for i, one in enumerate(optimizers) for group in one.param_groups]
        super().__init__(groups, {})
        self.optimizers = tuple(optimizers)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        device = self.param_groups[0]["params"][0].device.type
        with kernels(device):  # Muon multiplies in bfloat16, on a CPU that may have no such instructions as well
            for i, optimizer in enumerate(self.optimizers):
                optimizer.state = self.state
                optimizer.param_groups = [group for group in self.param_groups if group["of"] == i]
                optimizer.step()
        return loss
