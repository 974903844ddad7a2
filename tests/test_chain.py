"""Stages of a run, and the training of each."""

from dataclasses import replace

import pytest

from pipeline.chain import Fit
from pipeline.composing import compose
from pipeline.walk import stages_of


@pytest.mark.parametrize(("job", "base"), [("run", Fit(40, 1e-3)), ("plan", Fit(40, 1e-3)), ("compress", None)])
def test_links_train_for_a_quarter_of_the_steps_where_the_base_does_not_too(job: str, base: Fit | None) -> None:
    config = compose(["compression=[magnitude,int8]", "trainer.max_steps=40", "optimizer.lr=1e-3"])
    train, magnitude, int8, *_ = stages_of(replace(config, job=job))
    assert (train.fit, magnitude.fit, int8.fit) == (base, Fit(10, 1e-3 / 4), None)
