"""LoRA (Hu et al., 2021, arXiv:2106.09685): a product of two thin matrices beside each frozen weight is trained.

See layers/lora.py for the arithmetic; with `compression=nf4` it is QLoRA (adapters/base.py).
"""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.adapters.base import LowRankAdapter
from pipeline.registry import register


@register("adapter", "lora")
@dataclass(frozen=True, kw_only=True)
class Lora(LowRankAdapter):
    """No settings but those of all low-rank adapters."""
