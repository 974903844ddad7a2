"""Batches for every task: an endless training order that can be resumed anywhere, and a plain pass over evaluation.

The training order is one global sequence of samples: position p belongs to epoch p // n, and each epoch is a
permutation of the data drawn from (seed, epoch). With `world` devices, device r takes the positions r, r + world, ...;
so an optimizer step sees the same samples however they are spread over devices and micro batches.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sized
from typing import Any, cast

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate
from torchdata.stateful_dataloader import StatefulDataLoader

from pipeline.errors import ConfigError

Batch = dict[str, Any]

ENDLESS = 2**50
"""The length a training loader states, in batches. A loader without a length is read one batch ahead by Lightning, and
the state it saves then skips that batch on resume."""


class EndlessOrder:
    """Lists of `batch_size` sample indices for one device, without end."""

    def __init__(self, samples: int, batch_size: int, seed: int, rank: int = 0, world: int = 1) -> None:
        self.samples = samples
        self.batch_size = batch_size
        self.seed = seed
        self.rank = rank
        self.world = world

    def __len__(self) -> int:
        return ENDLESS

    def __iter__(self) -> EndlessIterator:
        return EndlessIterator(self)


class EndlessIterator(Iterator[list[int]]):
    """The walk along an `EndlessOrder`. Its state is a global position: any device may load any device's state."""

    def __init__(self, order: EndlessOrder) -> None:
        self.order = order
        self.position = 0
        self.epoch = -1
        self.permutation: np.ndarray[Any, np.dtype[np.int64]] = np.empty(0, np.int64)

    def __next__(self) -> list[int]:
        order = self.order
        positions = self.position + order.rank + order.world * np.arange(order.batch_size)
        self.position += order.world * order.batch_size
        return [self._sample(*divmod(int(position), order.samples)) for position in positions]

    def _sample(self, epoch: int, place: int) -> int:
        if epoch != self.epoch:
            self.epoch = epoch
            self.permutation = np.random.default_rng([self.order.seed, epoch]).permutation(self.order.samples)
        return int(self.permutation[place])

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position, "samples": self.order.samples, "seed": self.order.seed}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Raises ConfigError where the state is of other data or another seed, whose order would be another."""
        for key, value in (("samples", self.order.samples), ("seed", self.order.seed)):
            if state[key] != value:
                raise ConfigError(
                    f"resume: the checkpoint's data order has {key} {state[key]}, this run has {value}; "
                    "resume with the data and the seed it was made with"
                )
        self.position = state["position"]


def train_loader(
    dataset: Dataset[Batch], *, batch_size: int, seed: int, rank: int = 0, world: int = 1
) -> StatefulDataLoader[Batch]:
    """Endless shuffled micro batches of `batch_size` for device `rank` of `world`, resumable by `state_dict`.

    It draws nothing from the global random state. Under Lightning set `use_distributed_sampler=False`: the order is
    spread over the devices here.

    Raises:
        ConfigError: the dataset is empty.
    """
    samples = len(cast(Sized, dataset))
    if samples == 0:
        raise ConfigError("data: nothing to train on, the training split is empty")
    with warnings.catch_warnings():
        # torchdata 0.11 calls a telemetry function that torch 2.13 deprecates.
        warnings.filterwarnings("ignore", "'set_vital' is deprecated", UserWarning)
        return StatefulDataLoader(
            dataset,
            batch_sampler=EndlessOrder(samples, batch_size, seed, rank, world),
            collate_fn=collate,
            num_workers=0,
            generator=torch.Generator().manual_seed(seed),
        )


def training_batch(dataset: Dataset[Batch], batch_size: int) -> Batch:
    """A micro batch as training takes them, of `batch_size` samples even where the dataset has fewer."""
    return next(iter(train_loader(dataset, batch_size=batch_size, seed=0)))


class Turns(Sampler[list[int]]):
    """Batches of samples in order, which devices take in turns: of `world` devices `rank` takes batch number `rank`,
    `rank + world`, ...

    All take as many, since layers in shards wait for one another. Where batches are short of that, the last one is
    computed again, and does not count.
    """

    def __init__(self, samples: int, batch_size: int, rank: int = 0, world: int = 1) -> None:
        self.samples, self.batch_size, self.rank, self.world = samples, batch_size, rank, world
        self.batches = -(-samples // batch_size)

    def __len__(self) -> int:
        return -(-self.batches // self.world)

    def __iter__(self) -> Iterator[list[int]]:
        for turn in range(len(self)):
            first = min(turn * self.world + self.rank, self.batches - 1) * self.batch_size
            yield list(range(first, min(first + self.batch_size, self.samples)))

    def counts(self, turn: int) -> bool:
        """Whether this device's batch of a turn is no other's."""
        return turn * self.world + self.rank < self.batches


def evaluation_loader(dataset: Dataset[Batch], batch_size: int, *, rank: int = 0, world: int = 1) -> DataLoader[Batch]:
    """Every sample once, in order; the last batch may be smaller. Draws nothing from the global random state.

    Of several devices each takes its `Turns`, the loader's `batch_sampler`.
    """
    turns = Turns(len(cast(Sized, dataset)), batch_size, rank, world)
    generator = torch.Generator().manual_seed(0)
    return DataLoader(dataset, batch_sampler=turns, collate_fn=collate, generator=generator)


def collate(samples: Any) -> Batch:
    """A list of samples, stacked; or the batch itself, from a dataset whose `__getitems__` stacks."""
    return samples if isinstance(samples, dict) else cast(Batch, default_collate(samples))
