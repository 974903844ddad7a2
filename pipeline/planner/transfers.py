"""What a run holds while it opens its model, and while it writes checkpoints and artifacts.

Opening is replayed tensor by tensor: fresh weights are made in float32, tied ones each for itself before they are one,
and brought to the weights' dtype one after the other; transformers puts pretrained ones together, of fake tensors for
parts of mapped files; an artifact's come in the dtypes that they have, no other tensor beside them. What lies in files
is no memory: no phase says how much it is. An artifact is written by the code that writes it, on fake tensors; and a
checkpoint writes what training keeps, as it lies there.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily

from pipeline import stage_input
from pipeline.artifact import sparse, store
from pipeline.chain import Stage
from pipeline.compression.pruning import kept_share
from pipeline.data.base import DataBundle
from pipeline.layers import stored
from pipeline.layers.footprint import file_bytes
from pipeline.layers.quantized import IntegerLayer, quantized_layers
from pipeline.layers.sparsity import bitmask_bytes, kept_of, masked_layers
from pipeline.models.architecture import describe
from pipeline.planner.fakes import fake_batch, kernels_of, tracing
from pipeline.planner.folding import Folding, folded
from pipeline.planner.live import Live, Peak, by_kind
from pipeline.planner.replaying import replaying
from pipeline.planner.supposed import Supposing
from pipeline.schema import RunConfig
from pipeline.tasks.base import Batch, Task
from pipeline.walk import changing_stages, stages_of


def trace_opening(config: RunConfig, data: DataBundle) -> Peak | None:
    """The peak while stage 0's input is built, or read from a checkpoint or an artifact; None: its weights lie in
    files. On a GPU nothing is opened but on its host."""
    if in_files(config) or config.device.kind() == "cuda":
        return None
    model = stage_input.shapes(config, data)
    from_artifact = stage_input.artifact_of(config) is not None
    files = (
        [] if from_artifact else [(file.stat().st_size, stored.shapes(file)) for file in config.model.weight_files()]
    )
    with tracing(config):
        live = Live()
        live.phase = "weights"
        with live:
            if from_artifact:
                made = copies((*model.parameters(), *model.buffers()))
            else:
                made = read(config, data, files) if files else built(model)
                if config.artifact is not None:
                    made.append(torch.empty(checkpoint_bytes(config), dtype=torch.uint8))
                    live.hold(made[-1:], "checkpoint")
                    del made[-1]
                converted(made, config.precision.weight_dtype)
        del made
        return live.timeline.peak()


def in_files(config: RunConfig) -> bool:
    """Whether stage 0's input lies in files: where nothing trains, what was on disk before."""
    if stage_input.trains(changing_stages(stages_of(config))):
        return False
    if config.artifact is None:
        return bool(config.model.weight_files())
    return stage_input.artifact_of(config) is not None


def checkpoint_bytes(config: RunConfig) -> int:
    """Bytes of the checkpoint that the run begins with: all of its file is read."""
    path = Path(str(config.artifact))
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())


def built(model: nn.Module) -> list[Tensor]:
    """A model's tensors, in the order in which they are converted: tied ones are made each for itself before they are
    one, as modules make them."""
    shapes = list(own_tensors(model))
    made = copies(shapes)
    first = {id(tensor): place for place, tensor in reversed(list(enumerate(shapes)))}
    return [made[place] for place in sorted(first.values())]


@dataclass(frozen=True)
class Part:
    """One tensor of a mapped file, whose bytes are `file`, made when it is read, as a slice of safetensors' is."""

    file: Tensor
    shape: Tensor

    def __getitem__(self, _: object) -> Tensor:
        # At the start of the file, where every dtype is aligned: who counts bytes does not ask which a part takes.
        return self.file.view(self.shape.dtype).as_strided(self.shape.shape, self.shape.stride())


def read(config: RunConfig, data: DataBundle, files: Iterable[tuple[int, dict[str, Tensor]]]) -> list[Tensor]:
    """A model's tensors as transformers makes them of those in mapped files, in the order in which they are converted:
    those taken as they lie there are parts of a file, which stays as long as one of them does."""
    parts: dict[str, Any] = {}
    for size, shapes in files:
        file = torch.empty(size + -size % 8, dtype=torch.uint8, device="cpu")  # a whole number of the widest elements
        parts |= {name: Part(file, shape) for name, shape in shapes.items()}
    del file
    model = config.model.assembled(data.spec, parts)
    return list({id(tensor): tensor for tensor in own_tensors(model)}.values())


def own_tensors(module: nn.Module) -> Iterator[Tensor]:
    """As `nn.Module.to` goes through them: of the modules inside, then of the module itself."""
    for child in module.children():
        yield from own_tensors(child)
    yield from (parameter for parameter in module._parameters.values() if parameter is not None)
    yield from (buffer for buffer in module._buffers.values() if buffer is not None)


@torch.no_grad()
def converted(made: list[Tensor], dtype: torch.dtype) -> None:
    """`made` to `dtype` in place, one after the other."""
    for place, tensor in enumerate(made):
        if tensor.is_floating_point() and tensor.dtype != dtype:
            made[place] = tensor.to(dtype)
        del tensor


