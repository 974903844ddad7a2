"""Calibration batches: what is drawn, from where, and what is refused."""

import pytest
import torch

from pipeline.calibration.settings import Calibration
from pipeline.composing import compose
from pipeline.data.calibration import calibration_batches
from pipeline.errors import ConfigError


def settings(**changes):
    usual = {"source": "train", "samples": 10, "length": None, "seed": 0, "batch_size": 4}
    return Calibration(name="settings", **{**usual, **changes})


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "numbers.txt"
    path.write_text("\n".join(str(n) for n in range(3000)), encoding="utf-8")
    config = compose(["data=text", f"data.path={path}", "data.split=position", "data.sequence_length=64",
                      "data.evaluation_tokens=256"])  # fmt: skip
    return path, config.data.open(None)


def test_windows_come_from_the_training_split_in_batches_without_labels(text):
    _, data = text
    batches = calibration_batches(settings(), data, None)
    assert [batch["input_ids"].shape for batch in batches] == [(4, 64), (4, 64), (2, 64)]
    assert [list(batch) for batch in batches] == [["input_ids"]] * 3
    train = {tuple(data.train[i]["input_ids"].tolist()) for i in range(len(data.train))}
    rows = [tuple(row.tolist()) for batch in batches for row in batch["input_ids"]]
    assert set(rows) <= train
    assert len(set(rows)) == 10


def test_the_seed_decides_and_another_draws_others(text):
    _, data = text
    first, again, other = (torch.cat([b["input_ids"] for b in calibration_batches(settings(seed=s), data, None)])
                           for s in (0, 0, 1))  # fmt: skip
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_another_length_and_a_text_of_its_own(text, tmp_path):
    _, data = text
    (batch,) = calibration_batches(settings(samples=3, length=100), data, None)
    assert batch["input_ids"].shape == (3, 100)
    own = tmp_path / "own.txt"
    own.write_bytes(b"z" * 1000)
    (batch,) = calibration_batches(settings(samples=3, source=str(own)), data, None)
    assert (batch["input_ids"] == ord("z")).all()
    (tmp_path / "more.txt").write_bytes(b"z" * 50)
    (batch,) = calibration_batches(settings(samples=3, source=str(tmp_path)), data, None)
    assert (batch["input_ids"] == ord("z")).all()


def test_too_little_text_too_long_windows_and_images_with_a_length_are_refused(text, tmp_path):
    _, data = text
    own = tmp_path / "own.txt"
    own.write_bytes(b"z" * 63)
    with pytest.raises(ConfigError, match=r"holds 0 samples of 64 tokens; choose a shorter calibration.length"):
        calibration_batches(settings(source=str(own)), data, None)
    with pytest.raises(ConfigError, match=r"samples=100000: calibration.source=train holds \d+ samples of 64 tokens"):
        calibration_batches(settings(samples=100_000), data, None)
    with pytest.raises(ConfigError, match="length=65 is more than the model's 64 positions"):
        calibration_batches(settings(length=65), data, None, positions=64)
    images = compose(["model=efficientnet", "data=digits"]).data.open(None)
    (batch, *_) = calibration_batches(settings(), images, None)
    assert list(batch) == ["pixel_values"]
    with pytest.raises(ConfigError, match="length=8 is for text"):
        calibration_batches(settings(length=8), images, None)


@pytest.mark.parametrize("source", ["/no/such/place", "/dev/null"])
def test_a_source_that_is_no_file_or_folder_is_told_without_torch(source):
    assert settings().problems() == []
    (told,) = settings(source=source).problems()
    assert told == f"calibration.source={source} is neither 'train' nor a text file or a folder of them"


def test_a_folder_called_train_does_not_take_the_place_of_the_split(tmp_path, monkeypatch):
    (tmp_path / "train").mkdir()
    monkeypatch.chdir(tmp_path)
    assert compose([]).calibration.source == "train"
    assert compose(["calibration.source=./train"]).calibration.source == str(tmp_path / "train")
