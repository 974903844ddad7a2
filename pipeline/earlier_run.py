"""The run that wrote a checkpoint. Its lock lies beside its checkpoints, and says which model, data and adapters those
are of: a checkpoint itself holds weights without a word about their shapes.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from pipeline.errors import ConfigError
from pipeline.registry import decode_choice
from pipeline.schema import RunConfig

OF_WEIGHTS = ("model", "data", "adapter")
"""Groups that decide the shapes of weights, or the tokens that they are for."""


def lock_of(checkpoint: Path) -> Path | None:
    """The lock file of the run in whose directory a checkpoint lies; None where it lies elsewhere."""
    from pipeline.recipes import LOCK

    folder = next((parent for parent in checkpoint.absolute().parents if parent.name == "checkpoints"), None)
    lock = folder.with_name(LOCK) if folder else None
    return lock if lock and lock.is_file() else None


def with_group(config: RunConfig, group: str, values: Any, said: Path) -> RunConfig:
    """`config` with a group as the file `said` has it.

    Raises:
        ConfigError: it is nothing that this version knows.
    """
    part, problems = decode_choice(group, values, group, lambda key: str(said))
    if problems:
        raise ConfigError(problems)
    return replace(config, **{group: part}, choices={**config.choices, group: part.name})


def as_locked(config: RunConfig, lock: Path) -> RunConfig:
    """`config` with the model, data and adapters of the run that a lock is of. Raises as `with_group` does."""
    from pipeline.recipes import locked_values

    said = locked_values(lock)
    for group in OF_WEIGHTS:
        config = with_group(config, group, said.get(group), lock)
    return config
