"""Save a model as an artifact directory, and open one. No pickle, no code from the artifact is run.

A directory holds model.safetensors (or, above `SHARD_BYTES`, shards and their index as transformers names them),
config.json, manifest.json, probe.safetensors (a small batch and the outputs the
model gave for it before it was saved) and the tokenizer's files. It is written beside its place and renamed, so that
there is never half an artifact, and an older one is lost only once the new one is whole.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

import pipeline
from pipeline.artifact import manifest as manifests
from pipeline.artifact import sparse
from pipeline.artifact.filling import empty_model, fill_model, put_layers, take_dtypes, tie
from pipeline.artifact.machine import machine
from pipeline.errors import ArtifactError
from pipeline.layers import stored
from pipeline.layers.blockwise import in_dtype_of
from pipeline.layers.experts import linear_experts
from pipeline.layers.offload import OffloadError, beside
from pipeline.layers.public_names import Names, under_public_names
from pipeline.layers.quantized import QuantizedLayer, quantized_layers
from pipeline.layers.sparsity import MASK, masked_layers
from pipeline.models.unfilled import to_be_filled

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SHARD_BYTES = 50 * 10**9
"""The largest file of weights; transformers 5 cuts there too."""
VERSIONED = ("torch", "transformers", "safetensors", "compressed-tensors")


@dataclass(frozen=True)
class Count:
    """Elements of all parameters, quantized ones too (scales and masks are none), and how many are not zero."""

    elements: int
    nonzero: int


def count(model: nn.Module) -> Count:
    """Parameters of a float, masked or quantized model; tied ones once."""
    from pipeline.layers.sparse24 import compressed_weights

    elements = nonzero = 0
    dense = (parameter.detach() for parameter in model.parameters())
    quantized = (layer.dequantized() for layer in quantized_layers(model).values())
    for tensor in itertools.chain(dense, compressed_weights(model), quantized):
        elements, nonzero = elements + tensor.numel(), nonzero + int(torch.count_nonzero(tensor))
    return Count(elements, nonzero)


def save(
    model: nn.Module,
    directory: Path,
    *,
    chain: list[dict[str, Any]],
    tokenizer: PreTrainedTokenizerBase | None = None,
    probe: Mapping[str, Tensor],
    calibration: Mapping[str, Any] | None = None,
    extra: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Write `model` to `directory` (replacing an artifact there) and return its manifest.

    `chain`: the links that made the model, in order, as JSON. `probe`: a small batch of model inputs, on the model's
    device. `calibration`: what calibrated links looked at. `extra`: JSON to add to the manifest under keys of its own.

    Raises:
        ArtifactError: not a transformers model, `directory` holds something that is not an artifact, or it cannot be
            written. What was there is there still.
    """
    from transformers import PreTrainedModel

    from pipeline.artifact.formats import readers, write_config

    if not isinstance(model, PreTrainedModel):
        raise ArtifactError(
            f"{type(model).__name__} is not a transformers model; it cannot be stored by its class's name"
        )
    directory = Path(directory)
    _refuse_foreign(directory)
    _renew_transient_buffers(model)

    def fill(place: Path) -> dict[str, Any]:
        parts = parts_of(model, probe)
        weights = _write_tensors(parts.tensors, place)
        save_file(parts.probe, place / manifests.PROBE)
        write_config(model, place, parts.form, parts.names)
        for name in (*weights, manifests.PROBE):
            # safetensors makes its files for the owner alone; an artifact's are as readable as any other file.
            shutil.copymode(place / "config.json", place / name)
        if tokenizer is not None:
            tokenizer.save_pretrained(place)
        made = {
            "schema": manifests.SCHEMA,
            "leanfit": pipeline.__version__,
            "versions": {name: version(name) for name in VERSIONED},
            "format": parts.form,
            "opens_with": readers(parts.form, bool(linear_experts(model))),
            "model": {
                "class": type(model).__name__,
                "type": model.config.model_type,
                "attention": model.config._attn_implementation,
                "linear_experts": linear_experts(model),
            },
            "chain": chain,
            "calibration": None if calibration is None else dict(calibration),
            "layers": parts.layers,
            "encodings": parts.encodings,
            "tied": parts.tied,
            "names": parts.names,
            "kernels": dict(Counter(layer.kernel for layer in quantized_layers(model).values())),
            "parameters": parts.counted.elements,
            "nonzero": parts.counted.nonzero,
            "quality": None,
            "speed": None,
            "size": None,
            "probe": {"device": str(model.device), **machine()},
        }
        clash = sorted(set(made) & set(extra or {}) | {"files"} & set(extra or {}))
        if clash:
            raise ValueError(f"extra would overwrite {', '.join(clash)} of the manifest")
        made.update(extra or {}, files=manifests.describe_files(place))
        manifests.write(place, made)
        return made

    return cast(dict[str, Any], _write_whole(directory, fill))


