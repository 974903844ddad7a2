"""One step of decoding with a key-value cache, under whichever name the model's library gives the cache.

transformers called it `past_key_values` up to 5.23 and calls it `cache` since; models with code of their own may keep
the former name for long. A model's signature tells.
"""

import inspect
from typing import Any, cast

from torch import Tensor, nn

CACHES = ("cache", "past_key_values", "past_key_value", "layer_past")
"""Names under which models and their blocks are given a cache."""


def decode(model: nn.Module, ids: Tensor, cache: Any = None) -> tuple[Tensor, Any]:
    """Logits [B, T, V] of the tokens `ids` [B, T] that follow those in `cache`, and the cache with them added.

    Raises:
        TypeError: the model takes no cache.
    """
    taken = inspect.signature(model.forward).parameters
    name = next((name for name in CACHES if name in taken), None)
    if name is None:
        raise TypeError(f"{type(model).__name__} takes no key-value cache")
    output = cast(Any, model)(input_ids=ids, use_cache=True, **{name: cache})
    return output.logits, getattr(output, name)
