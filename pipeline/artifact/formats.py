"""The public side of an artifact: config.json as transformers, compressed-tensors and vLLM read it.

Formats: `dense` (a plain transformers directory), `int-quantized`, `pack-quantized` and `float-quantized`
(compressed-tensors; int8 W8A8, integer weights of 2 to 8 bits, E4M3 floats), and `leanfit` for what no public format
holds or no public reader opens: quantized convolutions and tables, NF4, zero points, bitmasks, several schemes at once,
experts as linear layers or of Llama 4, packed layers of Falcon, Mamba and StarCoder.
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

from pipeline.layers.experts import linear_experts
from pipeline.layers.float8 import Float8Linear
from pipeline.layers.linear import Int8Linear, WeightOnlyLinear
from pipeline.layers.quantized import IntegerLayer, QuantizedLayer, quantized_layers
from pipeline.layers.static import Int8StaticLinear

PUBLIC = ("dense", "int-quantized", "pack-quantized", "float-quantized")
MODEL_TYPE = "leanfit"
READING = frozenset({"falcon", "falcon_mamba", "gpt_bigcode", "mamba", "mamba2"})
"""Model types of which transformers reads weights of linear layers, where packed ones have none: Falcon's in a forward
pass of their own, the others' to initialise what a file may lack."""


def format_of(model: nn.Module, encodings: dict[str, Any]) -> str:
    """Which format holds `model`, whose tensors in `encodings` are stored as bitmasks."""
    layers = list(quantized_layers(model).values())
    linear = linear_experts(model)
    if not layers and not encodings and not linear:
        return "dense"
    if linear or encodings or not all(map(_is_public, layers)) or len({layer.scheme for layer in layers}) > 1:
        return "leanfit"
    form = {"weight_only": "pack-quantized", "fp8": "float-quantized"}.get(layers[0].scheme, "int-quantized")
    reading = getattr(getattr(model, "config", None), "model_type", None) in READING
    if (reading and form == "pack-quantized") or any(map(_exchanged, model.modules())):
        return "leanfit"
    return form


def _is_public(layer: QuantizedLayer) -> bool:
    """Zero points are not: compressed-tensors 0.20 packs them, then looks for unpacked ones when it loads."""
    if isinstance(layer, Float8Linear):
        return True
    return isinstance(layer, Int8Linear | Int8StaticLinear | WeightOnlyLinear) and layer.grid.symmetric


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


def quantization_config(model: nn.Module, form: str) -> dict[str, Any] | None:
    """`quantization_config` of config.json; None for a dense model."""
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
        "ignore": [name for name, module in model.named_modules() if isinstance(module, nn.Linear)],
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


def write_config(model: PreTrainedModel, directory: Path, form: str) -> None:
    """config.json and, for a model that generates, generation_config.json."""
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    config.dtype = model.dtype
    data = json.loads(config.to_json_string(use_diff=True))
    data.pop("quantization_config", None)
    data["model_type"] = MODEL_TYPE if form == "leanfit" else config.model_type
    extra = quantization_config(model, form)
    if extra is not None:
        data["quantization_config"] = extra
    text = json.dumps(data, indent=2, sort_keys=True) + "\n"
    (directory / "config.json").write_text(text, encoding="utf-8")
    if model.can_generate() and getattr(model, "generation_config", None) is not None:
        model.generation_config.save_pretrained(directory)
