"""What a run needs in memory, computed in well under a second: any size of model, any number and kind of devices.

Nothing is run on the device. Weights, gradients and optimizer state are counted from shapes and dtypes; what a block,
a loss and a step hold besides is asked of the block, the loss and the optimizer themselves, once for all that are alike
(`folding`, `stepping`), on fake tensors; what a rank holds of them, and what it gathers, is in `ranks`. Lightning's
loop is not run: its order of events is written down here.

    forward, gradients of the step before still there -> gradients freed -> backward -> step

The kernels' own scratch space, a GPU's context and its allocator's rounding are not in it.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from pipeline.chain import Stage
from pipeline.compression.base import Context, StageLoss
from pipeline.errors import LeanfitError
from pipeline.fitting import micro_batch_size
from pipeline.layers.footprint import file_bytes, model_tensors
from pipeline.layers.lora import held_tensors
from pipeline.memory.offload import SMALLEST
from pipeline.memory.saving import apply_activation_checkpointing
from pipeline.models.base import Architecture
from pipeline.parallelism.sharding import dtype_of
from pipeline.planner import compiled
from pipeline.planner.fakes import fake_batch, faked, inside, kernels_of, tracing
from pipeline.planner.folding import Account, Folding, folded
from pipeline.planner.gathering import saving
from pipeline.planner.live import ACTIVATIONS, STEP_DONE, Inner, Peak
from pipeline.planner.ranks import COMMUNICATION, GATHERED, Rank, norms_over, part, split_layers
from pipeline.planner.replaying import few_parts
from pipeline.planner.stepping import Stepped, stepped
from pipeline.planner.workspaces import WITH_BIAS, WORKSPACES
from pipeline.precision.plugins import kernels
from pipeline.schema import RunConfig
from pipeline.tasks.base import Batch, Task
from pipeline.tasks.measuring import inference
from pipeline.trainer.compiling import Compiler, compiled_blocks, compiled_criterion
from pipeline.walk import teacher_tensors

RECORD = 315
"""Bytes that a tensor takes in a checkpoint beside its own: its names, and the file's padding."""


def training(
    config: RunConfig,
    stage: Stage,
    model: nn.Module,
    task: Task,
    architecture: Architecture,
    batch: Batch,
    own: Callable[[], Context] | None = None,
) -> Peak:
    """The peak on one device over a warm step of the fit of `stage`, or over its only one.

    Args:
        model: on the meta device; it is filled with fake tensors in place.
        batch: one micro batch, whose shapes and dtypes count.
        own: what the link's method makes a loss of its own of, fake tensors where it is called; None: the task's loss.
    """
    assert stage.fit is not None
    _, accumulation = micro_batch_size(config)
    ranks, memory = config.parallelism, config.memory
    on_cpu = config.device.kind() == "cpu"
    blocks = [block.name for block in architecture.blocks]
    whole = copy.deepcopy(model) if ranks.sharded else None
    with ExitStack() as stack:
        compiler = compiled.Imitation()
        rank, step, folding, workspaces = stack.enter_context(
            at_work(config, stage, model, architecture, accumulation, compiler)
        )
        account = rank.account
        model.train()
        context = own() if own else None
        stack.enter_context(account)
        only = stage.fit.steps == 1 and not memory.step_in_backward
        rank.enter(
            0 if only else sum(step.state), kept=not (only or memory.release_gradients or memory.step_in_backward)
        )
        stage_loss: StageLoss | None = None
        if context and stage.method:
            stage_loss = stage.method.loss(context)
            stack.callback(once(model))
        if context and context.teacher:
            account.hold(teacher_tensors(context.teacher), "teacher")
            taught = [block.name for block in context.teacher.architecture.blocks]
            stack.enter_context(folded(context.teacher.model, taught, folding))
        taken = account.guest(workspaces, WORKSPACES)  # by the step before
        given = fake_batch(batch)
        account.hold(given.values(), "batch")
        account.moment, account.phase = "forward pass", ACTIVATIONS
        rank.forward()
        away = nullcontext() if memory.activation_offload == "none" else put_away(account, on_cpu)
        criterion = None
        if config.trainer.compile:
            stack.enter_context(compiled.without_kernels())
            criterion = compiled_criterion(compiler)
        stack.enter_context(account.telling_loss(model, architecture))
        with folded(model, blocks, folding), config.precision.plugin("cpu").forward_context(), away:
            task_loss = partial(task.loss, model, chunks=memory.loss_chunks, criterion=criterion)
            loss = stage_loss(model, given, task_loss) if stage_loss else task_loss(given)
        rank.backward()
        account.moment, account.phase = "backward pass", "backward"
        if memory.step_in_backward:
            step_early(rank.trained, step, account)
        with kernels("cpu"):
            loss.backward()  # type: ignore[no-untyped-call]
        rank.finish()
        account.hold((weight.grad for weight in rank.trained if weight.grad is not None), "gradients")
        account.moment = "optimizer step"
        if only:
            rank.have("state", sum(step.state), "optimizer state")
        if not memory.step_in_backward:
            account.guest(step.at_work, "optimizer step")
        del loss
        account.mark(STEP_DONE)
        del taken
    course = folding.unrolled()
    kept = course.held_at(STEP_DONE)
    if ranks.holding.buckets == "views":  # in which gradients lie once they are summed, and which stay without them
        kept.pop(COMMUNICATION, None)
    elif (memory.release_gradients or memory.step_in_backward or rank.engine) and not rank.gradients_stay:
        kept.pop("gradients", None)
    saved = written(config, stage.fit.lr, whole, architecture, kept, step.at_work) if whole else None
    return replace(course.peak(), kept=kept, saving=saved, plain=compiler.plain)


