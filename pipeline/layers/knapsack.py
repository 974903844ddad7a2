"""The multiple-choice knapsack: one option for each item, least total loss within a budget. Pure Python, exact.

States are (size, loss) of the items so far; one that is neither smaller nor better than another is dropped, and so is
one whose best possible end, by Lagrangian relaxation (Everett, 1963; Sinha and Zoltners, 1979, Operations Research 27),
is no better than the best whole choice known. Models repeat few shapes, so few states are left. Where they are more
than `LIMIT` all the same, sizes are rounded to a grid, and what that may cost is bounded by the same relaxation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

LIMIT = 200_000


@dataclass(frozen=True)
class Option:
    """Taking it costs `size` (bytes) and `loss` (any additive measure)."""

    size: int
    loss: float


@dataclass(frozen=True)
class Allocation:
    """`chosen[i]`: index of the option taken for item i. `bound`: no choice within the budget has a lower loss."""

    chosen: tuple[int, ...]
    size: int
    loss: float
    bound: float
    exact: bool


def allocate(items: Sequence[Sequence[Option]], budget: int, limit: int = LIMIT) -> Allocation:
    """The options, one an item, of least total loss whose total size is at most `budget`.

    Raises:
        ValueError: an item without options, or a budget below the sum of the smallest options (the message says it).
    """
    if any(not options for options in items):
        raise ValueError("an item has no options")
    least = sum(min(option.size for option in options) for options in items)
    if least > budget:
        raise ValueError(f"budget {budget} is below the least possible size {least}")
    hulls = [_undominated(options) for options in items]
    price, bound = _relaxation(items, budget)
    known = _greedy(hulls, items, budget)
    best = sum(items[i][k].loss for i, k in enumerate(known))
    chosen, exact = _states(items, hulls, budget, price, best, limit)
    chosen = chosen if chosen is not None else known
    size = sum(items[i][k].size for i, k in enumerate(chosen))
    loss = sum(items[i][k].loss for i, k in enumerate(chosen))
    return Allocation(tuple(chosen), size, loss, loss if exact else min(bound, loss), exact)


def _undominated(options: Sequence[Option]) -> list[int]:
    """Indices by growing size, each with less loss than all smaller ones."""
    kept: list[int] = []
    for index in sorted(range(len(options)), key=lambda i: (options[i].size, options[i].loss)):
        if not kept or options[index].loss < options[kept[-1]].loss:
            kept.append(index)
    return kept


def _relaxation(items: Sequence[Sequence[Option]], budget: int) -> tuple[float, float]:
    """(price of a byte, lower bound of the loss): the maximum over prices of min(loss + price size) - price budget."""

    def dual(price: float) -> tuple[float, int]:
        value, size = -price * budget, 0
        for options in items:
            best = min(options, key=lambda option: (option.loss + price * option.size, option.size))
            value += best.loss + price * best.size
            size += best.size
        return value, size

    low, high = 0.0, 1e-12
    while dual(high)[1] > budget and high < 1e30:
        high *= 4
    for _ in range(200):
        middle = (low + high) / 2
        if dual(middle)[1] > budget:
            low = middle
        else:
            high = middle
    return max(((price, dual(price)[0]) for price in (0.0, low, high)), key=lambda pair: pair[1])


def _greedy(hulls: Sequence[Sequence[int]], items: Sequence[Sequence[Option]], budget: int) -> list[int]:
    """A good choice within the budget: from the smallest options up, each time what saves most loss a byte."""
    place = [0] * len(items)
    size = sum(items[i][hull[0]].size for i, hull in enumerate(hulls))
    while True:
        best: tuple[float, int, int] | None = None
        for i, hull in enumerate(hulls):
            here = items[i][hull[place[i]]]
            for step in range(place[i] + 1, len(hull)):
                there = items[i][hull[step]]
                more = there.size - here.size
                if size + more <= budget:
                    rate = (here.loss - there.loss) / max(more, 1)
                    if best is None or rate > best[0]:
                        best = rate, i, step
        if best is None:
            return [hull[place[i]] for i, hull in enumerate(hulls)]
        _, i, step = best
        size += items[i][hulls[i][step]].size - items[i][hulls[i][place[i]]].size
        place[i] = step


def _states(
    items: Sequence[Sequence[Option]],
    hulls: Sequence[Sequence[int]],
    budget: int,
    price: float,
    best: float,
    limit: int,
) -> tuple[list[int] | None, bool]:
    """Dynamic programming over undominated states; None where nothing beats `best`. The flag: whether it is exact."""
    # What the items still to come add at least: in size, and in loss plus price times size.
    rest_size, rest_value = [0], [0.0]
    for i in range(len(items) - 1, -1, -1):
        options = [items[i][k] for k in hulls[i]]
        rest_size.append(rest_size[-1] + min(option.size for option in options))
        rest_value.append(rest_value[-1] + min(option.loss + price * option.size for option in options))
    rest_size.reverse()
    rest_value.reverse()
    exact, grid = True, 1
    states: list[tuple[int, float, int, int]] = [(0, 0.0, -1, -1)]  # size, loss, index of the parent, option
    layers: list[list[tuple[int, float, int, int]]] = [states]
    slack = 1e-12 * max(1.0, abs(best))
    for i, hull in enumerate(hulls):
        grown = []
        for parent, (size, loss, _, _) in enumerate(states):
            for k in hull:
                option = items[i][k]
                total, lost = size + option.size, loss + option.loss
                if total + rest_size[i + 1] > budget:
                    continue
                if lost + rest_value[i + 1] - price * (budget - total) >= best - slack:
                    continue
                grown.append((total, lost, parent, k))
        states = _frontier(grown, grid)
        while len(states) > limit:
            exact, grid = False, max(2 * grid, budget // limit)
            states = _frontier(states, grid)
        layers.append(states)
    index = min(range(len(states)), key=lambda s: states[s][1], default=-1)
    # A state may have been kept for what its unused bytes might have bought, and be no better in the end.
    if index < 0 or states[index][1] >= best:
        return None, exact
    chosen: list[int] = []
    for layer in reversed(layers[1:]):
        _, _, index, taken = layer[index]
        chosen.append(taken)
    return chosen[::-1], exact


def _frontier(states: list[tuple[int, float, int, int]], grid: int) -> list[tuple[int, float, int, int]]:
    """States by growing size, each with less loss than all smaller ones; of those in one cell of `grid`, the last."""
    kept: list[tuple[int, float, int, int]] = []
    for state in sorted(states):
        if kept and state[1] >= kept[-1][1]:
            continue
        if kept and grid > 1 and state[0] // grid == kept[-1][0] // grid:
            kept.pop()
        kept.append(state)
    return kept
