"""Measured peaks of allocated memory: what a phase, or two warm optimizer steps of a fit, really held.

CPU: the C++ allocator reports each allocation and release to torch's profiler; the running sum over them, on top of
the tensors that were alive at the start, gives the exact peak of tensors (resident memory is no oracle: it counts the
interpreter and pages that were freed long ago). Scratch space that oneDNN allocates by itself is not among the events.
What lies in mapped files does not count: weights (layers/offload.py), and what training put there.
CUDA: the caching allocator's own high-water marks: bytes of tensors, and of the pool that it has taken from the device
for them, which other programs cannot use. MPS: what the driver holds at the end; its pool only grows between clearings.
"""

from __future__ import annotations

import os
import threading
import time
import weakref
from bisect import bisect_left
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import lightning.pytorch as lightning
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_leaves

from pipeline.layers import pulse
from pipeline.layers.offload import IN_FILES, MAPS

autograd: Any = torch.autograd  # its profiler has no types


@dataclass
class Peak:
    """`bytes`: the peak of the measured phase; None until it has ended. `reserved`: what CUDA's pool held at most."""

    bytes: int | None = None
    reserved: int | None = None


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the storages behind `tensors`; one that several share (tied weights, views) counts once."""
    return sum(storage.nbytes() for storage in storages(tensors))


def storages(tensors: Iterable[Tensor]) -> list[torch.UntypedStorage]:
    """Each storage once: wrapper subclasses are taken apart, sparse and meta tensors have none that counts."""
    found = {}
    waiting = list(tensors)
    while waiting:
        tensor = waiting.pop()
        if hasattr(tensor, "__tensor_flatten__"):
            parts = (getattr(tensor, name) for name in tensor.__tensor_flatten__()[0])
            waiting.extend(part for part in parts if isinstance(part, Tensor))  # a DTensor also names its mesh
        elif tensor.layout == torch.strided and tensor.device.type != "meta":
            storage = tensor.untyped_storage()
            found[storage._cdata] = storage
    return list(found.values())


class Trace:
    """The peak of CPU memory between `start` and `stop`, on this thread and those that serve it.

    The profiler reports the release of a block only if it saw its allocation, so the storages that were alive at the
    start say so themselves, by a mark in the sequence of events. And it remembers blocks of earlier traces that were
    freed unseen: when their address is in use again, it reports the release of a size that is long gone. Only what was
    allocated within this trace, by address, is therefore taken off again. About a microsecond an allocation.

    Between processes gloo's threads hold what was sent a little longer than whoever waited for it, on a busy machine
    milliseconds. What they let go of last nobody reports, so while a trace records, whoever waits waits for them too.

    The events that were recorded take little room, what the profiler makes of them at the end a hundredfold: long loops
    call `layers.pulse.pulse`, at which they are added up and forgotten.
    """

    def __init__(self) -> None:
        self._base = 0
        self._watched: list[Any] = []
        self._sum = Sum()
        self._waiting = ExitStack()

    def start(self, alive: Iterable[Tensor], unseen: int = 0) -> None:
        held = [storage for storage in storages(alive) if storage not in IN_FILES]
        self._base = unseen + sum(storage.nbytes() for storage in held)
        self._watched = [weakref.finalize(storage, _mark_release, storage.nbytes()) for storage in held]
        del held
        self._sum, self._thread = Sum(), threading.get_ident()
        self._waiting.enter_context(waiting_longer())
        self._record()
        pulse.listeners.append(self._renew)

    def stop(self) -> int:
        """The peak in bytes: what was alive at the start, and the largest sum of allocations less releases since."""
        pulse.listeners.remove(self._renew)
        self._waiting.close()
        self._add_up()
        for watched in self._watched:
            watched.detach()
        return self._base + self._sum.peak

    def _record(self) -> None:
        options = {"report_input_shapes": False, "profile_memory": True, "with_stack": False, "with_flops": False}
        config = autograd.ProfilerConfig(
            autograd.ProfilerState.KINETO, *options.values(), False, torch._C._profiler._ExperimentalConfig()
        )
        with _silent_stderr():
            autograd._prepare_profiler(config, {autograd.ProfilerActivity.CPU})
            # Of operators nothing is recorded, only allocations and our own marks.
            scopes = {torch._C._profiler.RecordScope.USER_SCOPE}
            autograd._enable_profiler(config, {autograd.ProfilerActivity.CPU}, scopes)
        self._since = time.perf_counter()

    def _add_up(self) -> None:
        with _silent_stderr():
            result = autograd._disable_profiler()
        self._sum.add(_events(result.experimental_event_tree()))

    def _renew(self) -> None:
        if threading.get_ident() == self._thread and time.perf_counter() - self._since > RENEWED_AFTER:
            self._add_up()
            self._record()


RENEWED_AFTER = 0.2
"""Seconds."""
LONGER = 0.001
"""Seconds; gloo's threads need some microseconds, on a busy processor more."""
LONGEST = 1.0
"""Seconds after which a thread is taken to be at work on something else."""
THREADS = Path("/proc/self/task")
GLOO = "pt_gloo_runloop"
RELEASED = "leanfit released "


