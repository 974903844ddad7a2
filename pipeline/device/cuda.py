"""`device=cuda`: NVIDIA GPUs, found through their driver library without loading torch."""

from __future__ import annotations

import ctypes
import importlib.metadata
import platform
from dataclasses import dataclass
from functools import cache
from typing import Any

from pipeline.device.base import Device, Kind
from pipeline.registry import register


@register("device", "cuda")
@dataclass(frozen=True, kw_only=True)
class CUDA(Device):
    def kind(self) -> Kind:
        return "cuda"

    def problems(self, devices: int) -> list[str]:
        count = gpus()
        if count == 0:
            return [f"device={self.name}: no NVIDIA GPU found on this machine; use device=cpu"]
        if build := torch_without_cuda():
            return [
                f"device={self.name}: the installed torch {build} is built without CUDA; "
                "install one that has it (see pytorch.org), or use device=cpu"
            ]
        if devices > count:
            here = f"{count} NVIDIA GPU{'s' * (count > 1)}"
            return [f"parallelism.devices={devices}: this machine has {here}; use at most {count}"]
        return []

    def description(self) -> str:
        import torch

        return torch.cuda.get_device_name(0)

    def installed(self) -> int | None:
        if self.problems(1):
            return None
        import torch

        return int(torch.cuda.get_device_properties(0).total_memory)


CAPABILITY = (75, 76)
"""The driver's numbers for the two parts of a GPU's compute capability."""


def gpus(library: str | None = None) -> int:
    """NVIDIA GPUs that this process may use; 0 where there is no driver. The driver itself reads CUDA_VISIBLE_DEVICES.

    Args:
        library: name or path of the driver's library; the system's where None.
    """
    driver, count = _driver(library), ctypes.c_int()
    return 0 if driver is None or driver.cuDeviceGetCount(ctypes.byref(count)) != 0 else count.value


def capability(library: str | None = None) -> tuple[int, int]:
    """Compute capability of the first GPU, (9, 0) of an H100; (0, 0) where there is none."""
    driver, parts = _driver(library), (ctypes.c_int(), ctypes.c_int())
    if driver is None:
        return 0, 0
    for part, number in zip(parts, CAPABILITY, strict=True):
        if driver.cuDeviceGetAttribute(ctypes.byref(part), number, 0) != 0:
            return 0, 0
    return parts[0].value, parts[1].value


def _driver(library: str | None) -> Any:
    """The driver's library, ready; None where there is none."""
    name = library or ("nvcuda.dll" if platform.system() == "Windows" else "libcuda.so.1")
    try:
        driver = ctypes.CDLL(name)
    except OSError:
        return None
    return driver if driver.cuInit(0) == 0 else None


@cache
def torch_without_cuda() -> str | None:
    """The version of a torch that was built for something else than CUDA ('2.13.0+cpu'); None where it may have it."""
    version = importlib.metadata.version("torch")
    build = version.partition("+")[2]
    return version if build.startswith(("cpu", "rocm", "xpu")) else None
