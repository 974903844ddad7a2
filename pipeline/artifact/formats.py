"""The public side of an artifact: config.json as transformers, compressed-tensors and vLLM read it.

Formats: `dense` (a plain transformers directory), `int-quantized`, `pack-quantized` and `float-quantized`
(compressed-tensors; int8 W8A8, integer weights of 2 to 8 bits, E4M3 floats), and `leanfit` for what no public format
holds or no public reader opens: quantized convolutions and tables, NF4, zero points, bitmasks, several schemes at once,
packed layers of the model types in `READING` and any of those in `RENAMED`, a classifier's activation scales by row,
experts that are not quantized alike or of which transformers knows no checkpoints with layers for each
(`public_names`).
transformers ignores a quantization method that it does not know and fills in random weights; so a `leanfit` config
names a model type that it does not know and a quantization without a method, each of which it refuses to open.
"""

from __future__ import annotations

import copy
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers.base import MODULES_TO_PATCH_FOR_QUANTIZATION

from pipeline.layers.experts import gates, linear_experts, routers
from pipeline.layers.float8 import Float8Linear
from pipeline.layers.linear import Int8Linear, WeightOnlyLinear
from pipeline.layers.public_names import EXPERTS_SINCE, Names, public_names
from pipeline.layers.quantized import IntegerLayer, QuantizedLayer, quantized_layers
from pipeline.layers.static import Int8StaticLinear
from pipeline.models.architecture import describe

PUBLIC = ("dense", "int-quantized", "pack-quantized", "float-quantized")
MODEL_TYPE = "leanfit"
READING = frozenset(
    {
        "bit", "efficientnet", "falcon", "falcon_mamba", "gpt_bigcode", "hiera", "ijepa", "mamba", "mamba2",
        "modernbert-decoder", "nanochat", "pvt", "pvt_v2", "recurrent_gemma", "regnet", "resnet", "siglip",
        "swiftformer",
    }
)  # fmt: skip
"""Model types of which transformers reads weights of linear layers, where packed ones have none: Falcon's in a forward
pass of their own, the others' to initialise what a file may lack."""
RENAMED = frozenset({"dinov2", "dinov2_with_registers"})
"""Model types whose feed-forward layers transformers 5 renames as it opens them, and not what a scheme adds to them."""


def format_of(model: nn.Module, encodings: dict[str, Any]) -> tuple[str, Names]:
    """Which format holds `model`, whose tensors in `encodings` are stored as bitmasks, and what its layers and tensors
    are called there, as far as it is not as in the model."""
    quantized = quantized_layers(model)
    layers, linear = list(quantized.values()), linear_experts(model)
    if not layers and not encodings and not linear:
        return "dense", {}
    if not layers or encodings or not all(map(_is_public, layers)) or len({layer.scheme for layer in layers}) > 1:
        return "leanfit", {}
    form = {"weight_only": "pack-quantized", "fp8": "float-quantized"}.get(layers[0].scheme, "int-quantized")
    kind = getattr(getattr(model, "config", None), "model_type", None)
    if (kind in READING and form == "pack-quantized") or kind in RENAMED or any(map(_exchanged, model.modules())):
        return "leanfit", {}
    if _scales_rows(model, quantized):
        return "leanfit", {}
    names = _names_of_experts(model, quantized) if linear else {}
    return ("leanfit", {}) if names is None else (form, names)


def _names_of_experts(model: nn.Module, layers: dict[str, QuantizedLayer]) -> Names | None:
    """Public names of `model`, in which experts are linear layers; None where transformers would not open them.

    It puts their weights together by one scheme for all, and activations stay in float.
    """
    alike = {(layer.bits, layer.group_size) for layer in layers.values()}
    if len(alike) > 1 or any(map(_activations, layers.values())):
        return None
    return public_names(model, layers)


def _is_public(layer: QuantizedLayer) -> bool:
    """Zero points are not: compressed-tensors 0.20 packs them, then looks for unpacked ones when it loads."""
    if isinstance(layer, Float8Linear):
        return True
    return isinstance(layer, Int8Linear | Int8StaticLinear | WeightOnlyLinear) and layer.grid.symmetric


