"""What every device choice offers: whether this machine has it (found without torch), what it is called, and how much
memory it has."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Literal

from pipeline.sizes import Size, parse_size

Kind = Literal["cpu", "cuda", "mps", "tpu"]


@dataclass(frozen=True, kw_only=True)
class Device:
    """A `device` choice.

    memory: what one device has (`80GiB` or bytes), for a plan of a machine that is not here; None: what is found.
    """

    name: str
    memory: Size | None

    def memory_problems(self) -> list[str]:
        try:
            parse_size(self.memory if self.memory is not None else 1)
        except ValueError as error:
            return [f"device.memory={error}"]
        return []

    def capacity(self) -> int | None:
        """Bytes of memory that one device has: as `memory` says, else what is found here. May import torch."""
        return self.installed() if self.memory is None else parse_size(self.memory)

    def installed(self) -> int | None:
        """Bytes of memory of this machine's device; None where there is none, or it does not tell. May import torch."""
        return None

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
