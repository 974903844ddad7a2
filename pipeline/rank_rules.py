"""What does not go with several ranks: RunConfig -> one line for each problem, as in `pipeline.rules`."""

from __future__ import annotations

from collections.abc import Callable

from pipeline import registry
from pipeline.asked import choice, trains
from pipeline.chain import link_fit
from pipeline.parallelism.base import Parallelism
from pipeline.schema import RunConfig


def distributed_device(config: RunConfig) -> list[str]:
    """Apple GPUs have no collectives."""
    if not config.parallelism.distributed or config.device.problems(1) or config.device.kind() != "mps":
        return []
    return [f"parallelism={choice(config, 'parallelism')} needs device=cpu or device=cuda; mps has no collectives"]


def nodes(config: RunConfig) -> list[str]:
    """Several machines share fits, one run after the other."""
    parallelism, said = config.parallelism, f"parallelism.nodes={config.parallelism.nodes}"
    if parallelism.nodes == 1 or not parallelism.distributed:
        return []
    if config.job not in ("run", "compress"):
        return [f"{said}: job={config.job} works on one machine; use parallelism=single"]
    if config.sweep and parallelism.needs_followers:
        return [f"{said}: a sweep cannot lead other machines; use parallelism.launcher=srun or mpirun, or leave -m out"]
    return []


def gradient_dtype(config: RunConfig) -> list[str]:
    """Between devices gradients are summed in the weights' dtype."""
    given = config.precision.gradient_dtype
    if given is None or not config.parallelism.distributed or not trains(config):
        return []
    said = f"precision.gradient_dtype={given}: parallelism={choice(config, 'parallelism')}"
    return [f"{said} sums gradients in the weights' dtype; use precision.gradient_dtype=null, or parallelism=single"]


def gradient_compression(config: RunConfig) -> list[str]:
    """gloo sums no bfloat16."""
    bfloat16 = getattr(config.parallelism, "gradient_compression", None) == "bfloat16"
    if not bfloat16 or config.device.problems(1) or config.device.kind() == "cuda":
        return []
    return ["parallelism.gradient_compression=bfloat16 needs device=cuda; use parallelism.gradient_compression=float16"]


def static_graph(config: RunConfig) -> list[str]:
    """torch plans from the first backward pass, which must sum over devices: that of the first micro batch does not."""
    trainer, ranks = config.trainer, config.parallelism.data_ranks
    accumulates = (trainer.micro_batch_size or trainer.batch_size) * ranks < trainer.batch_size
    if not getattr(config.parallelism, "static_graph", False) or not accumulates or not trains(config):
        return []
    given = f"trainer.micro_batch_size={trainer.micro_batch_size}"
    said = f"parallelism.static_graph=true cannot sum micro batches ({given})"
    return [f"{said}; use parallelism.static_graph=false, or trainer.micro_batch_size=null"]


def steppable(parallelism: Parallelism) -> tuple[str, ...]:
    """What of a weight an optimizer must be able to step apart from the rest: see `Optimizer.steps_apart`."""
    if parallelism.name == "deepspeed":  # all weights in one flat tensor
        return ("values",)
    return ("values", "parts") if parallelism.tensor_ranks > 1 else ("values", "parts", "rows")