@contextmanager
def waiting_longer() -> Iterator[None]:
    """Whoever waits for a collective gives gloo's threads the time to let go of it first."""
    if not (dist.is_available() and dist.is_initialized()):
        yield
        return
    from torch.distributed import _functional_collectives as functional

    def longer(wait: Callable[..., Any]) -> Callable[..., Any]:
        def waits(*args: Any, **kwargs: Any) -> Any:
            done = wait(*args, **kwargs)
            let_go()
            return done

        return waits

    with (
        mock.patch.object(dist.Work, "wait", longer(dist.Work.wait)),
        mock.patch.object(functional, "wait_tensor", longer(functional.wait_tensor)),
    ):
        yield


def let_go() -> None:
    """Until gloo's threads sleep, which they do not before they have let go of what was sent; a while without Linux."""
    since = time.perf_counter()
    while (states := gloo_states()) - {"S"} and time.perf_counter() - since < LONGEST:
        time.sleep(LONGER / 10)
    if not states:
        time.sleep(LONGER)


def gloo_states() -> set[str]:
    """What the kernel says of gloo's threads: S sleeps, R runs or would if a processor were free."""
    states = set()
    for thread in THREADS.glob("*/stat"):
        with suppress(OSError):  # it has ended
            name, _, rest = thread.read_text().partition("(")[2].rpartition(")")
            if name == GLOO:
                states.add(rest.split(maxsplit=1)[0])
    return states


def _mark_release(size: int) -> None:
    with autograd.profiler.record_function(f"{RELEASED}{size}"):
        pass


def _events(roots: list[Any]) -> list[Any]:
    """The profiler's tree as a list in the order of time."""
    events, waiting = [], list(roots)
    while waiting:
        event = waiting.pop()
        events.append(event)
        waiting.extend(event.children)
    return sorted(events, key=lambda event: event.start_time_ns)


class Sum:
    """The running sum of bytes allocated less those released, and its peak, at least 0.

    Of a block that a thread without a profiler lets go of, as gloo's may, no release is reported: it is over, at the
    latest, when another block lies where it was.
    """

    def __init__(self) -> None:
        self.held = self.peak = 0
        self._sizes: dict[int, int] = {}
        self._places: list[int] = []  # addresses of `_sizes` in their order
        self._mapped = False

    def add(self, events: Iterable[Any]) -> None:
        """Go on with `events`, in the order of time."""
        for event in events:
            if event.tag == torch._C._profiler._EventType.Allocation:
                block = event.extra_fields
                if self._mapped:  # a file: neither this nor its release counts
                    self._mapped = False
                elif block.alloc_size > 0:
                    self._place(block.ptr, block.alloc_size)
                    self.held += block.alloc_size
                    self.peak = max(self.peak, self.held)
                elif block.ptr in self._sizes:
                    self._remove(bisect_left(self._places, block.ptr))
            elif event.name == MAPS:
                self._mapped = True
            elif event.name.startswith(RELEASED):
                self.held -= int(event.name.removeprefix(RELEASED))

    def _place(self, start: int, size: int) -> None:
        at = bisect_left(self._places, start)
        if at and self._places[at - 1] + self._sizes[self._places[at - 1]] > start:
            at -= 1
            self._remove(at)
        while at < len(self._places) and self._places[at] < start + size:
            self._remove(at)
        self._places.insert(at, start)
        self._sizes[start] = size

    def _remove(self, at: int) -> None:
        self.held -= self._sizes.pop(self._places.pop(at))


