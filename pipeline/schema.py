"""The root of a config and its groups, as frozen dataclasses. Defaults live in conf/, never here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt

from pipeline.compression.base import Method
from pipeline.data.base import Data
from pipeline.device.base import Device
from pipeline.memory.settings import Memory
from pipeline.models.base import Model
from pipeline.optimizers.base import Optimizer
from pipeline.parallelism.base import Parallelism
from pipeline.precision.base import Precision
from pipeline.trainer.settings import Trainer

Job = Literal["run", "compress", "evaluate", "verify", "generate"]


@dataclass(frozen=True, kw_only=True)
class Gate:
    """Limits the finished artifact must keep; a broken one exits 3. None: no limit.

    max_quality_drop: relative, in the worse direction. max_quality_points: absolute. min_ratio: size before / after.
    """

    max_quality_drop: Annotated[float, Ge(0)] | None
    max_quality_points: Annotated[float, Ge(0)] | None
    min_ratio: Annotated[float, Gt(0)] | None


@dataclass(frozen=True, kw_only=True)
class Generate:
    """`job=generate`. Greedy at temperature 0."""

    max_new_tokens: Annotated[int, Ge(1)]
    temperature: Annotated[float, Ge(0)]


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One run. `chain` maps stage names, in order, to the methods' settings; empty for `compression=none`."""

    job: Job
    model: Model
    data: Data
    chain: Mapping[str, Method]
    precision: Precision
    parallelism: Parallelism
    device: Device
    optimizer: Optimizer
    memory: Memory
    trainer: Trainer
    gate: Gate
    generate: Generate
    artifact: str | None
    prompt: str | None
    prompt_file: str | None
    keep_stages: bool
    lock: Mapping[str, Any] | None
    choices: Mapping[str, Any]
    """group -> choice, or list of stage names for compression; what `result.json` shows."""
    overrides: tuple[str, ...]
    """The command line, as typed."""
