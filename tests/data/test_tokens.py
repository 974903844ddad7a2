"""The token store: splits without overlap, exact contents, a cache that survives races and damage."""

import itertools
import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from pipeline.data.tokens import (
    File,
    Span,
    TokenWindows,
    cache_root,
    encode,
    read_files,
    split_by_file,
    split_by_position,
    token_bundle,
    token_dtype,
    tokenizer_fingerprint,
)
from pipeline.errors import ConfigError
from pipeline.memory.measure import measure_peak
from pipeline.models.byte_tokenizer import byte_tokenizer


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    root = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("LEANFIT_CACHE", str(root))
    return root


@pytest.fixture(scope="module")
def bpe() -> PreTrainedTokenizerFast:
    """A real byte-level BPE with merges and an end-of-text token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<end>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["def add(a, b):\n    return a + b\n"] * 50 + ["the naïve ☃ line\n"] * 50, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")


def write(folder: Path, contents: dict[str, bytes]) -> list[File]:
    for name, content in contents.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return read_files(folder, [folder / name for name in contents])


def bundle(files: list[File], tokenizer: PreTrainedTokenizerBase, **changes: object) -> object:
    settings = {
        "split": "file",
        "evaluation_fraction": 0.3,
        "evaluation_tokens": 10**6,
        "sequence_length": 8,
        "what": "test text",
    }
    return token_bundle(files, tokenizer, **{**settings, **changes})


def content(span: Span) -> bytes:
    return span.path.read_bytes()[span.start : span.end]


def test_windows_are_consecutive_and_complete() -> None:
    windows = TokenWindows(np.arange(35, dtype=np.uint8), 8)
    assert len(windows) == 4
    ids = torch.cat([windows[i]["input_ids"] for i in range(4)])
    assert torch.equal(ids, torch.arange(32))
    assert windows[0]["labels"].dtype == torch.int64
    with pytest.raises(IndexError):
        windows[4]


def test_a_batch_is_memory_that_is_measured_with_the_rest() -> None:
    windows = TokenWindows(np.zeros(800, np.uint8), 8)
    with measure_peak("cpu") as peak:
        batch = windows.__getitems__(list(range(16)))
    assert peak.bytes == batch["input_ids"].nbytes == 16 * 8 * 8


def test_a_batch_equals_its_stacked_samples() -> None:
    windows = TokenWindows(np.random.default_rng(0).integers(256, size=1000).astype(np.uint8), 8, limit=400)
    for key in ("input_ids", "labels"):
        assert torch.equal(windows.__getitems__([3, 0, 49])[key], torch.stack([windows[i][key] for i in (3, 0, 49)]))


def test_limited_windows_are_spread_over_the_whole_split() -> None:
    windows = TokenWindows(np.repeat(np.arange(100, dtype=np.uint8), 8), 8, limit=80)
    assert [int(windows[i]["input_ids"][0]) for i in range(len(windows))] == list(range(0, 100, 10))
    assert len(TokenWindows(np.zeros(80, np.uint8), 8, limit=3)) == 1
    assert len(TokenWindows(np.zeros(80, np.uint8), 8, limit=10**9)) == 10


def test_ids_are_stored_in_the_smallest_type() -> None:
    assert [token_dtype(v).name for v in (256, 257, 65536, 65537)] == ["uint8", "uint16", "uint16", "uint32"]


def test_split_by_file_puts_every_file_on_one_side_and_moves_none_when_files_are_added(tmp_path: Path) -> None:
    contents = {f"f{i}.txt": f"content {i}\n".encode() for i in range(200)}
    files = write(tmp_path, contents)
    train, evaluation = split_by_file(files, 0.3)
    assert sorted(span.path.name for span in train + evaluation) == sorted(contents)
    assert 30 <= len(evaluation) <= 90
    more = write(tmp_path, {**contents, "zzz.txt": b"one more"})
    again_train, again_evaluation = split_by_file(more, 0.3)
    assert {span.path for span in train} <= {span.path for span in again_train}
    assert {span.path for span in evaluation} <= {span.path for span in again_evaluation}


@pytest.mark.parametrize("fraction", [0.001, 0.5, 0.999])
def test_two_files_are_enough_for_a_split_by_file(tmp_path: Path, fraction: float) -> None:
    for first, second in itertools.combinations("abcdef", 2):
        train, evaluation = split_by_file(write(tmp_path / first / second, {first: b"1", second: b"2"}), fraction)
        assert len(train) == len(evaluation) == 1


def test_copies_of_a_file_never_stand_on_both_sides(tmp_path: Path) -> None:
    files = write(tmp_path, {f"{i}.txt": f"content {i % 5}".encode() for i in range(60)})
    train, evaluation = split_by_file(files, 0.4)
    assert {content(span) for span in train}.isdisjoint({content(span) for span in evaluation})
    copies = write(tmp_path / "copies", {"a": b"same", "b": b"same"})
    with pytest.raises(ConfigError, match=r"two different files or more, here is 1; data\.split=position"):
        split_by_file(copies, 0.4)


@settings(max_examples=100, deadline=None)
@given(
    texts=st.lists(st.text(st.sampled_from("ab\n☃\U0001f600é"), min_size=1, max_size=60), min_size=1, max_size=4),
    fraction=st.floats(0.01, 0.99),
)
def test_position_split_loses_nothing_overlaps_nowhere_and_cuts_no_character(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], fraction: float
) -> None:
    files = write(tmp_path_factory.mktemp("text"), {f"{i}.txt": text.encode() for i, text in enumerate(texts)})
    train, evaluation = split_by_position(files, fraction)
    sides = [b"".join(content(span) for span in side) for side in (train, evaluation)]
    assert b"".join(sides) == "".join(texts).encode()
    for side in sides:
        side.decode()


def test_position_split_holds_out_the_asked_share_from_the_end_at_a_line(tmp_path: Path) -> None:
    lines = [f"line {i:06d}\n".encode() for i in range(10_000)]
    files = write(tmp_path, {"a.txt": b"".join(lines[:3000]), "b.txt": b"".join(lines[3000:])})
    train, evaluation = split_by_position(files, 0.05)
    held_out = b"".join(content(span) for span in evaluation)
    assert held_out == b"".join(lines[-len(held_out) // len(lines[0]) :])
    assert abs(len(held_out) / sum(file.size for file in files) - 0.05) < 0.001
    assert train[0].last
    assert not train[1].last


def test_byte_store_holds_the_files_bytes_even_where_they_are_no_text(tmp_path: Path) -> None:
    files = write(tmp_path, {"a.bin": bytes(range(256)) * 4, "b.txt": b"hello" * 100})
    opened = bundle(files, byte_tokenizer(), evaluation_fraction=0.5)
    stored = {bytes(side.windows.astype(np.uint8).ravel()) for side in (opened.train, opened.evaluation)}
    assert stored == {bytes(range(256)) * 4, (b"hello" * 100)[: 500 // 8 * 8]}
    assert opened.spec.vocabulary == 256
    assert opened.train.windows.dtype == np.uint8


def test_bytes_as_they_are_equal_what_the_byte_tokenizer_gives(tmp_path: Path) -> None:
    text = "naïve ☃ \U0001f600 def f(x):\r\n\treturn x\n" * 50
    (file,) = write(tmp_path, {"a.txt": text.encode()})
    span = Span(file.path, 0, file.size, last=True)
    quick = np.concatenate(list(encode(span, byte_tokenizer(), as_bytes=True)))
    assert quick.tolist() == byte_tokenizer()(text)["input_ids"]


def test_a_tokenizers_ids_are_stored_document_by_document_with_its_end_token(
    tmp_path: Path, bpe: PreTrainedTokenizerFast
) -> None:
    texts = {f"{i}.txt": f"def add{i}(a, b):\n    return a + b\n" * (i + 3) for i in range(6)}
    files = write(tmp_path, {name: text.encode() for name, text in texts.items()})
    opened = bundle(files, bpe, sequence_length=2)
    expected: list[list[int]] = [[], []]
    for side, spans in zip(expected, split_by_file(files, 0.3), strict=True):
        for span in spans:
            side += bpe(span.path.read_text(encoding="utf-8"))["input_ids"] + [bpe.eos_token_id]
    assert opened.train.windows.ravel().tolist() == expected[0][: len(expected[0]) // 2 * 2]
    assert opened.evaluation.windows.ravel().tolist() == expected[1][: len(expected[1]) // 2 * 2]
    assert opened.train.windows.dtype == np.uint16
    assert opened.spec.vocabulary == len(bpe)


def test_long_files_are_encoded_in_pieces_that_end_with_a_line(tmp_path: Path, bpe: PreTrainedTokenizerFast) -> None:
    text = "".join(f"the naïve ☃ line {i}\n" for i in range(60_000))
    (file,) = write(tmp_path, {"long.txt": text.encode()})
    assert file.size > 1 << 20
    pieces = list(encode(Span(file.path, 0, file.size, last=False), bpe, as_bytes=False))
    assert len(pieces) == 2
    assert all(bpe.decode(piece).endswith("\n") for piece in pieces)
    assert "".join(bpe.decode(piece) for piece in pieces) == text


def test_undecodable_text_is_one_line_that_names_file_and_byte(tmp_path: Path, bpe: PreTrainedTokenizerFast) -> None:
    files = write(tmp_path, {"good.txt": b"fine\n" * 20, "bad.txt": b"abc\xff\n" * 20})
    with pytest.raises(ConfigError, match=r"bad\.txt is not UTF-8 text \(byte 0xff at 3\)"):
        bundle(files, bpe)


@pytest.mark.parametrize("side", ["training", "evaluation"])
def test_too_little_text_is_refused(tmp_path: Path, side: str) -> None:
    files = write(tmp_path, {"a.txt": b"x" * 1000})
    fraction = 0.995 if side == "training" else 0.005
    with pytest.raises(ConfigError, match=rf"gives 5 tokens for {side}, fewer than data\.sequence_length=8"):
        bundle(files, byte_tokenizer(), split="position", evaluation_fraction=fraction)


def test_the_second_opening_reads_the_cache(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = write(tmp_path, {f"{i}.txt": f"text {i}\n".encode() * 50 for i in range(4)})
    first = bundle(files, byte_tokenizer())

    def never(*_: object) -> None:
        raise AssertionError("encoded again")

    monkeypatch.setattr("pipeline.data.tokens.encode", never)
    second = bundle(files, byte_tokenizer())
    assert np.array_equal(first.train.windows, second.train.windows)
    assert isinstance(second.train.windows, np.memmap)
    assert first.fingerprint == second.fingerprint
    assert [path.name for path in (cache / "tokens").iterdir() if path.name.startswith(".")] == []


def test_a_changed_file_tokenizer_or_split_makes_an_entry_of_its_own(
    tmp_path: Path, cache: Path, bpe: PreTrainedTokenizerFast
) -> None:
    contents = {f"{i}.txt": f"text {i}\n".encode() * 50 for i in range(4)}
    first = bundle(write(tmp_path, contents), byte_tokenizer())
    bundle(write(tmp_path, contents), bpe)
    bundle(write(tmp_path, contents), byte_tokenizer(), split="position")
    bundle(write(tmp_path, contents), byte_tokenizer(), evaluation_fraction=0.5)
    changed = bundle(write(tmp_path, {**contents, "0.txt": b"other\n" * 50}), byte_tokenizer())
    assert len(list((cache / "tokens").iterdir())) == 5
    assert changed.fingerprint != first.fingerprint


@pytest.mark.parametrize("damage", ["truncated", "no meta", "empty meta", "missing file"])
def test_a_damaged_entry_is_written_anew(tmp_path: Path, cache: Path, damage: str) -> None:
    files = write(tmp_path, {f"{i}.txt": f"text {i}\n".encode() * 50 for i in range(4)})
    first = np.array(bundle(files, byte_tokenizer()).train.windows)
    (entry,) = (cache / "tokens").iterdir()
    if damage == "truncated":
        os.truncate(entry / "train.bin", 10)
    elif damage == "no meta":
        (entry / "meta.json").unlink()
    elif damage == "empty meta":
        (entry / "meta.json").write_text("")
    else:
        (entry / "evaluation.bin").unlink()
    assert np.array_equal(bundle(files, byte_tokenizer()).train.windows, first)
    assert sorted(path.name for path in entry.iterdir()) == ["evaluation.bin", "meta.json", "train.bin"]


def open_at_once(folder: str, results: "multiprocessing.Queue[bytes]", barrier: Callable[[], int]) -> None:
    files = read_files(Path(folder), sorted(Path(folder).iterdir()))
    tokenizer = byte_tokenizer()
    barrier()
    results.put(bytes(np.ascontiguousarray(bundle(files, tokenizer).train.windows)))


def test_processes_that_start_together_all_get_the_same_tokens(tmp_path: Path, cache: Path) -> None:
    write(tmp_path, {f"{i}.txt": f"text {i}\n".encode() * 5000 for i in range(20)})
    context = multiprocessing.get_context("fork")
    results, barrier = context.Queue(), context.Barrier(4)
    workers = [context.Process(target=open_at_once, args=(str(tmp_path), results, barrier.wait)) for _ in range(4)]
    for worker in workers:
        worker.start()
    gathered = [results.get(timeout=60) for _ in workers]
    for worker in workers:
        worker.join(timeout=60)
    assert [worker.exitcode for worker in workers] == [0] * 4
    assert len(set(gathered)) == 1
    assert len(list((cache / "tokens").iterdir())) == 1


def test_an_unwritable_cache_names_the_variable_that_moves_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = write(tmp_path, {f"{i}.txt": f"text {i}\n".encode() * 50 for i in range(4)})
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("LEANFIT_CACHE", str(tmp_path / "file"))
    with pytest.raises(ConfigError, match=r"cannot be written .*set LEANFIT_CACHE"):
        bundle(files, byte_tokenizer())


def test_the_cache_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LEANFIT_CACHE", "/one")
    monkeypatch.setenv("XDG_CACHE_HOME", "/two")
    assert cache_root() == Path("/one")
    monkeypatch.delenv("LEANFIT_CACHE")
    assert cache_root() == Path("/two/leanfit")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_root() == Path.home() / ".cache" / "leanfit"
    monkeypatch.setenv("LEANFIT_CACHE", "~nobody-of-that-name/x")
    with pytest.raises(ConfigError, match="LEANFIT_CACHE=~nobody-of-that-name/x: there is no user nobody-of-that-name"):
        cache_root()


def test_calling_a_tokenizer_leaves_its_fingerprint_unchanged(bpe: PreTrainedTokenizerFast) -> None:
    before = tokenizer_fingerprint(bpe)
    bpe("a b c d", truncation=True, max_length=2)
    assert tokenizer_fingerprint(bpe) == before
    assert tokenizer_fingerprint(byte_tokenizer()) == tokenizer_fingerprint(byte_tokenizer()) != before
