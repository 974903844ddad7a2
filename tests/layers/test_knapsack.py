"""The knapsack against trying every choice, and its bound where it is not exact."""

import itertools
import random

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pipeline.layers.knapsack import Option, allocate

options = st.lists(
    st.builds(Option, st.integers(0, 40), st.floats(0, 10, allow_nan=False).map(lambda x: round(x, 3))),
    min_size=1, max_size=4,
)  # fmt: skip


def brute_force(items, budget):
    best = None
    for choice in itertools.product(*(range(len(item)) for item in items)):
        size = sum(items[i][k].size for i, k in enumerate(choice))
        loss = sum(items[i][k].loss for i, k in enumerate(choice))
        if size <= budget and (best is None or loss < best):
            best = loss
    return best


@settings(deadline=None, max_examples=200)
@example([[Option(0, 2.0), Option(36, 1.0), Option(37, 0.0)], [Option(19, 0.0)]], 55)
@given(st.lists(options, min_size=1, max_size=5), st.integers(0, 150))
def test_it_finds_the_best_of_all_choices(items, budget):
    best = brute_force(items, budget)
    if best is None:
        with pytest.raises(ValueError, match="below the least possible size"):
            allocate(items, budget)
        return
    found = allocate(items, budget)
    assert found.exact
    assert found.loss == pytest.approx(best, abs=1e-9)
    assert found.size == sum(items[i][k].size for i, k in enumerate(found.chosen)) <= budget
    assert found.loss == pytest.approx(sum(items[i][k].loss for i, k in enumerate(found.chosen)))


@settings(deadline=None, max_examples=50)
@given(st.lists(options, min_size=2, max_size=6), st.integers(20, 150))
def test_with_few_states_the_bound_still_holds(items, budget):
    best = brute_force(items, budget)
    if best is None:
        return
    found = allocate(items, budget, limit=2)
    assert found.size <= budget
    assert found.bound <= best + 1e-9 <= found.loss + 2e-9


def test_a_model_of_hundreds_of_layers_is_exact_and_quick():
    draw = random.Random(0)
    items = [
        [Option(bits * (768 * 768 // 8) + 9000, draw.random() * 4.0**-bits) for bits in (2, 3, 4, 8)]
        for _ in range(288)
    ]
    budget = sum(item[2].size for item in items)
    found = allocate(items, budget)
    assert found.exact
    assert found.size <= budget
    assert found.loss <= sum(item[2].loss for item in items)
    assert found.bound <= found.loss


def test_no_options_is_an_error():
    with pytest.raises(ValueError, match="no options"):
        allocate([[]], 10)
