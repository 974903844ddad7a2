"""What many configs need, asked of one `Needs`: each as if it had been asked alone."""

import pytest

from pipeline.composing import compose
from pipeline.planner import needs as module
from pipeline.planner.needs import Needs, with_micro

SMALL = ["model=gpt_nano", "trainer=smoke", "data.sequence_length=16", "device=cpu", "plan.calibrate=false"]


def composed(*words):
    return compose([*SMALL, *words])


def test_the_line_through_two_micro_batches_is_the_formula_itself():
    one = with_micro(composed("trainer.batch_size=16", "data.sequence_length=64"), 2)  # of 1, 2, 4, 8, 16
    needs = Needs(one)
    assert needs.lower(one).bytes == pytest.approx(needs.fitted(one, False).bytes, rel=0.001)


def test_what_cannot_be_traced_is_computed_and_not_guessed_from_other_micro_batches(monkeypatch):
    one = with_micro(composed("parallelism=ddp", "parallelism.devices=2", "trainer.batch_size=32"), 2)
    needs = Needs(one)
    monkeypatch.setattr(needs, "lower", lambda config: pytest.fail("guessed"))
    assert needs.training(one, traced=True)["train"].bytes == needs.fitted(one, False).bytes


QLORA = ["compression=nf4", "adapter=lora"]


@pytest.mark.parametrize(
    ("phase", "first", "second"),
    [
        ("links", QLORA, ["compression=nf4"]),
        ("links", ["compression=int8_qat"], ["compression=int8_qat", "optimizer=sgd"]),
        ("validation", QLORA, ["adapter=lora"]),
        ("validation", [], ["parallelism=ddp", "parallelism.devices=2"]),
    ],
)
def test_a_config_that_needs_something_else_is_asked_itself(phase, first, second, monkeypatch):
    asked = []
    monkeypatch.setattr(module, "plan_links", lambda config, *_: asked.append(config))
    monkeypatch.setattr(module, "validation", lambda config, *_: asked.append(config))
    both = [composed("trainer.evaluate_every=4", *words) for words in (first, second)]
    needs = Needs(both[0])
    for config in [*both, *both]:
        needs.others(config) if phase == "links" else needs.validation(config, "traced")
    assert asked == both


def test_opening_the_model_is_a_phase_of_a_chain_too(monkeypatch):
    monkeypatch.setattr(module, "plan_links", lambda *_: None)
    config = composed("compression=int8")
    assert "load" in Needs(config).others(config)


def test_where_only_a_link_trains_its_fit_is_computed():
    words = ["compression=distill", "compression.distill.steps=4", "trainer.max_steps=0", "trainer.batch_size=2"]
    needs = Needs(composed(*words))
    large, small = (needs.training(with_micro(composed(*words), size), traced=False) for size in (2, 1))
    assert small["train: distill"].bytes < large["train: distill"].bytes


def test_a_chain_is_traced_once_whatever_batches_what_it_leaves_is_evaluated_in(monkeypatch):
    calls = []
    linked = module.plan_links
    monkeypatch.setattr(module, "plan_links", lambda *given: calls.append(given) or linked(*given))
    first, second = (composed("compression=int4", f"trainer.evaluation_batch_size={size}") for size in (16, 2))
    needs = Needs(first)
    large, small = (needs.others(one, traced=False)["evaluate"] for one in (first, second))
    assert len(calls) == 1
    assert small.bytes < large.bytes
    assert small == Needs(second).others(second, traced=False)["evaluate"]
