"""What a run needs in memory, computed in well under a second: any size of model, any number and kind of devices.

Nothing is run on the device. Weights, gradients and optimizer state are counted from shapes and dtypes; what a block, a
loss and a step hold besides is asked of the block, the loss and the optimizer themselves, once for all that are alike
(`folding`, `stepping`), on fake tensors; what a rank holds of them, and what it gathers, is in `ranks`. Lightning's loop
is not run: its order of events is written down here.

    forward, gradients of the step before still there -> gradients freed -> backward -> step

The kernels' own scratch space, a GPU's context and its allocator's rounding are not in it; compiled blocks are taken
for plain ones, which hold more.
"""

from __future__ import annotations

from contextlib import ExitStack, nullcontext
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.chain import Stage
from pipeline.fitting import micro_batch_size
from pipeline.memory.offload import SMALLEST
from pipeline.memory.saving import apply_activation_checkpointing
from pipeline.models.base import Architecture
from pipeline.planner.fakes import fake_batch, faked, sixteen_bit, tracing
from pipeline.planner.folding import Account, Folding, folded
from pipeline.planner.live import Peak
from pipeline.planner.stepping import Stepped, gradient_dtype, stepped
from pipeline.precision.plugins import kernels
from pipeline.schema import RunConfig
from pipeline.tasks.base import Batch, Task


def training(
    config: RunConfig, stage: Stage, model: nn.Module, task: Task, architecture: Architecture, batch: Batch
) -> Peak:
    """The peak on one device over a warm step of the fit of `stage`.

    Args:
        model: on the meta device; it is filled with fake tensors in place.
        batch: one micro batch, whose shapes and dtypes count.
    """
    assert stage.fit is not None
    _, accumulation = micro_batch_size(config)
    here = config.device.kind() == "cpu"
    blocks = [block.name for block in architecture.blocks]
    account = Account(sixteen_bit if here else None)
    memory = config.memory
    folding = Folding(account, lambda block, backward, begins: None)
    with ExitStack() as stack:
        stack.enter_context(tracing())
        faked(model, config.precision.weight_dtype)
        optimizer = config.optimizer.build(model, lr=stage.fit.lr)
        config.precision.prepare_training(model, optimizer)
        trained = [weight for group in optimizer.param_groups for weight in group["params"]]
        step = stepped(optimizer, lambda shape: shape, account._inner)
        stack.callback(config.precision.convert_layers(model, architecture))
        stack.callback(apply_activation_checkpointing(model, blocks, memory.activation_checkpointing))
        model.train()
        account.hold_model(model)
        stack.enter_context(account)
        given = fake_batch(batch)
        account.hold(given.values(), "batch")
        state = account.guest(sum(step.state), "optimizer state")
        account.moment = "forward pass"
        if accumulation > 1 or not (memory.release_gradients or memory.step_in_backward):
            for weight in trained:
                weight.grad = torch.empty(weight.shape, dtype=gradient_dtype(weight))
            account.hold((weight.grad for weight in trained), "gradients")
        account.phase = "activations"
        with folded(model, blocks, folding), config.precision.plugin("cpu").forward_context():
            loss = task.loss(model, given, memory.loss_chunks)
        if accumulation == 1:
            for weight in trained:
                weight.grad = None
        account.moment = account.phase = "backward pass"
        if memory.step_in_backward:
            step_early(trained, step, account)
        with kernels("cpu"):
            loss.backward()
        account.hold((weight.grad for weight in trained if weight.grad is not None), "gradients")
        account.moment = "optimizer step"
        if not memory.step_in_backward:
            account.guest(step.at_work, "optimizer step")
    return folding.unrolled().peak()


def step_early(trained: list[nn.Parameter], step: Stepped, account: Account) -> None:
    def early(weight: nn.Parameter) -> None:
        account.guest(step.alone[id(weight)], "optimizer step")
        weight.grad = None
    for weight in trained:
        weight.register_post_accumulate_grad_hook(early)
