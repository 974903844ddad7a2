"""The order of samples: complete, reproducible, the same for any number of devices, and resumable at any batch."""

import itertools
from collections import Counter
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import Dataset, Subset, TensorDataset

from pipeline.data.loader import ENDLESS, EndlessOrder, Turns, evaluation_loader, train_loader
from pipeline.data.tokens import TokenWindows
from pipeline.errors import ConfigError

SAMPLES = 13


class Numbers(Dataset[dict[str, torch.Tensor]]):
    """Sample i is the number i, without a batched read: what an image dataset looks like to the loader."""

    def __init__(self, samples: int = SAMPLES) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"values": torch.full((2,), float(index)), "labels": torch.tensor(index)}


def take(loader: Any, batches: int) -> list[list[int]]:
    return [batch["labels"].tolist() for batch in itertools.islice(loader, batches)]


def test_each_epoch_is_its_own_permutation_of_all_samples() -> None:
    stream = list(itertools.chain(*take(train_loader(Numbers(), batch_size=4, seed=3), 13)))
    epochs = [stream[i : i + SAMPLES] for i in range(0, 52, SAMPLES)]
    assert all(sorted(epoch) == list(range(SAMPLES)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_the_order_follows_the_seed_and_nothing_else() -> None:
    torch.manual_seed(1)
    first = take(train_loader(Numbers(), batch_size=4, seed=3), 20)
    torch.manual_seed(2)
    assert take(train_loader(Numbers(), batch_size=4, seed=3), 20) == first
    assert take(train_loader(Numbers(), batch_size=4, seed=4), 20) != first


def test_reading_draws_nothing_from_the_global_random_states() -> None:
    state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    take(train_loader(Numbers(), batch_size=4, seed=3), 10)
    take(evaluation_loader(Numbers(), 4), 10)
    assert torch.equal(torch.get_rng_state(), state)
    assert np.array_equal(np.random.get_state()[1], numpy_state)


@pytest.mark.parametrize("world", [1, 2, 3, 4, 6])
def test_a_global_batch_holds_the_same_samples_however_it_is_spread(world: int) -> None:
    alone = take(train_loader(Numbers(), batch_size=12, seed=0), 8)
    for micro in (m for m in (1, 2, 3, 4, 6, 12) if 12 % (m * world) == 0):
        accumulation = 12 // (micro * world)
        ranks = [
            take(train_loader(Numbers(), batch_size=micro, seed=0, rank=rank, world=world), 8 * accumulation)
            for rank in range(world)
        ]
        for step, expected in enumerate(alone):
            parts = [r[i] for r in ranks for i in range(step * accumulation, (step + 1) * accumulation)]
            assert Counter(itertools.chain(*parts)) == Counter(expected)


def test_the_order_of_samples_is_interleaved_over_the_ranks() -> None:
    alone = list(itertools.chain(*take(train_loader(Numbers(), batch_size=1, seed=0), 24)))
    ranks = [
        list(itertools.chain(*take(train_loader(Numbers(), batch_size=3, seed=0, rank=r, world=2), 4))) for r in (0, 1)
    ]
    assert list(itertools.chain(*zip(*ranks, strict=True))) == alone


@pytest.mark.parametrize("taken", [0, 1, 3, 4, 7, 30])
def test_a_loader_resumes_at_the_next_batch(taken: int) -> None:
    whole = take(train_loader(Numbers(), batch_size=4, seed=3), 40)
    loader = train_loader(Numbers(), batch_size=4, seed=3)
    assert take(loader, taken) == whole[:taken]
    state = loader.state_dict()
    resumed = train_loader(Numbers(), batch_size=4, seed=3)
    resumed.load_state_dict(state)
    assert take(resumed, 40 - taken) == whole[taken:]
    # A second interruption: the state of a resumed loader is as good.
    again = train_loader(Numbers(), batch_size=4, seed=3)
    again.load_state_dict(state)
    take(again, 2)
    third = train_loader(Numbers(), batch_size=4, seed=3)
    third.load_state_dict(again.state_dict())
    assert take(third, 3) == whole[taken + 2 : taken + 5]


def test_one_ranks_state_serves_every_rank_and_another_number_of_them() -> None:
    def rank(r: int, world: int, micro: int) -> Any:
        return train_loader(Numbers(), batch_size=micro, seed=3, rank=r, world=world)

    alone = take(rank(0, 1, 12), 6)
    first = rank(0, 2, 6)
    take(first, 2)
    for world, micro in ((1, 12), (2, 6), (4, 3)):
        resumed = [rank(r, world, micro) for r in range(world)]
        for loader in resumed:
            loader.load_state_dict(first.state_dict())
        batches = [take(loader, 4) for loader in resumed]
        for step in range(4):
            assert Counter(itertools.chain(*(b[step] for b in batches))) == Counter(alone[2 + step])


@pytest.mark.parametrize(("samples", "seed", "word"), [(14, 3, "samples"), (13, 4, "seed")])
def test_a_state_of_other_data_or_another_seed_is_refused(samples: int, seed: int, word: str) -> None:
    loader = train_loader(Numbers(), batch_size=4, seed=3)
    take(loader, 2)
    other = train_loader(Numbers(samples), batch_size=4, seed=seed)
    other.load_state_dict(loader.state_dict())
    with pytest.raises(ConfigError, match=f"data order has {word}"):
        next(iter(other))


def test_a_batch_may_be_larger_than_the_data() -> None:
    batches = take(train_loader(Numbers(3), batch_size=8, seed=0), 3)
    assert Counter(itertools.chain(*batches)) == {0: 8, 1: 8, 2: 8}


def test_an_empty_training_split_is_refused() -> None:
    with pytest.raises(ConfigError, match="training split is empty"):
        train_loader(Numbers(0), batch_size=4, seed=0)


def test_evaluation_reads_every_sample_once_in_order() -> None:
    assert take(evaluation_loader(Numbers(), 4), 99) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11], [12]]


