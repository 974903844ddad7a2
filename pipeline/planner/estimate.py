"""The peak memory of training anybody's model, without running it: `pipeline.memory.estimate`.

The model's own forward, the loss and the optimizer run on fake tensors (see `live`), for as many steps as it takes
until all of the optimizer's state is there. The model that is given is not touched, and may be on the meta device.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from pipeline.planner.fakes import faked, inside, tracing
from pipeline.planner.live import Live, Peak

STEPS = 3
Batch = Mapping[str, Any] | tuple[Any, ...] | list[Any] | Tensor
Loss = Callable[[nn.Module, Any], Tensor]


def estimate(
    model: nn.Module,
    optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer],
    batch: Batch,
    loss: Loss | None = None,
    autocast: torch.dtype | None = None,
) -> Peak:
    """The peak of allocated bytes over a warm training step on one device, and what it is made of.

    Args:
        optimizer: builds one from parameters: `torch.optim.AdamW`, or a `functools.partial` with its settings.
        batch: what the model is called with: a mapping as keywords, a tuple or list as arguments, a tensor alone.
            Only shapes and dtypes count.
        loss: (model, batch) -> a scalar to minimise; None: the output's `loss`, or the sum of a tensor that it gives.
        autocast: the dtype of mixed precision (torch.bfloat16 say); None: none.

    Raises:
        ValueError: nothing to train, no loss in what the model gives, or a sparse gradient, as of
            `nn.Embedding(sparse=True)`: fake tensors forget how many values it has.
        torch._subclasses.fake_tensor.DataDependentOutputException and its like: the model's shapes hang on values.
    """
    shadow = shapes_of(model)
    if not any(parameter.requires_grad for parameter in shadow.parameters()):
        raise ValueError("no parameter of the model requires a gradient, so there is nothing to train")
    live = Live(inside)
    with tracing():
        faked(shadow)
        live.hold_model(shadow)
        shadow.train()
        trained = [parameter for parameter in shadow.parameters() if parameter.requires_grad]
        steps = optimizer(trained)
        with live:
            for step in range(STEPS):
                live.mark(f"step {step}")
                given = tree_map_only(Tensor, lambda tensor: torch.empty(tensor.shape, dtype=tensor.dtype), batch)
                live.phase = "activations"
                live.mark("forward")
                with torch.autocast("cpu", autocast, enabled=autocast is not None):
                    result = (loss or default_loss)(shadow, given)
                live.phase = "backward"
                live.mark("backward")
                result.backward()  # type: ignore[no-untyped-call]
                del result, given
                refuse_sparse(shadow)
                live.hold((p.grad for p in trained if p.grad is not None), "gradients")
                live.phase = "optimizer step"
                live.mark("optimizer step")
                # Which divides by how far a product of its momentums is from 1; ASGD asks whether something is 1 still.
                live.number = 0.5 if isinstance(steps, torch.optim.NAdam) else 1.0
                steps.step()
                live.number = 1.0
                state = (value for held in steps.state.values() for value in held.values())
                live.hold((value for value in state if isinstance(value, Tensor)), "optimizer state")
                steps.zero_grad()
        return live.timeline.peak(live.timeline.since(f"step {STEPS - 1}"))


def refuse_sparse(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if parameter.grad is not None and parameter.grad.layout != torch.strided:
            raise ValueError(
                f"the gradient of {name} is sparse, and what it takes cannot be told from shapes; give sparse=False"
            )


def shapes_of(model: nn.Module) -> nn.Module:
    """A copy of `model` on the meta device, without a copy of its weights; tied ones stay tied."""
    shapes: dict[int, Any] = {}
    for parameter in model.parameters():
        empty = torch.empty_like(parameter, device="meta")
        shapes[id(parameter)] = nn.Parameter(empty, parameter.requires_grad)
    for buffer in model.buffers():
        shapes[id(buffer)] = torch.empty_like(buffer, device="meta")
    return copy.deepcopy(model, shapes)


def default_loss(model: nn.Module, batch: Any) -> Tensor:
    """The loss of a model that computes its own, as those of transformers do, or the sum of its output."""
    if isinstance(batch, Mapping):
        output = model(**batch)
    else:
        output = model(*batch) if isinstance(batch, (tuple, list)) else model(batch)
    found = getattr(output, "loss", None)
    if found is None and isinstance(output, Tensor):
        found = output.sum()
    if found is None:
        raise ValueError(f"the model gives a {type(output).__name__} without a loss: give estimate(..., loss=...)")
    assert isinstance(found, Tensor)
    return found
