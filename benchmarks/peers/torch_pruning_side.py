"""torch-pruning's side (1.6): its dependency graph and group importance (DepGraph), each layer by itself as ours.

Run by the Python of its own virtual environment: see setup.py. What is cut is what `structured` cuts: the channels
inside of EfficientNet's blocks, or feed-forward units and attention heads of OPT. Everything that would change the
residual stream is left alone on both sides.
"""

from __future__ import annotations

import warnings
from typing import Any

import protocol
import torch_pruning as tp
from torch import nn

BATCH = 16


def importance_of(settings: dict[str, Any]) -> tp.importance.Importance:
    """By the norms of all weights of a group, or by gradients on data."""
    if settings["importance"] == "magnitude":
        return tp.importance.GroupMagnitudeImportance(p=2)
    return tp.importance.GroupTaylorImportance()


def roots(model: nn.Module, settings: dict[str, Any]) -> list[tuple[nn.Module, float, int]]:
    """(layer whose outputs are cut, the share that goes, outputs that go together): in the order of the model."""
    found: list[tuple[nn.Module, float, int]] = []
    for name, module in model.named_modules():
        for ending, key in (("expand_conv", "channels"), ("fc1", "ffn"), ("q_proj", "heads")):
            if name.endswith(ending) and settings.get(key):
                config: Any = model.config
                head = config.hidden_size // config.num_attention_heads if key == "heads" else 1
                found.append((module, settings[key], head))
    return found


def prepare(method: str, settings: dict[str, Any], model: nn.Module) -> protocol.Compress:
    if method == "none":
        return lambda model, draw: model
    warnings.simplefilter("ignore")

    def compress(model: nn.Module, draw: protocol.Draw) -> nn.Module:
        model.eval()
        first = next(protocol.split(draw.calibration, 1))
        example: dict[str, Any] = {name: rows for name, rows in first.items() if name != "labels"}
        if "input_ids" in example:
            example["use_cache"] = False
        graph = tp.DependencyGraph().build_dependency(
            model, example, output_transform=lambda output: output.logits, verbose=False
        )
        if settings["importance"] != "magnitude":
            for batch in protocol.split(draw.calibration, BATCH):
                protocol.losses(model, batch)[0].mean().backward()  # type: ignore[no-untyped-call]
        importance = importance_of(settings)
        for layer, share, together in roots(model, settings):
            cut = tp.prune_conv_out_channels if isinstance(layer, nn.Conv2d) else tp.prune_linear_out_channels
            every = list(range(graph.get_out_channels(layer)))
            scores = importance(graph.get_pruning_group(layer, cut, every)).view(-1, together).sum(1)
            goes = scores.argsort()[: int(share * len(scores) + 1e-6)].tolist()
            indices = [unit * together + at for unit in sorted(goes) for at in range(together)]
            graph.get_pruning_group(layer, cut, indices).prune()
        for module in model.modules():
            if settings.get("heads") and hasattr(module, "q_proj"):
                module.embed_dim = module.q_proj.out_features
                module.num_heads = module.embed_dim // module.head_dim
        model.zero_grad()
        return model

    return compress


if __name__ == "__main__":
    protocol.run(prepare, protocol.save_state)
