"""How long an optimizer step will take, before it runs: a roofline over the operators of the real forward pass, loss,
backward pass and optimizer step, listed on fake tensors.

    seconds of an operator = max(floating-point operations / rate, bytes read and written / bandwidth) + its start

(Williams et al., 2009, doi:10.1145/1498765.1498785). Operators are listed once for micro batches of one sample and of
two; of each the work is linear in the samples. What checkpointing and a loss in chunks compute a second time is the
forward work of the blocks and of the head. Rates are probed where the device is here (`probed`: products of matrices,
copies, tiny operators; half a second), and assumed where it is not. What counts is the order of candidates, not the
seconds: caches, threads that wait and kernels far from their peak are not modelled. `timing` runs real steps.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry

from pipeline.chain import Stage
from pipeline.fitting import micro_batch_size
from pipeline.memory.saving import KEPT
from pipeline.models.architecture import describe
from pipeline.models.base import Architecture
from pipeline.parallelism.sharding import Columns, tensor_parallel_plan
from pipeline.planner import communication
from pipeline.planner.communication import Model, Sums, sent_of
from pipeline.planner.fakes import fake_batch, faked, sixteen_bit, tracing
from pipeline.planner.live import Live
from pipeline.planner.trained import adapted
from pipeline.precision.plugins import kernels
from pipeline.schema import RunConfig
from pipeline.stage_input import link_under_adapters
from pipeline.tasks.base import Batch, Task
from pipeline.tasks.measuring import wait

Part = Literal["blocks", "head", "rest", "backward", "step"]
"""The forward pass (in the blocks; from the head on, loss included; elsewhere), the backward pass, the optimizer."""
CPU_ATTENTION = "_scaled_dot_product_flash_attention_for_cpu"


class Operator(NamedTuple):
    """One operator that ran: where, whether `selective` checkpointing keeps its result, and what it had to do."""

    part: Part
    kept: bool
    dtype: str
    flops: float
    bytes: float


@dataclass(frozen=True)
class Rates:
    """What one device does in a second, and how that is known. `start`: seconds an operator takes to begin.

    `watched`: further seconds an operator takes while `selective` checkpointing looks at it. `step`: seconds an
    optimizer takes to begin a step. `bandwidth`: bytes a second.
    """

    flops: Mapping[str, float]
    bandwidth: float
    start: float
    watched: float
    step: float
    source: Literal["probed", "assumed"]
    asynchronous: bool
    """Whether operators begin while others still run: then a start only counts where the work is shorter."""


DISK = {"host": 12e9, "disk": 1e9}
"""Of PCI Express to the host, of a local disk: assumed."""
now = time.perf_counter
"""The clock that everything here is timed by."""
ASSUMED = {
    "cuda": Rates(
        {"float64": 3e13, "float32": 5e13, "float16": 4e14, "bfloat16": 4e14}, 2.5e12, 5e-6, 3e-5, 1e-4, "assumed", True
    ),
    "cpu": Rates(
        {"float64": 5e10, "float32": 1e11, "float16": 1e11, "bfloat16": 1e11}, 2e10, 5e-6, 3e-5, 1e-4, "assumed", False
    ),
}
"""For devices that are not here: of the order of an H100 as programs reach it, and of a few cores."""


class Operators(Live):  # type: ignore[no-untyped-call]
    """Lists the operators that run under it, in a FakeTensorMode; `part` says which part of a step it is.

    `forward`, `backward`: what tensor parallelism would sum over its ranks of what passes by.
    """

    def __init__(self, kind: str) -> None:
        super().__init__(sixteen_bit if kind == "cpu" else None)
        self.part: Part = "rest"
        self.found: list[Operator] = []
        self.forward, self.backward = Sums(), Sums()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        before = len(self.found)
        out = super().__torch_dispatch__(func, types, args, kwargs)
        inner = len(self.found) > before  # another kernel ran in its place, whose operators are listed
        makes = func._schema.is_mutable or any(isinstance(leaf, Tensor) for leaf in tree_iter(out))
        if makes and not inner and not func.is_view:
            self.found.append(operator(func, self.part, args, kwargs or {}, out))
        return out


def operator(func: Any, part: Part, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Operator:
    """What an operator does with these arguments: each tensor is read once, each result written once."""
    name = func.name().partition(".")[0]
    tensors = [leaf for leaf in tree_iter((args, kwargs)) if isinstance(leaf, Tensor)]
    results = [leaf for leaf in tree_iter(out) if isinstance(leaf, Tensor)]
    written = {id(tensor): tensor for tensor in [*tensors, *results]}
    moved = sum(tensor.numel() * tensor.element_size() for tensor in written.values())
    plain = name.removeprefix("aten::")
    if plain in ("empty", "empty_like", "detach", "empty_strided", "_local_scalar_dense"):
        moved = 0
    if plain.startswith("embedding") and results:  # rows are looked up, not the whole table
        moved = 2 * sum(tensor.numel() * tensor.element_size() for tensor in results)
    floating = next((tensor.dtype for tensor in [*tensors, *results] if tensor.is_floating_point()), torch.float32)
    return Operator(part, name in KEPT, str(floating).removeprefix("torch."), _flops(func, args, kwargs, out), moved)


def _flops(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> float:
    counted = flop_registry.get(func.overloadpacket)
    if counted is not None:
        return float(counted(*args, **kwargs, out_val=out))
    plain = func.overloadpacket.__name__
    if plain.startswith(CPU_ATTENTION):
        # Scores and their product with the values; five products of that size backwards.
        query, key = (args[0], args[1]) if plain == CPU_ATTENTION else (args[1], args[2])
        batch, heads, length, width = query.shape
        return float((4 if plain == CPU_ATTENTION else 10) * batch * heads * length * key.shape[-2] * width)
    return 0.0


def passes(
    config: RunConfig, stage: Stage, model: nn.Module, task: Task, architecture: Architecture, batch: Batch
) -> Operators:
    """The forward and backward pass of one micro batch, without any saving of memory.

    Args:
        model: on the meta device, as the fit of `stage` begins with it; it is filled with fake tensors in place.
    """
    operators = Operators(config.device.kind())
    with tracing(), _parts(model, architecture, operators):
        faked(model)
        plugin = config.precision.plugin("cpu")
        takes_off = config.precision.convert_layers(model, architecture)
        model.train()
        try:
            with operators, plugin.forward_context():
                loss = task.loss(model, fake_batch(batch))
                operators.part = "backward"
                loss.backward()  # type: ignore[no-untyped-call]
        finally:
            takes_off()
    return operators


def stepping(config: RunConfig, stage: Stage, model: nn.Module) -> list[Operator]:
    """The operators of a warm step of the optimizer; `model` as in `passes`."""
    assert stage.fit is not None
    operators = Operators(config.device.kind())
    operators.part = "step"
    with tracing():
        faked(model)
        optimizer = config.optimizer.build(model, stage.fit.lr)
        config.precision.prepare_training(model, optimizer)
        for _ in range(2):  # the first step makes the optimizer's state
            operators.found.clear()
            for weight in model.parameters():
                if weight.requires_grad:
                    weight.grad = torch.empty_like(weight, dtype=weight.grad_dtype or weight.dtype)
            with operators:
                optimizer.step()
    return operators.found


@contextmanager
def _parts(model: nn.Module, architecture: Architecture, operators: Operators) -> Iterator[None]:
    """Says to `operators` when the forward pass enters and leaves the blocks, when it comes to the head, and what goes
    into and comes out of layers that tensor parallelism splits."""

    def enter(part: Part) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            operators.part = part

        return hook

    def goes_in(_: nn.Module, inputs: tuple[Any, ...]) -> None:
        operators.backward = operators.backward.and_one(inputs[0].nbytes)

    def comes_out(_: nn.Module, __: Any, output: Tensor) -> None:
        operators.forward = operators.forward.and_one(output.nbytes)

    handles = []
    for name, how in tensor_parallel_plan(architecture).items():
        layer = model.get_submodule(name)
        split = isinstance(how, Columns)
        handles.append(layer.register_forward_pre_hook(goes_in) if split else layer.register_forward_hook(comes_out))
    for block in architecture.blocks:
        module = model.get_submodule(block.name)
        handles += [module.register_forward_pre_hook(enter("blocks")), module.register_forward_hook(enter("rest"))]
    if architecture.head is not None:
        handles.append(model.get_submodule(architecture.head).register_forward_pre_hook(enter("head")))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@dataclass(frozen=True)
class Work:
    """What training has to do: the operators for micro batches of one sample and of two, those of an optimizer step;
    and what of the model is sent between ranks."""

    one: Sequence[Operator]
    two: Sequence[Operator]
    step: Sequence[Operator]
    model: Model
    known: dict[Any, dict[str, float]] = field(default_factory=dict, compare=False)

    @cached_property
    def in_blocks(self) -> int:
        """Operators of the forward pass in the blocks."""
        return sum(operator.part == "blocks" for operator in self.one)

    @cached_property
    def in_head(self) -> int:
        return sum(operator.part == "head" for operator in self.one)

    def dtypes(self) -> set[str]:
        """In which there are products."""
        return {operator.dtype for operator in (*self.one, *self.step) if operator.flops}

    def seconds(self, samples: int, rates: Rates, split: int) -> dict[str, float]:
        """Of each part, for a micro batch of so many samples; `not kept`: what `selective` computes again.

        Args:
            split: ranks that share the work of the blocks.
        """
        if (samples, split) not in self.known:
            found = dict.fromkeys(("blocks", "not kept", "head", "rest", "backward", "step"), 0.0)
            for operator in (*self.at(samples), *self.step):
                cost = _cost(operator, rates, split if operator.part in ("blocks", "backward") else 1)
                found[operator.part] += cost
                found["not kept"] += cost if operator.part == "blocks" and not operator.kept else 0.0
            self.known[samples, split] = found
        return self.known[samples, split]

    def at(self, samples: int) -> Iterator[Operator]:
        """The operators of a micro batch of so many samples."""
        for one, two in zip(self.one, self.two, strict=True):
            more = samples - 1
            flops = one.flops + more * (two.flops - one.flops)
            yield one._replace(flops=flops, bytes=one.bytes + more * (two.bytes - one.bytes))


class Workbook:
    """The work of candidates with one base model. What they share is listed once.

    Args:
        build: makes the base model on the meta device.
        sample: a batch of one sample.
    """

    def __init__(self, build: Callable[[], nn.Module], task: Task, sample: Batch) -> None:
        self.build, self.task, self.sample = build, task, sample
        self._passes: dict[Any, tuple[list[Operator], list[Operator], Model]] = {}
        self._steps: dict[Any, list[Operator]] = {}

    def work(self, config: RunConfig, stage: Stage) -> Work:
        """The work of the fit of `stage`."""
        base = (config.precision, config.adapter, repr(link_under_adapters(config)))
        if base not in self._passes:
            first, second = (self._listed(config, stage, samples) for samples in (1, 2))
            one, two = first.found, second.found
            if len(one) != len(two):  # kernels chosen by the batch: as of two samples
                one = [operator._replace(flops=operator.flops / 2, bytes=operator.bytes / 2) for operator in two]
            sent = sent_of(self.model(config, stage), first.forward, first.backward)
            self._passes[base] = one, two, sent
        # Under adapters that train, what is compressed is not stepped.
        if (trained := (config.precision, config.adapter, config.optimizer)) not in self._steps:
            self._steps[trained] = stepping(config, stage, self.model(config, stage))
        one, two, sent = self._passes[base]
        return Work(one, two, self._steps[trained], sent)

    def model(self, config: RunConfig, stage: Stage) -> nn.Module:
        """What the fit begins with, on the meta device."""
        return adapted(config, stage, self.build())

    def _listed(self, config: RunConfig, stage: Stage, samples: int) -> Operators:
        model = self.model(config, stage)
        batch = {name: torch.cat([tensor] * samples) for name, tensor in self.sample.items()}
        return passes(config, stage, model, self.task, describe(model), batch)


def step_seconds(config: RunConfig, work: Work, rates: Rates, activations: int = 0) -> float:
    """Predicted seconds of an optimizer step over the global batch.

    Args:
        activations: bytes held for the backward pass, which offloading moves.
    """
    micro, accumulation = micro_batch_size(config)
    memory, parallelism = config.memory, config.parallelism
    shared = parallelism.devices if config.device.kind() == "cpu" else 1  # its processes share the cores
    cost = work.seconds(micro, rates, parallelism.tensor_ranks)
    once = sum(cost[part] for part in ("blocks", "head", "rest", "backward"))
    if memory.activation_checkpointing == "full":
        once += cost["blocks"]
    elif memory.activation_checkpointing == "selective":
        once += cost["not kept"] + 2 * work.in_blocks * rates.watched
    if memory.loss_chunks > 1:
        once += cost["head"] + 3 * (memory.loss_chunks - 1) * work.in_head * rates.start  # forward, again, backward
    total = accumulation * once + (accumulation - 1) * 3 * work.model.gradients / rates.bandwidth
    if memory.step_in_backward:
        total += len(work.model.trained) * rates.step
    if config.trainer.grad_clip is not None:
        total += 3 * work.model.gradients / rates.bandwidth
    total += cost["step"] / (parallelism.ranks if parallelism.sharded else 1)  # each rank steps its own
    total *= shared
    if memory.activation_offload != "none":
        total += accumulation * 2 * activations / DISK[memory.activation_offload]
    if memory.optimizer_offload != "none":
        total += sum(operator.bytes for operator in work.step) / DISK[memory.optimizer_offload]
    return total + communication.seconds(config, work.model, total)


def _cost(operator: Operator, rates: Rates, split: int) -> float:
    rate = rates.flops.get(operator.dtype, rates.flops["float32"])
    busy = max(operator.flops / rate, operator.bytes / rates.bandwidth) / split
    return max(busy, rates.start) if rates.asynchronous else busy + rates.start


def rates_of(kind: str, dtypes: Iterable[str], here: bool) -> Rates:
    """Probed on the device where it is `here` (half a second), else assumed."""
    assumed = ASSUMED.get(kind, ASSUMED["cuda"])
    if not here:
        return assumed
    flops = dict(assumed.flops)
    for dtype in {*dtypes, "float32"}:
        flops[dtype] = _products(kind, getattr(torch, dtype))
    floats, tiny = torch.randn(1 << 22, device=kind), torch.randn(16, device=kind)
    other = torch.empty_like(floats)
    weight = nn.Parameter(tiny.clone())
    weight.grad = tiny.clone()
    optimizer = torch.optim.AdamW([weight], fused=kind in ("cpu", "cuda"))

    def watched() -> None:
        with Passing():  # type: ignore[no-untyped-call]
            for _ in range(20):
                tiny.add(1)

    start = _seconds(kind, lambda: [tiny.add(1) for _ in range(20)]) / 20
    return replace(
        assumed,
        flops=flops,
        bandwidth=2 * floats.nbytes / _seconds(kind, lambda: other.copy_(floats)),
        start=start,
        watched=max(0.0, _seconds(kind, watched) / 20 - start),
        step=_seconds(kind, optimizer.step),
        source="probed",
    )


class Passing(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Looks at each operator and does nothing, as `selective` checkpointing at the least."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return func(*args, **(kwargs or {}))


def _products(kind: str, dtype: torch.dtype) -> float:
    """Floating-point operations a second in products of matrices, in the kernels that training uses."""
    size = 512 if kind == "cpu" else 4096
    matrix = torch.randn(size, size, device=kind).to(dtype)
    with kernels(kind):
        return 2.0 * size**3 / _seconds(kind, lambda: matrix @ matrix)


def _seconds(kind: str, call: Callable[[], Any], repeats: int = 7) -> float:
    """The quickest of some calls: what else runs on the machine only adds."""
    call()
    times = []
    for _ in range(repeats):
        wait(torch.device(kind))
        started = now()
        call()
        wait(torch.device(kind))
        times.append(now() - started)
    return min(times)
