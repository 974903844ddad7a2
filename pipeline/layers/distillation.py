"""Losses by which a student learns from a teacher, as pure functions, and the hooks that watch both.

Logits: Hinton et al., 2015 (arXiv:1503.02531). Hidden states: Romero et al., 2015 (arXiv:1412.6550), layers paired
evenly as in TinyBERT (Jiao et al., 2020, arXiv:1909.10351). Attention relations: MiniLM (Wang et al., 2020,
arXiv:2002.10957) as generalised by MiniLMv2 (arXiv:2012.15828). Sequences: Kim & Rush, 2016 (arXiv:1606.07947).
Each loss is a float32 scalar (float64 where it is given float64), 0 where student and teacher agree.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from pipeline.errors import LeanfitError
from pipeline.layers.decoding import decode
from pipeline.layers.quantize import at_least_float32
from pipeline.layers.sliced_loss import sum_over_rows
from pipeline.models.architecture import describe
from pipeline.models.base import Architecture


@dataclass(frozen=True)
class Observed:
    """What the losses look at in one forward pass; parts that no loss needs are left empty.

    `logits` [..., V], or [..., k] of the `classes` [..., k] alone; `hidden`: each block's output; `relations`:
    (projection [B, T, width], its head count) of the last block's query, key and value.
    """

    logits: Tensor | None = None
    hidden: Sequence[Tensor] = ()
    relations: Sequence[tuple[Tensor, int]] = ()
    classes: Tensor | None = None


@contextmanager
def observing(model: nn.Module, names: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Outputs of the named submodules ('' is the model) in the forward pass made inside; of a tuple, its first."""
    seen: dict[str, Any] = {}

    def hook(name: str) -> Any:
        def keep(module: nn.Module, args: Any, output: Any) -> None:
            seen[name] = output[0] if type(output) is tuple else output

        return keep

    handles = [model.get_submodule(name).register_forward_hook(hook(name)) for name in names]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def relation_names(architecture: Architecture) -> list[str]:
    """The last block's query, key and value projections; none where they are fused or there is no attention."""
    attention = architecture.blocks[-1].attention if architecture.blocks else None
    if attention is None or attention.query == attention.key:
        return []
    return [attention.query, attention.key, attention.value]


def has_relations(model: nn.Module) -> bool:
    """Whether the last block has the projections that `relation_names` gives."""
    return bool(relation_names(describe(model)))


def head_size(model: nn.Module) -> int | None:
    """How many logits a float model gives: the rows of its head; None where it has none."""
    head = describe(model).head
    return None if head is None else model.get_submodule(head).get_parameter("weight").shape[0]


def logits_loss(
    student: Tensor,
    teacher: Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    mask: Tensor | None = None,
    classes: Tensor | None = None,
) -> Tensor:
    """T^2 KL(softmax(teacher / T) || softmax(student / T)) in nats, mean over all rows of logits [..., V].

    T^2 keeps gradients at the size they have at T = 1. `top_k`: only the teacher's k largest logits of a row count, and
    both distributions are those over these k. `classes` [..., k]: which ones `teacher` [..., k] holds, where it was cut
    to them before. `mask` [...]: rows where it is 0 are left out.
    """
    counted = torch.ones(student.shape[:-1], device=student.device) if mask is None else mask
    beside = [teacher, counted.unsqueeze(-1)] if classes is None else [teacher, counted.unsqueeze(-1), classes]

    def divergence(student: Tensor, teacher: Tensor, counted: Tensor, classes: Tensor | None = None) -> Tensor:
        student, teacher = at_least_float32(student), at_least_float32(teacher)
        if classes is None and top_k is not None and top_k < teacher.shape[-1]:
            teacher, classes = teacher.topk(top_k, dim=-1)
        if classes is not None:
            student = student.gather(-1, classes)
        return (_divergence(student / temperature, teacher / temperature) * counted.squeeze(-1)).sum()

    total = sum_over_rows(divergence, *(tensor.flatten(0, -2) for tensor in (student, *beside)))
    return temperature**2 * total / counted.sum()


