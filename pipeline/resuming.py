"""What is wrong with resuming a run that has ended, or that went further than is asked now. Imports no torch."""

from __future__ import annotations

import json
from pathlib import Path

from pipeline.schema import RunConfig


def finished_run(config: RunConfig, directory: Path) -> list[str]:
    """What is wrong with resuming the run in `directory`, where it ended well. One that broke a gate may be judged
    again, and a longer one goes on."""
    try:
        result = json.loads((directory / "result.json").read_text(encoding="utf-8"))
        taken = int((result["train"] or {}).get("steps") or 0)
        if result["status"] != "ok":
            return []
    except (OSError, ValueError, LookupError, TypeError, AttributeError):  # none, or one that was cut off
        return []
    asked = config.trainer.max_steps if config.job == "run" else 0
    if taken > asked:
        return [beyond(directory, taken, asked)]
    if taken < asked:
        return []
    # Only a stage 0 that has trained grows with trainer.max_steps: without one there is nothing to train longer.
    longer = "; to train longer say trainer.max_steps=MORE" if taken else ""
    return [f"resume={directory}: nothing to resume, the run is over{longer}"]


def beyond(directory: Path, taken: int, asked: int) -> str:
    """The message where a resumed run is asked for fewer steps than it has taken."""
    return f"resume={directory}: it has trained {taken} steps already, so trainer.max_steps={asked} cannot be met"
