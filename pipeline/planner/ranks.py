"""What a rank holds of a model in training, and what it has besides while a block is at work.

The choice of parallelism says what is spread (`Holding`); here is the order of events. Weights that are spread are put
together for each block, as torch's FSDP2 does it:

    forward   a buffer of the block's weights arrives, weights are copied out; they go, the buffer stays until that of
              the next block is there
    backward  the weights again, while those of the next block arrive already; whole gradients are copied into a
              buffer, which is summed over the ranks into this rank's part, and stays a block long

Between processes on a CPU gloo has a copy of each buffer for a moment.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.distributed.tensor import Shard
from torch.utils._pytree import tree_leaves

from pipeline.layers import sync_norm
from pipeline.models.base import Architecture
from pipeline.parallelism.base import Holding
from pipeline.parallelism.sharding import HEAD_COUNTS, dtype_of, tensor_parallel_plan
from pipeline.planner.folding import Account
from pipeline.planner.stepping import gradient_dtype

ZERO_LIVE, ZERO_PREFETCHED = 1_000_000_000, 50_000_000
"""Elements of whole weights that DeepSpeed's stage 3 lets live at once, and of those that it has arrive at once."""
COMMUNICATION = "communication buffers"
GATHERED = "gathered weights"
LEFT_OUT = "left out of gradients"
BUCKET = 25 * 2**20
"""Bytes of gradients that torch's DDP sends at once on GPUs; on a CPU what leaves something out is sent all at once."""


def part(shape: torch.Size, ranks: int) -> torch.Size:
    """What the first of so many ranks holds of a tensor that is split by rows."""
    if ranks == 1 or not shape:
        return shape
    return torch.Size((math.ceil(shape[0] / ranks), *shape[1:]))


def split_dimensions(model: nn.Module, architecture: Architecture) -> dict[str, int]:
    """{name of a weight that tensor parallelism splits: along which dimension}."""
    return {
        f"{name}.{key}": placement.dim
        for name, style in tensor_parallel_plan(architecture).items()
        for key, _ in model.get_submodule(name).named_parameters(recurse=False)
        if isinstance(placement := style.PLACEMENTS[key], Shard)
    }