@contextmanager
def at_work(
    config: RunConfig,
    stage: Stage,
    model: nn.Module,
    architecture: Architecture,
    accumulation: int,
    compiler: Compiler | None = None,
) -> Iterator[tuple[Rank, Stepped, Folding, int]]:
    """`model`, of the meta device, filled with fake tensors as one device has it in the fit of `stage`, and not yet
    counted: the rank, what its optimizer holds, the account of a folded pass, and the bytes of its workspaces.
    `compiler`: of blocks that are compiled."""
    assert stage.fit is not None
    ranks, dtype = config.parallelism, config.precision.weight_dtype
    inner, workspace = kernels_of(config)
    blocks = [block.name for block in architecture.blocks]
    split_layers(model, architecture, ranks.tensor_ranks)
    account = Account(inner)
    account.timeline.cuda = config.device.kind() == "cuda"
    on_cpu = config.device.kind() == "cpu"
    with ExitStack() as stack:
        stack.enter_context(tracing(config))
        stack.enter_context(few_parts())
        step = steps(config, faked(model), stage.fit.lr, inner)
        if gathered_in := dtype_of(ranks.holding.gathered_in):
            faked(model, gathered_in)
        stack.callback(config.precision.convert_layers(model, architecture))
        if config.trainer.compile and compiler:
            stack.enter_context(compiled_blocks(model, blocks, compiler))
        stack.callback(apply_activation_checkpointing(model, blocks, config.memory.activation_checkpointing))
        stack.enter_context(norms_over(model, ranks.ranks))
        rank = Rank(ranks.holding, account, model, blocks, dtype, accumulation > 1, on_cpu, stage.fit.steps)
        folding = Folding(account, rank.around, rank.within)
        yield rank, step, folding, 2 * workspace + sum(WITH_BIAS) if workspace else 0


def validating(
    config: RunConfig, stage: Stage, model: nn.Module, task: Task, architecture: Architecture, batch: Batch
) -> Peak:
    """The peak on one device of several while they evaluate `model` in the middle of the fit of `stage`, beside all
    that it keeps; arguments as for `training`, with a batch of evaluation.

    Lightning has let go of gradients, but not of the buckets that they lie in.
    """
    with ExitStack() as stack:
        rank, step, folding, workspaces = stack.enter_context(at_work(config, stage, model, architecture, 1))
        account = stack.enter_context(rank.account)
        rank.enter(sum(step.state), kept=False)
        taken = account.guest(workspaces, WORKSPACES)
        given = fake_batch(batch)
        account.hold(given.values(), "batch")
        account.moment, account.phase = "evaluation", ACTIVATIONS
        stack.enter_context(inference(model))
        rank.forward()
        if rank.engine:  # DeepSpeed's stage 3 lets go at once of what no backward pass will ask for
            rank.drop("outside")
        blocks = [block.name for block in architecture.blocks]
        stack.enter_context(account.telling_loss(model, architecture))
        with folded(model, blocks, folding), config.precision.plugin("cpu").forward_context():
            task.loss(model, given, chunks=config.memory.loss_chunks)
        del taken
    return folding.unrolled().peak()


