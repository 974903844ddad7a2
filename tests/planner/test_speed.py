"""The work of a step beside torch's own count of operations on real tensors, and what takes longer than what."""

from dataclasses import replace

import pytest
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from pipeline.composing import compose
from pipeline.data.loader import evaluation_loader
from pipeline.planner import speed
from pipeline.stage_input import prepared, shapes
from pipeline.tasks import lookup
from pipeline.walk import stages_of

GPT = ["model=gpt_nano", "trainer=smoke", "device=cpu", "trainer.grad_clip=null"]
CNN = ["model=efficientnet", "data=digits", *GPT[1:]]
QLORA = [*GPT, "adapter=lora", "compression=nf4"]
RATES = replace(speed.ASSUMED["cpu"], start=1e-6)


def book(config):
    data = config.data.open(config.model.tokenizer())
    task = lookup.get(config.data.task)
    sample = next(iter(evaluation_loader(data.train, 1)))
    return speed.Workbook(lambda: shapes(config, data), task, sample), data, task


@pytest.fixture(scope="module")
def gpt():
    """(its workbook, a function from overrides to predicted seconds of a step)."""
    made = book(compose(GPT))[0]

    def seconds(*overrides, rates=RATES):
        config = compose([*GPT, *overrides])
        return speed.step_seconds(config, made.work(config, stages_of(config)[0]), rates)

    return made, seconds


@pytest.mark.parametrize("words", [GPT, CNN, QLORA], ids=["gpt", "efficientnet", "adapters beside nf4"])
def test_operations_are_those_that_torch_counts_on_real_tensors(words, tmp_path):
    config = compose(words)
    made, data, task = book(config)
    line = stages_of(config)
    model = prepared(config, tmp_path, data, None, line, line[0])[0].train()
    batch = next(iter(evaluation_loader(data.train, 3)))
    # torch counts no attention on a CPU: written out, it is products.
    with FlopCounterMode(display=False) as counter, nn.attention.sdpa_kernel(nn.attention.SDPBackend.MATH):
        task.loss(model, batch).backward()
    listed = sum(operator.flops for operator in made.work(config, stages_of(config)[0]).at(3))
    # The fused kernel computes scores once more in the backward pass.
    assert listed == pytest.approx(counter.get_total_flops(), rel=0.05)
    assert listed >= counter.get_total_flops()


def test_what_is_said_of_a_batch_of_five_is_what_a_batch_of_five_does(gpt):
    config = compose(GPT)
    stage = stages_of(config)[0]
    made = gpt[0]
    said, listed = list(made.work(config, stage).at(5)), made._listed(config, stage, 5).found
    assert [one.part for one in said] == [one.part for one in listed]
    assert sum(one.flops for one in said) == pytest.approx(sum(one.flops for one in listed))
    assert sum(one.bytes for one in said) == pytest.approx(sum(one.bytes for one in listed), rel=0.01)


def test_a_step_moves_weights_gradients_and_state(gpt):
    config = compose(GPT)
    stage = stages_of(config)[0]
    work = gpt[0].work(config, stage)
    moved = sum(operator.bytes for operator in work.step)
    assert moved == pytest.approx(4 * work.model.gradients, rel=0.01)  # AdamW's kernel reads, and writes in place
    plain, sgd = (
        sum(operator.bytes for operator in gpt[0].work(compose([*GPT, *words]), stage).step)
        for words in (["optimizer.implementation=plain"], ["optimizer=sgd"])
    )
    assert plain > 3 * moved
    assert sgd < plain
    lora = gpt[0].work(compose([*GPT, "adapter=lora"]), stage)
    assert lora.model.gradients < 0.5 * lora.model.weights


def test_what_saves_memory_costs_its_time(gpt):
    _, seconds = gpt
    full, selective = (seconds(f"memory.activation_checkpointing={mode}") for mode in ("full", "selective"))
    assert seconds() < selective
    assert seconds() < full < 1.5 * seconds()
    unwatched = replace(RATES, watched=0.0)
    assert seconds("memory.activation_checkpointing=selective", rates=unwatched) < full
    assert seconds() < seconds("memory.loss_chunks=4") < full
    assert seconds() < seconds("trainer.micro_batch_size=4") < seconds("trainer.micro_batch_size=1")
    assert seconds() == seconds("memory.release_gradients=true")
    assert seconds() < seconds("optimizer.implementation=plain")
    assert seconds() < seconds("memory.step_in_backward=true")
    assert seconds() < seconds("memory.optimizer_offload=disk")


def test_checkpointing_adds_the_forward_work_of_the_blocks(gpt):
    made, seconds = gpt
    config = compose(GPT)
    work = made.work(config, stages_of(config)[0])
    added = seconds("memory.activation_checkpointing=full") - seconds()
    assert added == pytest.approx(work.seconds(config.trainer.batch_size, RATES, 1)["blocks"])


def test_on_a_device_that_runs_ahead_a_start_counts_only_where_work_is_shorter(gpt):
    _, seconds = gpt
    behind, ahead = (replace(RATES, start=1e-5, asynchronous=one) for one in (False, True))
    assert seconds(rates=ahead) < seconds(rates=behind)
    assert seconds(rates=replace(RATES, bandwidth=1e6, asynchronous=True)) == pytest.approx(
        seconds(rates=replace(RATES, bandwidth=1e6, start=0.0)), rel=0.05
    )


def test_rates_of_a_device_that_is_not_here_are_said_to_be_assumed():
    assert speed.rates_of("cuda", {"bfloat16"}, here=False).source == "assumed"
    probed = speed.rates_of("cpu", {"float32"}, here=True)
    assert probed.source == "probed"
    assert min(*probed.flops.values(), probed.bandwidth, probed.start, probed.step) > 0