def sharded(config: RunConfig) -> list[str]:
    """What does not go with a rank that holds a part of the model only."""
    if not config.parallelism.sharded or not trains(config):
        return []
    said, found = f"parallelism={choice(config, 'parallelism')}", []
    if config.precision.rounds_stochastically:
        found.append(f"{said} steps shards as they are; use precision.stochastic_rounding=false, or parallelism=ddp")
    if config.optimizer.steps_apart not in steppable(config.parallelism):
        whole = {"weights": "weights", "rows": "rows", "parts": "matrices"}[config.optimizer.steps_apart]
        fitting = [
            name
            for name in registry.names("optimizer")
            if registry.lookup("optimizer", name).steps_apart in steppable(config.parallelism)
        ]
        unfit = choice(config, "optimizer")
        found.append(f"{said}: {unfit} steps whole {whole}; use optimizer={' or '.join(fitting)}")
    kernel = getattr(config.optimizer, "implementation", None)
    if kernel in ("fused", "foreach") and config.parallelism.tensor_ranks > 1:
        taken = f"optimizer.implementation={kernel} takes weights that are split alike"
        found.append(f"{said} leaves some weights whole; {taken}: use optimizer.implementation=auto or plain")
    first = next(iter(config.chain.items()), None)
    if config.adapter.trains and first and first[1].holds_adapters and config.parallelism.tensor_ranks > 1:
        held = f"those of compression.{first[0]}, beside which adapter={choice(config, 'adapter')} trains,"
        found.append(f"{said} splits layers in float; {held} stay whole: use parallelism=fsdp")
    if getattr(config.parallelism, "offload", False) and config.device.kind() != "cuda":
        given = getattr(config.parallelism, "offload", None)
        found.append(
            f"{registry.shown('parallelism.offload', given)} moves shards from a GPU to the host; "
            f"use device=cuda, or offload={'false' if given is True else 'null'}"
        )
    whole_blocks = config.parallelism.name != "deepspeed" and config.parallelism.tensor_ranks == 1
    found += [
        f"{said}: compression.{stage} trains a whole model; use parallelism=ddp"
        for stage, method in config.chain.items()
        if link_fit(method, config.trainer.max_steps, config.optimizer.lr)
        and not (whole_blocks and method.trains_in_shards)
    ]
    return found


def deepspeed(config: RunConfig) -> list[str]:
    """What its engine has another way of its own for, or none."""
    if config.parallelism.name != "deepspeed" or not trains(config):
        return []
    said, found, precision = "parallelism=deepspeed", [], choice(config, "precision")
    if config.precision.scales_loss:
        found.append(f"{said} cannot scale the loss as {precision} must; use precision=bf16-mixed")
    if config.adapter.trains:
        found.append(f"{said}: adapter={choice(config, 'adapter')} is not made for its shards; use parallelism=fsdp")
    if config.precision.label not in ("32-true", "bf16-mixed", "bf16-true") and not config.precision.scales_loss:
        found.append(f"{said} trains in float32 or bfloat16, not precision={precision}; use precision=bf16-mixed")
    if config.precision.label == "bf16-true" and getattr(config.parallelism, "offload", None):
        found.append(f"{said}: offloaded state is float32, precision={precision} has none; use precision=bf16-mixed")
    for key in ("activation_offload", "optimizer_offload"):
        if (where := getattr(config.memory, key)) != "none":
            found.append(f"{said}: memory.{key}={where} is for whole weights or those of fsdp; use parallelism=fsdp")
    if config.trainer.compile:
        found.append(f"{said}: trainer.compile=true does not see its hooks; use trainer.compile=false")
    if getattr(config.parallelism, "stage", 0) == 3 and config.memory.activation_checkpointing == "selective":
        found.append(
            f"{said} with stage 3: memory.activation_checkpointing=selective does not see its linear layers, and "
            "trains wrongly; use parallelism.stage=2, or memory.activation_checkpointing=full"
        )
    return found


def horovod(config: RunConfig) -> list[str]:
    """It sums no bfloat16."""
    if config.parallelism.name != "horovod" or config.precision.label != "bf16-true" or not trains(config):
        return []
    said = f"parallelism=horovod sums no bfloat16 gradients, as precision={choice(config, 'precision')} makes them"
    return [f"{said}; use precision=bf16-mixed, or parallelism=ddp"]


OF_RANKS: tuple[Callable[[RunConfig], list[str]], ...] = (
    distributed_device,
    nodes,
    gradient_dtype,
    gradient_compression,
    static_graph,
    sharded,
    deepspeed,
    horovod,
)
