"""The `trainer` group: how long, how much at once, how often to log, evaluate and save."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from annotated_types import Ge, Gt, Lt

from pipeline.registry import register


@register("trainer", "settings")
@dataclass(frozen=True, kw_only=True)
class Trainer:
    """`batch_size` is global, in samples (sequences or images); accumulation follows from the micro batch and devices.

    `micro_batch_size` None: the global batch split over the devices, no accumulation. `evaluate_every`: steps between
    validations while training (best.ckpt follows them); 0 means only after training. `grad_clip` None: no clipping.
    `rank_timeout`: seconds without any progress after which a rank of a distributed fit is taken to hang.
    """

    name: str
    max_steps: Annotated[int, Ge(0)]
    batch_size: Annotated[int, Ge(1)]
    micro_batch_size: Annotated[int, Ge(1)] | None
    evaluation_batch_size: Annotated[int, Ge(1)]
    seed: Annotated[int, Ge(0), Lt(2**32)]
    grad_clip: Annotated[float, Gt(0)] | None
    log_every: Annotated[int, Ge(1)]
    checkpoint_every: Annotated[int, Ge(1)]
    evaluate_every: Annotated[int, Ge(0)]
    rank_timeout: Annotated[float, Gt(0)]
