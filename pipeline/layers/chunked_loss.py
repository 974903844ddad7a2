"""Cross-entropy of a language model without ever holding its logits: the head runs on a part of the tokens at a time.

Logits, their logarithms and their gradients are three tensors of tokens x vocabulary in float32, often the largest of a
training step. Each part's are computed again in the backward pass (Chen et al., 2016, arXiv:1604.06174), which costs
the head's product a second time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pipeline.errors import ConfigError
from pipeline.layers.sliced_loss import IGNORED, Criterion, cross_entropy


def chunked_cross_entropy(
    hidden: Tensor,
    head: Callable[[Tensor], Tensor],
    targets: Tensor,
    chunks: int,
    criterion: Criterion = cross_entropy,
) -> Tensor:
    """Mean nats of `targets` int64 [B, T] (-100: left out) under `head(hidden)`; `hidden` is [B, T, H]."""
    rows, wanted = hidden.flatten(0, 1), targets.flatten()
    size = -(-len(rows) // chunks)

    def nats(part: Tensor, target: Tensor) -> Tensor:
        return criterion(head(part), target, "sum")

    parts = zip(torch.split(rows, size), torch.split(wanted, size), strict=True)
    sums = [checkpoint(nats, *part, use_reentrant=False, preserve_rng_state=False) for part in parts]
    return torch.stack(sums).sum() / (wanted != IGNORED).sum()


def before_head(model: nn.Module, ids: Tensor) -> tuple[Tensor, nn.Module]:
    """What the head of `model` is given for the tokens `ids` [B, T]: hidden states [B, T, H]; and the head."""
    head = cast(nn.Module, cast(Any, model).get_output_embeddings())
    taken: list[Tensor] = []

    def take(hidden: Tensor) -> Tensor:
        taken.append(hidden)
        return hidden[:, :0]

    plain = head.__dict__.get("forward")
    head.__dict__["forward"] = take
    try:
        model(input_ids=ids, use_cache=False)
    finally:
        del head.__dict__["forward"]
        if plain is not None:
            head.__dict__["forward"] = plain
    return taken[0], head


def require_plain_head(model: nn.Module, key: str) -> None:
    """Raises ConfigError, naming `key`, unless the logits of `model` are just what its head gives."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    fix = f"{key}: this model's logits are not what a head alone makes of its hidden states; use {key.split('=')[0]}=1"
    if not isinstance(head, nn.Module):
        raise ConfigError(fix)
    mode = model.training
    model.eval()
    with torch.no_grad():
        ids = torch.arange(8, device=next(model.parameters()).device).unsqueeze(0) % 4
        whole = cast(Any, model)(input_ids=ids, use_cache=False).logits
        hidden, head = before_head(model, ids)
        same = hidden.shape[:2] == ids.shape and torch.equal(head(hidden), whole)
    model.train(mode)
    if not same:
        raise ConfigError(fix)
