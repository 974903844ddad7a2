"""Plans for a GPU that is not here: the host's memory is another, kernels are a GPU's. Beside what an H200 took."""

import json
from pathlib import Path

import pytest
import torch

from pipeline.composing import compose
from pipeline.layers import float8, kernels
from pipeline.planner.fakes import tracing
from pipeline.planner.gpu import as_on_gpu
from pipeline.planner.links import declare_links, trace_links
from pipeline.planner.live import ROUNDING, Block, Timeline
from pipeline.planner.plan import plan
from pipeline.planner.supposed import Supposing

RECORDED = Path(__file__).parents[2] / "benchmarks" / "results" / "planner-nvidia-h200-2026-11-28.json"


def counted(work):
    """Bytes at the peak of `work`, as on a GPU, beside the 4,000 that it is given."""
    with tracing(), as_on_gpu(), Supposing() as live:
        given = torch.empty(1000)
        live.hold([given], "given")
        kept = work(given)
        peak = live.timeline.peak().bytes
        del kept
    return peak - 4000


@pytest.mark.parametrize(
    ("work", "expected"),
    [
        (lambda x: x.to("cuda"), 0),
        (lambda x: x.cpu(), 0),
        (lambda x: x.to("cpu"), 0),
        (lambda x: x.cpu().to("cuda"), 4000),
        (lambda x: x.cpu().to(device="cuda", dtype=torch.float64), 12000),
        (lambda x: x.cpu().cpu().reshape(10, 100), 0),
        (lambda x: x.to("cuda", torch.float16), 2000),
        (lambda x: x.to(x.device), 0),
        (lambda x: x.to(torch.float16), 2000),
        (lambda x: x + 1, 4000),
    ],
)
def test_what_is_put_on_the_host_does_not_count_and_what_comes_back_does(work, expected):
    assert counted(work) == expected


def test_kernels_are_a_gpus_while_a_plan_is_made_and_this_machines_afterwards():
    here = kernels.choose(torch.device("cpu"), torch.float32, 5000)
    with as_on_gpu():
        assert kernels.choose(torch.device("cpu"), torch.float32, 5000) == "int_mm"
        assert kernels.choose(torch.device("cpu"), torch.float32, 500) == "float"
        assert float8.multiplies_float8(torch.device("cpu"))
    assert kernels.choose(torch.device("cpu"), torch.float32, 5000) == here
    assert not float8.multiplies_float8(torch.device("cpu"))


def recorded(end):
    """(config, peaks measured on an H200) of the run whose command ends so."""
    runs = json.loads(RECORDED.read_text())["runs"]
    found = next(run for run in runs if run["command"].strip().endswith(end))
    words = found["command"].removeprefix("python run.py ").split()
    planned = ["job=plan", "device=cuda", "device.memory=140GiB", "trainer.evaluate_every=0"]
    return compose([*planned, *words]), found["measured"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("end", "traced", "computed"),
    [
        ("trainer.batch_size=16 precision=32", 0.002, 0.005),
        ("trainer.batch_size=16 precision=bf16-mixed", 0.002, 0.005),
        ("data.sequence_length=256 precision=bf16-mixed", 0.005, 0.02),
        ("precision=bf16-mixed memory.activation_checkpointing=full", 0.005, 0.02),
        ("precision=bf16-mixed trainer.micro_batch_size=2", 0.002, 0.01),
        ("precision=bf16-mixed adapter=lora", 0.002, 0.01),
    ],
)
def test_training_takes_what_an_h200_measured(end, traced, computed):
    config, measured = recorded(end)
    data = config.data.open(config.model.tokenizer())
    for level, margin in (("trace", traced), ("formula", computed)):
        train = plan(config, data, level=level).phases["train"]
        assert train.bytes == pytest.approx(measured["train"], rel=margin)
        assert train.bytes == sum(train.kinds.values())


def test_a_block_of_cudas_pool_that_is_not_split_counts_whole():
    mib = 1 << 20
    first, second = Block(19 * mib + mib // 2, "weights"), Block(19 * mib, "weights")
    events = [(first, 1, "a"), (first, -1, ""), (second, 1, "b"), (Block(3 * mib, "other"), 1, "c")]
    assert Timeline(events).peak().bytes == 22 * mib
    peak = Timeline(events, cuda=True).peak()  # 20 MiB are taken for the first, and left whole to the second
    assert peak.bytes == 23 * mib
    assert peak.kinds == {"weights": 19 * mib, "other": 3 * mib, ROUNDING: mib}
    assert max(map(sum, zip(*peak.course.kinds.values(), strict=True))) == peak.bytes


STAYED = 16 * 256 * 768 * 4
"""Bytes of what a block gives for a batch of calibration: the last one's stayed on the GPU when this was measured."""


# Of Wanda more was measured than anything here explains, and of distillation's evaluation a teacher that stayed.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("link", "traced", "computed"),
    [
        ("int4_gptq", 0.005, 0.02),
        ("int4_awq", 0.01, 0.04),
        ("wanda", 0.11, 0.1),
        ("int8", 0.03, 0.03),
        ("fp8", 0.03, 0.03),
        ("nf4", 0.015, 0.015),
    ],
)
def test_links_and_what_they_leave_take_what_an_h200_measured(link, traced, computed):
    config, measured = recorded(f"compression={link}")
    tokenizer = config.model.tokenizer()
    data = config.data.open(tokenizer)
    for links, margin in (
        (trace_links(config, data, tokenizer), traced),
        (declare_links(config, data, tokenizer), computed),
    ):
        stayed = STAYED if link in ("int4_gptq", "int4_awq", "wanda") else 0
        assert (1 - margin) * measured["compress"] - stayed < links.compress[link].bytes
        assert links.compress[link].bytes < (1 + margin) * measured["compress"]
        assert links.evaluate.bytes == pytest.approx(measured["evaluate"], rel=0.005)
