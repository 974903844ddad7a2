"""AdamW (Loshchilov & Hutter, 2019, arXiv:1711.05101): Adam whose weight decay stands apart from the gradient."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from annotated_types import Ge, Gt, Lt

from pipeline.errors import ConfigError
from pipeline.optimizers.base import Optimizer, decay_groups
from pipeline.registry import register

if TYPE_CHECKING:
    import torch
    from torch import nn

FUSED_DEVICES = ("cpu", "cuda", "mps")
Beta = Annotated[float, Ge(0), Lt(1)]


@register("optimizer", "adamw")
@dataclass(frozen=True, kw_only=True)
class AdamW(Optimizer):
    """`betas`: decay of the running means of the gradient and of its square. `eps`: added to the root of the latter.

    `fused` null: one kernel for the whole step where the weights' device and dtype have it, else a plain loop; true
    or false: exactly that. The `foreach` kind is never used: it needs another copy of the gradients.
    """

    betas: tuple[Beta, Beta]
    eps: Annotated[float, Gt(0)]
    fused: bool | None

    def build(self, parameters: Iterable[nn.Parameter], lr: float) -> torch.optim.AdamW:
        """Raises ConfigError where `fused` is demanded and cannot be had."""
        import torch

        groups = decay_groups(parameters, self.weight_decay)
        possible = all(fusible(weight) for group in groups for weight in group["params"])
        if self.fused and not possible:
            raise ConfigError(
                f"optimizer.fused=true: these weights have no fused kernel, which takes floats on "
                f"{', '.join(FUSED_DEVICES)}; use optimizer.fused=null"
            )
        fused = possible if self.fused is None else self.fused
        return torch.optim.AdamW(groups, lr=lr, betas=self.betas, eps=self.eps, fused=fused, foreach=False)


def fusible(weight: torch.Tensor) -> bool:
    """Whether torch's fused AdamW steps such a weight."""
    return weight.is_floating_point() and weight.device.type in FUSED_DEVICES