def test_batched_reads_give_what_single_reads_give() -> None:
    windows = TokenWindows(np.random.default_rng(0).integers(256, size=8 * SAMPLES).astype(np.uint8), 8)
    batches = list(itertools.islice(train_loader(windows, batch_size=4, seed=3), 10))
    order = take(train_loader(Numbers(), batch_size=4, seed=3), 10)
    for batch, indices in zip(batches, order, strict=True):
        assert torch.equal(batch["input_ids"], torch.stack([windows[i]["input_ids"] for i in indices]))
    assert len(next(iter(evaluation_loader(Subset(windows, [0, 2]), 4)))["input_ids"]) == 2


def test_order_of_a_long_run_is_cheap_to_reach() -> None:
    order = EndlessOrder(1000, 4, seed=0)
    assert len(order) == ENDLESS
    iterator = iter(order)
    iterator.load_state_dict({"position": 10**12, "samples": 1000, "seed": 0})
    assert len(next(iterator)) == 4


class Recorder(lightning.LightningModule):
    """Trains one weight and keeps the samples of every step."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 1)
        self.seen: list[list[int]] = []

    def training_step(self, batch: dict[str, torch.Tensor], _: int) -> torch.Tensor:
        self.seen.append(batch["labels"].tolist())
        return nn.functional.dropout(self.layer(batch["values"]), 0.5).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=0.01)


def fit(folder: Path, steps: int, accumulate: int, ckpt: Path | None = None) -> Recorder:
    torch.manual_seed(0)
    module = Recorder()
    trainer = lightning.Trainer(
        max_steps=steps,
        max_epochs=-1,
        accumulate_grad_batches=accumulate,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        use_distributed_sampler=False,
        callbacks=[ModelCheckpoint(folder, save_last=True, every_n_train_steps=3)],
    )
    trainer.fit(module, train_loader(Numbers(), batch_size=3, seed=5), ckpt_path=ckpt)
    return module


@pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers")
@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
# Lightning 2.6 asks torch 2.13's pytree in a way that it deprecates.
@pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.* is deprecated:FutureWarning")
@pytest.mark.parametrize("accumulate", [1, 2])
def test_lightning_resumes_in_mid_epoch_with_the_same_batches(tmp_path: Path, accumulate: int) -> None:
    whole = fit(tmp_path / "whole", 6, accumulate)
    half = fit(tmp_path / "half", 3, accumulate)
    rest = fit(tmp_path / "half", 6, accumulate, tmp_path / "half" / "last.ckpt")
    assert len(whole.seen) == 6 * accumulate
    assert half.seen + rest.seen == whole.seen
    expected = take(train_loader(Numbers(), batch_size=3, seed=5), 6 * accumulate)
    assert whole.seen == expected


def test_tuples_are_collated_like_torch_does() -> None:
    values, labels = next(iter(evaluation_loader(TensorDataset(torch.arange(6.0), torch.arange(6)), 4)))
    assert torch.equal(values, torch.arange(4.0))
    assert torch.equal(labels, torch.arange(4))


@given(samples=st.integers(1, 60), batch_size=st.integers(1, 9), world=st.integers(1, 7))
def test_devices_take_turns_at_batches_that_count_once(samples: int, batch_size: int, world: int) -> None:
    turns = [Turns(samples, batch_size, rank, world) for rank in range(world)]
    assert len({len(one) for one in turns}) == 1
    assert all(len(list(one)) == len(one) for one in turns)
    counted = [batch for one in turns for turn, batch in enumerate(one) if one.counts(turn)]
    assert sorted(sample for batch in counted for sample in batch) == list(range(samples))
    assert max(len(batch) for one in turns for batch in one) <= batch_size
    alone = [list(batch) for batch in Turns(samples, batch_size)]
    assert sorted(counted) == alone
