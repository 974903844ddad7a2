"""Linear layers that multiply in float8 for as long as a fit goes on, by torchao."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

SHARED = (
    "_parameters", "_buffers", "_non_persistent_buffers_set", "_forward_hooks", "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called", "_forward_pre_hooks", "_forward_pre_hooks_with_kwargs", "_backward_hooks",
    "_backward_pre_hooks",
)  # fmt: skip
"""What a layer and the one in its place have together, so that either sees what happens to the other: weights that are
moved, masks that grow, hooks."""


def to_float8(model: nn.Module, names: Sequence[str], recipe: str, *, emulate: bool) -> Callable[[], None]:
    """Put float8 layers in the place of the linear layers `names`; names and weights stay.

    Returns:
        A function that puts the layers themselves back.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=DeprecationWarning)  # torchao's own use of torch
        warnings.filterwarnings("ignore", category=FutureWarning)
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    plain = {name: model.get_submodule(name) for name in names}
    config = Float8LinearConfig.from_recipe_name(recipe)
    object.__setattr__(config, "emulate", emulate)
    convert_to_float8_training(model, module_filter_fn=lambda _, name: name in plain, config=config)
    casts = []
    for name, layer in plain.items():
        float8 = model.get_submodule(name)
        for key in SHARED:
            float8.__dict__[key] = layer.__dict__[key]
        float8.train(layer.training)
        casts.append(float8.register_forward_pre_hook(_to_bfloat16))

    def put_back() -> None:
        for cast in casts:
            cast.remove()
        for name, layer in plain.items():
            layer.train(model.get_submodule(name).training)
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, layer)

    return put_back


def _to_bfloat16(layer: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """torchao's layers follow the autocast of NVIDIA GPUs only."""
    first, *rest = inputs
    return (first.to(torch.bfloat16) if isinstance(first, Tensor) else first, *rest)
