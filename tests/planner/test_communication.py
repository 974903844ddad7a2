"""What ranks send, beside the collectives that the real strategies call, on a process group that sends nothing."""

from collections import Counter

import pytest
import torch
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from pipeline.composing import compose
from pipeline.data.loader import evaluation_loader
from pipeline.fitting import micro_batch_size
from pipeline.memory.saving import apply_activation_checkpointing
from pipeline.models.architecture import describe
from pipeline.planner import communication, speed
from pipeline.planner.communication import Model, Sums, Traffic
from pipeline.stage_input import prepared, shapes
from pipeline.tasks import lookup
from pipeline.walk import stages_of

GPT = ["model=gpt_nano", "trainer=smoke", "device=cpu"]
LLAMA = ["model=llama", "model.layers=2", *GPT[1:]]
SENT = {"all_reduce": 2, "allreduce_": 2, "_allgather_base_": 1, "_reduce_scatter_base_": 1}
"""Collectives, and how often a ring sends the (N - 1) / N of the larger of what goes in and comes out."""


class Collectives(TorchDispatchMode):
    """Counts bytes, (N - 1) / N of which are sent, and calls."""

    def __init__(self):
        super().__init__()
        self.bytes, self.calls = Counter(), Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        space, _, name = func.name().partition("::")
        if "c10d" in space and (name := name.partition(".")[0]) in SENT:
            sides = [sum(one.nbytes for one in tree_iter(side) if isinstance(one, torch.Tensor)) for side in args[:2]]
            self.calls[name] += 1
            self.bytes[name] += SENT[name] * max(sides)
        return out


@pytest.fixture
def group():
    """Starts a process group of so many ranks, of which this is rank 0."""
    yield lambda ranks: distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module .* returned a view tensor")
@pytest.mark.parametrize(
    ("words", "within"),
    [
        ([*GPT, "parallelism=tp", "parallelism.devices=2"], 0),
        ([*LLAMA, "parallelism=tp", "parallelism.devices=2", "precision=bf16-mixed"], 0),
        ([*LLAMA, "parallelism=tp", "parallelism.devices=2", "memory.activation_checkpointing=full"], 0),
        ([*GPT, "parallelism=fsdp", "parallelism.devices=4"], 0.002),  # shards of equal size: they are padded
        ([*GPT, "parallelism=fsdp", "parallelism.devices=4", "parallelism.reshard=false"], 0.002),
        ([*GPT, "parallelism=fsdp", "parallelism.devices=4", "parallelism.parameter_dtype=bfloat16"], 0.002),
        ([*GPT, "parallelism=fsdp", "parallelism.devices=4", "parallelism.replicas=2"], 0.002),
        ([*GPT, "parallelism=fsdp_tp", "parallelism.devices=4"], 0.02),  # norms are whole on each tensor rank
    ],
)
def test_collectives_of_a_micro_batch_are_those_that_the_strategy_calls(words, within, group, tmp_path):
    config = compose(words)
    ranks, line = config.parallelism, stages_of(config)
    micro, accumulation = micro_batch_size(config)
    assert accumulation == 1
    data, task = config.data.open(config.model.tokenizer()), lookup.get(config.data.task)
    sample = next(iter(evaluation_loader(data.train, 1)))
    work = speed.Workbook(lambda: shapes(config, data), task, sample).work(config, line[0])
    said = communication.sent(config, work.model)

    model = prepared(config, tmp_path, data, None, line, line[0])[0]
    architecture = describe(model)
    group(ranks.ranks)
    names = ("data_parallel", "tensor_parallel")
    ranks.shard(
        model, architecture, init_device_mesh("cpu", (ranks.data_ranks, ranks.tensor_ranks), mesh_dim_names=names)
    )
    apply_activation_checkpointing(
        model, [block.name for block in architecture.blocks], config.memory.activation_checkpointing
    )
    with Collectives() as called, config.precision.plugin("cpu").forward_context():
        task.loss(model, next(iter(evaluation_loader(data.train, micro)))).backward()
    tensor = called.bytes.pop("all_reduce", 0) * (ranks.tensor_ranks - 1) / ranks.tensor_ranks
    assert said.activations[:2] == (tensor, called.calls.pop("all_reduce", 0))
    replicas = getattr(ranks, "replicas", 1)
    between = called.bytes.pop("allreduce_", 0) * (replicas - 1) / replicas
    assert said.replicas.bytes == pytest.approx(between, rel=within)
    assert said.replicas.starts == called.calls.pop("allreduce_", 0)
    shards = ranks.data_ranks // replicas
    assert said.shards.starts == called.calls.total()
    assert said.shards.bytes == pytest.approx(called.bytes.total() * (shards - 1) / shards, rel=within)


def sent(*overrides, model=None):
    shape = torch.Size([10, 100])
    made = model or Model(
        weights=4000, gradients=4000, block_weights=4000, block_gradients=4000, trained=(shape,), units=1,
        forward=Sums(), backward=Sums(),
    )  # fmt: skip
    cluster = ["parallelism.devices=4", "trainer.batch_size=16", "job=plan", "device=cuda"]
    return communication.sent(compose([*GPT[:2], *cluster, *overrides]), made)


def test_copies_send_their_gradients_once_a_step_as_they_are_compressed():
    whole = Traffic(2 * 3000, 1, 4)
    assert sent("parallelism=ddp").shards == whole
    assert sent("parallelism=ddp", "trainer.micro_batch_size=1").shards == whole
    assert sent("parallelism=ddp", "parallelism.gradient_compression=float16").shards.bytes == whole.bytes / 2
    factors = sent("parallelism=ddp", "parallelism.gradient_compression=powersgd", "parallelism.powersgd_rank=2")
    assert factors.shards.bytes == pytest.approx(whole.bytes * 2 * 110 / 1000)
    useless = sent("parallelism=ddp", "parallelism.gradient_compression=powersgd", "parallelism.powersgd_rank=5")
    assert useless.shards == whole


def test_shards_are_sent_in_each_micro_batch_and_one_device_sends_nothing():
    once, often = (sent("parallelism=fsdp", f"trainer.micro_batch_size={size}").shards for size in (4, 1))
    assert often == Traffic(4 * once.bytes, 4 * once.starts, 4)
    assert sent("parallelism=single", "parallelism.devices=1") == communication.Sent()


def test_what_computing_covers_costs_nothing_on_a_gpu_and_nodes_are_further_apart():
    model = Model(
        weights=4 * 10**9, gradients=4 * 10**9, block_weights=0, block_gradients=0, trained=(), units=1,
        forward=Sums(), backward=Sums(),
    )  # fmt: skip

    def seconds(computing, *words):
        cluster = ["parallelism=ddp", "parallelism.devices=4", "trainer.batch_size=16", "job=plan", *words]
        return communication.seconds(compose([*GPT[:2], *cluster]), model, computing)

    assert seconds(1.0, "device=cuda") == 0
    assert seconds(0.0, "device=cuda") > 0.03
    assert seconds(1.0, "device=cpu") == seconds(0.0, "device=cpu") > 3
    far = seconds(
        0.0,
        "device=cuda",
        "parallelism.nodes=2",
        "parallelism.devices=2",
        "parallelism.rendezvous=a:1",
        "parallelism.node_rank=0",
    )
    assert far > 10 * seconds(0.0, "device=cuda")
