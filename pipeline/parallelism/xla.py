"""`parallelism=xla`: data parallelism over TPU cores, refused for the reason that `pipeline.device.tpu` gives."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from pipeline.device.tpu import WHY
from pipeline.errors import ConfigError
from pipeline.parallelism.base import Parallelism
from pipeline.registry import register

if TYPE_CHECKING:
    from lightning.pytorch.strategies import Strategy


@register("parallelism", "xla")
@dataclass(frozen=True, kw_only=True)
class XLA(Parallelism):
    distributed: ClassVar[bool] = False

    def problems(self) -> list[str]:
        return [f"parallelism={self.name}: {WHY}; use parallelism=ddp or parallelism=fsdp with device=cuda"]

    def strategy(self, device: str) -> Strategy:
        raise ConfigError(self.problems())
