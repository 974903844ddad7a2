"""Stages of a run and their order: what is walked, checked and recorded. Imports no torch.

A run is a list of stages: `train`, one for each link of the compression chain, then `evaluate` and `save`. Each stage
that changes the model leaves a snapshot, from which `resume` starts the next.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from pipeline.compression.base import Method

OWN = ("train", "evaluate", "save")
"""Names of the stages that every run has: metrics, checkpoints and ranks find a stage by its name."""


@dataclass(frozen=True)
class Fit:
    """A stage's own training: optimizer steps and peak learning rate."""

    steps: int
    lr: float


@dataclass(frozen=True)
class Stage:
    """One step of a run. `index` numbers its snapshot directory, `stages/<index>-<name>`."""

    index: int
    name: str
    kind: Literal["train", "link", "evaluate", "save"]
    method: Method | None = None
    fit: Fit | None = None

    @property
    def directory(self) -> str:
        return f"{self.index:02d}-{self.name}"


def link_fit(method: Method, max_steps: int, lr: float) -> Fit | None:
    """The fit of a link that trains: its own `steps` and `lr`, else a quarter of `max_steps` (at least 1) at `lr` / 4.

    The learning rate falls because the link starts from trained weights.
    """
    if not method.trains:
        return None
    steps = getattr(method, "steps", None)
    rate = getattr(method, "lr", None)
    steps = max(1, max_steps // 4) if steps is None else steps
    return Fit(steps=steps, lr=lr / 4 if rate is None else rate) if steps > 0 else None


def stages(chain: Mapping[str, Method], max_steps: int, lr: float, base_trains: bool = True) -> list[Stage]:
    """Every stage of a run, in order. Stage 0 trains the base model: not at 0 steps, nor without `base_trains`."""
    base = Fit(steps=max_steps, lr=lr) if base_trains and max_steps > 0 else None
    train, evaluate, save = OWN
    walk = [Stage(0, train, "train", fit=base)]
    for name, method in chain.items():
        walk.append(Stage(len(walk), name, "link", method, link_fit(method, max_steps, lr)))
    walk.append(Stage(len(walk), evaluate, "evaluate"))
    walk.append(Stage(len(walk), save, "save"))
    return walk


def order_problems(chain: Mapping[str, Method]) -> list[str]:
    """What is wrong with the order of links, or with their names, one message each."""
    problems = [
        f"compression.{name}: '{name}' is a stage of every run, so no link can be called that; give it another name"
        for name in chain
        if name in OWN
    ]
    before: list[tuple[str, Method]] = []
    for name, method in chain.items():
        words = {word for earlier in before for word in (earlier[1].kind, earlier[1].name)}
        clash = [n for n, m in before if {m.kind, m.name} & method.cannot_follow]
        if clash:
            neither = {method.kind, method.name} & chain[clash[0]].cannot_follow
            fix = "choose one of them" if neither else f"put '{name}' before it, or leave one of them out"
            problems.append(f"compression: '{name}' cannot follow '{clash[0]}'; {fix}")
        missing = method.must_follow - words
        if missing:
            problems.append(
                f"compression: '{name}' must follow {' and '.join(sorted(missing))}; put it later in the list"
            )
        before.append((name, method))
    return problems
