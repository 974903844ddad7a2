"""What the first rank holds while ranks write a checkpoint, beside sums that are made by hand."""

import pytest
import torch
from torch import nn

from pipeline.composing import compose
from pipeline.models.base import Architecture
from pipeline.planner.gathering import CHECKPOINT, TOLD, saving
from pipeline.planner.plan import MARGINS, plan
from pipeline.planner.ranks import COMMUNICATION

SHORT = ["model=gpt_nano", "trainer=smoke", "device=cpu", "plan.calibrate=false", "parallelism.devices=2"]
KEPT = {"weights": 1000, "gradients": 1000, COMMUNICATION: 10}


def saved(*words, sizes=((10, 10), (2, 5)), states=0, dtype=torch.float32, kept=KEPT, on_cpu=True, tied=False):
    """With so many tensors of state for each weight, of its shape."""
    model = nn.ModuleList(nn.Linear(columns, rows, bias=False) for rows, columns in sizes)
    if tied:
        model.append(nn.Linear(1, 1, bias=False))
        model[-1].weight = model[0].weight
    state = {id(weight): [(weight.shape, dtype)] * states for weight in model.parameters()}
    return saving(compose([*SHORT, *words]).parallelism, model, Architecture(()), state, kept, on_cpu=on_cpu)


def test_whole_tensors_stay_while_the_next_is_put_together():
    found = saved("parallelism=fsdp", sizes=[(2, 5), (10, 10)], states=1)
    assert found == {**KEPT, CHECKPOINT: 2 * 440, COMMUNICATION: 10 + 400}


def test_a_tied_weight_is_put_together_once_for_each_name_and_one_copy_stays():
    assert saved("parallelism=fsdp", tied=True) == {**KEPT, CHECKPOINT: 840, COMMUNICATION: 10 + 400}
    assert saved("parallelism=fsdp", tied=True, states=2) == {**KEPT, CHECKPOINT: 440 + 800, COMMUNICATION: 10 + 400}


def test_parts_are_of_equal_size():
    assert saved("parallelism=fsdp", sizes=[(3, 10)]) == {**KEPT, CHECKPOINT: 160, COMMUNICATION: 10 + 160}


def test_a_gpu_holds_one_whole_tensor_at_a_time():
    assert saved("parallelism=fsdp", states=2, on_cpu=False) == {**KEPT, CHECKPOINT: 400}


def test_an_optimizer_without_state_makes_gradients_where_there_are_none():
    many, bare = [(10, 10)] * 4, {"weights": 1000}
    assert saved("parallelism=fsdp", sizes=many, kept=bare) == {**bare, CHECKPOINT: 1600, "gradients": 800}
    assert "gradients" not in saved("parallelism=fsdp", sizes=many, states=1, kept=bare)


def test_what_is_whole_on_each_rank_is_not_put_together():
    assert saved("parallelism=tp", states=2) == KEPT


@pytest.mark.parametrize(("on_cpu", "copies"), [(True, 5), (False, 3)])
def test_ranks_that_write_their_parts_tell_each_other_of_them(on_cpu, copies):
    found = saved("parallelism=fsdp", "parallelism.checkpoint=sharded", states=2, on_cpu=on_cpu)
    assert found == {**KEPT, COMMUNICATION: 10 + copies * TOLD * 6}


def test_what_an_engine_puts_together_goes_as_the_next_one_is_there():
    zero = ["parallelism=deepspeed", "parallelism.stage=2"]
    assert saved(*zero, states=1) == {**KEPT, CHECKPOINT: 440}
    assert saved(*zero) == KEPT
    # A sum in float32, the one before it, and what becomes of both in 16 bits.
    narrow = saved(*zero, states=1, dtype=torch.bfloat16)
    assert narrow == {**KEPT, CHECKPOINT: 220, COMMUNICATION: 10 + 440}
    zero = ["parallelism=deepspeed", "parallelism.stage=3"]
    spread = saved(*zero, "parallelism.persistence_threshold=0", on_cpu=False)
    assert spread == {**KEPT, COMMUNICATION: 10 + 440}
    # Of the two the small one was whole, and is no more when the optimizer's state follows.
    some = saved(*zero, "parallelism.persistence_threshold=100", states=1)
    assert some == {**KEPT, "weights": 1000 - 40, CHECKPOINT: 840, COMMUNICATION: 10 + 400}


@pytest.mark.parametrize("strategy", ["fsdp", "tp"])
def test_a_checkpoint_that_one_of_several_processes_puts_together_may_use_what_others_leave(strategy):
    config = compose([*SHORT, f"parallelism={strategy}", "job=plan"])
    found = plan(config, config.data.open(config.model.tokenizer()))
    save, train = found.phases["save"], found.phases["train"]
    assert save.kinds[CHECKPOINT] > 0.9 * found.disk["checkpoint"] * (1 if strategy == "fsdp" else 0.5)
    assert save.margin == MARGINS["computed"]
    assert train.saving == save.kinds
    others = save.bytes - save.kinds[CHECKPOINT]
    assert found.left == {"save": found.capacity - int(others * (1 + MARGINS["computed"]))}
    found.capacity, found.left = save.bytes, {"save": save.bytes}
    assert found.most("save") < save.bytes
    assert found.binding()[0] != "save"