@dataclass(frozen=True)
class Parts:
    """What is written of a model: tensors by name, {alias of a tied one: the name of the other}, {name: encoding} of
    those stored as bitmasks, the format, {name in the model: names in the format} where they differ, the probe's inputs
    and outputs, records of quantized and masked layers."""

    tensors: dict[str, Tensor]
    tied: dict[str, str]
    encodings: dict[str, Any]
    form: str
    names: Names
    probe: dict[str, Tensor]
    counted: Count
    layers: dict[str, Any]


def parts_of(model: nn.Module, probe: Mapping[str, Tensor]) -> Parts:
    """All that `save` computes, and so all that it holds beside the model."""
    from pipeline.artifact.formats import format_of

    tensors, tied, encodings = plain_tensors(model)
    form, names = format_of(model, encodings)
    tensors = under_public_names(tensors, names)
    probed, counted, records = _probe_tensors(model, probe), count(model), _layer_records(model)
    return Parts(tensors, tied, encodings, form, names, probed, counted, records)


def stored_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The tensors of `model` as they lie in its file."""
    from pipeline.artifact.formats import format_of

    tensors, _, encodings = plain_tensors(model)
    return under_public_names(tensors, format_of(model, encodings)[1])


def publish(source: Path, directory: Path) -> None:
    """Copy the artifact at `source` to `directory`, whole or not at all."""
    _refuse_foreign(directory)
    _write_whole(directory, lambda place: shutil.copytree(source, place, dirs_exist_ok=True))


def annotate(directory: Path, fields: Mapping[str, Any]) -> None:
    """Enter what was measured later (`quality`, `speed`, `size`, ...) into the manifest."""
    manifest = manifests.read(Path(directory))
    fixed = {"schema", "files", "model", "layers", "encodings", "tied", "names", "format"} & set(fields)
    if fixed:
        raise ValueError(f"{', '.join(sorted(fixed))} of a manifest are fixed when it is saved")
    manifests.write(Path(directory), {**manifest, **fields})


def read_manifest(directory: Path) -> dict[str, Any]:
    """The manifest; raises ArtifactError as `load` does, but does not read the other files."""
    return manifests.read(Path(directory))


def check(directory: Path) -> None:
    """Raises ArtifactError where a file is missing, truncated or altered."""
    manifests.check_files(Path(directory), manifests.read(Path(directory)))


def files(directory: Path) -> list[dict[str, Any]]:
    """Name, bytes and sha256 of every file of the artifact, the manifest with them."""
    directory = Path(directory)
    path = directory / manifests.NAME
    own = {"name": path.name, "bytes": path.stat().st_size, "sha256": manifests.sha256(path)}
    return [*manifests.describe_files(directory), own]


def tensor_bytes(directory: Path) -> int:
    """Bytes of the weights on disk."""
    directory = Path(directory)
    return sum((directory / name).stat().st_size for name in manifests.weight_files(os.listdir(directory)))


def kept_share(directory: Path) -> float:
    """Of float weights that are stored as bitmasks, how many are kept; 1 where there are none."""
    counts = kept_weights(directory).values()
    return sum(kept for kept, _ in counts) / sum(elements for _, elements in counts) if counts else 1.0


def kept_weights(directory: Path) -> dict[str, tuple[int, int]]:
    """{float weight that is stored as a bitmask: (how many elements are kept, of how many)}."""
    directory, found = Path(directory), {}
    encodings = manifests.read(directory)["encodings"]
    for file in manifests.weight_files(os.listdir(directory)):
        for name, shape in stored.shapes(directory / file).items():
            weight = name.removesuffix(".values")
            encoding = encodings.get(weight)
            if encoding is not None and not encoding["packed"]:
                found[weight] = (shape.numel(), math.prod(encoding["shape"]))
    return found


def load(
    directory: Path,
    device: str = "cpu",
    trainable: bool = False,
    offload_to: Path | None = None,
    sparse_kernels: bool = False,
) -> nn.Module:
    """The model of an artifact, in eval mode, on `device`.

    `trainable`: in train mode, float parameters with gradients, masks as buffers, so that a chain can go on.
    `sparse_kernels`: of a model that is not, 2:4 layers run by a GPU's kernels for them (layers/sparse24.py).
    `offload_to`: a directory with room for a copy of the weights, which lie there instead of in memory
    (layers/offload.py).

    Raises:
        ArtifactError: a file is missing, truncated, altered or of a newer schema; or it names a class or layer that
            this program does not know.
    """
    directory = Path(directory)
    manifest = manifests.read(directory)
    manifests.check_files(directory, manifest)
    try:
        model = empty_model(directory, manifest)
        masks = fill_model(model, directory, manifest, offload_to)
    except (ArtifactError, OffloadError):
        raise
    except Exception as error:  # whatever a hostile or altered file makes a library raise
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ArtifactError(f"{directory}: altered or made by another version: {first[:200]}") from error
    if trainable:
        for name, mask in masks.items():
            model.get_submodule(name).register_buffer(MASK, mask)
    layers = quantized_layers(model)
    if layers or linear_experts(model):
        cast(Any, model).save_pretrained = refuse_to_save
    quantized = {id(p) for layer in layers.values() for p in layer.parameters()}
    for parameter in model.parameters():
        parameter.requires_grad_(trainable and id(parameter) not in quantized)
    if sparse_kernels and not trainable:
        from pipeline.layers.sparse24 import use_kernels

        use_kernels(model, masks)
    model.train(trainable)
    model.to(cast(Any, device))
    return model


def refuse_to_save(*_: Any, **__: Any) -> NoReturn:
    """In the place of `save_pretrained`, whose files transformers would open with random weights for these layers."""
    raise NotImplementedError(
        "save_pretrained does not know this model's layers, which are quantized or experts of their own: transformers "
        "would open what it writes with random weights; copy the artifact's directory instead"
    )


def load_tokenizer(directory: Path) -> PreTrainedTokenizerBase | None:
    """The tokenizer of an artifact, None where it holds none."""
    if not (Path(directory) / "tokenizer_config.json").is_file():
        return None
    from transformers import AutoTokenizer

    return cast("PreTrainedTokenizerBase", AutoTokenizer.from_pretrained(directory))


def blueprint(directory: Path, quantized: bool = False) -> nn.Module:
    """The float model of an artifact on the meta device: names, shapes, dtypes, config.

    Raises ArtifactError as `load` does. `quantized`: with the quantized layers that it has.
    """
    manifest = read_manifest(directory)
    manifests.check_files(Path(directory), manifest, contents=False)
    with torch.device("meta"):
        try:
            model = empty_model(Path(directory), manifest)
            if quantized:
                put_layers(model, manifest)
            take_dtypes(model, Path(directory), manifest)
            tie(model, manifest["tied"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ArtifactError(f"{directory}: altered, {error}") from error
    return model


def plain_tensors(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str], dict[str, Any]]:
    """(tensors to store, aliases of tied ones -> the name of the other, encodings of those stored as bitmasks)."""
    first: dict[int, str] = {}
    tensors: dict[str, Tensor] = {}
    tied: dict[str, str] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if name.rpartition(".")[2] == MASK:
            continue
        if id(tensor) in first:
            tied[name] = first[id(tensor)]
            continue
        first[id(tensor)] = name
        tensors[name] = tensor.detach().cpu().contiguous()
    encodings: dict[str, Any] = {}
    for name, dense, mask, bits, packed in _sparse_tensors(model):
        stored = tensors.get(name)
        if stored is None or sparse.encoded_bytes(mask, bits) >= stored.numel() * stored.element_size():
            continue
        del tensors[name]
        parts = sparse.encode(dense, mask, bits)
        tensors[f"{name}.bitmask"], tensors[f"{name}.values"] = (beside(part, stored) for part in parts)
        encodings[name] = {"encoding": "bitmask", "shape": list(dense.shape), "bits": bits, "packed": packed}
    return tensors, tied, encodings


def _write_tensors(tensors: dict[str, Tensor], place: Path) -> list[str]:
    """Write `tensors` into one file, or into shards of at most `SHARD_BYTES` (but for larger tensors) with their index.

    Returns the names of the files. The index is that of `save_pretrained`.
    """
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.nbytes > SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    if len(shards) == 1:
        save_file(tensors, place / manifests.TENSORS, metadata={"format": "pt"})
        return [manifests.TENSORS]
    files = {f"model-{n:05d}-of-{len(shards):05d}.safetensors": shard for n, shard in enumerate(shards, 1)}
    for file, shard in files.items():
        save_file(shard, place / file, metadata={"format": "pt"})
    index = {
        "metadata": {"total_size": sum(tensor.nbytes for tensor in tensors.values())},
        "weight_map": {name: file for file, shard in files.items() for name in shard},
    }
    (place / manifests.INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return list(files)


def _sparse_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor, Tensor, int, bool]]:
    """(tensor's name, dense values, what is kept, bits a value, whether the stored form is packed)."""
    for name, module in masked_layers(model):
        weight = cast(Tensor, module.weight).detach().cpu()
        mask = cast(Tensor, module.weight_mask).cpu()
        yield f"{name}.weight", weight, mask, weight.element_size() * 8, False
    for name, layer in quantized_layers(model).items():
        if (sparse_values := layer.sparse_values()) is not None:
            leaf, dense = sparse_values[0], sparse_values[1].cpu()
            yield f"{name}.{leaf}", dense, dense != 0, layer.bits, leaf == "weight_packed"


def _layer_records(model: nn.Module) -> dict[str, Any]:
    """What each quantized or masked layer is; plain layers have no record."""
    records: dict[str, Any] = {
        name: {"scheme": "float", "masked": True, "sparsity": _zeros(cast(Tensor, module.weight).detach())}
        for name, module in masked_layers(model)
    }
    records.update((name, _quantized_record(layer)) for name, layer in quantized_layers(model).items())
    return records


def _quantized_record(layer: QuantizedLayer) -> dict[str, Any]:
    return {
        "scheme": layer.scheme,
        "bits": layer.bits,
        "group_size": layer.group_size,
        "shape": list(layer.weight_dims),
        "kernel": layer.kernel,
        "sparse": layer.sparse,
        "sparsity": _zeros(layer.dequantized()),
        "settings": layer.settings(),
    }


def _zeros(tensor: Tensor) -> float:
    return 1 - int(torch.count_nonzero(tensor)) / tensor.numel()


def output_of(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Logits of a batch, in eval mode; the model's mode is restored."""
    mode = model.training
    model.eval()
    try:
        with torch.inference_mode():
            logits: Tensor = model(**{name: in_dtype_of(model, value) for name, value in batch.items()}).logits
    finally:
        model.train(mode)
    return logits.detach().cpu().contiguous().clone()


def _probe_tensors(model: nn.Module, probe: Mapping[str, Tensor]) -> dict[str, Tensor]:
    device = next(model.parameters()).device
    output = output_of(model, {name: tensor.to(device) for name, tensor in probe.items()})
    return {"output": output, **{f"input.{name}": tensor.cpu().contiguous() for name, tensor in probe.items()}}


def _renew_transient_buffers(model: PreTrainedModel) -> None:
    """Buffers that are not stored (rotary frequencies) as a fresh model has them: `model.to(bfloat16)` rounds them, and
    what `model.double()` makes of an embedding's scale was rounded before."""
    others = (torch.float16, torch.bfloat16, torch.float64)
    transient = [
        (name, module, leaf)
        for name, module in model.named_modules()
        for leaf in module._non_persistent_buffers_set
        if (buffer := getattr(module, leaf, None)) is not None and buffer.dtype in others
    ]
    if not transient:
        return
    fresh = to_be_filled(type(model), model.config, model.dtype)
    for name, module, leaf in transient:
        setattr(module, leaf, getattr(fresh.get_submodule(name), leaf).to(getattr(module, leaf).device))


def _refuse_foreign(directory: Path) -> None:
    """Only an artifact, or an empty directory, is ever replaced."""
    if directory.exists() and not (directory / manifests.NAME).is_file() and any(directory.iterdir()):
        raise ArtifactError(f"{directory}: holds files that are not an artifact's; choose another place")


def _reason(error: OSError | SafetensorError) -> str:
    """What the system said, without the files meanwhile."""
    if isinstance(error, shutil.Error):  # of copies: (from, to, what it said) each
        error = error.args[0][0][2] if error.args else error
    said = re.search(r"(?:\[Errno \d+\]|I/O error:) ([^:(]+)", str(error))
    return said[1].strip() if said else str(error)


def _write_whole(directory: Path, fill: Callable[[Path], Any]) -> Any:
    """Let `fill` write into a new directory beside `directory`, then put it in place. Returns what `fill` gave. Raises
    ArtifactError where the system does not let it."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    partial = directory.with_name(f".{directory.name}.partial-{os.getpid()}")
    old = directory.with_name(f".{directory.name}.old-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        made = fill(partial)
        if directory.exists():
            directory.replace(old)
        try:
            partial.replace(directory)
        except OSError:
            if old.exists():
                old.replace(directory)
            raise
    except (OSError, SafetensorError) as error:
        raise ArtifactError(f"{directory}: cannot be written: {_reason(error)}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)
    return made
