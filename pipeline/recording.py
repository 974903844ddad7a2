"""The teacher's logits on disk: recorded before a link's fit, read in it, so that no teacher is held meanwhile.

Recorded once, by the process that walks the stages; the ranks of a distributed fit map the same files. A cache that is
there already is taken where it was recorded for the same teacher, data and settings and is whole; where not, this is
said and it is recorded anew.
"""

from __future__ import annotations

import gc
import shutil
import weakref
from collections.abc import Callable, Sized
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, cast

from torch import Tensor, nn

from pipeline.artifact.manifest import sha256
from pipeline.chain import Stage
from pipeline.compression.base import Context
from pipeline.data.base import DataBundle
from pipeline.fitting import fit_inputs
from pipeline.layers.distillation import head_size
from pipeline.layers.logit_cache import Inputs, LogitCache, LogitCacheError, bytes_needed, largest_top_k, write
from pipeline.memory.measure import storage_bytes
from pipeline.models.architecture import describe
from pipeline.report.units import format_bytes
from pipeline.schema import RunConfig
from pipeline.stage_input import FIRST, guests
from pipeline.teacher import FrozenTeacher, RecordedTeacher


def records(stage: Stage) -> bool:
    """Whether the stage's fit reads its teacher's logits from disk."""
    return stage.fit is not None and stage.method is not None and stage.method.records_teacher


def place(directory: Path, stage: Stage) -> Path:
    """Where they are, in the run's `directory`."""
    return directory / "stages" / f"{stage.directory}-logits"


def recorded(
    config: RunConfig, stage: Stage, directory: Path, data: DataBundle, context: Context, say: Callable[[str], None]
) -> Context:
    """`context` with a teacher that reads from disk; the one it has is run over the fit's batches first, if need be.

    The caller is to let go of the old context, and with it of whatever the old teacher was made from.
    """
    teacher, where = context.teacher, place(directory, stage)
    assert isinstance(teacher, FrozenTeacher)
    about = recorded_for(config, stage, directory, data)
    cache, held = _usable(where, about, stage, say), False
    found = cache is not None
    if cache is None:
        needed = most_bytes(config, stage, data, teacher.shapes())
        size = "" if needed is None else f", up to {format_bytes(needed)}"
        say(f"{stage.name}: the teacher's logits are written to disk{size}")
        forget(directory, stage)
        cache, held = _record(config, stage, data, teacher, where, about)
    context.facts["cached_logits"] = {
        "samples": len(cache), "bytes": cache.bytes, **cache.notes, "found": found, "teacher_held": held,
    }  # fmt: skip
    return reading(context, cache)


def _record(
    config: RunConfig, stage: Stage, data: DataBundle, teacher: FrozenTeacher, where: Path, about: dict[str, Any]
) -> tuple[LogitCache, bool]:
    """The cache, and whether anything still holds the teacher after it was let go."""
    device = config.device.kind()
    plugin = config.precision.plugin(device)
    alive = weakref.ref(teacher.model)  # opened out here: the precision's context would have its say in its weights
    notes = {"teacher_bytes": storage_bytes([*teacher.model.parameters(), *teacher.model.buffers()])}

    def forward(inputs: Inputs) -> Tensor:
        with plugin.forward_context():
            return teacher({name: tensor.to(device) for name, tensor in inputs.items()}).logits

    inputs = (plugin.convert_input(batch) for batch in fit_inputs(config, stage, data))
    write(where, about, inputs, forward, _top_k(stage), notes)
    teacher.release()
    gc.collect()
    if device == "cuda":
        import torch

        torch.cuda.empty_cache()  # a distributed fit takes place in other processes
    return LogitCache(where), alive() is not None


def reading(context: Context, cache: LogitCache) -> Context:
    """`context` with a teacher that reads from `cache`."""
    assert isinstance(context.teacher, FrozenTeacher)
    return replace(context, teacher=RecordedTeacher(cache, describe(context.teacher.shapes())))


def forget(directory: Path, stage: Stage) -> None:
    """Delete what was recorded for `stage`, if anything was."""
    shutil.rmtree(place(directory, stage), ignore_errors=True)


def recorded_for(config: RunConfig, stage: Stage, directory: Path, data: DataBundle) -> dict[str, Any]:
    """All that decides what is recorded, as JSON. The temperature does not: it is applied to what is read."""
    assert stage.fit is not None
    return {
        "teacher": _contents(Path(guests(stage).get("teacher") or directory / "stages" / FIRST)),
        "model": str(asdict(config.model)),
        "data": [data.fingerprint, str(asdict(config.data))],
        "seed": config.trainer.seed,
        "samples": stage.fit.steps * config.trainer.batch_size,
        "top_k": _top_k(stage),
        "precision": config.precision.label,
        "device": config.device.kind(),
    }


def space_problems(config: RunConfig, stage: Stage, directory: Path, data: DataBundle, context: Context) -> list[str]:
    """A message where the logits cannot fit on the disk; for the preflight."""
    assert context.teacher is not None
    where = place(directory, stage)
    if (directory / "stages" / stage.directory).exists():  # a link that is done, in a run that is resumed
        return []
    held = sum(file.stat().st_size for file in where.iterdir()) if where.is_dir() else 0
    classes, free = head_size(context.teacher.model), shutil.disk_usage(directory).free + held
    needed = most_bytes(config, stage, data, context.teacher.model)
    if classes is None or needed is None or needed <= free:
        return []
    key, fitting = f"compression.{stage.name}", largest_top_k(free, *_most(config, stage, data), classes)
    fewer = f"choose {key}.top_k={fitting}, or " if fitting else "choose "
    return [
        f"{key}.cache_logits=true takes up to {format_bytes(needed)}, {format_bytes(free)} are free at {directory}; "
        f"{fewer}{key}.cache_logits=false"
    ]


def most_bytes(config: RunConfig, stage: Stage, data: DataBundle, teacher: nn.Module) -> int | None:
    """What the cache takes on disk if the fit sees no sample twice but in later epochs; None for an unknown head."""
    classes = head_size(teacher)
    return None if classes is None else bytes_needed(*_most(config, stage, data), classes, _top_k(stage))


def _usable(where: Path, about: dict[str, Any], stage: Stage, say: Callable[[str], None]) -> LogitCache | None:
    """The cache that is there, if it is whole and for this fit; why not is said."""
    if not where.exists():
        return None
    try:
        cache = LogitCache(where)
        other = [key for key, value in about.items() if cache.about.get(key) != value]
        if not other:
            cache.verify()
            return cache
        why = f"those on disk were recorded for another {', '.join(other)}"
    except LogitCacheError as error:
        why = str(error)
    say(f"{stage.name}: the teacher's logits are recorded anew: {why}")
    return None


def _top_k(stage: Stage) -> int | None:
    return cast("int | None", getattr(stage.method, "top_k", None))


def _most(config: RunConfig, stage: Stage, data: DataBundle) -> tuple[int, tuple[int, ...]]:
    """How many samples the fit sees at most, each once, and over what shape each has logits."""
    assert stage.fit is not None
    seen = stage.fit.steps * config.trainer.batch_size
    length = data.spec.sequence_length
    return min(len(cast(Sized, data.train)), seen), () if length is None else (length,)


def _contents(path: Path) -> dict[str, str]:
    """Name and sha256 of a file, or of each in a directory."""
    files = [path] if path.is_file() else sorted(file for file in path.iterdir() if file.is_file())
    return {file.name: sha256(file) for file in files}
