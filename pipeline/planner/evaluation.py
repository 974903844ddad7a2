"""The evaluation of a run on fake tensors: the task's own metric over two batches, without memory."""

from __future__ import annotations

from dataclasses import replace

from torch import nn
from torch.utils.data import Subset

from pipeline.data.base import DataBundle
from pipeline.models.architecture import describe
from pipeline.planner.fakes import faked, kernels_of, put_into_files, tracing
from pipeline.planner.folding import Folding, folded
from pipeline.planner.live import Live, Peak
from pipeline.planner.replaying import replaying
from pipeline.planner.supposed import Supposing
from pipeline.schema import RunConfig
from pipeline.stage_input import trains
from pipeline.tasks.base import Task
from pipeline.walk import changing_stages, stages_of

BATCHES = 2
"""The second is computed while the first one's results are still there."""


def trace_evaluation(config: RunConfig, model: nn.Module, task: Task, data: DataBundle) -> Peak:
    """The peak while `model` (on the meta device, filled with fake tensors in place) is evaluated.

    Where there is less held-out data than two batches, as much as there is.
    """
    with tracing(config):
        faked(model, config.precision.weight_dtype)
        if not trains(changing_stages(stages_of(config))):  # the artifact is then opened in files
            put_into_files(model)
        return traced_evaluation(config, model, task, data, Supposing(*kernels_of(config)))


def traced_evaluation(config: RunConfig, model: nn.Module, task: Task, data: DataBundle, live: Live) -> Peak:
    """The same for a `model` of fake tensors, counted by `live`. To be called within `tracing`."""
    size = config.trainer.evaluation_batch_size
    held_out = min(len(data.evaluation), BATCHES * size)  # type: ignore[arg-type]
    few = replace(data, evaluation=Subset(data.evaluation, range(held_out)))
    live.hold_model(model)
    live.phase = "activations"
    folding = Folding(live)
    blocks = [block.name for block in describe(model).blocks]
    with live, folded(model, blocks, folding), replaying(live), config.precision.evaluation_context("cpu"):
        task.evaluate(model, few, size, "cpu")
    return folding.unrolled().peak()
