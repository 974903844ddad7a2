"""The `memory` group: what training may free early or compute twice in order to fit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pipeline.registry import register


@register("memory", "settings")
@dataclass(frozen=True, kw_only=True)
class Memory:
    """`release_gradients` frees gradients right after the step instead of before the next backward.

    `activation_checkpointing`: `full` keeps only each block's input and recomputes the block in the backward pass
    (Chen et al., 2016, arXiv:1604.06174); `selective` keeps the results of matrix products and recomputes the rest.
    """

    name: str
    release_gradients: bool
    activation_checkpointing: Literal["none", "full", "selective"]
