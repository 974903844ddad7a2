"""Own text: folders, single files, and everything that must be refused in one line."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from pipeline.data.text import Text
from pipeline.errors import ConfigError
from pipeline.models.byte_tokenizer import byte_tokenizer


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LEANFIT_CACHE", str(tmp_path_factory.mktemp("cache")))


def text(path: Path | str, **changes: object) -> Text:
    settings = Text(
        name="text",
        path=str(path),
        glob="**/*",
        sequence_length=16,
        split="file",
        evaluation_fraction=0.2,
        evaluation_tokens=10**6,
    )
    return dataclasses.replace(settings, **changes)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for i in range(12):
        path = tmp_path / "corpus" / f"part{i % 3}" / f"{i}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"unique line {i} of many\n" * 40, encoding="utf-8")
    return tmp_path / "corpus"


def test_a_folder_is_split_by_file_without_overlap(folder: Path) -> None:
    opened = text(folder).open(byte_tokenizer())
    sides = [bytes(side.windows.ravel()) for side in (opened.train, opened.evaluation)]
    found = [{i for i in range(12) if f"unique line {i} of".encode() in side} for side in sides]
    assert found[0].isdisjoint(found[1])
    assert found[0] | found[1] == set(range(12))
    assert found[1]


def test_a_single_file_is_split_by_position_if_that_is_said(tmp_path: Path) -> None:
    lines = b"".join(f"line {i:05d}\n".encode() for i in range(2000))
    (tmp_path / "one.txt").write_bytes(lines)
    opened = text(tmp_path / "one.txt", split="position").open(byte_tokenizer())
    train, evaluation = (bytes(side.windows.ravel()) for side in (opened.train, opened.evaluation))
    assert lines.startswith(train)
    start = lines.index(evaluation)
    assert start >= len(train)
    assert lines[start - 1 : start] == b"\n"
    assert abs(start / len(lines) - 0.8) < 0.01


def test_a_single_file_split_by_file_names_the_way_out(tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("x" * 1000)
    (found,) = text(tmp_path / "one.txt").problems()
    assert "data.split=position" in found
    with pytest.raises(ConfigError, match="split=position"):
        text(tmp_path / "one.txt").open(byte_tokenizer())
    with pytest.raises(ConfigError, match="split=position"):
        text(tmp_path).open(byte_tokenizer())


def test_glob_chooses_files_and_hidden_ones_are_left_out(folder: Path) -> None:
    (folder / ".git").mkdir()
    (folder / ".git" / "junk").write_bytes(b"\x00JUNK" * 100)
    (folder / "notes.md").write_text("NOTES " * 100)
    everything = text(folder, split="position").open(byte_tokenizer())
    chosen = text(folder, split="position", glob="**/*.txt").open(byte_tokenizer())
    assert b"NOTES" in bytes(everything.train.windows.ravel())
    for opened in (everything, chosen):
        assert b"JUNK" not in bytes(opened.train.windows.ravel()) + bytes(opened.evaluation.windows.ravel())
    assert b"NOTES" not in bytes(chosen.train.windows.ravel())


def test_bytes_of_a_binary_file_are_taken_as_they_are(tmp_path: Path) -> None:
    data = np.random.default_rng(0).integers(256, size=4096, dtype=np.uint8)
    (tmp_path / "noise").write_bytes(data.tobytes())
    opened = text(tmp_path / "noise", split="position").open(byte_tokenizer())
    assert np.array_equal(opened.train.windows.ravel(), data[: opened.train.windows.size])


def test_evaluation_is_limited_and_spread(folder: Path) -> None:
    whole = text(folder, split="position", evaluation_fraction=0.5).open(byte_tokenizer())
    few = text(folder, split="position", evaluation_fraction=0.5, evaluation_tokens=64).open(byte_tokenizer())
    assert len(few.evaluation) == 4
    assert few.evaluation.chosen[-1] >= 0.7 * len(whole.evaluation)


@pytest.mark.parametrize(
    ("make", "changes", "words"),
    [
        ("nothing", {}, "does not exist; give a text file or a folder of them"),
        ("pipe", {}, "is a pipe or a device; give a text file or a folder of them"),
        ("empty folder", {}, r"holds no file that matches data.glob=\*\*/\*"),
        ("folder", {"glob": "*.py"}, r"holds no file that matches data.glob=\*.py"),
        ("folder", {"glob": "/abs/*"}, "data.glob=/abs/.* is no pattern for files below data.path"),
        ("folder", {"glob": ""}, "data.glob= is no pattern for files below data.path"),
        ("empty file", {"split": "position"}, "holds no text: every file is empty"),
        (
            "short",
            {"split": "position"},
            r"gives \d+ tokens for (training|evaluation), fewer than data.sequence_length=16",
        ),
    ],
)
def test_what_cannot_serve_is_refused(tmp_path: Path, make: str, changes: dict[str, str], words: str) -> None:
    path = tmp_path / "here"
    if "folder" in make:
        path.mkdir()
    if make == "folder":
        (path / "a.txt").write_text("text")
    if make == "empty file":
        path.touch()
    if make == "pipe":
        os.mkfifo(path)
    if make == "short":
        path.write_text("short")
    with pytest.raises(ConfigError, match=words):
        text(path, **changes).open(byte_tokenizer())


def test_no_path_is_not_the_current_directory(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    (told,) = text("").problems()
    assert told.startswith("data.path is empty")


def test_an_unreadable_file_is_named(folder: Path) -> None:
    (folder / "dangling").symlink_to(folder / "nowhere")
    assert text(folder).open(byte_tokenizer())
    (folder / "loop").symlink_to(folder)
    assert text(folder).open(byte_tokenizer())


def test_checking_the_settings_imports_no_torch(folder: Path) -> None:
    code = (
        "import sys\n"
        "from pipeline.data.text import Text\n"
        "from pipeline.data import pystdlib\n"
        f"t = Text(name='text', path={str(folder)!r}, glob='*/*', sequence_length=8, split='file', "
        "evaluation_fraction=.1, evaluation_tokens=9)\n"
        "print(t.problems(), 'torch' in sys.modules or 'numpy' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["[]", "False"]
