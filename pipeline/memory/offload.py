"""What training keeps for later moves out of the device's memory: activations until the backward pass, optimizer state
until the step.

    host   of a GPU: activations go to pinned memory on a stream of their own; the state lives in the host's memory and
           weights are stepped there, one at a time, as ZeRO-Offload does (Ren et al., 2021, arXiv:2101.06840)
    disk   memory-mapped files in the run's directory, which the system writes out and drops when memory is short; on a
           CPU they are used in place

Each value comes back bit for bit, so training is the same. A storage that is saved more than once, or of which several
views are saved, is written once. Weights, buffers and the batch stay: they are held anyway.
"""

from __future__ import annotations

import mmap
import os
import tempfile
import weakref
from abc import abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Placement
from torch.utils._pytree import tree_leaves

from pipeline.layers.offload import IN_FILES, OffloadError
from pipeline.memory.measure import storages
from pipeline.optimizers.stepping import in_place_of, step_each

SMALLEST = 1 << 14
"""Bytes of a tensor below which it stays: such ones are many and hold little."""
IN_FLIGHT = 3
"""Storages that may be on their way to the host at once; the device waits for the first when there are more."""
Where = Literal["none", "host", "disk"]


class Store:
    """Where bytes are put."""

    @abstractmethod
    def put(self, octets: Tensor) -> Callable[[], Tensor]:
        """Copies `octets`, uint8 [n] on any device; what is returned gives them back, on the device they came from."""

    @abstractmethod
    def keep(self, tensor: Tensor) -> Tensor:
        """`tensor` for good, on the host; itself where it is put away already."""

    def settle(self) -> None:
        """Lets go of what was put."""


class Files(Store):
    """Memory-mapped files without a name, which are gone with the process, however it ends.

    A file that nothing uses any more is used again: a step asks for the sizes that the step before asked for, and then
    no system call is made.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._free: dict[int, list[mmap.mmap]] = {}

    def put(self, octets: Tensor) -> Callable[[], Tensor]:
        device, held = octets.device, self._empty(octets.numel())
        held.copy_(octets)
        return (lambda: held) if device.type == "cpu" else (lambda: held.to(device))

    def keep(self, tensor: Tensor) -> Tensor:
        if tensor.untyped_storage() in IN_FILES:
            return tensor
        plain = tensor.detach().contiguous()
        held = self._empty(plain.nbytes).view(plain.dtype).view(plain.shape)
        return held.copy_(plain)

    def _empty(self, count: int) -> Tensor:
        """uint8 [count] in a file, page-aligned as large tensors in memory are."""
        size = _rounded(count)
        unused = self._free.setdefault(size, [])
        mapped = unused.pop() if unused else self._new(size)
        tensor = torch.frombuffer(mapped, dtype=torch.uint8, count=count)
        storage = tensor.untyped_storage()
        IN_FILES.add(storage)
        weakref.finalize(storage, unused.append, mapped).atexit = False
        return tensor

    def _new(self, size: int) -> mmap.mmap:
        try:
            with tempfile.TemporaryFile(dir=self.directory, buffering=0) as file:
                if hasattr(os, "posix_fallocate"):  # not on macOS
                    # Room is taken now: a write to a mapping that finds the disk full would kill the process.
                    os.posix_fallocate(file.fileno(), 0, size)
                else:
                    file.truncate(size)
                return mmap.mmap(file.fileno(), size)
        except OSError as error:
            raise OffloadError(f"{self.directory}: no room for a file of {size} bytes: {error.strerror}") from error


def _rounded(count: int) -> int:
    """The next size that files have: eighths of a power of two, whole pages."""
    unit = max(mmap.PAGESIZE, 1 << max(0, count.bit_length() - 4))
    return -(-count // unit) * unit


class Host(Store):
    """The memory of a GPU's host, pinned for what comes back to the GPU."""

    def __init__(self) -> None:
        self._leaving: deque[tuple[Tensor, torch.cuda.Event]] = deque()
        self._stream: torch.cuda.Stream | None = None

    def put(self, octets: Tensor) -> Callable[[], Tensor]:
        self._stream = self._stream or torch.cuda.Stream(octets.device)  # type: ignore[no-untyped-call]
        device, held = octets.device, torch.empty(octets.numel(), dtype=torch.uint8, pin_memory=True)
        self._stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(self._stream):
            held.copy_(octets, non_blocking=True)
        there = self._stream.record_event()
        # Held until the device has waited for the copy: only then may its memory be used for something else.
        self._leaving.append((octets, there))
        self._settle(IN_FLIGHT)

        def back() -> Tensor:
            torch.cuda.current_stream(device).wait_event(there)
            return held.to(device, non_blocking=True)

        return back

    def settle(self) -> None:
        self._settle(0)

    def _settle(self, left: int) -> None:
        while len(self._leaving) > left:
            octets, there = self._leaving.popleft()
            torch.cuda.current_stream(octets.device).wait_event(there)

    def keep(self, tensor: Tensor) -> Tensor:
        return tensor.detach().cpu()


