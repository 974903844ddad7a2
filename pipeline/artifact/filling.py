"""An artifact's files become a model again: its class and config, empty layers of its kinds, tensors in their places.

No pickle is read, and only classes of transformers and layers of this program can be named.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from pipeline.artifact import manifest as manifests
from pipeline.artifact import sparse
from pipeline.errors import ArtifactError
from pipeline.layers import stored
from pipeline.layers.experts import split
from pipeline.layers.offload import offload
from pipeline.layers.public_names import joined, under_own_names
from pipeline.models.unfilled import to_be_filled

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def empty_model(directory: Path, manifest: dict[str, Any]) -> PreTrainedModel:
    """The model of the manifest's class and config.json, its weights not initialised."""
    cls = model_class(manifest["model"].get("class"))
    data = json.loads((directory / "config.json").read_text(encoding="utf-8"), object_hook=_number)
    # Attention may name code on a hub; only torch's own kinds are taken, and only from the manifest.
    for key in (
        "quantization_config",
        "auto_map",
        "attn_implementation",
        "_attn_implementation",
        "experts_implementation",
    ):
        data.pop(key, None)
    attention = manifest["model"].get("attention")
    if attention not in ("eager", "sdpa"):
        raise ArtifactError(f"{directory}: attention {attention!r} is not one of eager, sdpa")
    config = cls.config_class.from_dict({**data, "model_type": manifest["model"].get("type")})
    config._attn_implementation = attention
    model = to_be_filled(cls, config)
    for name in manifest["model"].get("linear_experts", ()):
        split(model, name)
    return cast("PreTrainedModel", model)


def _number(read: dict[str, Any]) -> Any:
    """The number, where this is what transformers writes for one that JSON has not: {"__float__": "Infinity"} say."""
    return float(read["__float__"]) if read.keys() == {"__float__"} else read


def model_class(name: object) -> Any:
    """The model class of the transformers package called `name`: nothing else can be named by an artifact.

    Raises:
        ArtifactError: no such class.
    """
    import transformers

    found = None
    if isinstance(name, str) and re.fullmatch(r"[A-Za-z][A-Za-z0-9_]*", name):
        found = getattr(transformers, name, None)
    known = isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)
    if not known or not found.__module__.startswith("transformers."):
        raise ArtifactError(f"model class {name!r} is not a model of the transformers package")
    return found


def put_layers(model: nn.Module, manifest: dict[str, Any]) -> None:
    """Empty quantized layers of the manifest's kinds in place of the float ones."""
    from pipeline.layers.schemes import empty_layer, replace

    for name, record in manifest["layers"].items():
        if record["scheme"] != "float":
            layer = cast(nn.Linear, model.get_submodule(name))
            quantized = empty_layer(record["scheme"], layer, **record["settings"])
            quantized.sparse = bool(record["sparse"])
            replace(model, name, quantized)


def fill_model(
    model: PreTrainedModel, directory: Path, manifest: dict[str, Any], offload_to: Path | None
) -> dict[str, Tensor]:
    """Put the stored tensors into `model`, quantized layers in place of float ones. Returns the masks by layer.

    Tensors lie in files in `offload_to`, where it is given.
    """
    from pipeline.layers.schemes import join_siblings

    # In memory of its own, where torch aligns it: elsewhere a kernel may add in another order.
    keep: Callable[[Tensor], Tensor] = torch.clone if offload_to is None else partial(offload, directory=offload_to)
    made: Callable[[Tensor], Tensor] = Tensor.detach if offload_to is None else keep  # here, and so of its own already
    tensors: dict[str, Tensor] = {}
    for name, parts in _as_in_model(stored.tensors, directory, manifest):
        tensors[name] = keep(parts[0]) if len(parts) == 1 else made(joined(name, parts))
    masks: dict[str, Tensor] = {}
    for name, encoding in manifest["encodings"].items():
        tensors[name], masks[name.rpartition(".")[0]] = map(made, _decoded(tensors, name, encoding))
    put_layers(model, manifest)
    tied = manifest["tied"]
    result = model.load_state_dict({**tensors, **{alias: tensors[kept] for alias, kept in tied.items()}}, assign=True)
    if result.missing_keys or result.unexpected_keys:
        raise ArtifactError(
            f"{directory}: tensors {[*result.missing_keys, *result.unexpected_keys][:3]} do not fit the model"
        )
    tie(model, tied)
    join_siblings(model)
    float_masks = {}
    for name, record in manifest["layers"].items():
        if record["scheme"] == "float":
            weight = model.get_parameter(f"{name}.weight").detach()
            float_masks[name] = masks[name] if name in masks else made(weight != 0)
    return float_masks


def _as_in_model(
    read: Callable[[Path], dict[str, Tensor]], directory: Path, manifest: dict[str, Any]
) -> Iterator[tuple[str, list[Tensor]]]:
    """(name in the model, its parts) of what `read` gives of each file of weights."""
    files = manifests.weight_files(entry["name"] for entry in manifest["files"])
    stored_ones = itertools.chain.from_iterable(read(directory / file).items() for file in files)
    return under_own_names(stored_ones, manifest.get("names", {}))


def tie(model: nn.Module, tied: dict[str, str]) -> None:
    """Parameters that are one again: {alias: the name under which it is stored}."""
    for alias, kept in tied.items():
        parent, _, leaf = alias.rpartition(".")
        setattr(model.get_submodule(parent), leaf, model.get_parameter(kept))


def _decoded(tensors: dict[str, Tensor], name: str, encoding: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """The stored form of a tensor that lies there as bitmask and values, and its mask."""
    from pipeline.layers.packing import pack_int32

    bits, shape = encoding["bits"], tuple(encoding["shape"])
    dense, mask = sparse.decode(tensors.pop(f"{name}.bitmask"), tensors.pop(f"{name}.values"), shape, bits)
    return (pack_int32(dense, bits) if encoding["packed"] else dense), mask


def take_dtypes(model: nn.Module, directory: Path, manifest: dict[str, Any]) -> None:
    """Give the floating-point tensors of `model`, on the meta device, the dtypes that those of the files have."""
    tensors = dict(itertools.chain(model.named_parameters(), model.named_buffers()))
    for name, (shape, *_) in _as_in_model(stored.shapes, directory, manifest):
        tensor = tensors.get(name.removesuffix(".values"))  # of one that lies there as a bitmask
        if tensor is not None and shape.is_floating_point():
            tensor.data = tensor.data.to(shape.dtype)