@contextmanager
def _silent_stderr() -> Iterator[None]:
    """Starting and stopping, the profiler writes lines of its own to the process's stderr, whatever its log level."""
    try:
        kept = os.dup(2)
    except OSError:  # the process has no stderr
        yield
        return
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


class Meter:
    """Start and stop around a phase on any device. `start` takes the tensors that are alive and stay in the sum."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.trace = Trace()
        self.reserved: int | None = None
        """After `stop`: the most that CUDA's pool has taken from the device."""

    def start(self, alive: Iterable[Tensor], unseen: int = 0) -> None:
        """`unseen`: bytes that are alive beside `alive`, in tensors which nobody can name (CPU)."""
        if self.device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        elif self.device == "mps":
            torch.mps.empty_cache()
        else:
            self.trace.start(alive, unseen)

    def stop(self) -> int:
        if self.device == "cuda":
            torch.cuda.synchronize()
            self.reserved = torch.cuda.max_memory_reserved()
            return torch.cuda.max_memory_allocated()
        if self.device == "mps":
            return torch.mps.driver_allocated_memory()
        return self.trace.stop()


@contextmanager
def measure_peak(device: str, alive: Iterable[Tensor] = (), unseen: int = 0) -> Iterator[Peak]:
    """`with measure_peak("cpu", model.parameters()) as peak: ...` and then `peak.bytes`.

    Args:
        device: 'cpu', 'cuda' or 'mps'.
        alive: tensors that exist at the start and belong to the phase (CPU only: accelerators know by themselves).
        unseen: bytes that are there besides, behind no tensor (`bucket_bytes`).

    The events of a phase are kept until its end, about 1 KB an operator: measure hundreds of batches, not
    millions.
    """
    peak = Peak()
    meter = Meter(device)
    meter.start(alive, unseen)
    del alive  # or what the phase lets go of would stay
    try:
        yield peak
    finally:
        peak.bytes, peak.reserved = meter.stop(), meter.reserved


class _Measuring(lightning.Callback):
    """Measures the peak over a part of a fit. `beside`: gives tensors that are alive and that the module does not hold;
    asked when measuring starts."""

    def __init__(self, beside: Callable[[], Iterable[Tensor]]) -> None:
        self.beside = beside
        self.peak_bytes: int | None = None
        """Peak in bytes; None until it has been measured."""
        self.reserved_bytes: int | None = None
        """The most that CUDA's pool has taken from the device meanwhile."""
        self._meter: Meter | None = None

    def state_dict(self) -> dict[str, Any]:
        return {"peak_bytes": self.peak_bytes, "reserved_bytes": self.reserved_bytes}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """What an earlier process measured; it stays where that took the last step, too."""
        self.peak_bytes, self.reserved_bytes = state_dict["peak_bytes"], state_dict["reserved_bytes"]

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self._stop()
        self.beside = tuple  # the progress bar asks for `skipped_steps` as long as it lives: a teacher is not to

    def on_exception(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, exception: BaseException
    ) -> None:
        self._stop()

    def _start(
        self, trainer: lightning.Trainer, module: lightning.LightningModule, batch: Any, steps: Collection[int] = ()
    ) -> None:
        """`steps`: as for `bucket_bytes`."""
        meter = Meter(module.device.type)
        alive = [*training_tensors(trainer, module, batch), *self.beside()]
        meter.start(alive, bucket_bytes(trainer.strategy.model, steps))
        self._meter = meter

    def _stop(self) -> None:
        if self._meter is not None:
            self.peak_bytes, self.reserved_bytes = self._meter.stop(), self._meter.reserved
            self._meter = None


