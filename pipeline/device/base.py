"""What every device choice offers: whether this machine has it (found without torch), and what it is called."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Literal

Kind = Literal["cpu", "cuda", "mps", "tpu"]


@dataclass(frozen=True, kw_only=True)
class Device:
    """A `device` choice."""

    name: str

    @abstractmethod
    def kind(self) -> Kind:
        """Which accelerator runs. Must not import torch."""

    @abstractmethod
    def problems(self, devices: int) -> list[str]:
        """Why this machine cannot give `devices` of them. Must not import torch."""

    def reason(self) -> str | None:
        """Why this device, in one line, where it was not named but chosen. Must not import torch."""
        return None

    @abstractmethod
    def description(self) -> str:
        """The device's own name ('AMD EPYC 7763, 2 cores', 'NVIDIA H100'); may import torch."""
