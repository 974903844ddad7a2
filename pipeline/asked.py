"""What a config asks for, in the words that problems are told in. Imports no torch."""

from __future__ import annotations

from pipeline.chain import link_fit
from pipeline.schema import RunConfig


def trains(config: RunConfig) -> bool:
    """Whether anything is trained: the base model, or a link of the chain."""
    steps, lr = config.trainer.max_steps, config.optimizer.lr
    links = any(link_fit(method, steps, lr) for method in config.chain.values())
    return config.job in ("run", "compress") and (links or (config.job == "run" and steps > 0))


def choice(config: RunConfig, group: str) -> str:
    """The choice as typed; the name behind it where a config was made without Hydra."""
    return str(config.choices.get(group) or getattr(config, group).name)
