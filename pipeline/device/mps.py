"""`device=mps`: the GPU of Apple silicon."""

from __future__ import annotations

import platform
from dataclasses import dataclass

from pipeline.device.base import Device, Kind
from pipeline.registry import register


@register("device", "mps")
@dataclass(frozen=True, kw_only=True)
class MPS(Device):
    def kind(self) -> Kind:
        return "mps"

    def problems(self, devices: int) -> list[str]:
        if not apple_gpu():
            return [f"device={self.name}: no Apple GPU found on this machine; use device=cpu"]
        if devices > 1:
            return [f"parallelism.devices={devices}: a machine has one Apple GPU; use parallelism.devices=1"]
        return []

    def description(self) -> str:
        from pipeline.device.cpu import processor

        return f"{processor()} GPU"

    def installed(self) -> int | None:
        if self.problems(1):
            return None
        import torch

        return int(torch.mps.recommended_max_memory())


def apple_gpu() -> bool:
    """Whether this is a Mac with Apple silicon, whose GPU torch calls mps."""
    return platform.system() == "Darwin" and platform.machine() == "arm64"
