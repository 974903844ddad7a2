"""Data parallelism: a copy of the model on each device, gradients averaged while the backward pass runs.

Li et al., 2020 (arXiv:2006.15704). Ranks are started by torchrun, whose environment Lightning reads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from pipeline.parallelism.base import Parallelism, backend
from pipeline.registry import register

if TYPE_CHECKING:
    from lightning.pytorch.strategies import Strategy


@register("parallelism", "ddp")
@dataclass(frozen=True, kw_only=True)
class DDP(Parallelism):
    """`bucket_view`: gradients live in the communication buckets, which saves a copy of them (4 bytes a parameter).

    `static_graph`: the same parameters take part in each step, in the same order; torch then plans ahead. Every
    parameter must receive a gradient in every step.
    """

    distributed: ClassVar[bool] = True

    bucket_view: bool
    static_graph: bool

    def strategy(self, device: str) -> Strategy:
        """Raises ConfigError for a device between whose copies nothing can be sent."""
        from lightning.pytorch.strategies import DDPStrategy

        return DDPStrategy(
            process_group_backend=backend("ddp", device),
            find_unused_parameters=False,
            gradient_as_bucket_view=self.bucket_view,
            static_graph=self.static_graph,
        )
