"""What a language model holds while it continues a prompt: the task's own decoding with a key-value cache, on fake
tensors. Of all tokens those are traced at which most is held: the first three, and the last three, or those before the
model's last position and the pass that begins anew there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from pipeline.layers.decoding import CACHES
from pipeline.models.architecture import describe, positions
from pipeline.planner.fakes import as_opened, faked, kernels_of, tracing
from pipeline.planner.folding import Folding, folded
from pipeline.planner.live import ACTIVATIONS, Live, Peak, by_kind
from pipeline.planner.replaying import replaying
from pipeline.planner.supposed import Supposing
from pipeline.schema import RunConfig
from pipeline.tasks.base import Task
from pipeline.tasks.causal_lm import PROMPT_TOKENS

KEY_VALUE_CACHE = "key-value cache"
"""Its kind in a plan."""
WARM = 3
"""Passes until each is like the one before, but for one token more: the third lets go of the prompt's logits."""


def generates(config: RunConfig, task: Task) -> bool:
    """Whether generation belongs to a plan: a run itself generates nothing."""
    return hasattr(task, "generate") and (config.job == "plan" or config.fit.inference is not None)


def longest(prompt: int, tokens: int, limit: int | None) -> tuple[int, bool]:
    """(positions that the cache holds at most, whether the model's last one is passed) of a text that goes on for
    `tokens` after `prompt`; `limit`: positions of the model."""
    first = prompt if limit is None or prompt <= limit else max(1, limit // 2)
    last = first + tokens - 1
    return (last, False) if limit is None or last <= limit else (limit, True)


def trace_generation(config: RunConfig, model: nn.Module, task: Task) -> Peak:
    """The peak while `model`, of the meta device and in the dtypes that it has then, continues a prompt of
    `PROMPT_TOKENS` by `generate.max_new_tokens`; it is filled with fake tensors in place."""
    with tracing(config):
        return traced_generation(config, faked(model), task, PROMPT_TOKENS, lambda: Supposing(*kernels_of(config)))


def traced_generation(
    config: RunConfig, model: nn.Module, task: Task, prompt: int, counting: Callable[[], Live]
) -> Peak:
    """The same for a `model` of fake tensors and a prompt of so many tokens, each stretch counted by a new
    `counting()`. To be called within `tracing`."""
    as_opened(model)
    limit = positions(model)
    tokens = config.generate.max_new_tokens
    held, passed = longest(prompt, tokens, limit)
    peaks = [_stretch(config, model, task, prompt, min(WARM, tokens), counting(), 0)]
    if (before := held - WARM + 1) > min(prompt, limit or prompt):
        peaks.append(_stretch(config, model, task, before, WARM, counting(), WARM - 1))
    if passed and limit is not None:
        peaks.append(_stretch(config, model, task, max(1, limit // 2), 1, counting(), 0))
    return max(peaks, key=lambda peak: peak.bytes)


def _stretch(config: RunConfig, model: nn.Module, task: Any, prompt: int, tokens: int, live: Live, since: int) -> Peak:
    """The peak from pass number `since` on."""
    passes = iter(range(tokens))

    def begin(*_: Any) -> None:
        live.mark(f"pass {next(passes)}")

    def label(module: nn.Module, args: Any, given: dict[str, Any], out: Any) -> None:
        cache = next((given[name] for name in CACHES if given.get(name) is not None), None)
        live.hold(_cached(cache), KEY_VALUE_CACHE)
        # Some in the form of a kernel, by now. Those of a block that is not computed are told by another's.
        live.hold((weight for weight in by_kind(module)["weights"] if live.block(weight) is not None), "weights")

    known = describe(model)
    folding, blocks = Folding(live), [block.name for block in known.blocks]
    hooks = [model.register_forward_pre_hook(begin)]
    for name in blocks:
        hooks.append(model.get_submodule(name).register_forward_hook(label, with_kwargs=True))
    live.hold_model(model)
    live.phase = ACTIVATIONS
    try:
        with (
            live, folded(model, blocks, folding), live.telling_loss(model, known), replaying(live),
            config.precision.evaluation_context("cpu"),
        ):  # fmt: skip
            task.generate(model, Prompt(prompt), "", tokens, config.generate.temperature, 0)
    finally:
        for hook in hooks:
            hook.remove()
    whole = folding.unrolled()
    return whole.peak(whole.since(f"pass {since}") if since else None)


def _cached(cache: Any) -> list[Tensor]:
    """The tensors of a key-value cache, of the layers that were computed."""
    layers = [vars(layer).values() for layer in getattr(cache, "layers", [])]
    return [value for values in layers for value in values if isinstance(value, Tensor)]


class Prompt:
    """In place of a tokenizer: a prompt of so many tokens, and no token at which a text ends."""

    eos_token_id = bos_token_id = None

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [0] * self.tokens}

    def decode(self, ids: list[int], **_: Any) -> str:
        return ""
