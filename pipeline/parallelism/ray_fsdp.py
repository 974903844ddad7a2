"""Fully sharded data parallelism whose ranks are workers of Ray Train; see `ray` and `fsdp`."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.parallelism.fsdp import FullySharded
from pipeline.parallelism.ray import OnRay
from pipeline.registry import register


@register("parallelism", "ray_fsdp")
@dataclass(frozen=True, kw_only=True)
class RayFSDP(FullySharded, OnRay):
    """Weights, gradients and optimizer state in shards over the devices, as in `fsdp`."""
