"""The evaluation of a run on fake tensors: the task's own metric over two batches, without memory."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from itertools import islice

from torch import nn
from torch.utils.data import Subset

from pipeline.data.base import DataBundle
from pipeline.data.loader import evaluation_loader
from pipeline.models.architecture import describe
from pipeline.planner.fakes import faked, kernels_of, put_into_files, tracing
from pipeline.planner.folding import Folding, folded
from pipeline.planner.live import ACTIVATIONS, Live, Peak
from pipeline.planner.replaying import replaying
from pipeline.planner.supposed import Supposing
from pipeline.planner.workspaces import BIASED
from pipeline.schema import RunConfig
from pipeline.tasks.base import Task
from pipeline.tasks.measuring import inference

BATCHES = 2
"""The second is computed while the first one's results are still there."""


def trace_evaluation(
    config: RunConfig, model: nn.Module, task: Task, data: DataBundle, *, in_files: bool = False
) -> Peak:
    """The peak while `model`, of the meta device and in the dtypes that it has then, is evaluated; it is filled with
    fake tensors in place. `in_files`: it is opened as an artifact lies on disk, and its weights take no memory.

    Where there is less held-out data than two batches, as much as there is.
    """
    with tracing(config):
        faked(model)
        if in_files:
            put_into_files(model)
        live = Supposing(*kernels_of(config))
        live.multiply(BIASED)  # something was evaluated before, or trained
        return traced_evaluation(config, model, task, data, live)


def trace_validation(config: RunConfig, model: nn.Module, task: Task, data: DataBundle) -> Peak:
    """The peak while a fit on one device evaluates `model` in its middle, without what the fit keeps; `model`, of the
    meta device and in the dtypes that it is trained in, is filled with fake tensors in place."""
    loader = evaluation_loader(data.evaluation, config.trainer.evaluation_batch_size)
    with tracing(config), ExitStack() as stack:
        faked(model)
        stack.callback(config.precision.convert_layers(model, describe(model)))
        live = Supposing(*kernels_of(config))
        live.multiply(BIASED)

        def losses() -> None:
            with inference(model), config.precision.plugin("cpu").forward_context():
                for batch in islice(loader, BATCHES):
                    live.hold(batch.values(), "batch")
                    task.loss(model, batch, config.memory.loss_chunks)

        return _counted(live, model, losses)


def traced_evaluation(config: RunConfig, model: nn.Module, task: Task, data: DataBundle, live: Live) -> Peak:
    """As `trace_evaluation`, for a `model` of fake tensors, counted by `live`. To be called within `tracing`."""
    size = config.trainer.evaluation_batch_size
    held_out = min(len(data.evaluation), BATCHES * size)  # type: ignore[arg-type]
    few = replace(data, evaluation=Subset(data.evaluation, range(held_out)))

    def metric() -> None:
        with config.precision.evaluation_context("cpu"):
            task.evaluate(model, few, size, "cpu")

    return _counted(live, model, metric)


def _counted(live: Live, model: nn.Module, passes: Callable[[], None]) -> Peak:
    """The peak over `passes` through `model`, blocks and layers that are alike computed once."""
    live.hold_model(model)
    live.phase = ACTIVATIONS
    folding = Folding(live)
    known = describe(model)
    blocks = [block.name for block in known.blocks]
    with live, folded(model, blocks, folding), live.telling_loss(model, known), replaying(live):
        passes()
    return folding.unrolled().peak()