def split_layers(model: nn.Module, architecture: Architecture, ranks: int) -> None:
    """The layers that tensor parallelism splits, as one of so many ranks has them; in place, on the meta device."""
    if ranks == 1:
        return
    for name, dimension in split_dimensions(model, architecture).items():
        weight, (layer, _, key) = model.get_parameter(name), name.rpartition(".")
        kept = list(weight.shape)
        kept[dimension] //= ranks
        split = nn.Parameter(weight.new_empty(kept), weight.requires_grad)
        model.get_submodule(layer).register_parameter(key, split)
    for block in architecture.blocks:
        if block.attention:
            module = model.get_submodule(block.attention.output.rpartition(".")[0])
            for name in HEAD_COUNTS:
                if module.__dict__.get(name) in (block.attention.heads, block.attention.key_value_heads):
                    setattr(module, name, module.__dict__[name] // ranks)


@contextmanager
def norms_over(model: nn.Module, ranks: int) -> Iterator[None]:
    """While entered, batch norms of `model`, which become those of so many ranks, suppose the others."""
    sync_norm.synchronise_batch_norms(model)
    with (
        mock.patch.object(sync_norm, "ranks", return_value=ranks),
        mock.patch.object(sync_norm, "summed", _Sum.apply),
    ):
        yield


class _Sum(torch.autograd.Function):
    """A sum over ranks, which is made in a copy, as that of its gradient is."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0].clone()


class Rank:
    """One rank while `account` counts a step. The methods are called in their order; `around` for each block.

    Args:
        model: of fake tensors, in the dtype that is computed in.
        dtype: of weights between steps.
        accumulates: gradients of earlier micro batches are there.
        on_cpu: ranks are processes on a CPU.
        steps: of the fit.
    """

    def __init__(
        self,
        holding: Holding,
        account: Account,
        model: nn.Module,
        blocks: Sequence[str],
        dtype: torch.dtype,
        accumulates: bool,
        on_cpu: bool,
        steps: int,
    ) -> None:
        self.holding, self.account, self.model, self.dtype = holding, account, model, dtype
        self.accumulates, self.on_cpu = accumulates, on_cpu
        self.leaves_out = holding.leaves_out is not None and steps > holding.leaves_out
        self.weights = list(model.parameters())
        self.trained = [weight for weight in self.weights if weight.requires_grad]
        modules = [model.get_submodule(name) for name in blocks]
        self.numbers = {block: number for number, block in enumerate(modules)}
        self.blocks = [list(block.parameters()) for block in modules]
        inside = {id(weight) for block in self.blocks for weight in block}
        self.outside = [weight for weight in self.weights if id(weight) not in inside]
        self.guests: dict[str, list[Tensor]] = {}

    def enter(self, state: int, kept: bool) -> None:
        """What is there when a step begins. `state`: bytes of the optimizer's; `kept`: gradients of the last step are
        there."""
        holding = self.holding
        self.account.hold_model(self.model)
        if holding.weights > 1 or holding.gathers:  # these are what is put together, of one part where all is copies
            for weight in self.weights:
                block = self.account.block(weight)
                assert block is not None
                block.bytes = 0
            self.have("weights", self.part(self.weights, holding.weights), "weights")
        self.have("state", state, "optimizer state")
        if holding.master:
            self.have("master", self.part(self.trained, holding.state), "master weights")
        if self.engine and holding.weights > 1:  # there for good
            self.keep_small()
            self.have("bucket", self.bucket() * self.dtype.itemsize, COMMUNICATION)
        if holding.buckets == "copies" or (holding.buckets == "views" and self.accumulates):
            self.have("buckets", self.sent(), COMMUNICATION)
        if self.leaves_out:
            self.have("left out", self.sent(), LEFT_OUT)
        if kept or self.accumulates or self.gradients_stay:
            self.fill()

    def sent(self) -> int:
        """Bytes of whole gradients."""
        return sum(grad_bytes(weight) for weight in self.trained)

    @property
    def gradients_stay(self) -> bool:
        """Gradients live in buffers that are there for good."""
        views = self.holding.buckets == "views" and not self.accumulates
        return views or (self.engine and self.holding.weights > 1)

    @property
    def engine(self) -> bool:
        """DeepSpeed steps, which lets go of gradients as it has."""
        return self.holding.bucket is not None

    def fill(self) -> None:
        """Gradients, as they are held between backward passes."""
        if self.holding.gradients > 1 or self.holding.gathers:
            if self.holding.gathers or self.accumulates or self.gradients_stay:
                self.have("gradients", self.part(self.trained, self.holding.gradients), "gradients")
            return
        if self.engine and not self.accumulates:
            return
        if not self.accumulates and not self.gradients_stay:  # nothing is added to them
            self.have("gradients", self.sent(), "gradients")
            return
        for weight in self.trained:
            weight.grad = torch.empty(weight.shape, dtype=gradient_dtype(weight))
        self.account.hold((weight.grad for weight in self.trained if weight.grad is not None), "gradients")

    def forward(self) -> None:
        """What is put together until the backward pass is over: all but the blocks; with ZeRO what may live at once."""
        if self.holding.gathers:
            self.gather(self.outside)
            self.copy_out(self.outside, "outside")
            self.watch()
        elif self.holding.weights > 1:
            whole = sum(weight.numel() for weight in self.weights)
            size = min(whole, ZERO_PREFETCHED) * self.dtype.itemsize
            self.have("arrived", size, COMMUNICATION)
            self.briefly(size)
            self.drop("small")
            self.have("outside", min(whole, ZERO_LIVE) * self.dtype.itemsize, GATHERED)
            if not self.blocks:
                self.drop("arrived")

    def watch(self) -> None:
        """The last block's buffer stays until the model has run. Then, as soon as its output has a gradient, the last
        block's weights are gathered, before anything else of the backward pass."""

        def ended(model: nn.Module, given: Any, output: Any) -> None:
            seen.remove()
            self.drop("arrived")
            for leaf in tree_leaves(output):
                if isinstance(leaf, Tensor) and leaf.requires_grad:
                    leaf.register_hook(lambda _: self.fetch(len(self.blocks) - 1))  # type: ignore[no-untyped-call]

        seen = self.model.register_forward_hook(ended)

    def fetch(self, number: int) -> None:
        """Gather the weights of a block for its backward pass, unless they are there."""
        if number >= 0 and not self.holding.keeps and not self.guests.get("arrived"):
            self.gather(self.blocks[number])

    def around(self, block: nn.Module, backward: bool, begins: bool) -> None:
        """See `folding.Folding`."""
        number = self.numbers.get(block)
        if backward and begins:
            self.make_bucket()
        if self.engine and not backward and not begins and number == len(self.blocks) - 1:  # all has been used
            self.drop("arrived")
        if not self.holding.gathers or number is None:  # a teacher is whole on each rank
            return
        weights, name = self.blocks[number], f"block {number}"
        if begins and not backward:
            before = self.guests.pop("arrived", None)
            self.gather(weights)
            self.copy_out(weights, name)
            del before
        elif not backward:
            if not self.holding.keeps:
                self.drop(name)
        elif begins:
            if not self.holding.keeps:
                self.fetch(number)
                self.copy_out(weights, name)
                self.drop("arrived")
            self.fetch(number - 1)
        else:
            self.drop(name)
            self.send(weights)

    def within(self, block: nn.Module) -> None:
        """See `folding.Folding`."""
        if self.holding.gathers and block in self.numbers:
            self.reduce(self.blocks[self.numbers[block]])

    def backward(self) -> None:
        """Before the backward pass; gradients of the step before are freed where it is the first one of a step."""
        if not self.accumulates and not self.gradients_stay:
            self.drop("gradients")
        if sent := dtype_of(self.holding.sent_in):
            self.have("sent", sum(weight.numel() for weight in self.trained) * sent.itemsize, COMMUNICATION)
        if self.engine:
            for weight in self.outside:
                if weight.requires_grad:
                    weight.register_post_accumulate_grad_hook(lambda _: self.make_bucket())  # type: ignore[no-untyped-call]
        if self.engine and self.holding.gradients > 1:
            for weight in self.trained:
                weight.register_post_accumulate_grad_hook(_let_go)  # type: ignore[no-untyped-call]

    def keep_small(self) -> None:
        """Weights that DeepSpeed's stage 3 keeps whole between steps; in a step they come with all others."""
        small = sum(weight.numel() for weight in self.weights if weight.numel() < self.holding.whole_below)
        self.have("small", small * self.dtype.itemsize, "weights")

    def make_bucket(self) -> None:
        """Where DeepSpeed's stages 1 and 2 have the first gradient."""
        if self.engine and not self.guests.get("bucket"):
            self.have("bucket", self.bucket() * self.dtype.itemsize, COMMUNICATION)

    def finish(self) -> None:
        """After the backward pass."""
        if self.holding.gathers:
            for block, number in reversed(self.numbers.items()):
                if self.guests.get(f"block {number}"):  # its input has no gradient that says where it ends
                    self.within(block)
                    self.around(block, True, False)
            self.drop("outside")
            self.reduce(self.outside)
            self.send(self.outside)
        elif self.holding.bucket is not None:
            self.reduce_buckets()
        if self.leaves_out:  # a copy from before it was compressed, and what is left out now beside what was last time
            sent = self.sent()
            self.account.guest(2 * (sent if self.on_cpu else min(sent, BUCKET)), LEFT_OUT)
        self.drop("outside", "arrived", "sums", "sum", "sent")
        if self.engine and self.holding.weights > 1:
            self.keep_small()

    def reduce_buckets(self) -> None:
        """A copy of the bucket is sent; what this rank steps of it is kept."""
        size, bucket = sum(weight.numel() for weight in self.trained), self.bucket()
        own = 0 if self.accumulates or self.holding.weights > 1 else self.part(self.trained, self.holding.state)
        if bucket < size and self.holding.weights == 1:
            self.have("own", own, "gradients")
        if self.holding.gradients > 1 and self.holding.weights == 1:
            self.have("copy", bucket * self.dtype.itemsize, COMMUNICATION)  # with stage 1, gradients gave way to it
        self.drop("copy", "own", *(["bucket"] if self.holding.weights == 1 else []))
        if self.holding.gradients > 1:
            self.have("own", own, "gradients")
            self.have("flat", own, "gradients")

    def bucket(self) -> int:
        """Elements of DeepSpeed's buffer."""
        assert self.holding.bucket is not None
        return min(self.holding.bucket, sum(weight.numel() for weight in self.trained))

    def gather(self, weights: Sequence[nn.Parameter]) -> None:
        """Whole weights arrive in one buffer, from a copy of this rank's part where its dtype or its place differs."""
        if self.holding.weights == 1:  # a group of one sends nothing
            return
        size = self.whole(weights)
        self.have("arrived", size, COMMUNICATION)
        if self.converts or self.holding.on_host == "all":
            self.have("own part", size // self.holding.weights, COMMUNICATION)
        self.briefly(size)
        self.drop("own part")

    def copy_out(self, weights: Sequence[nn.Parameter], name: str) -> None:
        self.have(name, self.whole(weights), GATHERED)

    @property
    def converts(self) -> bool:
        """Weights are gathered in another dtype than they have between steps."""
        return any(weight.dtype != self.dtype for weight in self.weights)

    def reduce(self, weights: Sequence[nn.Parameter]) -> None:
        """Whole gradients give way to this rank's part."""
        trained = [weight for weight in weights if weight.grad is not None]
        for weight in trained:
            weight.grad = None
        if not self.accumulates:
            self.have("gradients", self.part(trained, self.holding.gradients), "gradients")

    def send(self, weights: Sequence[nn.Parameter]) -> None:
        """Gradients in one buffer, which are summed over the ranks, and stay until those of the next block are sent."""
        self.drop("sums")
        size = self.summed(weights)
        self.have("sums", size, COMMUNICATION)
        wide = dtype_of(self.holding.summed_in)
        apart = self.holding.on_host == "all" or any((wide or weight.dtype) != self.dtype for weight in weights)
        if self.accumulates or apart:  # else this is what `reduce` keeps
            self.have("sum", size // self.holding.gradients, COMMUNICATION)
        if self.holding.gradients > 1:
            self.briefly(size)
        if not self.holding.copies:  # between which it may still be on its way
            self.drop("sum")

    def have(self, name: str, size: int, kind: str) -> None:
        """So many bytes until `drop(name)`."""
        self.guests.setdefault(name, []).append(self.account.guest(size, kind))

    def drop(self, *names: str) -> None:
        for name in names:
            self.guests.pop(name, None)

    def briefly(self, size: int) -> None:
        """gloo's copy of what is sent."""
        if self.on_cpu:
            self.account.guest(size, COMMUNICATION)

    def whole(self, weights: Iterable[nn.Parameter]) -> int:
        """Bytes of weights that are put together of equal parts."""
        return sum(self.padded(weight) * weight.itemsize for weight in weights)

    def summed(self, weights: Iterable[nn.Parameter]) -> int:
        dtype = dtype_of(self.holding.summed_in)
        return sum(self.padded(weight) * (dtype or weight.dtype).itemsize for weight in weights if weight.requires_grad)

    def padded(self, weight: Tensor) -> int:
        """Elements of a weight, rounded up to equal parts."""
        return part(weight.shape, self.holding.weights).numel() * self.holding.weights

    def part(self, weights: Iterable[nn.Parameter], ranks: int) -> int:
        """Bytes of this rank's parts, in the dtype that weights have between steps; 0 where the host has them."""
        spread = (ranks > 1 or self.holding.gathers) and (weights is not self.weights or self.holding.on_host == "all")
        if self.holding.on_host != "nothing" and spread:
            return 0
        return sum(part(weight.shape, ranks).numel() for weight in weights) * self.dtype.itemsize


def _let_go(weight: Tensor) -> None:
    weight.grad = None


def grad_bytes(weight: Tensor) -> int:
    return weight.numel() * gradient_dtype(weight).itemsize
