"""Live bytes over time, counted as operators run, on tensors that hold nothing.

Under torch's FakeTensorMode each operator gives tensors of the right shape, dtype and aliasing without memory. `Live`
sees each operator after autograd and autocast, notes every new storage, and when it is freed: the sum over time is
what the allocator of a real run would hold. Kernels that take scratch space of their own inside one operator are not
seen, but for those in `inner`, and the workspaces of matrix products.
"""

from __future__ import annotations

import itertools
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from pipeline.layers.quantized import QuantizedLayer
from pipeline.models.base import Architecture
from pipeline.planner.pool import pooled
from pipeline.planner.workspaces import BIASED, PRODUCTS, WITH_BIAS, WORKSPACES

Inner = Callable[[str, Any, tuple[Any, ...], dict[str, Any]], Any]
"""(operator's name, operator, arguments, named arguments) -> its result; NotImplemented where torch's own will do."""
COUNTING: weakref.WeakSet[Any] = weakref.WeakSet()
"""Each `Live` that there is."""
FILES: dict[int, torch.UntypedStorage] = {}
"""Storages of fake tensors that stand for such in files, by address."""
HOST: dict[int, torch.UntypedStorage] = {}
"""And for such in the memory of a GPU's host, where a plan is a GPU's."""
SAMPLES = 200
"""Moments of a phase that a plan keeps, for its plot."""


ROUNDING = "rounding of CUDA's pool"
"""What blocks take beside the tensors in them: a kind in a plan."""
ACTIVATIONS = "activations"
LOGITS_AND_LOSS = "logits and loss"
CAST_WEIGHTS = "autocast's weights"
"""Copies of weights in the dtype that a pass computes in; the weights themselves are the master weights then."""
STEP_DONE = "step is done"
"""Marks what a fit keeps between two steps."""
DEVICE = torch.ops.prim.device.default
"""What asks a tensor for its device: two of three calls that a mode gets."""

VIEW, UNSAFE_VIEW = torch.ops.aten.view.default, torch.ops.aten._unsafe_view.default
ADD = torch.ops.aten.add.Tensor
ADD_IN_PLACE = torch.ops.aten.add_.Tensor
ZEROS = frozenset({"aten::zeros", "aten::zeros_like", "aten::new_zeros"})
INTO_ZEROS = {
    torch.ops.aten.scatter.src: torch.ops.aten.scatter_.src,
    torch.ops.aten.scatter_add.default: torch.ops.aten.scatter_add_.default,
    torch.ops.aten.index_add.default: torch.ops.aten.index_add_.default,
    torch.ops.aten.index_put.default: torch.ops.aten.index_put_.default,
    torch.ops.aten.index_fill.int_Tensor: torch.ops.aten.index_fill_.int_Tensor,
    torch.ops.aten.put.default: torch.ops.aten.put_.default,
}
"""What puts the gradient of chosen elements among zeros, and the same in place."""
CAST = torch.ops.aten._to_copy.default
ENGINE = "_engine_run_backward"
"""The function of torch.autograd.graph in which backward passes run."""
DISPATCHING = frozenset({"meets_in_place", "__torch_dispatch__", "inner", "_fn"})
"""Functions between it and `only_autograd_has`, in a mode that sees an operator: the last two keep torch.compile away
from modes."""
WHOLE = frozenset(
    {
        torch.ops.aten.linear.default, torch.ops.aten.matmul.default, torch.ops.aten.conv2d.default,
        torch.ops.aten.conv2d.padding, torch.ops.aten._convolution_mode.default,
        torch.ops.aten.scaled_dot_product_attention.default, torch.ops.aten._scaled_dot_product_attention_math.default,
    }
)  # fmt: skip
"""Operators made of others, which a mode gets whole where autograd does not take them apart: in inference mode."""


@dataclass
class Block:
    """A storage: its bytes, and what it holds."""

    bytes: int
    kind: str


Event = tuple[Block, int, str]
"""(block, +1 or -1, what ran then)."""


