"""What every parallelism choice offers: how many devices, and the Lightning strategy on a rank."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

from annotated_types import Ge

if TYPE_CHECKING:
    from lightning.pytorch.strategies import Strategy


@dataclass(frozen=True, kw_only=True)
class Parallelism:
    """A `parallelism` choice."""

    distributed: ClassVar[bool]
    """Whether a fit runs in workers of its own, started by torchrun."""
    name: str
    devices: Annotated[int, Ge(1)]
    nodes: Annotated[int, Ge(1)]

    def problems(self) -> list[str]:
        """What is wrong with these settings that types and ranges cannot say. Must not import torch."""
        return []

    @abstractmethod
    def strategy(self, device: str) -> Strategy:
        """The Lightning strategy, built on the rank that uses it."""
