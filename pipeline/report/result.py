"""`result.json`, schema 1: its names and types, an empty one, strict and atomic writing, and reading back.

The classes below are the schema. Sizes are bytes, times seconds; a value that does not apply is null.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, get_origin, get_type_hints

from annotated_types import Ge
from pydantic import ConfigDict, FiniteFloat, TypeAdapter, ValidationError
from typing_extensions import TypedDict, is_typeddict

from pipeline.errors import LeanfitError
from pipeline.versions import versions

SCHEMA = 1

Count = Annotated[int, Ge(0)] | None
Amount = Annotated[FiniteFloat, Ge(0)] | None
Text = str | None


class Section(TypedDict):
    __pydantic_config__ = ConfigDict(strict=True, extra="forbid")  # type: ignore[misc]


class Failure(Section):
    type: str
    message: str


class PrecisionUsed(Section):
    requested: Text
    used: Text


class ParallelismUsed(Section):
    strategy: Text
    devices: Count
    nodes: Count


class DeviceUsed(Section):
    """`reason`: why this one, where it was not named but chosen (`device=auto`)."""

    kind: Text
    name: Text
    reason: Text


class Train(Section):
    """A fit. `seconds` are those of all its steps, without validation. Rates leave out the steps that were slowed, two
    by measuring memory and one by compiling: they are null where a fit has no others. `skipped_steps`: those that the
    loss scaler left out, since gradients overflowed; null without one."""

    steps: Count
    skipped_steps: Count
    samples: Count
    tokens: Count
    seconds: Amount
    samples_per_second: Amount
    tokens_per_second: Amount
    mfu: Amount
    loss_first: FiniteFloat | None
    loss_last: FiniteFloat | None
    trainable_parameters: Count


class Peaks(Section):
    """`load`: what a run begins with is built or opened, and its artifact is read back. `validate`: the evaluation in
    the middle of stage 0's fit. `save`: checkpoints after a fit's last step, and artifacts, are written."""

    load: Count
    train: Count
    validate: Count
    compress: Count
    save: Count
    evaluate: Count
    generate: Count
    """Of `job=generate`, and of plans of a language model."""


class Errors(Section):
    """Predicted / measured - 1."""

    load: FiniteFloat | None
    train: FiniteFloat | None
    validate: FiniteFloat | None
    compress: FiniteFloat | None
    save: FiniteFloat | None
    evaluate: FiniteFloat | None
    generate: FiniteFloat | None


class Memory(Section):
    """`measured`: what `kind` says. `reserved`: what torch's pool on a CUDA device held of it at most. `adapted`: what
    was changed, and computes the same, each time that memory ran out (`fit.on_oom=adapt`)."""

    predicted: Peaks
    measured: Peaks
    reserved: Peaks
    reserved_predicted: Peaks
    error: Errors
    reserved_error: Errors
    kind: Text
    adapted: list[str]


class QualityBeforeAfter(Section):
    metric: Text
    direction: Literal["lower", "higher"] | None
    before: FiniteFloat | None
    after: FiniteFloat | None
    loss_before: FiniteFloat | None
    loss_after: FiniteFloat | None
    baseline: FiniteFloat | None
    n: Count


class Size(Section):
    parameters_before: Count
    parameters_after: Count
    nonzero_after: Count
    bytes_before: Count
    bytes_after: Count
    ratio: Amount
    ratio_float32: Amount
    claim: Text


class SpeedBeforeAfter(Section):
    unit: Literal["tokens/s", "samples/s"] | None
    before: Amount
    after: Amount
    ratio: Amount
    latency_before: Amount
    latency_after: Amount
    batch_size: Count


class LinkPeaks(Section):
    """Peaks of a link: of its own fit, with its teacher, measured and predicted; and of preparing and compressing."""

    train: Count
    compress: Count
    train_predicted: Count


class StageRecord(Section):
    name: str
    method: str
    config: dict[str, Any]
    seconds: Amount
    quality_after: FiniteFloat | None
    bytes_after: Count
    train: Train | None
    memory: LinkPeaks
    detail: dict[str, Any]


class File(Section):
    name: str
    bytes: Annotated[int, Ge(0)]
    sha256: str


class Reload(Section):
    ok: bool | None
    max_abs_diff: Amount


class Artifact(Section):
    path: Text
    format: Text
    files: list[File]
    reload: Reload


class Export(Section):
    format: str
    path: Text
    bytes: Count
    runtime: Text
    max_abs_diff: Amount
    tokens_or_samples_per_second: Amount


class Fitted(Section):
    """One candidate of `job=fit`: overrides beside those that were typed, bytes at the peak of `phase` (`source`:
    traced or computed), seconds of an optimizer step."""

    changes: list[str]
    bytes: Count
    phase: str
    source: str
    seconds_predicted: Amount
    seconds_measured: Amount


class Fit(Section):
    """What `job=fit` found: those that fit, best first. `rates`: whether the device was probed, or assumed."""

    budget: Count
    searched: Count
    traced: Count
    rates: str
    command: str
    ranking: list[Fitted]


class Result(Section):
    """`seconds` (the whole run) and `versions` are additions to what scripts may rely on."""

    schema: Literal[1]
    status: Literal["ok", "failed", "gate"]
    error: Failure | None
    job: str
    overrides: list[str]
    choices: dict[str, str | list[str] | None]
    seconds: Amount
    versions: dict[str, str]
    precision: PrecisionUsed
    parallelism: ParallelismUsed
    device: DeviceUsed
    train: Train
    memory: Memory
    quality: QualityBeforeAfter
    size: Size
    speed: SpeedBeforeAfter
    fit: Fit | None
    stages: list[StageRecord]
    artifact: Artifact
    exports: list[Export]


def _empty(kind: Any) -> Any:
    """The value of a type where nothing is known: sections with all their keys, empty lists, null."""
    if is_typeddict(kind):
        return {name: _empty(hint) for name, hint in get_type_hints(kind).items()}
    origin = get_origin(kind)
    return [] if origin is list else {} if origin is dict else None


def empty_train() -> dict[str, Any]:
    """The `train` section with every value null, for a link's fit."""
    train: dict[str, Any] = _empty(Train)
    return train


