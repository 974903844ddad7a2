"""DoRA (Liu et al., 2024, arXiv:2402.09353): LoRA for the direction of each weight row, and its length trained apart.

See layers/lora.py for the arithmetic.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from pipeline.adapters.base import LowRankAdapter
from pipeline.registry import register


@register("adapter", "dora")
@dataclass(frozen=True, kw_only=True)
class Dora(LowRankAdapter):
    """No settings but those of all low-rank adapters."""

    magnitude: ClassVar[bool] = True
