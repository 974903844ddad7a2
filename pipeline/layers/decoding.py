"""One step of decoding with a key-value cache, under whichever name the model's library gives the cache.

transformers called it `past_key_values` up to 5.23 and calls it `cache` since; models with code of their own may keep
the former name for long. A model's signature tells. One that takes none (GPT-1, RWKV) is run on all tokens each time.

One float32 token on a CPU is decoded without oneDNN. Its matrix products are not oneDNN's there, but GELU would be, and
takes 50 microseconds to start where torch's own takes 5 for all 3,072 features of a token.
"""

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn

CACHES = ("cache", "past_key_values", "past_key_value", "layer_past")
"""Names under which models and their blocks are given a cache."""
LAST = ("logits_to_keep",)
"""And the number of tokens, from the end, whose logits are wanted."""


def decode(model: nn.Module, ids: Tensor, cache: Any = None) -> tuple[Tensor, Any]:
    """Logits [B, 1, V] of the last of the tokens `ids` [B, T] that follow those in `cache`, and the cache with them.

    Of a prompt most models (transformers') compute the last token's alone, which are 1/T of its logits. The tokens so
    far are the cache of a model that takes none.
    """
    forward = getattr(model.forward, "__func__", model.forward)
    name = _taken(forward, CACHES)
    if name is None:
        ids = ids if cache is None else torch.cat([cache, ids], dim=1)
        return cast(Any, model)(input_ids=ids).logits[:, -1:], ids
    last = _taken(forward, LAST)
    with _kernels_for(model, ids):
        output = cast(Any, model)(input_ids=ids, use_cache=True, **{name: cache}, **({last: 1} if last else {}))
    return output.logits[:, -1:], getattr(output, name)


@functools.cache
def _taken(forward: Callable[..., Any], names: tuple[str, ...]) -> str | None:
    """Which of `names` a model's `forward` takes."""
    taken = inspect.signature(forward).parameters
    return next((name for name in names if name in taken), None)


def _kernels_for(model: nn.Module, ids: Tensor) -> AbstractContextManager[None]:
    if ids.numel() != 1 or ids.device.type != "cpu" or torch.compiler.is_compiling():
        return nullcontext()
    weight = next(model.parameters(), None)
    return nullcontext() if weight is None or weight.dtype != torch.float32 else _without_onednn()


@contextmanager
def _without_onednn() -> Iterator[None]:
    before = torch.backends.mkldnn.enabled
    torch.backends.mkldnn.enabled = False  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.backends.mkldnn.enabled = before
