"""Checkpoints in one file and in shards: always whole, and read by any number of devices."""

import os
import resource
import shutil
import sys
import time
from pathlib import Path

import pytest
import torch

from pipeline import checkpoints
from pipeline.chain import Stage
from pipeline.composing import compose
from pipeline.fitting import checkpoint_directory
from pipeline.report.metrics import read_metrics
from tests.parallelism.test_parity import COMMON, DOUBLE, four, train, two
from tests.ranks import made_by_ranks

SHARDED = "parallelism.checkpoint=sharded"
CONSTANT = [*COMMON, *DOUBLE, "optimizer.schedule=constant", "optimizer.warmup_steps=0"]
HALF, WHOLE = "trainer.max_steps=10", "trainer.max_steps=20"


def last(directory):
    return checkpoint_directory(directory, Stage(0, "train", "train")) / "last.ckpt"


def shards(path, number):
    path.mkdir()
    torch.save({"global_step": number}, path / checkpoints.EXTRA)
    return path


def test_a_directory_takes_the_place_of_a_file_and_of_a_directory_and_a_file_of_both(tmp_path):
    path = tmp_path / "last.ckpt"
    checkpoints.save({"global_step": 1}, path)
    for number in (2, 3, 4):
        checkpoints.publish(shards(checkpoints.fresh_directory(path), number), path)
        assert checkpoints.is_sharded(path)
        assert checkpoints.step(path) == number
        assert len(list(tmp_path.iterdir())) == 2  # the link, and what it leads to
    checkpoints.save({"global_step": 5}, path)
    assert checkpoints.step(path) == 5
    assert [file.name for file in tmp_path.iterdir()] == ["last.ckpt"]


def test_a_save_that_is_cut_off_leaves_the_former_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "last.ckpt"
    checkpoints.publish(shards(checkpoints.fresh_directory(path), 1), path)
    shards(checkpoints.fresh_directory(path), 2)  # written, not published
    assert checkpoints.step(path) == 1
    monkeypatch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        checkpoints.save({"global_step": 3}, path)
    assert checkpoints.step(path) == 1
    monkeypatch.undo()
    checkpoints.publish(shards(checkpoints.fresh_directory(path), 4), path)  # over what was left behind
    assert checkpoints.step(path) == 4


@pytest.mark.parametrize("sizes", [[100_000], [100] * 1000], ids=["one tensor", "many, which are written together"])
def test_what_has_no_room_is_named_and_leaves_the_room_that_it_took(sizes, tmp_path):
    path = tmp_path / "last.ckpt"
    checkpoints.save({"global_step": 1}, path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))  # as a full disk does, it lets a part be written
    try:
        with pytest.raises(OSError, match=r"File too large: '.*/last\.ckpt'"):
            checkpoints.save({"global_step": 2, "weights": [torch.zeros(size) for size in sizes]}, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert checkpoints.step(path) == 1
    assert [file.name for file in tmp_path.iterdir()] == ["last.ckpt"]


def test_a_directory_without_its_last_file_is_no_checkpoint(tmp_path):
    path = tmp_path / "last.ckpt"
    path.mkdir()
    assert not checkpoints.exists(path)
    torch.save({}, path / checkpoints.EXTRA)
    assert checkpoints.exists(path)


@pytest.mark.slow
def test_shards_of_two_devices_are_gone_on_with_by_one_and_by_four_as_if_nothing_had_happened(
    tmp_path, tmp_path_factory
):
    train(tmp_path / "through", compose([*CONSTANT, WHOLE]))
    expected = [row.loss for row in read_metrics(tmp_path / "through" / "metrics.csv")]
    weights = checkpoints.weights(last(tmp_path / "through"))
    begun = made_by_ranks(__file__, 2, tmp_path_factory) / "fsdp"
    assert checkpoints.is_sharded(last(begun))
    shutil.copytree(begun, tmp_path / "alone", symlinks=True)
    train(tmp_path / "alone", compose([*CONSTANT, WHOLE]), resume=True)
    assert last(tmp_path / "alone").is_file()
    ended = made_by_ranks(__file__, 4, tmp_path_factory)
    for directory in (tmp_path / "alone", ended / "fsdp", ended / "fsdp_tp", ended / "ddp"):
        losses = [row.loss for row in read_metrics(directory / "metrics.csv")]
        torch.testing.assert_close(losses, expected, rtol=1e-10, atol=0)
        here = checkpoints.weights(last(directory))
        assert here.keys() == weights.keys()
        for name in set(here) - {name for name in here if name.endswith("k_proj.bias")}:
            margin = 1e-10 * weights[name].abs().max().item()
            torch.testing.assert_close(here[name], weights[name], rtol=0, atol=margin, msg=name)
    assert checkpoints.is_sharded(last(ended / "fsdp_tp"))
    assert last(ended / "fsdp").is_file()
    one, several = (last(directory).stat().st_size for directory in (tmp_path / "through", ended / "fsdp"))
    assert several == pytest.approx(one, rel=0.02), "tied weights are in it twice"


if __name__ == "__main__":
    import functools

    from lightning.pytorch.strategies import model_parallel

    # A run has one fit a process; see test_parity.
    model_parallel._setup_device_mesh = functools.cache(model_parallel._setup_device_mesh)
    torch.set_num_threads(1)
    count, directory = int(sys.argv[1]), Path(sys.argv[2])
    if count == 2:
        train(directory / "fsdp", compose([*CONSTANT, *two("fsdp"), SHARDED, HALF]))
    else:
        cases = {
            "fsdp": four("fsdp"),
            "fsdp_tp": [*four("fsdp_tp"), SHARDED],
            "ddp": four("ddp"),
        }
        if os.environ["RANK"] == "0":
            for case in cases:
                shutil.copytree(f"{sys.argv[2][:-1]}2/fsdp", directory / case, symlinks=True)
            (directory / "copied").touch()
        while not (directory / "copied").exists():
            time.sleep(0.1)
        for case, overrides in cases.items():
            train(directory / case, compose([*CONSTANT, *overrides, WHOLE]), resume=True)
