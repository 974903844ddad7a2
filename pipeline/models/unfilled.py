"""Models without weights: what a class makes of a config, at a fraction of what it costs to initialise them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, cast
from unittest import mock

import torch
from torch import nn


def on_meta(cls: Any, config: Any) -> nn.Module:
    """The transformers model `cls(config)` on the meta device, tied as it ties itself: shapes alone, in float32."""
    return shapes_alone(lambda: cls(config))


def shapes_alone(build: Callable[[], nn.Module]) -> nn.Module:
    """The transformers model that `build` makes, on the meta device, tied as it ties itself."""
    from transformers.initialization import no_init_weights

    with torch.device("meta"), no_init_weights():
        model = build()
    if tie := getattr(model, "tie_weights", None):  # which `no_init_weights` leaves out
        tie()
    return model


def to_be_filled(cls: Any, config: Any, dtype: torch.dtype | None = None) -> nn.Module:
    """The transformers model `cls(config)`, what is stored of it on the meta device and not tied, for a loader to put
    there. Buffers that are not stored are made as transformers makes them for weights of `dtype` (None: the config's).
    """
    from transformers.initialization import no_init_weights

    # In float32 where weights are of 16 bits: such buffers are rounded where they are used.
    wide = torch.float64 if (dtype or getattr(config, "dtype", None)) == torch.float64 else torch.float32
    default = torch.get_default_dtype()
    torch.set_default_dtype(wide)
    try:
        with no_init_weights(), registering(_to_meta):
            model = cast(nn.Module, cls(config))
    finally:
        torch.set_default_dtype(default)
    for module in model.modules():
        for name in module._buffers.keys() - module._non_persistent_buffers_set:
            buffer = module._buffers[name]
            module._buffers[name] = None if buffer is None else buffer.to("meta")
    return model


@contextmanager
def registering(put: Callable[[nn.Module, str, nn.Parameter], None]) -> Iterator[None]:
    """`put` is called with each parameter that a module is given meanwhile, by its name there."""
    register = nn.Module.register_parameter

    def registered(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        register(module, name, parameter)
        if parameter is not None:
            put(module, name, parameter)

    nn.Module.register_parameter = registered  # type: ignore[assignment, method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def one_by_one() -> AbstractContextManager[Any]:
    """transformers converts each tensor as it needs it, and in this thread, where the peak of loading is measured; with
    threads of its own it holds many that wait to be put together."""
    return mock.patch.dict(os.environ, {"HF_DEACTIVATE_ASYNC_LOAD": "1"})


def _to_meta(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
    """One by one: no second model beside the stored one."""
    module._parameters[name] = nn.Parameter(parameter.to("meta"), parameter.requires_grad)
