"""AdamW (Loshchilov & Hutter, 2019, arXiv:1711.05101): Adam whose weight decay stands apart from the gradient."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

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

    `implementation`: `fused` is one kernel for the whole step; `foreach` takes all weights at once and holds another
    copy of the gradients for a moment; `plain` goes from weight to weight. `auto`: fused where the weights' device and
    dtype have it, plain elsewhere.
    """

    steps_apart: ClassVar[Literal["weights", "rows", "parts", "values"]] = "values"

    betas: tuple[Beta, Beta]
    eps: Annotated[float, Gt(0)]
    implementation: Literal["auto", "fused", "foreach", "plain"]

    def build(self, model: nn.Module, lr: float) -> torch.optim.AdamW:
        """Raises ConfigError where `fused` is demanded and cannot be had."""
        import torch

        groups = decay_groups(model.parameters(), self.weight_decay)
        weights = [weight for group in groups for weight in group["params"]]
        # One kernel for all takes weights that are spread over devices alike (tensor parallelism leaves some whole).
        alike = len({getattr(weight, "device_mesh", None) for weight in weights}) == 1
        possible = alike and all(fusible(weight) for weight in weights)
        if self.implementation == "fused" and not possible:
            raise ConfigError(
                f"optimizer.implementation=fused: these weights have no fused kernel, which takes floats on "
                f"{', '.join(FUSED_DEVICES)}, all of them split over devices or none; use optimizer.implementation=auto"
            )
        fused = possible if self.implementation == "auto" else self.implementation == "fused"
        foreach = self.implementation == "foreach"
        if foreach and not alike:
            raise ConfigError(
                "optimizer.implementation=foreach: some weights are split over devices and some are not; "
                "use optimizer.implementation=auto"
            )
        return torch.optim.AdamW(groups, lr=lr, betas=self.betas, eps=self.eps, fused=fused, foreach=foreach)


def fusible(weight: torch.Tensor) -> bool:
    """Whether torch's fused AdamW steps such a weight."""
    return weight.is_floating_point() and weight.device.type in FUSED_DEVICES
