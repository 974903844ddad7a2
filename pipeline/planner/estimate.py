"""The peak memory of training anybody's model, without running it: `pipeline.memory.estimate`.

The model's own forward, the loss and the optimizer run on fake tensors (see `live`), for as many steps as it takes
until all of the optimizer's state is there. The model that is given is not touched, and may be on the meta device.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses import fake_tensor
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_map_only

from pipeline.errors import first_line
from pipeline.planner.fakes import faked, inside, like, tracing
from pipeline.planner.live import ACTIVATIONS, Peak
from pipeline.planner.passing import Passing, padded

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
            Only shapes, dtypes and whether they require a gradient count, and whether an `attention_mask` hides
            something.
        loss: (model, batch) -> a scalar to minimise; None: the output's `loss`, or the sum of a tensor that it gives.
        autocast: the dtype of mixed precision (torch.bfloat16 say); None: none.

    Raises:
        ValueError: what cannot be told, in one line: nothing to train, a model without shapes, no loss that has a
            gradient, an optimizer that is built already or that calls the model itself (LBFGS), a sparse gradient, as
            of `nn.Embedding(sparse=True)` (fake tensors forget how many values it has), or whatever the model, the loss
            or the optimizer raises, such as on a batch that does not fit, or where shapes hang on values. What a mask
            chooses (`x[mask]`, `nonzero`) is taken for all of it: a bound from above. What a model does only where
            `any` of its values is so (Longformer's global attention) is not counted.
    """
    if isinstance(optimizer, torch.optim.Optimizer):
        raise ValueError(
            f"optimizer is built already, a {type(optimizer).__name__}; give what builds it: its class, "
            "or a functools.partial of it with its settings"
        )
    shadow = shapes_of(model)
    if not any(parameter.requires_grad for parameter in shadow.parameters()):
        raise ValueError("no parameter of the model requires a gradient, so there is nothing to train")
    live = Passing(inside)
    with padded(hides(batch)), torch.inference_mode(False), torch.enable_grad(), tracing():
        faked(shadow)
        live.hold_model(shadow)
        shadow.train()
        trained = [parameter for parameter in shadow.parameters() if parameter.requires_grad]
        steps = optimizer(trained)
        refuse_closure(steps)
        with live, live.adding_bias(), live.telling_loss(shadow, None):
            for step in range(STEPS):
                live.mark(f"step {step}")
                given = tree_map_only(Tensor, blank, batch)
                live.phase = ACTIVATIONS
                live.mark("forward")
                with told("the model or its loss"), torch.autocast("cpu", autocast, enabled=autocast is not None):
                    result = (loss or default_loss)(shadow, given)
                refuse_loss(result)
                live.phase = "backward"
                live.mark("backward")
                with told("the backward pass"):
                    result.backward()  # type: ignore[no-untyped-call]
                del result, given
                refuse_sparse(shadow)
                live.hold((p.grad for p in trained if p.grad is not None), "gradients")
                live.phase = "optimizer step"
                live.mark("optimizer step")
                # Which divides by how far a product of its momentums is from 1; ASGD asks whether something is 1 still.
                live.number = 0.5 if isinstance(steps, torch.optim.NAdam) else 1.0
                with told("the optimizer's step"):
                    steps.step()
                live.number = 1.0
                state = (value for held in steps.state.values() for value in held.values())
                live.hold((value for value in state if isinstance(value, Tensor)), "optimizer state")
                steps.zero_grad()
        return live.timeline.peak(live.timeline.since(f"step {STEPS - 1}"))


def hides(batch: Batch) -> bool:
    """Whether an attention mask of the batch hides something; one without values, on the meta device say, does not."""
    named = batch if isinstance(batch, Mapping) else {}
    masks = [value for name, value in named.items() if name.endswith("attention_mask")]
    return any(type(mask) is Tensor and not mask.is_meta and bool((mask == 0).any()) for mask in masks)


def blank(tensor: Tensor) -> Tensor:
    """An input of this kind, which has a gradient where it is asked for (older checkpointing passes none otherwise)."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, requires_grad=tensor.requires_grad)


@contextmanager
def told(what: str) -> Iterator[None]:
    """What `what` raises on tensors without values, in one line; torch would print a traceback of its own before."""
    try:
        with mock.patch.object(fake_tensor.log, "disabled", True):
            yield
    except ValueError:
        raise
    except (fake_tensor.DynamicOutputShapeException, fake_tensor.DataDependentOutputException) as error:
        raise ValueError(
            f"{what} has shapes that hang on values ({error.func}), so what it takes cannot be told from shapes"
        ) from error
    except Exception as error:  # whatever torch, or somebody's model, makes of tensors without values
        raise ValueError(f"{what} fails on tensors of these shapes: {first_line(error)}") from error


def refuse_closure(optimizer: torch.optim.Optimizer) -> None:
    if inspect.signature(optimizer.step).parameters["closure"].default is inspect.Parameter.empty:
        raise ValueError(
            f"{type(optimizer).__name__} calls the model as often as it likes within a step, so its peak cannot be "
            "told; give an optimizer whose step takes no closure"
        )


def refuse_loss(found: Any) -> None:
    if not isinstance(found, Tensor):
        raise ValueError(f"the loss is a {type(found).__name__}; give a loss that returns a scalar tensor")
    if found.numel() != 1:
        raise ValueError(f"the loss has the shape {list(found.shape)}; give its mean or its sum, a scalar")
    if not found.requires_grad:
        raise ValueError("the loss has no gradient (it is detached, or of integers), so nothing would be trained")


def refuse_sparse(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if parameter.grad is not None and parameter.grad.layout != torch.strided:
            raise ValueError(
                f"the gradient of {name} is sparse, and what it takes cannot be told from shapes; give sparse=False"
            )


def shapes_of(model: nn.Module) -> nn.Module:
    """A copy of `model` on the meta device, without a copy of its weights; tied ones stay tied."""
    if isinstance(model, torch.jit.ScriptModule):
        raise ValueError("a model of TorchScript cannot be copied without its weights; give what it was made of")
    shapes: dict[int, Any] = {}
    for module in model.modules():  # what a hook computes of parameters before each call (torch.nn.utils.prune)
        for value in vars(module).values():
            if isinstance(value, Tensor) and not value.is_leaf:
                shapes[id(value)] = torch.empty_like(value, device="meta")
    storages: dict[int, Tensor] = {}
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if is_lazy(tensor):
            raise ValueError(f"{name} has no shape yet; call the model on a batch once, as lazy modules need it")
        empty = like(tensor, "meta", storages)
        weight = isinstance(tensor, nn.Parameter)
        shapes[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if weight else empty
    return copy.deepcopy(model, shapes)


def default_loss(model: nn.Module, batch: Any) -> Tensor:
    """The loss of a model that computes its own, as those of transformers do, or the sum of its output."""
    if isinstance(batch, Mapping):
        output = model(**batch)
    else:
        output = model(*batch) if isinstance(batch, (tuple, list)) else model(batch)
    found = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if found is None and isinstance(output, Tensor):
        found = output.sum()
    if found is None:
        raise ValueError(f"the model gives a {type(output).__name__} without a loss: give estimate(..., loss=...)")
    assert isinstance(found, Tensor)
    return found
