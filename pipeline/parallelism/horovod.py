"""Data parallelism through Horovod: a copy of the model on each device, gradients averaged by its ring all-reduce.

Sergeev and Del Balso, 2018 (arXiv:1802.05799). Horovod is built by hand: docs/horovod.md.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from pipeline.parallelism.base import backend
from pipeline.parallelism.launched import Launched
from pipeline.registry import register

if TYPE_CHECKING:
    from lightning.pytorch.strategies import Strategy


@register("parallelism", "horovod")
@dataclass(frozen=True, kw_only=True)
class Horovod(Launched):
    """`gradient_compression`: what is sent between devices. `float16`: half the bytes, rounded."""

    gradient_compression: Literal["none", "float16"]

    def problems(self) -> list[str]:
        found = super().problems()
        if importlib.util.find_spec("horovod") is None:
            found.append(
                f"parallelism={self.name} needs Horovod, built as docs/horovod.md says; or use parallelism=ddp"
            )
        return found

    def strategy(self, device: str) -> Strategy:
        """Raises ConfigError for a device between whose copies nothing can be sent."""
        from pipeline.parallelism.ring import HorovodStrategy

        return HorovodStrategy(self.gradient_compression, process_group_backend=backend(self.name, device))
