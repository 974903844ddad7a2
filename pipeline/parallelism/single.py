"""One process, one device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from pipeline.parallelism.base import Parallelism
from pipeline.registry import register

if TYPE_CHECKING:
    from lightning.pytorch.strategies import Strategy


@register("parallelism", "single")
@dataclass(frozen=True, kw_only=True)
class Single(Parallelism):
    """No communication. More than one device or node is a problem, not a wish to be ignored."""

    distributed: ClassVar[bool] = False

    def problems(self) -> list[str]:
        return [
            f"parallelism.{key}={value}: parallelism=single uses one; use parallelism=ddp, or parallelism.{key}=1"
            for key, value in (("devices", self.devices), ("nodes", self.nodes))
            if value != 1
        ]

    def strategy(self, device: str) -> Strategy:
        from lightning.pytorch.strategies import SingleDeviceStrategy

        return SingleDeviceStrategy(device="cuda:0" if device == "cuda" else device)
