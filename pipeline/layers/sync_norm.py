"""Batch norms that normalise by the batch of all ranks, so that a fit is the same on any number of devices.

torch has nn.SyncBatchNorm, for GPUs only. This one is written in differentiable collectives, which gloo has too:
mean and variance are those of the samples of all ranks (the batch of Ioffe & Szegedy, 2015, arXiv:1502.03167).
"""

from __future__ import annotations

from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce

from pipeline.layers.quantize import at_least_float32


class SyncedBatchNorm(nn.modules.batchnorm._BatchNorm):
    """A batch norm of any number of dimensions; in eval mode, and without other ranks, what torch's is."""

    def _check_input_dim(self, input: Tensor) -> None:
        """The layer that this one was has been given such inputs before."""

    def forward(self, input: Tensor) -> Tensor:
        if not self.training or ranks() == 1:
            return super().forward(input)
        over = [dim for dim in range(input.ndim) if dim != 1]
        x = at_least_float32(input)
        shape = [1, -1, *[1] * (input.ndim - 2)]
        count = x.new_tensor([x.numel() / x.shape[1]])
        total = summed(torch.cat([x.sum(over), count]))
        mean, count = total[:-1] / total[-1], total[-1].detach()
        centred = x - mean.view(shape)
        # From the mean of all, in a second pass: E[x^2] - E[x]^2 would cancel.
        variance = summed(centred.square().sum(over)) / count
        self._track(mean.detach(), (variance * count / (count - 1).clamp_min(1)).detach())
        y = centred * (variance + self.eps).rsqrt().view(shape)
        if self.weight is not None:
            y = y * self.weight.view(shape)
        if self.bias is not None:
            y = y + self.bias.view(shape)
        return y.to(input.dtype)

    @torch.no_grad()
    def _track(self, mean: Tensor, variance: Tensor) -> None:
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return
        self.num_batches_tracked.add_(1)
        share = 1.0 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), share)
        self.running_var.lerp_(variance.to(self.running_var.dtype), share)


def ranks() -> int:
    """Processes that train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def summed(value: Tensor) -> Tensor:
    """The sum over all ranks, with gradients."""
    return cast(Tensor, all_reduce(value))  # type: ignore[no-untyped-call]


def synchronise_batch_norms(model: nn.Module) -> nn.Module:
    """`model` whose batch norms, in place, go by the samples of all ranks. Names and values in the state dict stay."""
    for module in model.modules():
        if type(module) in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d):
            module.__class__ = SyncedBatchNorm
    return model
