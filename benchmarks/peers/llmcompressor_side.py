"""llm-compressor's side (0.14): its modifiers by `oneshot`, with the settings that correspond to ours.

Run by the Python of its own virtual environment: see setup.py.
"""

from __future__ import annotations

from typing import Any

import protocol
import torch
from compressed_tensors.compressors import ModelCompressor
from datasets import Dataset
from llmcompressor import oneshot
from torch import nn


def weights(settings: dict[str, Any]) -> dict[str, Any]:
    """A config group of weight-only integers."""
    size = settings["group_size"]
    return {
        "group_0": {
            "targets": ["Linear"],
            "weights": {
                "num_bits": settings["bits"], "type": "int", "symmetric": settings.get("symmetric", True),
                "strategy": "channel" if size is None else "group", "group_size": size, "observer": "minmax",
            },
        }
    }  # fmt: skip


OPT_PAIRS = {
    "re:.*self_attn_layer_norm$": ["re:.*q_proj$", "re:.*k_proj$", "re:.*v_proj$"],
    "re:.*v_proj$": ["re:.*out_proj$"],
    "re:.*layers.*final_layer_norm$": ["re:.*fc1$"],
}
"""What may be scaled against what in OPT, which neither AWQ nor SmoothQuant knows there by itself."""


def without_pinning() -> None:
    """Its AWQ pins memory for an accelerator whether there is one or not, and fails where there is none."""
    from llmcompressor.pipelines.cache import IntermediatesCache

    if not torch.accelerator.is_available():
        IntermediatesCache.pin_memory = lambda self, *args, **kwargs: None


def recipe(method: str, settings: dict[str, Any], opt: bool) -> Any:
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.pruning.sparsegpt import SparseGPTModifier
    from llmcompressor.modifiers.pruning.wanda import WandaPruningModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier

    ignore = ["lm_head"]
    if method == "int4":
        return QuantizationModifier(config_groups=weights(settings), ignore=ignore)
    if method == "int4_gptq":
        return GPTQModifier(
            config_groups=weights(settings), ignore=ignore, block_size=128, dampening_frac=0.01, actorder="static"
        )
    if method == "int4_awq":
        from llmcompressor.modifiers.transform.awq import AWQMapping, AWQModifier

        without_pinning()
        pairs = [AWQMapping(norm, linears) for norm, linears in OPT_PAIRS.items()] if opt else None
        rounding = QuantizationModifier(config_groups=weights(settings), ignore=ignore)
        return [AWQModifier(duo_scaling=True, mappings=pairs), rounding]
    if method in ("int8", "int8_smoothquant"):
        from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier

        plain = QuantizationModifier(targets="Linear", scheme="W8A8", ignore=ignore)
        if method == "int8":
            return plain
        pairs = [[linears, norm] for norm, linears in OPT_PAIRS.items() if "norm" in norm] if opt else None
        return [SmoothQuantModifier(smoothing_strength=settings["alpha"], mappings=pairs), plain]
    cls = {"sparsegpt": SparseGPTModifier, "wanda": WandaPruningModifier}[method]
    return cls(
        sparsity=settings.get("sparsity") or 0.5, mask_structure=settings.get("pattern") or "0:0",
        targets=["Linear"], ignore=["re:.*lm_head"],
    )  # fmt: skip


def prepare(method: str, settings: dict[str, Any], model: nn.Module) -> protocol.Compress:
    if method == "none":
        return lambda model, draw: model
    modifiers = recipe(method, settings, "OPT" in type(model).__name__)
    quantizes = method.startswith("int")

    def compress(model: nn.Module, draw: protocol.Draw) -> nn.Module:
        calibration = draw.calibration["input_ids"]
        rows = [{"input_ids": row.tolist(), "attention_mask": [1] * len(row)} for row in calibration]
        oneshot(
            model=model, dataset=Dataset.from_list(rows), recipe=modifiers, num_calibration_samples=len(rows),
            max_seq_length=calibration.shape[1], shuffle_calibration_samples=False, batch_size=16,
        )  # fmt: skip
        if quantizes:  # else it leaves weights as they are until it saves them, with their scales beside
            ModelCompressor.from_pretrained_model(model).compress_model(model)
        return model

    return compress


if __name__ == "__main__":
    protocol.run(prepare)
