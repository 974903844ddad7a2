"""`device=auto`: the best accelerator that is here. `reason` says in one line what was chosen and why."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.device.base import Device, Kind
from pipeline.device.cpu import CPU
from pipeline.device.cuda import CUDA, gpus, torch_without_cuda
from pipeline.device.mps import MPS, apple_gpu
from pipeline.registry import register


@register("device", "auto")
@dataclass(frozen=True, kw_only=True)
class Auto(Device):
    def chosen(self) -> tuple[Device, str]:
        """The device that runs, and why, in one line."""
        count, build = gpus(), torch_without_cuda()
        if count and not build:
            found = f"device=auto: cuda, {count} NVIDIA GPU{'s' * (count > 1)} found"
            return CUDA(name=self.name, memory=self.memory), found
        if apple_gpu():
            return MPS(name=self.name, memory=self.memory), "device=auto: mps, this is Apple silicon"
        if count:
            why = f"because the installed torch {build} cannot use the NVIDIA GPU"
            return CPU(name=self.name, memory=self.memory), f"device=auto: cpu, {why}"
        return CPU(name=self.name, memory=self.memory), "device=auto: cpu, no GPU found"

    def reason(self) -> str:
        return self.chosen()[1]

    def kind(self) -> Kind:
        return self.chosen()[0].kind()

    def problems(self, devices: int) -> list[str]:
        return self.chosen()[0].problems(devices)

    def description(self) -> str:
        return self.chosen()[0].description()

    def installed(self) -> int | None:
        return self.chosen()[0].installed()