def written(
    config: RunConfig, lr: float, model: nn.Module, architecture: Architecture, kept: Mapping[str, int], at_work: int
) -> Mapping[str, int]:
    """Bytes by kind on the first rank, at most, while ranks write `last.ckpt` that keep `kept` between two steps.

    `model`: on the meta device, whole; it is filled with fake tensors in place. `at_work`: of the optimizer there.
    """
    state, on_cpu = of_whole_weights(config, model, lr).tensors, config.device.kind() == "cpu"
    return saving(config.parallelism, model, architecture, state, kept, at_work, on_cpu=on_cpu)


def of_whole_weights(config: RunConfig, model: nn.Module, lr: float) -> Stepped:
    """What the optimizer makes of `model`, which is on the meta device, and is filled with fake tensors in place."""
    with tracing():
        optimizer = config.optimizer.build(faked(model), lr)
        config.precision.prepare_training(model, optimizer)
        return stepped(optimizer, lambda shape: shape, inside)


def once(model: nn.Module) -> Callable[[], None]:
    """Has `model` refuse to run a second time, whose blocks would be taken for more of those of the first; gives what
    lets it again."""
    runs = itertools.count(1)

    def count(*_: Any) -> None:
        if next(runs) > 1:
            raise LeanfitError("the model runs more than once for a loss")

    return model.register_forward_pre_hook(count).remove


def on_disk(config: RunConfig, model: nn.Module) -> dict[str, int]:
    """Bytes of `last.ckpt`, and of the weights in the artifact where nothing is compressed.

    `model`, of the meta device, is the one that stage 0 trains, with the adapters if there are any; they are merged.
    """
    held = held_tensors(model)
    saved = {id(tensor): tensor for name, tensor in model.state_dict(keep_vars=True).items() if name not in held}
    state = of_whole_weights(config, copy.deepcopy(model), config.optimizer.lr).state
    sizes = [tensor.nbytes for tensor in saved.values()] + list(state)
    checkpoint = sum(sizes) + RECORD * len(sizes)
    return {"checkpoint": checkpoint, "artifact": file_bytes(model_tensors(config.adapter.merge(model), {}))}


def steps(config: RunConfig, model: nn.Module, lr: float, inner: Inner | None) -> Stepped:
    """What the optimizer of a fit holds here."""
    holding = config.parallelism.holding
    optimizer = config.optimizer.of_parts(holding.state).build(model, lr)
    config.precision.prepare_training(model, optimizer)
    found = stepped(optimizer, lambda shape: part(shape, holding.state), inner)
    if holding.on_host != "nothing":
        return replace(found, state=[], at_work=0)
    if config.memory.optimizer_offload != "none":
        # One weight is stepped at a time, where its state is: on a CPU in mapped files, else in the host's memory.
        alone = max(found.alone.values()) if config.device.kind() == "cpu" else 0
        return replace(found, state=[size for size in found.state if size < SMALLEST], at_work=alone)
    return found


def put_away(account: Account, on_cpu: bool) -> saved_tensors_hooks:
    """Activations leave for the backward pass as `memory.offload` has them leave: into files, which on a CPU are used
    where they are, or to a GPU's host, from where they come back one at a time."""

    def pack(tensor: Tensor) -> Any:
        block = account.block(tensor)
        stays = block is None or block.kind in ("weights", "buffers", "batch", GATHERED) or tensor.nbytes < SMALLEST
        return tensor if stays else (tensor.shape, tensor.stride(), tensor.dtype)

    def unpack(kept: Any) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        shape, stride, dtype = kept
        back = torch.empty_strided(shape, stride, dtype=dtype)
        block = account.block(back)
        if on_cpu and block is not None:
            block.bytes = 0
        return back

    return saved_tensors_hooks(pack, unpack)


def step_early(trained: list[nn.Parameter], step: Stepped, account: Account) -> None:
    """Each weight is stepped as its gradient is there."""

    def early(weight: nn.Parameter) -> None:
        account.guest(step.alone[id(weight)], "optimizer step")
        weight.grad = None

    for weight in trained:
        weight.register_post_accumulate_grad_hook(early)  # type: ignore[no-untyped-call]
