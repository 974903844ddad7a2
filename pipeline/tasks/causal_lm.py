"""Causal language modelling: predict each token from those before it. Perplexity, decoding speed, generation.

A sequence of T tokens gives T - 1 predictions. Decoding is HF's forward with its key-value cache, called directly:
`generate()` adds several milliseconds of Python a token, which would hide what a faster layer gains.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal, cast

import torch
from torch import nn
from torch.nn import functional

from pipeline.data.loader import evaluation_loader
from pipeline.errors import ConfigError
from pipeline.layers.chunked_loss import before_head, chunked_cross_entropy
from pipeline.layers.decoding import decode
from pipeline.layers.sliced_loss import IGNORED, Criterion, cross_entropy
from pipeline.models.architecture import positions
from pipeline.tasks.base import Batch, Quality, Speed, Task
from pipeline.tasks.measuring import inference, wait

if TYPE_CHECKING:
    from collections.abc import Sized

    from transformers import PreTrainedTokenizerBase

    from pipeline.data.base import DataBundle

PROMPT_TOKENS = 16
NEW_TOKENS = 32
SPEED_SECONDS = 2.0
"""What all rounds of all models together may take, warm-up aside, as long as each model gets its `MIN_ROUNDS`."""
MIN_ROUNDS, MAX_ROUNDS = 3, 15
PROBE_SHAPE = (2, 32)


class CausalLM(Task):
    """Batches: {"input_ids": int64 [B, T], "labels": int64 [B, T]}; labels are the inputs, the shift is made here."""

    name: ClassVar[str] = "causal_lm"
    metric: ClassVar[str] = "perplexity"
    direction: ClassVar[Literal["lower", "higher"]] = "lower"
    unit: ClassVar[Literal["tokens/s", "samples/s"]] = "tokens/s"

    def loss(self, model: nn.Module, batch: Batch, chunks: int = 1, criterion: Criterion | None = None) -> torch.Tensor:
        """Mean cross-entropy in nats a predicted token, in float32 (float64 where the model computes in it)."""
        criterion = criterion or cross_entropy
        if chunks > 1:
            hidden, head = before_head(model, batch["input_ids"])
            return chunked_cross_entropy(hidden, head, shifted(batch["labels"]), chunks, criterion)
        return _nll(_logits(model, batch["input_ids"]), batch["labels"], criterion)

    def count(self, batch: Batch) -> int:
        """Tokens that the model processes: B x T, the convention for throughput (the loss is over B x (T - 1))."""
        return batch["input_ids"].numel()

    def evaluate(self, model: nn.Module, data: DataBundle, batch_size: int, device: str) -> Quality:
        """Perplexity, exp of the mean nats a predicted token; `n` is how many were predicted."""
        total, predicted = 0.0, 0
        with inference(model):
            for batch in evaluation_loader(data.evaluation, batch_size):
                ids, labels = batch["input_ids"].to(device), batch["labels"].to(device)
                total += _nll(_logits(model, ids), labels, cross_entropy, "sum").item()
                predicted += int((labels[:, 1:] != IGNORED).sum())
        loss = total / predicted
        return Quality(self.metric, self.direction, _exp(loss), loss, predicted)

    def baseline(self, data: DataBundle) -> float:
        """Perplexity of token frequencies: counted (plus one) on the training split, measured on the evaluation's."""
        vocabulary = data.spec.vocabulary
        if vocabulary is None:
            raise ValueError("the data's spec has no vocabulary")
        frequencies = torch.ones(vocabulary, dtype=torch.float64)
        for batch in evaluation_loader(data.train, 1024):
            frequencies += torch.bincount(batch["input_ids"].flatten(), minlength=vocabulary)
        targets = torch.zeros(vocabulary, dtype=torch.float64)
        for batch in evaluation_loader(data.evaluation, 1024):
            targets += torch.bincount(batch["labels"][:, 1:].flatten(), minlength=vocabulary)
        nats = -(frequencies / frequencies.sum()).log()
        return _exp(float((targets * nats).sum() / targets.sum()))

    def speed(self, models: Mapping[str, nn.Module], data: DataBundle, device: str) -> dict[str, Speed]:
        """Greedy decoding at batch 1 with a key-value cache, after a prompt of 16 held-out tokens.

        A round decodes 32 tokens (fewer where the model has fewer positions); models take rounds in turns for about
        `SPEED_SECONDS`. The prompt's own pass is not timed.
        """
        row = data.evaluation[0]["input_ids"].to(device)
        room = min([len(row), *(limit for model in models.values() if (limit := positions(model)))])
        prompt = row[: min(PROMPT_TOKENS, room // 2)].unsqueeze(0)
        steps = min(NEW_TOKENS, room - prompt.shape[1])
        seconds: dict[str, list[float]] = {name: [] for name in models}
        for model in models.values():
            with inference(model):
                _decode_seconds(model, prompt, min(4, steps))
        started = time.perf_counter()
        for turn in range(MAX_ROUNDS):
            for name, model in models.items():
                with inference(model):
                    seconds[name].append(_decode_seconds(model, prompt, steps) / steps)
            if turn + 1 >= MIN_ROUNDS and time.perf_counter() - started > SPEED_SECONDS:
                break
        medians = {name: statistics.median(times) for name, times in seconds.items()}
        return {name: Speed(self.unit, 1 / latency, latency, batch_size=1) for name, latency in medians.items()}

    def probe(self, data: DataBundle) -> Batch:
        """{"input_ids": int64 [2, 32]}: the beginnings of two held-out windows (shorter where the windows are)."""
        rows, length = PROBE_SHAPE
        held_out = len(cast("Sized", data.evaluation))
        return {"input_ids": torch.stack([data.evaluation[i % held_out]["input_ids"][:length] for i in range(rows)])}

    def generate(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        prompt: str,
        max_new_tokens: int,
        temperature: float,
        seed: int,
    ) -> str:
        """`prompt` and its continuation: see the function of the same name."""
        return generate(model, tokenizer, prompt, max_new_tokens, temperature, seed)


def generate(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    max_new_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
) -> str:
    """`prompt` and its continuation: greedy at temperature 0, else sampled from softmax(logits / temperature).

    Stops at the tokenizer's end-of-text token, where it has one. When the context reaches the model's last position, it
    goes on from its more recent half.

    Raises:
        ConfigError: the prompt is empty and the tokenizer has no token to begin with.
    """
    ids: list[int] = tokenizer(prompt, verbose=False)["input_ids"]
    if not ids:
        if tokenizer.bos_token_id is None:
            raise ConfigError(
                "prompt is empty and the model has no token to begin a text with; give at least a character"
            )
        ids = [tokenizer.bos_token_id]
    limit = positions(model)
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    cache: Any = None
    seen = 0
    with inference(model):
        for _ in range(max_new_tokens):
            if cache is not None and (limit is None or seen < limit):
                fresh = ids[-1:]
            else:
                cache, seen = None, 0
                fresh = ids if limit is None or len(ids) <= limit else ids[-max(1, limit // 2) :]
            scores, cache = decode(model, torch.tensor([fresh], device=device), cache)
            seen += len(fresh)
            logits = scores[0, -1].float()
            if temperature > 0:
                choice = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)
            else:
                choice = logits.argmax()
            ids.append(int(choice))
            if ids[-1] == tokenizer.eos_token_id:
                break
    return cast(str, tokenizer.decode(ids, skip_special_tokens=True))


def _logits(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    return cast(torch.Tensor, model(input_ids=ids, use_cache=False).logits)


def _nll(logits: torch.Tensor, labels: torch.Tensor, criterion: Criterion, reduction: str = "mean") -> torch.Tensor:
    """Cross-entropy of logits [B, T, V] against the labels [B, T] one step later.

    The labels are moved, not the logits cut: a view of all but the last position would have to be copied, and logits
    are the largest tensor of a small model.
    """
    return criterion(logits.reshape(-1, logits.shape[-1]), shifted(labels).flatten(), reduction)


def shifted(labels: torch.Tensor) -> torch.Tensor:
    """What each position of `labels` [B, T] predicts: the next one; the last predicts nothing."""
    return functional.pad(labels[:, 1:], (0, 1), value=IGNORED)


def _exp(nats: float) -> float:
    try:
        return math.exp(nats)
    except OverflowError:
        return math.inf


def _decode_seconds(model: nn.Module, prompt: torch.Tensor, steps: int) -> float:
    logits, cache = decode(model, prompt)
    token = logits[:, -1].argmax(-1, keepdim=True)
    wait(prompt.device)
    started = time.perf_counter()
    for _ in range(steps):
        logits, cache = decode(model, token, cache)
        token = logits[:, -1].argmax(-1, keepdim=True)
    wait(prompt.device)
    return time.perf_counter() - started
