"""The end of a run: the artifact, its receipt from a fresh process, before against after, and the gates.

Quality and speed of `after` are measured on what was read back from disk, never on the model that was saved.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import nn

from pipeline.artifact import receipt, store
from pipeline.chain import Stage
from pipeline.errors import ReceiptError
from pipeline.memory.measure import measure_peak
from pipeline.schema import RunConfig
from pipeline.stage_input import trains
from pipeline.tasks.base import Quality
from pipeline.walk import Run, changing_stages, enter_peak, evaluate


def prove(run: Run, line: Sequence[Stage]) -> None:
    """Artifact, receipt, quality and speed of what was read back from disk, gates.

    Raises:
        ReceiptError: the receipt or a gate was not met. The snapshots stay, so that `resume` can judge again.
    """
    run.doing = "evaluate"
    changing = changing_stages(line)
    first, last = changing[0], changing[-1]
    artifact = run.directory / "artifact"
    store.publish(run.snapshot(last), artifact)
    offload_to = None if trains(line) else run.directory
    with run.progress.phase("checking in a fresh process"):
        proof = receipt.check(artifact, offload_to)
    with measure_peak(run.device) as opening:
        after = store.load(artifact, device=run.device, offload_to=offload_to, sparse_kernels=True)
    enter_peak(run.result, "load", opening)
    with (
        run.progress.phase("evaluating the artifact"),
        measure_peak(run.device, [*after.parameters(), *after.buffers()]) as peak,
    ):
        quality = evaluate(run, after, last.name if trains(line) or last is not first else None)
    before = after
    if first is not last:
        before = store.load(run.snapshot(first), device=run.device, offload_to=offload_to, sparse_kernels=True)
    # Two measurements of one model, which nothing has compressed, would differ by chance.
    timed = {"after": after} if before is after else {"before": before, "after": after}
    with run.progress.phase("measuring speed"), run.config.precision.evaluation_context(run.device):
        speeds = {name: asdict(speed) for name, speed in run.task.speed(timed, run.data, run.device).items()}
    fill(run, artifact, before, after, quality, speeds.get("before", speeds["after"]), speeds["after"], proof)
    enter_peak(run.result, "evaluate", peak)
    run.result["memory"]["kind"] = "allocated"
    store.annotate(artifact, {key: run.result[key] for key in ("quality", "size", "speed")})
    run.result["artifact"]["files"] = store.files(artifact)
    demand(run.config, run.result, proof)
    if not run.config.keep_stages:  # kept where a gate is broken: `resume` with other gates judges them again
        shutil.rmtree(run.directory / "stages")


def fill(
    run: Run, artifact: Path, before: nn.Module, after: nn.Module, quality: Quality,
    slow: dict[str, Any], fast: dict[str, Any], proof: receipt.Receipt,
) -> None:  # fmt: skip
    """Enter what was measured on the finished artifact."""
    result, size = run.result, run.result["size"]
    result["quality"].update(after=quality.value, loss_after=quality.loss)
    if result["stages"]:
        result["stages"][-1]["quality_after"] = quality.value
    dense, stored = store.count(before), store.count(after)
    size.update(
        parameters_before=dense.elements,
        parameters_after=stored.elements,
        nonzero_after=stored.nonzero,
        bytes_after=store.tensor_bytes(artifact),
        claim="smaller" if any(method.shrinks for method in run.config.chain.values()) else "none",
    )
    size["ratio"] = size["bytes_before"] / size["bytes_after"]
    size["ratio_float32"] = 4 * dense.elements / size["bytes_after"]
    result["speed"] = {
        "unit": slow["unit"],
        "before": slow["per_second"],
        "after": fast["per_second"],
        "ratio": fast["per_second"] / slow["per_second"],
        "latency_before": slow["latency"],
        "latency_after": fast["latency"],
        "batch_size": slow["batch_size"],
    }
    result["artifact"] = {
        "path": str(artifact),
        "format": store.read_manifest(artifact)["format"],
        "files": [],
        "reload": {"ok": proof.ok, "max_abs_diff": proof.max_abs_diff},
    }


def demand(config: RunConfig, result: dict[str, Any], proof: receipt.Receipt) -> None:
    """Raise ReceiptError, with every broken promise, where the receipt or a gate is not met."""
    broken = list(proof.problems)
    size, quality, gate = result["size"], result["quality"], config.gate
    if size["claim"] == "smaller" and size["bytes_after"] >= size["bytes_before"]:
        broken.append(f"not smaller on disk: {size['bytes_before']} bytes before, {size['bytes_after']} after")
    worse = quality["after"] - quality["before"]
    worse = worse if quality["direction"] == "lower" else -worse
    # Of an accuracy of 0 there is no share, but what did not fall has lost nothing.
    drop = worse / abs(quality["before"]) if quality["before"] else float("inf") if worse > 0 else 0.0
    points = worse * 100 if quality["metric"] == "accuracy" else worse
    if gate.max_quality_drop is not None and not drop <= gate.max_quality_drop:
        broken.append(
            f"gate.max_quality_drop={gate.max_quality_drop}: {quality['metric']} is {drop:.4f} worse (relative)"
        )
    if gate.max_quality_points is not None and not points <= gate.max_quality_points:
        broken.append(f"gate.max_quality_points={gate.max_quality_points}: {quality['metric']} is {points:.4f} worse")
    if gate.min_ratio is not None and size["ratio"] < gate.min_ratio:
        broken.append(f"gate.min_ratio={gate.min_ratio}: the artifact is {size['ratio']:.2f} times smaller")
    if broken:
        raise ReceiptError("; ".join(broken))
