"""The standard library of the interpreter that runs the test."""

import sysconfig
from pathlib import Path

import numpy as np
import pytest

from pipeline.data.base import DataBundle
from pipeline.data.pystdlib import PyStdlib, stdlib_sources
from pipeline.models.byte_tokenizer import byte_tokenizer

SETTINGS = PyStdlib(name="pystdlib", sequence_length=128, evaluation_fraction=0.05, evaluation_tokens=32768)


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> DataBundle:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LEANFIT_CACHE", str(tmp_path_factory.mktemp("cache")))
        return SETTINGS.open(byte_tokenizer())


def test_sources_are_the_librarys_own_without_tests_and_installed_packages() -> None:
    root = Path(sysconfig.get_paths()["stdlib"])
    names = {path.relative_to(root).as_posix() for path in stdlib_sources(root)}
    assert {"argparse.py", "json/decoder.py", "dataclasses.py"} <= names
    assert not [n for n in names if {"test", "tests", "site-packages", "dist-packages"} & set(n.split("/"))]


def test_windows_hold_source_text_and_evaluation_is_as_long_as_asked(opened: DataBundle) -> None:
    assert len(opened.evaluation) == 32768 // 128
    assert len(opened.train) * 128 > 3_000_000
    assert (opened.spec.vocabulary, opened.spec.sequence_length) == (256, 128)
    text = bytes(opened.train.windows.ravel())
    assert text.count(b"def ") > 10_000


def test_training_and_evaluation_share_no_window(opened: DataBundle) -> None:
    held_out = {bytes(row) for row in opened.evaluation.windows}
    trained = {bytes(row) for row in opened.train.windows}
    assert len(held_out) > 1000
    # Rules of dashes are the same in any file.
    common = [row for row in held_out & trained if len(set(row)) > 10]
    assert common == []


def test_opening_twice_gives_the_same(opened: DataBundle) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LEANFIT_CACHE", str(Path(opened.train.windows.base.filename).parents[2]))
        again = SETTINGS.open(None)
    assert again.fingerprint == opened.fingerprint
    assert np.array_equal(again.train.windows, opened.train.windows)
    assert "held out by file" in again.description


def test_evaluation_shorter_than_a_window_is_a_problem() -> None:
    small = PyStdlib(name="pystdlib", sequence_length=128, evaluation_fraction=0.05, evaluation_tokens=100)
    assert small.problems() == ["data.evaluation_tokens=100 is fewer than data.sequence_length=128; give at least 128"]
    assert SETTINGS.problems() == []
