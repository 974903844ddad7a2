"""Handwritten digits: the split, the images as a model gets them, and what the lock file compares."""

import dataclasses
import hashlib
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader

from pipeline.data.base import DataBundle
from pipeline.data.digits import CLASSES, SAMPLES, Digits, split_by_class

DIGITS = Digits(name="digits", image_size=16, interpolation="nearest", evaluation_fraction=0.2, seed=0)


def images(data: Any) -> torch.Tensor:
    return torch.stack([data[i]["pixel_values"] for i in range(len(data))])


def labels(data: Any) -> list[int]:
    return [int(data[i]["labels"]) for i in range(len(data))]


@pytest.fixture(scope="module")
def bundle() -> DataBundle:
    return DIGITS.open(None)


def test_items_are_what_the_base_class_promises(bundle: DataBundle) -> None:
    for data in (bundle.train, bundle.evaluation):
        item = data[0]
        assert set(item) == {"pixel_values", "labels"}
        assert (item["pixel_values"].dtype, item["pixel_values"].shape) == (torch.float32, (1, 16, 16))
        assert (item["labels"].dtype, item["labels"].shape) == (torch.int64, ())
    spec = bundle.spec
    assert (spec.classes, spec.channels, spec.image_size, spec.vocabulary) == (10, 1, 16, None)
    batch = next(iter(DataLoader(bundle.train, batch_size=5)))
    assert batch["pixel_values"].shape == (5, 1, 16, 16)


def test_the_splits_are_disjoint_and_lose_nothing(bundle: DataBundle) -> None:
    source = load_digits()
    train, held_out = split_by_class(source.target, 0.2, seed=0)
    assert sorted([*train, *held_out]) == list(range(SAMPLES))
    assert labels(bundle.train) == source.target[train].tolist()
    assert labels(bundle.evaluation) == source.target[held_out].tolist()
    assert len(source.target) == SAMPLES


@pytest.mark.parametrize("fraction", [0.01, 0.2, 0.5, 0.9])
def test_each_class_is_split_in_proportion(fraction: float) -> None:
    source = load_digits()
    train, held_out = split_by_class(source.target, fraction, seed=3)
    every, part = Counter(source.target), Counter(source.target[held_out])
    assert len(held_out) == int(np.ceil(SAMPLES * fraction))
    assert all(abs(part[c] - fraction * every[c]) <= 1 for c in range(CLASSES))
    assert set(source.target[train]) == set(range(CLASSES))


def test_nearest_images_are_the_source_normalised_and_repeated(bundle: DataBundle) -> None:
    source = load_digits()
    train, held_out = split_by_class(source.target, 0.2, seed=0)
    wanted = (source.images - source.images[train].mean()) / source.images[train].std()
    for data, rows in ((bundle.train, train), (bundle.evaluation, held_out)):
        np.testing.assert_allclose(images(data)[:, 0, ::2, ::2], wanted[rows], atol=1e-5)
        np.testing.assert_array_equal(images(data)[:, 0, ::2, ::2], images(data)[:, 0, 1::2, 1::2])


def test_the_training_split_has_mean_zero_and_deviation_one(bundle: DataBundle) -> None:
    train = images(bundle.train)
    assert train.mean().item() == pytest.approx(0, abs=1e-5)
    assert train.std().item() == pytest.approx(1, abs=1e-3)


def test_bilinear_images_lie_between_those_of_their_neighbours() -> None:
    smooth = images(dataclasses.replace(DIGITS, interpolation="bilinear").open(None).evaluation)
    blocky = images(DIGITS.open(None).evaluation)
    assert not torch.equal(smooth, blocky)
    # Away from the border, the middle two of four enlarged pixels are 3 : 1 mixtures of the two source pixels.
    row = smooth[:, 0, 0]
    source = blocky[:, 0, 0, ::2]
    torch.testing.assert_close(row[:, 1:-1:2], 0.75 * source[:, :-1] + 0.25 * source[:, 1:], atol=1e-5, rtol=0)


def test_the_original_size_leaves_images_alone() -> None:
    for interpolation in ("nearest", "bilinear"):
        native = dataclasses.replace(DIGITS, image_size=8, interpolation=interpolation).open(None)
        torch.testing.assert_close(images(native.train), images(DIGITS.open(None).train)[..., ::2, ::2])


def test_the_seed_alone_decides_the_split(bundle: DataBundle) -> None:
    again = DIGITS.open(None)
    assert torch.equal(images(again.train), images(bundle.train))
    assert torch.equal(images(again.evaluation), images(bundle.evaluation))
    torch.manual_seed(99)
    np.random.seed(99)
    assert torch.equal(images(DIGITS.open(None).train), images(bundle.train))
    other = dataclasses.replace(DIGITS, seed=1).open(None)
    assert not torch.equal(images(other.train), images(bundle.train))


def test_opening_draws_nothing_from_the_global_generators() -> None:
    torch.manual_seed(0)
    np.random.seed(0)
    DIGITS.open(None)
    drawn = torch.rand(3), np.random.rand(3)
    torch.manual_seed(0)
    np.random.seed(0)
    assert torch.equal(drawn[0], torch.rand(3))
    np.testing.assert_array_equal(drawn[1], np.random.rand(3))


def test_the_fingerprint_is_that_of_the_data_not_of_the_settings(bundle: DataBundle) -> None:
    source = load_digits()
    data = source.images.astype(np.float32).tobytes() + source.target.astype(np.int64).tobytes()
    assert bundle.fingerprint == hashlib.sha256(data).hexdigest()
    assert dataclasses.replace(DIGITS, seed=5, image_size=8).open(None).fingerprint == bundle.fingerprint


def test_a_change_of_one_pixel_changes_the_fingerprint(bundle: DataBundle, monkeypatch: pytest.MonkeyPatch) -> None:
    changed = load_digits()
    changed.images[7, 3, 3] += 1
    monkeypatch.setattr("sklearn.datasets.load_digits", lambda: changed)
    assert DIGITS.open(None).fingerprint != bundle.fingerprint


def test_the_description_tells_the_counts(bundle: DataBundle) -> None:
    assert "1,437" in bundle.description
    assert "360" in bundle.description
    assert "16 x 16" in bundle.description


@pytest.mark.parametrize("fraction", [0.001, 0.005, 0.995, 0.9999])
def test_a_fraction_that_leaves_a_class_out_is_one_line(fraction: float) -> None:
    [problem] = dataclasses.replace(DIGITS, evaluation_fraction=fraction).problems()
    assert problem.startswith(f"data.evaluation_fraction={fraction} ")


@pytest.mark.parametrize("fraction", [0.006, 0.2, 0.99, 0.994])
def test_a_fraction_without_a_problem_opens(fraction: float) -> None:
    data = dataclasses.replace(DIGITS, evaluation_fraction=fraction)
    assert data.problems() == []
    opened = data.open(None)
    assert set(labels(opened.train)) == set(labels(opened.evaluation)) == set(range(CLASSES))