@dataclass
class Timeline:
    """Allocations and releases in order. `cuda`: by the pool of torch for CUDA, which gives blocks of certain sizes."""

    events: list[Event] = field(default_factory=list)
    marks: list[tuple[int, str]] = field(default_factory=list)
    """(number of events before it, name) of moments that were marked."""
    cuda: bool = False

    def since(self, mark: str) -> range:
        """Events from the first mark of that name on."""
        return range(next(at for at, name in self.marks if name == mark), len(self.events))

    def held_at(self, mark: str) -> dict[str, int]:
        """Bytes by kind at the last mark of that name."""
        end = next(at for at, name in reversed(self.marks) if name == mark)
        kinds: dict[str, int] = {}
        for block, sign, _ in self.events[:end]:
            kinds[block.kind] = kinds.get(block.kind, 0) + sign * block.bytes
        return {kind: held for kind, held in kinds.items() if held}

    def peak(self, span: range | None = None) -> Peak:
        """The largest sum of live bytes within `span` (all events if None), and what it is made of."""
        span = range(len(self.events)) if span is None else span
        highest, at = 0, -1
        totals = list(self._held(span.stop))
        for number, held in enumerate(totals):
            # What is there when it begins counts, and is said to be of the event before.
            if number >= span.start - 1 and (held > highest or at < 0):
                highest, at = held, number
        kinds: dict[str, int] = {}
        for block, sign, _ in self.events[: at + 1]:
            kinds[block.kind] = kinds.get(block.kind, 0) + sign * block.bytes
        if rest := highest - sum(kinds.values()):
            kinds[ROUNDING] = rest
        operator = self.events[at][2] if at >= 0 else ""
        return Peak(highest, {kind: held for kind, held in kinds.items() if held}, operator, self._course(span, totals))

    def _held(self, stop: int) -> Iterable[int]:
        """Bytes after each event before number `stop`."""
        if self.cuda:
            return (held for held, _ in pooled(self.events[:stop]))
        return itertools.accumulate(sign * block.bytes for block, sign, _ in self.events[:stop])

    def _course(self, span: range, totals: Sequence[int]) -> Course:
        """Live bytes by kind at no more than `SAMPLES` moments within `span`: of each stretch of equally many events
        the one with the largest sum, so that no peak is lost. `totals`: bytes after each event."""
        held: dict[str, int] = {}
        highest: dict[int, tuple[int, dict[str, int]]] = {}
        stretch = max(1, -(-len(span) // SAMPLES))
        for number, (block, sign, _) in enumerate(self.events[: span.stop]):
            held[block.kind] = held.get(block.kind, 0) + sign * block.bytes
            if number < span.start:
                continue
            at, total = (number - span.start) // stretch, totals[number]
            if at not in highest or total > highest[at][0]:
                rest = total - sum(held.values())
                highest[at] = (total, {**held, ROUNDING: rest} if rest else dict(held))
        names = dict.fromkeys(kind for _, held in highest.values() for kind in held)
        kinds = {kind: [held.get(kind, 0) for _, held in highest.values()] for kind in names}
        moments = [((number - span.start) // stretch, name) for number, name in self.marks if number in span]
        return Course({kind: course for kind, course in kinds.items() if any(course)}, moments)


@dataclass(frozen=True)
class Course:
    """Live bytes of each kind over the events of a phase, and the (position, name) of moments on the way."""

    kinds: Mapping[str, list[int]]
    moments: Sequence[tuple[int, str]]


@dataclass(frozen=True)
class Peak:
    """`bytes` live at once, of which kinds, and the operator that was running; `course`: how it came, where traced.
    `reserved`: what CUDA's pool takes from the device for it (`pool`), where that is known. `kept`: bytes by kind that
    a fit keeps when a step is done, where it is traced. `saving`: and at most while ranks write its checkpoint; None:
    what is kept is written as it lies there. `plain`: why compiled blocks were taken for plain ones, which hold more;
    empty where they were not."""

    bytes: int
    kinds: Mapping[str, int]
    operator: str
    course: Course | None = field(default=None, repr=False)  # a number for each operator
    reserved: int | None = None
    kept: Mapping[str, int] | None = None
    saving: Mapping[str, int] | None = None
    plain: str = ""


def device_of(tensor: Tensor) -> torch.device:
    """The device that a tensor has, or stands for. A fake tensor's own answer goes through all modes."""
    if isinstance(tensor, FakeTensor) and not tensor.fake_mode.in_kernel_invocation:
        return cast(torch.device, cast(Any, tensor).fake_device)
    return tensor.device


def storage_key(tensor: Tensor) -> int:
    """What the storage behind a fake tensor is known by, as long as it lives."""
    return int(tensor.untyped_storage()._cdata)


def uncounted(tensor: Tensor, dtype: torch.dtype, place: dict[int, torch.UntypedStorage]) -> Tensor:
    """A fake tensor of the shape of `tensor` in `FILES` or in `HOST`: entered there before it has any bytes."""
    made = torch.empty(0, dtype=dtype)
    place[storage_key(made)] = made.untyped_storage()
    return made.resize_(tensor.shape)


def by_kind(model: nn.Module) -> dict[str, list[Tensor]]:
    """A model's own tensors. What a quantized layer holds in its weight's place is weights too, though no parameter."""
    quantized = [module for module in model.modules() if isinstance(module, QuantizedLayer)]
    stored = {id(tensor) for layer in quantized for tensor in layer.buffers()}
    buffers, lent = list(model.buffers()), [tensor for layer in quantized for tensor in layer.lent()]
    return {
        "weights": [*model.parameters(), *(tensor for tensor in buffers if id(tensor) in stored), *lent],
        "buffers": [tensor for tensor in buffers if id(tensor) not in stored],
    }


def wraps(types: Iterable[type]) -> bool:
    """Whether one of these tensors is made of others, as torchao's float8 ones are. A mode that leaves its operators to
    it (NotImplemented) sees what runs on its parts."""
    return any(hasattr(kind, "__tensor_flatten__") for kind in types)


def meets_in_place(one: Tensor, other: Tensor) -> bool:
    """Whether these are gradients of one tensor that autograd would add in place, were they no fake ones: nobody else
    holds the first (torch/csrc/autograd/input_buffer.cpp). It leaves tensors of a subclass as they are."""
    return one.shape == other.shape and one.is_contiguous() and only_autograd_has(one)


def only_autograd_has(tensor: Tensor) -> bool:
    """Whether a formula of autograd's own is at work, and nobody else holds `tensor`."""
    if torch._C._current_graph_task_id() == -1 or torch.is_grad_enabled():
        return False
    caller = sys._getframe(1)
    while caller.f_code.co_name in DISPATCHING and caller.f_back is not None:
        caller = caller.f_back
    alone = torch._C._storage_Use_Count(tensor.untyped_storage()._cdata) == 2  # the tensor, and who asks
    return alone and caller.f_code.co_name == ENGINE


class Live(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Enter it inside a FakeTensorMode; `timeline` grows while operators run.

    Args:
        inner: what an operator does inside where its kernel is another than torch's.
        workspace: bytes that a thread's first matrix product takes, and keeps.
    """

    def __init__(self, inner: Inner | None = None, workspace: int = 0) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.timeline = Timeline(cuda=workspace > 0)
        self.phase = "other"
        """What storages that appear now are for, unless somebody says."""
        self.number = 1.0
        """What a float is taken for."""
        self._inner = inner
        self._within = ""  # the operator that `inner` is asked about
        self._workspace = workspace
        self._noting = True
        self._taken: set[tuple[bool, bool]] = set()
        self._blocks: dict[int, Block] = {}
        self._watched: dict[int, Any] = {}
        self._drawn: set[int] = set()
        self._dropped: set[int] = set()
        self._zeros: set[int] = set()
        COUNTING.add(self)

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """torch.compile need not be kept away from each call of this mode: nothing is compiled in a trace."""
        return False

    def hold(self, tensors: Iterable[Tensor], kind: str) -> None:
        """Say what storages hold, also of those that are known already."""
        for tensor in tensors:
            block = self._note(tensor, "", kind)
            if block is not None:
                block.kind = kind

    def hold_model(self, model: nn.Module) -> None:
        for kind, tensors in by_kind(model).items():
            self.hold(tensors, kind)

    def block(self, tensor: Tensor) -> Block | None:
        """The storage behind `tensor`; None where it is not counted."""
        return self._blocks.get(tensor.untyped_storage()._cdata)

    @contextmanager
    def telling_loss(self, model: nn.Module, architecture: Architecture | None) -> Iterator[None]:
        """While entered, what passes through `model` make of logits and loss is told apart from activations: all that
        comes after a language model's last block, or with the head of another. Of a model that is not known
        (`architecture` is None) it is what the model gives, and what is made of that."""

        def begins(*_: Any) -> None:
            self._in_forward(ACTIVATIONS)

        def ends(*_: Any) -> None:
            self._in_forward(LOGITS_AND_LOSS)

        def gives(_: nn.Module, __: Any, out: Any) -> None:
            ends()
            for block in [self.block(leaf) for leaf in tree_iter(out) if isinstance(leaf, Tensor)]:
                if block is not None and block.kind == ACTIVATIONS:
                    block.kind = LOGITS_AND_LOSS

        if architecture and architecture.embeddings and architecture.blocks:
            blocks = [model.get_submodule(block.name) for block in architecture.blocks]
            hooks = [block.register_forward_pre_hook(begins) for block in blocks]
            hooks += [block.register_forward_hook(ends) for block in blocks]
        else:
            hooks = [model.register_forward_pre_hook(begins)]
            if architecture and architecture.head:
                hooks.append(model.get_submodule(architecture.head).register_forward_pre_hook(ends))
            else:
                hooks.append(model.register_forward_hook(gives))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _in_forward(self, kind: str) -> None:
        """What is computed again in a backward pass is part of that."""
        if torch._C._current_graph_task_id() == -1:
            self.phase = kind

    def mark(self, name: str) -> None:
        self.timeline.marks.append((len(self.timeline.events), name))

    def _note(self, tensor: Tensor, operator: str, kind: str) -> Block | None:
        if not self._noting or tensor.layout != torch.strided or device_of(tensor).type == "meta":
            return None
        storage = tensor.untyped_storage()
        key = storage._cdata
        block = self._blocks.get(key)
        if block is None:
            block = self._blocks[key] = Block(storage.nbytes(), kind)
            self.timeline.events.append((block, 1, operator))
            self._watched[key] = weakref.finalize(storage, self._release, key)
            self._watched[key].atexit = False
        return block

    @contextmanager
    def unnoted(self) -> Iterator[None]:
        """What operators make meanwhile does not count."""
        self._noting = False
        try:
            yield
        finally:
            self._noting = True

    def multiply(self, name: str) -> None:
        """A product of matrices: what its thread takes for the first one, and for the first with a bias."""
        if not self._workspace:
            return
        backward = torch._C._current_graph_task_id() != -1  # which a GPU's autograd runs in a thread of its own
        for biased in {False, name == BIASED}:
            if (backward, biased) not in self._taken:
                self._taken.add((backward, biased))
                for taken in WITH_BIAS if biased else [self._workspace]:
                    self.timeline.events.append((Block(taken, WORKSPACES), 1, name))

    def forget(self) -> None:
        """Watch no storage any more: before garbage is collected, which torch does not outlive otherwise."""
        for watched in self._watched.values():
            watched.detach()
        self._watched.clear()

    def _release(self, key: int) -> None:
        del self._watched[key]
        self._drawn.discard(key)
        self._dropped.discard(key)
        self._zeros.discard(key)
        block = self._blocks.pop(key)
        self.timeline.events.append((block, -1, ""))

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is DEVICE:
            return device_of(args[0])
        kwargs = kwargs or {}
        if func is torch.ops.aten._local_scalar_dense.default:
            if isinstance(args[0], FakeTensor) and args[0].constant is not None:  # made of numbers alone
                return args[0].constant.item()
            # Others have no values. With these no mask hides anything, and no count of steps or tokens is 0.
            if args[0].dtype == torch.bool:
                return self.truth(args[0])
            return self.number if args[0].is_floating_point() else 1
        if func in WHOLE:
            with self:
                return func.decompose(*args, **kwargs)
        if func is ADD and not kwargs and isinstance(args[1], Tensor) and meets_in_place(*args):
            func = ADD_IN_PLACE
        # Autograd's formulas take these out of place for tensors of a subclass alone.
        if func in INTO_ZEROS and args[0].untyped_storage()._cdata in self._zeros and only_autograd_has(args[0]):
            func = INTO_ZEROS[func]
        if func is UNSAFE_VIEW:  # below autograd it is any view, and fake tensors remember those
            func = VIEW
        name = func.name().partition(".")[0]
        if name in PRODUCTS:
            self.multiply(name)
        out = NotImplemented
        outer = self._within
        if self._inner is not None:
            self._within = outer or name
            try:
                with self:  # what it calls is counted too
                    out = self._inner(name, func, args, kwargs)
            finally:
                self._within = outer
        if out is NotImplemented:
            out = func(*args, **kwargs)
        for leaf in tree_iter(out):
            if isinstance(leaf, Tensor):
                self._note(leaf, outer or name, self.phase)
        if func is CAST and self.phase in (ACTIVATIONS, LOGITS_AND_LOSS) and args[0].is_floating_point():
            source = self.block(args[0])
            if source is not None and source.kind == "weights":
                self.hold([out], CAST_WEIGHTS)
        if name in ZEROS and out.untyped_storage()._cdata in self._blocks:
            self._zeros.add(out.untyped_storage()._cdata)
        elif name == "aten::rand" and out.ndim == 0:
            self._drawn.add(out.untyped_storage()._cdata)
        elif name == "aten::lt" and args[0].untyped_storage()._cdata in self._drawn:
            self._dropped.add(out.untyped_storage()._cdata)
        return out

    def truth(self, scalar: Tensor) -> bool:
        """What a truth is taken for: true, but for a number drawn at random that is compared with a rate (LayerDrop):
        nothing is dropped."""
        return scalar.untyped_storage()._cdata not in self._dropped
