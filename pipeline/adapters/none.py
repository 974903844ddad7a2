"""No adapter: stage 0 trains every weight."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.adapters.base import Adapter
from pipeline.registry import register


@register("adapter", "none")
@dataclass(frozen=True, kw_only=True)
class NoAdapter(Adapter):
    """Nothing to set."""
