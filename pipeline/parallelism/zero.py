"""Training by the DeepSpeed engine under Lightning: our optimizer, schedule, clipping, accumulation and precision.

Lightning's own DeepSpeedStrategy takes GPUs only, and writes a directory of shards that only as many devices with the
same stage read back. This one runs the same engine on CPUs (gloo) as well, so that what is tested there is what runs on
GPUs, and keeps to the checkpoint of every other strategy: one file with whole weights and the optimizer's state by
parameter, from which any of them goes on. The engine clips, accumulates and steps; nothing is done twice.

Nothing is compiled. The one operator that DeepSpeed would build at the start, sums through shared memory between CPUs,
is declined in favour of gloo's, and optimizers are torch's.
"""

from __future__ import annotations

import argparse
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import lightning.pytorch as lightning
import torch
import torch.distributed as dist
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.optim import Optimizer

from pipeline.errors import LeanfitError

BUCKET_ELEMENTS = 200_000_000
"""Gradients are reduced and weights gathered in buckets of at most so many; a small model has smaller ones."""


class ZeroStrategy(DDPStrategy):
    """One fit of one optimizer.

    Args:
        stage: 1, 2 or 3.
        offload: 'optimizer', 'parameters' (both, stage 3) or None.
        persistence_threshold: elements below which stage 3 keeps a weight whole.
    """

    def __init__(self, stage: int, *, offload: str | None, persistence_threshold: int, **settings: Any) -> None:
        super().__init__(**settings)
        self.stage, self.offload, self.persistence_threshold = stage, offload, persistence_threshold
        self._linear = nn.functional.linear
        self.parameters: list[list[nn.Parameter]] = []
        """The trained weights of each of the optimizer's groups, whose place in it the engine takes with shards."""

    @property
    def engine(self) -> Any:
        """The `deepspeed.DeepSpeedEngine` around the module."""
        return self.model

    @property
    def handles_gradient_accumulation(self) -> bool:
        return True

    def setup_distributed(self) -> None:
        super().setup_distributed()
        join(self.root_device.type)

    def configure_ddp(self) -> None:
        """The engine takes the wrapper's place, once there is an optimizer."""

    def model_to_device(self) -> None:
        """The engine moves the model; with stage 3 one weight at a time, of which only a shard stays."""

    def setup_optimizers(self, trainer: lightning.Trainer) -> None:
        super().setup_optimizers(trainer)
        import deepspeed

        module, (optimizer,) = self.lightning_module, self.optimizers
        assert module is not None
        # Before weights are sharded: optimizers go by their shapes.
        self.parameters = [list(group["params"]) for group in optimizer.param_groups]
        config = engine_config(
            self.stage,
            precision=str(self.precision_plugin.precision),
            accumulation=trainer.accumulate_grad_batches,
            clip=trainer.gradient_clip_val,
            elements=sum(weight.numel() for group in self.parameters for weight in group),
            offload=self.offload,
            persistence_threshold=self.persistence_threshold,
        )
        if self.stage == 3:
            deepspeed.zero.Init(module=module, config_dict_or_path=config)
            for buffer in module.buffers():
                buffer.data = buffer.data.to(self.root_device)
        self.model, *_ = deepspeed.initialize(
            args=argparse.Namespace(device_rank=self.local_rank),
            model=module,
            model_parameters=[weight for group in self.parameters for weight in group],
            optimizer=optimizer,
            config=config,
            dist_init_required=False,
        )

    def teardown(self) -> None:
        # Stage 3 puts a function of its own, which keeps no gathered weight, in its place for the whole process.
        nn.functional.linear = self._linear
        super().teardown()

    def backward(self, closure_loss: Tensor, optimizer: Optimizer | None, *args: Any, **kwargs: Any) -> Tensor:
        module = self.lightning_module
        assert module is not None
        loss = self.precision_plugin.pre_backward(closure_loss, module)
        # Lightning has divided the loss by the number of micro batches already.
        self.precision_plugin.backward(loss, self.engine, optimizer, scale_wrt_gas=False)
        return self.precision_plugin.post_backward(loss, module)

    def optimizer_step(self, optimizer: Optimizer, closure: Callable[[], Any], model: Any = None, **kwargs: Any) -> Any:
        """After each micro batch; the engine knows at which of them it steps."""
        loss = closure()
        module = self.lightning_module
        assert module is not None
        steps = self.engine.is_gradient_accumulation_boundary()
        if steps:
            for callback in module.trainer.callbacks:  # type: ignore[attr-defined]
                callback.on_before_optimizer_step(module.trainer, module, optimizer)
        self.engine.step()
        if steps and not self.engine.was_step_applied():
            raise LeanfitError(
                f"training diverged: gradients of step {module.trainer.global_step} are not finite; "
                "lower optimizer.lr, or clip gradients (trainer.grad_clip=1.0)"
            )
        return loss

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Whole weights on rank 0; nothing elsewhere, where stage 3 shards them."""
        assert self.lightning_module is not None
        state = self.lightning_module.state_dict(keep_vars=True)
        if self.stage < 3:
            return {name: tensor.detach() for name, tensor in state.items()}
        return dict(self._gathered(state))

    def _gathered(self, state: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        import deepspeed

        copies: dict[int, Tensor] = {}  # a tied weight is one tensor in the file too
        for name, tensor in state.items():
            if id(tensor) not in copies:
                with deepspeed.zero.GatheredParameters([tensor], enabled=hasattr(tensor, "ds_id")):
                    whole = tensor.detach()
                    copies[id(tensor)] = whole.cpu().clone() if self.is_global_zero else whole.new_empty(0)
            if self.is_global_zero:
                yield name, copies[id(tensor)]

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """As `optimizer.state_dict()` would be on one device; tensors on rank 0 only."""
        from deepspeed.utils import safe_get_full_optimizer_state

        optimizer = optimizer._optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
        by_weight, shared = kinds_of_state(optimizer.state)
        self._link()
        state: dict[int, dict[str, Any]] = {}
        for index, weight in enumerate(weight for group in self.parameters for weight in group):
            state[index] = {
                name: value.clone() if isinstance(value, Tensor) else value for name, value in shared.items()
            }
            for name, dtype in by_weight.items():
                whole = safe_get_full_optimizer_state(weight, name)
                if self.is_global_zero:
                    state[index][name] = whole.to(dtype).cpu()
        return {"state": state if by_weight or shared else {}, "param_groups": self._groups(optimizer)}

    def _groups(self, optimizer: Optimizer) -> list[dict[str, Any]]:
        """The settings of each group, with its weights by number."""
        groups, first = [], 0
        for group, weights in zip(optimizer.param_groups, self.parameters, strict=True):
            groups.append({**group, "params": list(range(first, first + len(weights)))})
            first += len(weights)
        return groups

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        (optimizer,), (saved,) = self.optimizers, checkpoint["optimizer_states"]
        for group, settings in zip(optimizer.param_groups, saved["param_groups"], strict=True):
            group.update({name: value for name, value in settings.items() if name != "params"})
        if not saved["state"]:
            return
        by_weight, shared = kinds_of_state(saved["state"])
        for shard in self._shards():
            optimizer.state[shard] = {name: torch.zeros_like(shard) for name in by_weight}
            optimizer.state[shard].update({name: placed(value, shard, optimizer) for name, value in shared.items()})
        self._link()
        numbers = [number for group in saved["param_groups"] for number in group["params"]]
        for number, weight in zip(numbers, (weight for group in self.parameters for weight in group), strict=True):
            for name in by_weight:
                self._put(weight, name, saved["state"][number][name])

    def _shards(self) -> list[Tensor]:
        """What the optimizer steps on this rank: all weights of a group (or a part of them) in one flat shard."""
        zero = self.engine.optimizer
        flat: list[Tensor] = (
            zero.fp32_partitioned_groups_flat if self.stage == 3 else zero.single_partition_of_fp32_groups
        )
        return flat

    def _link(self) -> None:
        """Let weights know where their state is. DeepSpeed does after the first group's step, when others have none."""
        if self.stage < 3:
            zero = self.engine.optimizer
            zero._hp_optimizer_states_linked = False
            zero._lazy_init_hp_params_optimizer_state()

    def _put(self, weight: nn.Parameter, name: str, value: Tensor) -> None:
        """This rank's shard of `value` as the optimizer's state `name` of `weight`."""
        from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

        if self.stage < 3:
            safe_set_full_optimizer_state(weight, value, name)
            return
        shard: Any = weight
        size, group = shard.ds_tensor.numel(), shard.ds_process_group
        padding = size * dist.get_world_size(group) - value.numel()
        mine = nn.functional.pad(value.flatten(), (0, padding)).narrow(0, size * dist.get_rank(group), size)
        safe_set_local_optimizer_state(weight, mine, name)