def hidden_loss(student: Sequence[Tensor], teacher: Sequence[Tensor], mask: Tensor | None = None) -> Tensor:
    """Mean over the student's blocks of |s - t|^2 / |t|^2, each block paired by `paired` with one of the teacher's.

    Relative to the teacher's own size, as hidden states grow from block to block. `mask` [B, T] for [B, T, width].

    Raises:
        LeanfitError: the two have other shapes: nothing here maps one width to another.
    """
    terms = []
    for place, one in enumerate(student):
        other = teacher[paired(place, len(student), len(teacher))]
        if one.shape != other.shape:
            raise LeanfitError(
                f"hidden states of {list(one.shape)} cannot be compared with the teacher's {list(other.shape)}"
            )
        one, other = at_least_float32(one), at_least_float32(other)
        if mask is not None:
            one, other = one * mask.unsqueeze(-1), other * mask.unsqueeze(-1)
        terms.append((one - other).square().sum() / other.square().sum())
    return torch.stack(terms).mean()


def paired(place: int, student: int, teacher: int) -> int:
    """Place of the teacher's block that the student's block at `place` is to match: evenly, the last with the last."""
    return -(-(place + 1) * teacher // student) - 1


def relation_loss(
    student: Sequence[tuple[Tensor, int]], teacher: Sequence[tuple[Tensor, int]], mask: Tensor | None = None
) -> Tensor:
    """Mean over query, key and value of KL(teacher's relation || student's), mean over heads and tokens.

    A projection X [B, T, width] in heads of width d has the relation softmax(X X^T / sqrt(d)) [B, heads, T, T]: how
    alike the tokens are. Widths may differ: both are cut into the most heads that the teacher's heads and the student's
    width allow (MiniLMv2). `mask` [B, T]: tokens where it is 0 are left out.
    """
    terms = []
    for (one, _), (other, heads) in zip(student, teacher, strict=True):
        common = math.gcd(heads, one.shape[-1])
        pair = [_similarity(at_least_float32(x), common, mask) for x in (one, other)]
        rows = None if mask is None else mask.unsqueeze(1).expand(-1, common, -1)
        terms.append(_mean(_divergence(*pair), rows))
    return torch.stack(terms).mean()


def continued(model: nn.Module, ids: Tensor, prompt: int, sample: bool) -> Tensor:
    """int64 like `ids` [B, T]: the first `prompt` tokens of each row, and what `model` makes of them.

    The likeliest token each time (a beam of 1), or one drawn from the model's distribution with the global generator.
    """
    rows, cache, fresh = ids[:, :prompt], None, ids[:, :prompt]
    with torch.no_grad():
        while rows.shape[1] < ids.shape[1]:
            logits, cache = decode(model, fresh, cache)
            last = logits[:, -1].float()
            fresh = torch.multinomial(last.softmax(-1), 1) if sample else last.argmax(-1, keepdim=True)
            rows = torch.cat([rows, fresh], dim=1)
    return rows


def combined(
    student: Observed,
    teacher: Observed,
    weights: Mapping[str, float],
    temperature: float = 1.0,
    top_k: int | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """The sum of the losses `logits`, `hidden` and `relations`, each by its weight; those of weight 0 are not computed.

    Raises:
        ValueError: no weight is above 0, or what a loss needs was not observed.
    """
    terms = []
    if weights.get("logits"):
        if student.logits is None or teacher.logits is None:
            raise ValueError("logits were not observed")
        rows = mask if mask is not None and mask.shape == student.logits.shape[:-1] else None
        loss = logits_loss(student.logits, teacher.logits, temperature, top_k, rows, teacher.classes)
        terms.append(weights["logits"] * loss)
    if weights.get("hidden"):
        terms.append(weights["hidden"] * hidden_loss(student.hidden, teacher.hidden, mask))
    if weights.get("relations"):
        terms.append(weights["relations"] * relation_loss(student.relations, teacher.relations, mask))
    if not terms:
        raise ValueError("no loss has a weight above 0")
    return torch.stack(terms).sum()


def _divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(softmax(teacher) || softmax(student)) of each row."""
    ours, theirs = student.log_softmax(-1), teacher.log_softmax(-1)
    return functional.kl_div(ours, theirs, reduction="none", log_target=True).sum(-1)


def _mean(rows: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        return rows.mean()
    return (rows * mask).sum() / mask.sum()


def _similarity(x: Tensor, heads: int, mask: Tensor | None) -> Tensor:
    """X X^T / sqrt(d) of each head: [B, heads, T, T]; columns of tokens that are masked are out of reach."""
    batch, tokens, width = x.shape
    cut = x.view(batch, tokens, heads, width // heads).transpose(1, 2)
    scores = cut @ cut.transpose(2, 3) / math.sqrt(width // heads)
    # A large number and not infinity, which would make 0 x inf of the divergence.
    return scores if mask is None else scores.masked_fill(mask[:, None, None, :] == 0, -1e9)
