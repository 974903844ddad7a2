"""The `trainer` group: how long, how much at once, how often to log, evaluate and save."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
import sysconfig
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
    `compile`: forward and backward passes of blocks and loss as compiled kernels, which the first step of a fit waits
    for.
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
    compile: bool
    rank_timeout: Annotated[float, Gt(0)]


def missing_compiler(kind: str) -> str | None:
    """What torch would need to compile for device `kind` ('cpu', 'cuda') and this machine lacks; None where nothing."""
    default = {"cpu": "clang++" if sys.platform == "darwin" else "g++", "cuda": "gcc"}[kind]
    compiler = os.environ.get("CXX" if kind == "cpu" else "CC") or default
    if shutil.which(compiler) is None:
        return f"there is no {'C++' if kind == 'cpu' else 'C'} compiler ({compiler})"
    if not os.path.isfile(os.path.join(sysconfig.get_path("include"), "Python.h")):
        return "there is no Python.h (python3-dev)"
    if kind == "cuda" and importlib.util.find_spec("triton") is None:
        return "there is no triton"
    return None
