"""The levers of a run on memory, the measurement of peaks; and from Python, the planner:

`pipeline.memory.plan(config)` for a run, `pipeline.memory.estimate(model, optimizer, batch)` for any module.
"""

from __future__ import annotations

import importlib
from typing import Any

PLANNER = {"plan": ("pipeline.planner.checked", "plan_checked"), "estimate": ("pipeline.planner.estimate", "estimate")}
"""What stands on top of everything else here is looked up only when it is asked for: (module, name there)."""


def __getattr__(name: str) -> Any:
    if name not in PLANNER:
        raise AttributeError(f"module {__name__} has no attribute {name}")
    module, there = PLANNER[name]
    return getattr(importlib.import_module(module), there)
