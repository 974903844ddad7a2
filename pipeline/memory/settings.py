"""The `memory` group: what training may free early or compute twice in order to fit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge

from pipeline.registry import register


@register("memory", "settings")
@dataclass(frozen=True, kw_only=True)
class Memory:
    """`release_gradients` frees gradients right after the step instead of before the next backward.

    `activation_checkpointing`: `full` keeps only each block's input and recomputes the block in the backward pass
    (Chen et al., 2016, arXiv:1604.06174); `selective` keeps the results of matrix products and recomputes the rest.

    `step_in_backward` steps each weight as soon as its gradient is there and frees the gradient. `loss_chunks`: a
    language model's logits are computed, and computed again in the backward pass, for so many parts of a batch in turn.

    `activation_offload`, `optimizer_offload`: where activations wait for the backward pass, and the optimizer's state
    for the step. `host`: a GPU's host, where weights are then stepped as well. `disk`: mapped files in the run's
    directory.
    """

    name: str
    release_gradients: bool
    activation_checkpointing: Literal["none", "full", "selective"]
    step_in_backward: bool
    loss_chunks: Annotated[int, Ge(1)]
    activation_offload: Literal["none", "host", "disk"]
    optimizer_offload: Literal["none", "host", "disk"]

    def problems(self) -> list[str]:
        if self.activation_offload == "none" or self.activation_checkpointing != "selective":
            return []
        return [
            f"memory.activation_offload={self.activation_offload}: activation_checkpointing=selective holds what it "
            "keeps by itself; use memory.activation_checkpointing=full, or none"
        ]
