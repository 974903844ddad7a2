"""`device=tpu`: Google's TPUs, which no torch that runs this program can use, and which therefore is refused.

torch_xla ends at 2.9.0 and needs exactly torch 2.9.0. This program needs torch 2.11: among other things it holds
gradients in a dtype of their own (`Tensor.grad_dtype`). Its successor, TorchTPU (`torch_tpu`), takes torch 2.11 and
newer, but is a beta, is unknown to Lightning, and registers no device where there is no TPU to try it on.
"""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.device.base import Device, Kind
from pipeline.registry import register

WHY = "torch_xla ends at 2.9.0, which needs torch 2.9.0, and this program needs torch 2.11 or newer"


@register("device", "tpu")
@dataclass(frozen=True, kw_only=True)
class TPU(Device):
    def kind(self) -> Kind:
        return "tpu"

    def problems(self, devices: int) -> list[str]:
        return [f"device={self.name}: {WHY}; use device=cpu or device=cuda"]

    def description(self) -> str:
        return "Google TPU"