def join(device: str) -> None:
    """DeepSpeed on the process group that is there; quiet, with operators of torch only."""
    os.environ["DS_ACCELERATOR"] = device  # else it takes a GPU that is there, whatever was asked for
    import deepspeed

    # Its log goes where all others do, not to the standard output.
    deepspeed.utils.logger.handlers.clear()
    deepspeed.utils.logger.propagate = True
    deepspeed.ops.__compatible_ops__ = {}
    # It calls collectives by names that torch has given others since.
    warnings.filterwarnings("ignore", message=r"`torch\.distributed\.\w+` is deprecated", category=FutureWarning)
    deepspeed.init_distributed()


def engine_config(
    stage: int,
    *,
    precision: str,
    accumulation: int,
    clip: float | None,
    elements: int,
    offload: str | None,
    persistence_threshold: int,
) -> dict[str, Any]:
    """DeepSpeed's own settings for a fit of ours. Imports no deepspeed.

    Args:
        precision: '32-true', 'bf16-mixed' or 'bf16-true'.
        accumulation: micro batches of a step.
        clip: the gradients' largest 2-norm; None: not clipped.
        elements: of all trained weights.
        offload, persistence_threshold: see `ZeroStrategy`.
    """
    bucket = min(BUCKET_ELEMENTS, elements)
    zero: dict[str, Any] = {"stage": stage, "reduce_bucket_size": bucket, "allgather_bucket_size": bucket}
    if stage == 3:
        zero["stage3_param_persistence_threshold"] = persistence_threshold
    if offload:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
    if offload == "parameters":
        zero["offload_param"] = {"device": "cpu", "pin_memory": True}
    # bf16-mixed is autocast over float32 weights here as everywhere; `bf16` would be bfloat16 weights with a copy in
    # float32. What is summed between devices stays in the dtype of the weights.
    dtypes: dict[str, Any] = {}
    if precision == "bf16-mixed":
        dtypes["torch_autocast"] = {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}
    if precision == "bf16-true":
        dtypes["bf16"] = {
            "enabled": True,
            "bf16_master_weights_and_grads": True,
            "bf16_optimizer_states": True,
            "check_grad_overflow": False,
        }
    return {
        "train_micro_batch_size_per_gpu": 1,  # for its own reports only
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": clip or 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": zero,
        **dtypes,
    }


def kinds_of_state(state: Mapping[Any, Mapping[str, Any]]) -> tuple[dict[str, torch.dtype], dict[str, Any]]:
    """Of an optimizer's state: {name: dtype} of what has a value for each element of a weight, and what is one for all
    weights, which are stepped together (the count of steps)."""
    first = next(iter(state.values()), {})
    by_weight = {name: value.dtype for name, value in first.items() if isinstance(value, Tensor) and value.ndim > 0}
    return by_weight, {name: value for name, value in first.items() if name not in by_weight}


def placed(value: Any, shard: Tensor, optimizer: Optimizer) -> Any:
    """A copy of a count of steps, beside its shard where the optimizer's kernel reads it there."""
    if not isinstance(value, Tensor):
        return value
    fused = any(group.get("fused") or group.get("capturable") for group in optimizer.param_groups)
    return value.to(shard.device if fused else "cpu", copy=True)