def new_result(job: str, overrides: Sequence[str], choices: Mapping[str, Any]) -> dict[str, Any]:
    """A result with every key, null where nothing is known yet, `status` too: written like this it is a failure."""
    result: dict[str, Any] = _empty(Result)
    plain = {
        group: list(name) if isinstance(name, (list, tuple)) else name if name is None else str(name)
        for group, name in choices.items()
    }
    result.update(schema=SCHEMA, job=job, overrides=list(overrides), choices=plain, versions=versions())
    return result


def _strict(value: Any, path: str, bad: list[str], free: bool) -> Any:
    """`value` as plain JSON. A non-finite number becomes null and is named in `bad`; in free-form parts, its name."""
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        if math.isfinite(value):
            return float(value)
        if free:
            return str(value)
        bad.append(f"{path} is {value}")
        return None
    if isinstance(value, Mapping):
        parts = {str(key): (f"{path}.{key}" if path else str(key), item) for key, item in value.items()}
        return {
            key: _strict(item, where, bad, free or key in {"config", "detail"}) for key, (where, item) in parts.items()
        }
    if isinstance(value, (list, tuple, set, frozenset)):
        items = sorted(value, key=repr) if isinstance(value, (set, frozenset)) else value
        return [_strict(item, f"{path}[{position}]", bad, free) for position, item in enumerate(items)]
    if isinstance(value, Path):
        return str(value)
    if getattr(value, "shape", None) == () and hasattr(value, "item"):
        return _strict(value.item(), path, bad, free)
    raise TypeError(f"result.json: {path} is a {type(value).__name__}, which JSON cannot hold")


def settle(result: Mapping[str, Any]) -> dict[str, Any]:
    """A strictly-JSON copy. NaN or infinity becomes null, and an `ok` that holds one becomes `failed`, naming it.

    A result that is not ok and gives no reason says `Unfinished`.
    In `stages[].config` and `stages[].detail`, which are free-form, such a number is kept as text ("nan", "inf").

    Raises:
        TypeError: a value that JSON cannot hold.
    """
    bad: list[str] = []
    clean: dict[str, Any] = _strict(result, "", bad, free=False)
    if bad:
        note = f"not a finite number: {'; '.join(bad)}"
        error = clean.get("error")
        if clean.get("status") == "ok" or not isinstance(error, dict):
            clean.update(status="failed", error={"type": "NonFiniteResult", "message": note})
        else:
            error["message"] = f"{error.get('message')}; {note}"
    if clean.get("status") is None:
        clean["status"] = "failed"
    if clean["status"] != "ok" and clean.get("error") is None:
        clean["error"] = {"type": "Unfinished", "message": "the run did not finish"}
    return clean


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 atomically: a reader sees the old file or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8", newline="") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_result(path: str | Path, result: Mapping[str, Any]) -> dict[str, Any]:
    """Write `settle(result)` atomically and return it: its `status` is the one that counts."""
    clean = settle(result)
    write_text(Path(path), json.dumps(clean, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
    return clean


def read_result(path: str | Path) -> dict[str, Any]:
    """The result in `path`, of a schema this version knows. Whether it is complete: `schema_problems`.

    Raises:
        LeanfitError: the file is missing, not JSON, or of a newer schema.
    """
    path = Path(path)
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise LeanfitError(f"{path}: there is no such result") from None
    except (OSError, ValueError, RecursionError) as error:
        raise LeanfitError(f"{path}: not a readable result ({type(error).__name__}: {error})") from None
    if not isinstance(result, dict):
        raise LeanfitError(f"{path}: not a readable result (a {type(result).__name__}, not an object)")
    schema = result.get("schema")
    if isinstance(schema, int) and schema > SCHEMA:
        raise LeanfitError(f"{path}: schema {schema} is newer than this version's {SCHEMA}; update leanfit")
    return result


@cache
def _adapter() -> TypeAdapter[Any]:
    return TypeAdapter(Result)


def schema_problems(result: Any) -> list[str]:
    """What is wrong with names and types, one line each; an empty list means a valid result of schema 1."""
    try:
        _adapter().validate_python(result)
    except ValidationError as error:
        return [f"{'.'.join(map(str, item['loc'])) or 'result'}: {item['msg']}" for item in error.errors()]
    if (result["status"] == "ok") != (result["error"] is None):
        return [f"error: must be null exactly where status is 'ok', got status '{result['status']}'"]
    return []