def _scales_rows(model: nn.Module, layers: dict[str, QuantizedLayer]) -> bool:
    """Whether layers give each row of a flat input, an image's in a classifier's head, an activation scale of its own,
    where the public format has one for all rows. In blocks with attention inputs are [images, patches, features]."""
    own = [
        name
        for name, layer in layers.items()
        if isinstance(layer, Int8Linear | Float8Linear) and _activations(layer) is not None and not layer.share_flat
    ]
    if not own:
        return False
    architecture = describe(model)
    inside = tuple(f"{block.name}." for block in architecture.blocks if block.attention)
    # Language models flatten tokens alone, and rarely.
    return not architecture.embeddings and not all(name.startswith(inside) for name in own)


def _exchanged(module: nn.Module) -> bool:
    """Whether transformers puts another module in the place of this one as soon as a config tells of quantization.

    It does so with the experts of Llama 4: each is then a layer of its own, of which nothing is stored.
    """
    entry: dict[str, Any] | None = MODULES_TO_PATCH_FOR_QUANTIZATION.get(type(module).__name__)
    return entry is not None and "compressed-tensors" in entry["quantization_methods"]


def _weights(layer: QuantizedLayer) -> dict[str, Any]:
    strategy = "channel" if layer.group_size is None else "group"
    return {
        "num_bits": layer.bits, "type": _type(layer), "symmetric": True, "strategy": strategy,
        "group_size": layer.group_size, "dynamic": False, "observer": "minmax", "observer_kwargs": {},
        "block_structure": None, "actorder": None,
    }  # fmt: skip


def _type(layer: QuantizedLayer) -> str:
    return "int" if isinstance(layer, IntegerLayer) else "float"


def _activations(layer: QuantizedLayer) -> dict[str, Any] | None:
    """None where activations stay in float."""
    static = isinstance(layer, Int8StaticLinear)
    dynamic = layer.activations == "dynamic" if isinstance(layer, Float8Linear) else isinstance(layer, Int8Linear)
    if not static and not dynamic:
        return None
    return {
        "num_bits": 8, "type": _type(layer), "symmetric": True, "strategy": "tensor" if static else "token",
        "group_size": None, "dynamic": dynamic, "observer": "minmax" if static else None, "observer_kwargs": {},
        "block_structure": None, "actorder": None,
    }  # fmt: skip


def readers(form: str, experts: bool) -> list[str]:
    """What opens an artifact of this format, `experts` in it quantized."""
    since = f">={'.'.join(map(str, EXPERTS_SINCE))}" if experts else ""
    return ["pipeline.load", *([f"transformers{since}"] if form in PUBLIC else [])]


def quantization_config(model: nn.Module, form: str, names: Names) -> dict[str, Any] | None:
    """`quantization_config` of config.json; None for a dense model. `names`: as `format_of` gives them."""
    if form == "dense":
        return None
    if form == "leanfit":
        return {"format": "leanfit", "open_with": "pipeline.load(DIRECTORY)"}
    alike: dict[tuple[Any, ...], list[str]] = defaultdict(list)
    layers = quantized_layers(model)
    for name, layer in layers.items():
        alike[layer.bits, layer.group_size].append(name)
    groups = {
        f"group_{index}": {
            # Layers of several kinds are told apart by name.
            "targets": ["Linear"] if len(alike) == 1 else names,
            "weights": _weights(layers[names[0]]),
            "input_activations": _activations(layers[names[0]]),
            "output_activations": None,
        }
        for index, names in enumerate(alike.values())
    }
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": _ignored(model, names),
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


def _ignored(model: nn.Module, names: Names) -> list[str]:
    """Layers that stay in float, by the names of the model, and those that choose among experts by public ones too:
    to a program that knows the public ones a router may be a linear layer."""
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    if not linear_experts(model):
        return linear
    choosing = [*routers(model), *(gate for mixture in linear_experts(model) for gate in gates(model, mixture))]
    public = [names.get(f"{name}.weight", [f"{name}.weight"])[0].removesuffix(".weight") for name in choosing]
    return list(dict.fromkeys([*linear, *public]))


def write_config(model: PreTrainedModel, directory: Path, form: str, names: Names) -> None:
    """config.json and, for a model that generates, generation_config.json."""
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    config.dtype = model.dtype
    data = json.loads(config.to_json_string(use_diff=True))
    data.pop("quantization_config", None)
    data["model_type"] = MODEL_TYPE if form == "leanfit" else config.model_type
    extra = quantization_config(model, form, names)
    if extra is not None:
        data["quantization_config"] = extra
    text = json.dumps(data, indent=2, sort_keys=True) + "\n"
    (directory / "config.json").write_text(text, encoding="utf-8")
    if model.can_generate() and getattr(model, "generation_config", None) is not None:
        model.generation_config.save_pretrained(directory)
