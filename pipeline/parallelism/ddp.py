"""Data parallelism: a copy of the model on each device, gradients averaged while the backward pass runs.

Li et al., 2020 (arXiv:2006.15704).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

from annotated_types import Ge

from pipeline.parallelism.base import Holding, Parallelism, backend
from pipeline.parallelism.launched import Launched
from pipeline.registry import register

if TYPE_CHECKING:
    import torch
    from lightning.pytorch.strategies import Strategy
    from torch import nn


POWERSGD_AFTER = 10
"""Steps with whole gradients first: early ones have no low rank."""
ONE_BUCKET = 1 << 20
"""MiB of gradients that are sent at once where that is to be all of them. PowerSGD sends factors from threads of gloo,
which take several buckets in another order on each rank: what was sent of one came as part of another."""


@dataclass(frozen=True, kw_only=True)
class DataParallel(Parallelism):
    """`bucket_view`: gradients live in the communication buckets, which saves a copy of them (4 bytes a parameter).

    `static_graph`: the same parameters take part in each step, in the same order; torch then plans ahead. Every
    parameter must receive a gradient in every step.

    `gradient_compression`: what is sent between devices. `float16`, `bfloat16`: half the bytes, rounded. `powersgd`:
    factors of rank `powersgd_rank` of each matrix, after 10 steps with whole ones; what they miss is added to the next
    step's (Vogels et al., 2019, arXiv:1905.13727), and is not in a checkpoint.
    """

    bucket_view: bool
    static_graph: bool
    gradient_compression: Literal["none", "float16", "bfloat16", "powersgd"]
    powersgd_rank: Annotated[int, Ge(1)]

    @property
    def holding(self) -> Holding:
        narrow = self.gradient_compression if self.gradient_compression in ("float16", "bfloat16") else None
        leaves_out = POWERSGD_AFTER if self.gradient_compression == "powersgd" else None
        return Holding(buckets="views" if self.bucket_view else "copies", sent_in=narrow, leaves_out=leaves_out)

    def begin(self, wrapped: nn.Module) -> None:
        # Lightning registers hooks on GPUs only, and says nothing elsewhere.
        from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
        from torch.distributed.algorithms.ddp_comm_hooks import powerSGD_hook as powersgd
        from torch.nn.parallel import DistributedDataParallel

        assert isinstance(wrapped, DistributedDataParallel)
        if self.gradient_compression == "powersgd":
            dtype = next(weight.dtype for weight in wrapped.parameters() if weight.requires_grad)
            state = powersgd.PowerSGDState(
                None, self.powersgd_rank, POWERSGD_AFTER, orthogonalization_epsilon=least_norm(dtype)
            )
            wrapped.register_comm_hook(state, powersgd.powerSGD_hook)
        elif self.gradient_compression != "none":
            hooks = {"float16": default_hooks.fp16_compress_hook, "bfloat16": default_hooks.bf16_compress_hook}
            wrapped.register_comm_hook(None, hooks[self.gradient_compression])

    def strategy(self, device: str) -> Strategy:
        """Raises ConfigError for a device between whose copies nothing can be sent."""
        from lightning.pytorch.strategies import DDPStrategy

        return DDPStrategy(
            process_group_backend=backend(self.name, device),
            find_unused_parameters=False,
            gradient_as_bucket_view=self.bucket_view,
            static_graph=self.static_graph,
            bucket_cap_mb=ONE_BUCKET if self.gradient_compression == "powersgd" and device == "cpu" else None,
        )


def least_norm(dtype: torch.dtype) -> float:
    """What torch adds to a column's norm that it divides by, so that a gradient of zeros (small ones in float16 are
    that) stays 0, not NaN: less than any norm that counts, and not 0 in `dtype`."""
    import torch

    return 6e-8 if dtype == torch.float16 else 1e-30


@register("parallelism", "ddp")
@dataclass(frozen=True, kw_only=True)
class DDP(DataParallel, Launched):
    """Ranks of torchrun, srun or mpirun."""