def copies(tensors: Iterable[Tensor]) -> list[Tensor]:
    return [torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu") for tensor in tensors]


def held(model: nn.Module) -> Peak:
    """A model's own tensors: nothing else is there while an artifact is opened."""
    kinds = {kind: nbytes(tensors) for kind, tensors in by_kind(model).items()}
    return Peak(sum(kinds.values()), {kind: size for kind, size in kinds.items() if size}, "")


def opens_in_memory(config: RunConfig) -> bool:
    """Whether what stages leave is read into memory: where nothing trains, weights stay in files, but for a GPU's."""
    return config.device.kind() == "cuda" or stage_input.trains(changing_stages(stages_of(config)))


def reading(config: RunConfig, model: nn.Module, stage: Stage | None = None) -> Peak:
    """An artifact is opened, of which `model`, of fake tensors, has been stored: masked weights come as a mask and
    values, and masks stay until all are read. On a GPU they are put together on its host.

    `stage`: it left the model; None: the last one.
    """
    share = share_of(config, stage)
    weights = [layer.get_parameter("weight") for _, layer in masked_layers(model)]
    whole = held(model)
    masks = sum(weight.numel() for weight in weights)
    kinds = {**whole.kinds, "buffers": whole.kinds.get("buffers", 0) - masks}
    if config.device.kind() != "cuda":
        working = [0]
        floats = [(weight.numel(), 8 * weight.itemsize, weight.nbytes) for weight in weights]
        for elements, bits, size in (*floats, *sparse_integers(model)):
            kept = kept_of(elements, share)
            if bitmask_bytes(elements, kept, bits) < size:
                # Values, and where they are; those of fewer than 8 bits are packed again when all are there.
                working.append(kept * (max(bits, 8) // 8 + 8) + (elements - size if bits < 8 else 0))
                masks += elements if bits <= 8 else 0
        kinds |= {"masks": masks, "working set": max(working)}
    return Peak(sum(kinds.values()), {kind: size for kind, size in kinds.items() if size}, "")


def sparse_integers(model: nn.Module) -> Iterator[tuple[int, int, int]]:
    """(elements, bits of one, bytes of all as they lie in the model) of quantized weights that were masked."""
    for layer in quantized_layers(model).values():
        if layer.sparse and isinstance(layer, IntegerLayer) and layer.grid.symmetric:
            stored = layer.get_buffer("weight_packed" if layer.packed else "weight")
            yield math.prod(layer.weight_dims), layer.bits, stored.nbytes


def nbytes(tensors: Iterable[Tensor]) -> int:
    return sum({id(tensor): tensor.nbytes for tensor in tensors}.values())


def traced_saving(
    config: RunConfig, model: nn.Module, task: Task, data: DataBundle, stage: Stage | None = None
) -> Peak:
    """The peak while `model`, of fake tensors, is written as an artifact. To be called within `tracing`.

    `stage`: it left the model; None: the last one. On a GPU it is what the model holds there: it is written from the
    host.
    """
    if config.device.kind() == "cuda":
        return held(model)
    with unset_fake_temporarily():
        batch: Batch = task.probe(data)
    live = Supposing(*kernels_of(config))
    live.hold_model(model)
    live.phase = "working set"
    folding, blocks = Folding(live), [block.name for block in describe(model).blocks]
    with live, folded(model, blocks, folding), replaying(live), masks_keeping(share_of(config, stage)):
        store.parts_of(model, fake_batch(batch))
    return folding.unrolled().peak()


def stored_bytes(config: RunConfig, model: nn.Module) -> int:
    """Bytes of the weights of `model`, of fake tensors, as an artifact. Of masked ones that are quantized it takes less
    where rounding makes more of them zero. To be called within `tracing`."""
    with masks_keeping(share_of(config)):
        tensors = store.stored_tensors(model)
    return file_bytes((name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items())


def share_of(config: RunConfig, stage: Stage | None = None) -> float:
    """Of weights under a mask, how many are kept: by the links, or by the artifact that they go on with. Links that
    come after `stage` have pruned nothing yet."""
    share = kept_share(list(config.chain.values())[: None if stage is None else stage.index])
    artifact = stage_input.artifact_of(config)
    return share if artifact is None else min(share, store.kept_share(artifact))


@contextmanager
def masks_keeping(share: float) -> Iterator[None]:
    """Masks of fake tensors are stored as if they kept this share of what is under them."""

    def encoded(mask: Tensor, bits: int) -> int:
        return bitmask_bytes(mask.numel(), kept_of(mask.numel(), share), bits)

    def taken(dense: Tensor, mask: Tensor) -> Tensor:
        kept = kept_of(mask.numel(), share)
        _ = torch.empty(kept, mask.ndim, dtype=torch.int64)  # where they are
        return torch.empty(kept, dtype=dense.dtype)

    with mock.patch.object(sparse, "encoded_bytes", encoded), mock.patch.object(sparse, "taken", taken):
        yield