def store(where: Where, directory: Path) -> Store:
    """`where` is `host` or `disk`; files lie in `directory`."""
    return Files(directory) if where == "disk" else Host()


@dataclass
class Saved:
    """A tensor put away: where it lies in a span of a storage."""

    span: Span
    dtype: torch.dtype
    offset: int
    size: torch.Size
    stride: tuple[int, ...]

    def tensor(self) -> Tensor:
        octets = self.span.octets()
        back = torch.empty(0, dtype=self.dtype, device=octets.device)
        return back.set_(octets.untyped_storage(), self.offset, self.size, self.stride)


class Span:
    """Octets of a storage. What was brought back is shared by all that ask while one of them has it."""

    def __init__(self, octets: Callable[[], Tensor]) -> None:
        self._octets = octets
        self._back: weakref.ref[Tensor] | None = None

    def octets(self) -> Tensor:
        back = self._back() if self._back else None
        if back is None:
            back = self._octets()
            self._back = weakref.ref(back)
        return back


@dataclass
class SavedDTensor:
    """A tensor that is spread over devices, of which the part here is put away."""

    local: Saved
    like: tuple[DeviceMesh, Sequence[Placement]]
    size: torch.Size
    stride: tuple[int, ...]

    def tensor(self) -> Tensor:
        mesh, placements = self.like
        return DTensor.from_local(
            self.local.tensor(), mesh, placements, run_check=False, shape=self.size, stride=self.stride
        )


class ActivationOffload:
    """Puts away what the forward pass of `model` saves for the backward pass."""

    def __init__(self, model: nn.Module, where: Store) -> None:
        self.model, self.store = model, where
        self._held: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()
        self._spans: weakref.WeakKeyDictionary[torch.UntypedStorage, dict[Any, Span]] = weakref.WeakKeyDictionary()
        self._hooks: list[Any] | None = None

    @contextmanager
    def saving(self, batch: Any) -> Iterator[None]:
        """The forward pass takes place within; the backward pass needs not."""
        if self._hooks is None:
            # FSDP makes whole weights when a block runs, always in the same storages.
            blocks = [module for module in self.model.modules() if isinstance(module, FSDPModule)]
            self._hooks = [block.register_forward_pre_hook(self._hold_weights) for block in blocks]
        given = [leaf for leaf in tree_leaves(batch) if isinstance(leaf, Tensor)]
        self._hold([*self.model.parameters(), *self.model.buffers(), *given])
        with saved_tensors_hooks(self.pack, unpack):
            yield
        self.store.settle()

    def close(self) -> None:
        for hook in self._hooks or []:
            hook.remove()
        self._hooks = None

    def _hold_weights(self, block: nn.Module, inputs: Any) -> None:
        self._hold(block.parameters())

    def _hold(self, tensors: Iterable[Tensor]) -> None:
        self._held.update(storages(tensors))

    def pack(self, tensor: Tensor) -> Tensor | Saved | SavedDTensor:
        """What is kept for the backward pass: the tensor itself, or where it was put."""
        if type(tensor) is DTensor and type(tensor._local_tensor) is Tensor:
            local = self.pack(tensor._local_tensor)
            if isinstance(local, Tensor):
                return tensor
            assert isinstance(local, Saved)
            return SavedDTensor(local, (tensor.device_mesh, tensor.placements), tensor.shape, tensor.stride())
        plain = type(tensor) is Tensor and tensor.layout == torch.strided
        if not plain or tensor.is_conj() or tensor.is_neg() or tensor.nbytes < SMALLEST:
            return tensor
        storage = tensor.untyped_storage()
        if storage in self._held or storage in IN_FILES or tensor.device.type == "meta":
            return tensor
        start, end = _part(tensor, storage.nbytes())
        spans = self._spans.setdefault(storage, {})
        key = (start, end, tensor._version)
        if key not in spans:
            octets = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage, start, (end - start,), (1,))
            spans[key] = Span(self.store.put(octets))
        offset = int(tensor.storage_offset()) - start // tensor.itemsize
        return Saved(spans[key], tensor.dtype, offset, tensor.shape, tensor.stride())


