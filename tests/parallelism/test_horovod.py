"""Horovod's ranks against one device; without Horovod (docs/horovod.md builds it), what is told."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

from pipeline import app, rules
from pipeline.arguments import parse
from pipeline.composing import compose
from pipeline.errors import ConfigError
from pipeline.schema import decode_run
from tests.parallelism.test_parity import COMMON, DOUBLE, LEVERS, assert_same_weights, outcome, train
from tests.ranks import made_by_ranks

built = pytest.mark.skipif(importlib.util.find_spec("horovod") is None, reason="Horovod is built by hand")


def ranks(count, *words):
    return ["parallelism=horovod", f"parallelism.devices={count}", *words]


CASES = {
    2: {
        "float32": ranks(2),
        "float64": ranks(2, *DOUBLE),
        "accumulation": ranks(2, *DOUBLE, *LEVERS["accumulation"]),
        "lean": ranks(2, *DOUBLE, *LEVERS["lean"]),
        "float16": ranks(2, "parallelism.gradient_compression=float16"),
        "16-mixed": ranks(2, "precision=16-mixed"),
    },
    4: {"float64": ranks(4, *DOUBLE)},
}
MEMORY_ONLY = {word for lever in LEVERS.values() for word in lever}


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """What one device makes of the same settings."""
    done = {}

    def of(overrides):
        words = tuple(word for word in overrides if not word.startswith("parallelism") and word not in MEMORY_ONLY)
        if words not in done:
            directory = tmp_path_factory.mktemp("single")
            train(directory, compose([*COMMON, *words]))
            done[words] = outcome(directory)
        return done[words]

    return of


@built
@pytest.mark.slow
@pytest.mark.parametrize(("count", "case"), [(n, case) for n in CASES for case in CASES[n]])
def test_its_ranks_train_as_one_device_does(count, case, alone, tmp_path_factory):
    overrides = CASES[count][case]
    losses, weights = outcome(made_by_ranks(__file__, count, tmp_path_factory) / case)
    expected, one = alone(overrides)
    near = 1e-10 if "precision=64-true" in overrides else 1e-5
    if case in ("float16", "16-mixed"):  # rounded on the way
        assert case == "16-mixed" or not torch.equal(losses[-5:], expected[-5:])
        torch.testing.assert_close(losses, expected, rtol=3e-3, atol=0)
        return
    torch.testing.assert_close(losses, expected, rtol=near, atol=0)
    assert_same_weights(weights, one, max(near, 1e-3 if near > 1e-6 else 0))


@built
@pytest.mark.slow
@pytest.mark.parametrize("case", CASES[2])
def test_all_ranks_end_with_the_same_weights(case, tmp_path_factory):
    directory = made_by_ranks(__file__, 2, tmp_path_factory) / case
    first, second = (torch.load(directory / f"weights-{rank}.pt") for rank in (0, 1))
    assert all(torch.equal(first[name], second[name]) for name in first)


def told(monkeypatch, found, *words):
    """What the rules say of a config, where Horovod is or is not installed."""
    spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: found if name == "horovod" else spec(name))
    overrides = [*COMMON, *ranks(2), *words]
    return rules.problems(decode_run(app.provenance.compose(app.loader(), parse(overrides).overrides), overrides))


def test_without_it_one_line_says_where_the_recipe_is(monkeypatch):
    assert told(monkeypatch, None) == [
        "parallelism=horovod needs Horovod, built as docs/horovod.md says; or use parallelism=ddp"
    ]


@pytest.mark.skipif(importlib.util.find_spec("horovod") is not None, reason="Horovod is installed")
def test_without_it_the_run_is_refused():
    with pytest.raises(ConfigError, match=r"needs Horovod, built as docs/horovod\.md says"):
        compose([*COMMON, *ranks(2)])


@pytest.mark.parametrize("more", [[], ["precision.stochastic_rounding=true"]])
def test_weights_in_bfloat16_are_refused(monkeypatch, more):
    (said,) = told(monkeypatch, object(), "precision=bf16-true", *more)
    assert said.startswith("parallelism=horovod sums no bfloat16 gradients, as precision=bf16-true makes them; use ")
    assert told(monkeypatch, object(), "precision=bf16-mixed") == []


if __name__ == "__main__":
    from pipeline.fitting import TaskModule

    def keep(module):
        """What each rank ends with: only rank 0 writes a checkpoint."""
        torch.save(module.state_dict(), directory / f"weights-{module.global_rank}.pt")

    TaskModule.on_train_end = keep
    torch.set_num_threads(1)
    count = int(sys.argv[1])
    for case, overrides in CASES[count].items():
        directory = Path(sys.argv[2]) / case
        train(directory, compose([*COMMON, *overrides]))
