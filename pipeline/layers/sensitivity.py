"""How much a model minds that one layer is quantized: measured, layer by layer and number of bits by number of bits.

The measure is the Kullback-Leibler divergence, in nats, of the model's output distribution with that one layer
quantized from the float model's, a mean over tokens (or images) of calibration. What layers cost together is close to
the sum of what they cost alone as long as each costs little (Dong et al., 2019, arXiv:1905.03696, argue so to second
order); a divergence is measured instead of Hessian traces, since it needs no gradients and counts what the model says.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.layers.blockwise import model_inputs
from pipeline.layers.quantize import Grid, quantize_rows

Batch = Mapping[str, Tensor]


def sensitivities(
    model: nn.Module, layers: Sequence[str], grids: Sequence[Grid], batches: Iterable[Batch], device: str
) -> dict[str, dict[int, float]]:
    """{layer: {bits: mean divergence in nats}}. The model is as before afterwards; one batch's logits are held."""
    training = model.training
    model.eval().to(device)
    sums = {name: {grid.bits: 0.0 for grid in grids} for name in layers}
    count = 0
    try:
        with torch.no_grad():
            for batch in batches:
                moved = model_inputs(model, batch, device)
                reference = _log_probabilities(model, moved)
                count += reference.shape[0]
                for name in layers:
                    for grid in grids:
                        sums[name][grid.bits] += _divergence(model, name, grid, moved, reference)
    finally:
        model.train(training)
    return {name: {bits: total / count for bits, total in found.items()} for name, found in sums.items()}


def _divergence(model: nn.Module, name: str, grid: Grid, batch: dict[str, Any], reference: Tensor) -> float:
    """The sum over a batch's distributions, with the layer `name` rounded to `grid`."""
    weight = cast(Tensor, model.get_submodule(name).weight)
    kept = weight.data
    weight.data = quantize_rows(kept.flatten(1), grid.of(kept)).dequantized().view_as(kept)
    try:
        found = _log_probabilities(model, batch)
    finally:
        weight.data = kept
    return float(F.kl_div(found, reference, reduction="sum", log_target=True))


def _log_probabilities(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    """float32 [distributions, classes]."""
    logits: Tensor = model(**batch).logits
    return logits.reshape(-1, logits.shape[-1]).float().log_softmax(-1)