def _part(tensor: Tensor, size: int) -> tuple[int, int]:
    """The octets of the storage to put away with `tensor`: all, unless it is a small part of a large one."""
    if 4 * tensor.nbytes >= size:
        return 0, size
    extent = 1 + sum((length - 1) * stride for length, stride in zip(tensor.shape, tensor.stride(), strict=True))
    start = int(tensor.storage_offset()) * tensor.itemsize
    return start, start + int(extent) * tensor.itemsize


def unpack(kept: Tensor | Saved | SavedDTensor) -> Tensor:
    """The tensor that `ActivationOffload.pack` was given, bit for bit."""
    return kept if isinstance(kept, Tensor) else kept.tensor()


def offload_optimizer(optimizer: torch.optim.Optimizer, where: Store) -> None:
    """From now on the state of `optimizer` is kept by `where`, and each weight is stepped where its state is.

    The first step makes and puts away the state of one weight at a time; loading a checkpoint puts it away too. The
    optimizer's own arithmetic is used, so on a CPU steps are the same bit for bit.
    """

    @contextmanager
    def stepped(weight: nn.Parameter) -> Iterator[None]:
        put_away(weight)
        with nullcontext() if weight.device.type == "cpu" else _on_host(optimizer, weight):
            yield
        put_away(weight)

    def put_away(weight: nn.Parameter) -> None:
        state = optimizer.state[weight]
        for name, value in state.items():
            state[name] = _kept(value, where)

    aside: list[dict[str, Any]] = []

    def set_aside(_: torch.optim.Optimizer, given: dict[str, Any]) -> dict[str, Any]:
        # torch would move the state to the weights' device.
        aside.append(given)
        return {**given, "state": {}}

    def put_back(loaded: torch.optim.Optimizer) -> None:
        given = aside.pop()
        keys = [key for group in given["param_groups"] for key in group["params"]]
        weights = [weight for group in loaded.param_groups for weight in group["params"]]
        for key, weight in zip(keys, weights, strict=True):
            if key in given["state"]:
                loaded.state[weight] = {name: _kept(value, where) for name, value in given["state"][key].items()}

    optimizer.register_load_state_dict_pre_hook(set_aside)
    optimizer.register_load_state_dict_post_hook(put_back)
    step_each(optimizer, stepped)


def _kept(value: Any, where: Store) -> Any:
    """A value of an optimizer's state, put away if it is a tensor that is worth it."""
    if type(value) is DTensor:
        local = _kept(value.to_local(), where)
        if local is value._local_tensor:
            return value
        return DTensor.from_local(
            local, value.device_mesh, value.placements, run_check=False, shape=value.shape, stride=value.stride()
        )
    return where.keep(value) if isinstance(value, Tensor) and value.nbytes >= SMALLEST else value


@contextmanager
def _on_host(optimizer: torch.optim.Optimizer, weight: nn.Parameter) -> Iterator[None]:
    """While entered, `optimizer` steps a copy of `weight` in the host's memory; the device gets what it is then."""
    assert weight.grad is not None
    near = nn.Parameter(weight.detach().cpu())
    near.grad_dtype = weight.grad_dtype
    near.grad = weight.grad.cpu()
    with in_place_of(optimizer, weight, near):
        yield
    weight.data.copy_(near.data)