class MeasureTraining(_Measuring):
    """Measures the peak over warm optimizer steps of a fit, counted from the first step that this process runs.

    By the second step gradients and optimizer states exist, and from then on every step is alike: two are measured. In
    a fit too short for them the last steps it has are taken, the first one only where there is no other. Later fits
    with the same callback are left alone.

    Args:
        steps: first and last optimizer step to measure, from 0.
        beside: gives tensors that are alive and that the module does not hold; asked when measuring starts.
    """

    def __init__(self, steps: tuple[int, int] = (2, 3), beside: Callable[[], Iterable[Tensor]] = tuple) -> None:
        if not 0 <= steps[0] <= steps[1]:
            raise ValueError(f"steps={steps}: the first must be at least 0 and not above the last")
        super().__init__(beside)
        self.steps = steps
        self.skipped_steps: frozenset[int] = frozenset()
        """Optimizer steps (`trainer.global_step` at their start) that were slowed down: to leave out of rates."""
        self._finished = False

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        if self._finished:
            return
        first, last = self.steps
        if trainer.max_steps > 0:
            left = trainer.max_steps - trainer.global_step
            last = min(last, left - 1)
            first = max(min(1, last), min(first, last - (self.steps[1] - self.steps[0])))
        self._began = trainer.global_step
        self.skipped_steps = frozenset(range(self._began + first, self._began + last + 1))

    def on_train_batch_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._finished or self._meter is not None or not self.skipped_steps:
            return
        if trainer.global_step == min(self.skipped_steps):
            self._start(trainer, pl_module, batch, [step - self._began for step in self.skipped_steps])

    def on_validation_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self._stop()  # a validation between two steps is no part of them

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step > max(self.skipped_steps, default=trainer.global_step):
            self._stop()

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        super().on_train_end(trainer, pl_module)
        self._finished = True

    def _stop(self) -> None:
        self._finished = self._finished or self._meter is not None
        super()._stop()


class MeasureValidation(_Measuring):
    """Measures the peak over the first two batches of the first validation of a fit: the second is computed while what
    the first has left is there."""

    def on_validation_batch_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        if self.peak_bytes is None and self._meter is None and batch_idx == 0:
            self._start(trainer, pl_module, batch)

    def on_validation_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        *_: Any,
    ) -> None:
        if batch_idx == 1:
            self._stop()

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self._stop()


def bucket_bytes(wrapped: Any, steps: Collection[int] = ()) -> int:
    """Bytes of the buckets in which `ddp` sends gradients: 0 where those that are there lie in them.

    `steps`: the next ones, from 0 in this process. One of them may let these go and make others, in the order of its
    gradients: the second, of a static graph the third.
    """
    if not isinstance(wrapped, DistributedDataParallel) or 1 + wrapped.static_graph in steps:
        return 0
    if wrapped.gradient_as_bucket_view and any(weight.grad is not None for weight in wrapped.parameters()):
        return 0
    told = wrapped._get_ddp_logging_data()  # type: ignore[no-untyped-call]
    sizes = told.get("rebuilt_bucket_sizes") or told["bucket_sizes"]
    return sum(int(size) for size in sizes.split(","))


def training_tensors(trainer: lightning.Trainer, module: lightning.LightningModule, batch: Any) -> list[Tensor]:
    """What training holds between steps: weights, gradients, buffers, optimizer states, and the batch at hand."""
    # ZeRO steps flat shards, which its optimizer has during the step alone with stage 3, in which weights are empty.
    stepped = [
        weight for optimizer in trainer.optimizers for group in optimizer.param_groups for weight in group["params"]
    ]
    shards = [weight.ds_tensor for weight in module.parameters() if hasattr(weight, "ds_tensor")]
    parameters = [*module.parameters(), *stepped, *shards]
    gradients = [weight.grad for weight in parameters if weight.grad is not None]
    engine = getattr(trainer.strategy.model, "optimizer", None)
    parameters += getattr(engine, "fp32_partitioned_groups_flat", [])
    # Where stage 3 sums gradients, and the buckets in which it sends them.
    gradients.append(getattr(engine, "grad_partitions_flat_buffer", None))
    gradients += tree_leaves([bucket.buffer for bucket in getattr(engine, "ipg_buckets", {}).values()])
    # What PowerSGD keeps of gradients, and its factors.
    for _, state in getattr(trainer.strategy.model, "_comm_hooks", ()):
        if state is not None:
            gradients += tree_leaves([state.error_dict, state.p_memory_dict, state.q_memory_dict])
    states = [leaf for optimizer in trainer.optimizers for leaf in tree_leaves(list(optimizer.state.values()))]
    leaves = [*parameters, *gradients, *module.buffers(), *states, *tree_leaves(batch)]
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]
