"""Corpora as token ids: split without overlap, encoded once, memory-mapped from a cache, served in windows.

A corpus is a list of files. A split turns it into spans (file, first byte, last byte) for training and for evaluation;
each span is encoded by the model's tokenizer (byte-level tokenizers: the bytes as they are) and appended to one array
a split on disk. The cache's key is a hash of all that decides the result: the files' contents, the tokenizer and the
split. Entries are written beside and renamed into place, so that processes which start together do no harm.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch.utils.data import Dataset

from pipeline.data.base import DataBundle, DataSpec
from pipeline.errors import ConfigError
from pipeline.models.byte_tokenizer import is_byte_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    Tokens = np.ndarray[Any, np.dtype[Any]]

FORMAT = 1
"""Part of every cache key: raise it when the same inputs come to give other tokens."""
CHUNK = 1 << 20


@dataclass(frozen=True)
class File:
    """One file of a corpus: `name`, relative to the corpus, decides the split; `digest` is its content's sha256."""

    name: str
    path: Path
    size: int
    digest: str


@dataclass(frozen=True)
class Span:
    """Bytes `start` to `end` of a file; `last` where the document ends with it."""

    path: Path
    start: int
    end: int
    last: bool


Spans = tuple[list[Span], list[Span]]
"""(training, evaluation)"""


class TokenWindows(Dataset[dict[str, torch.Tensor]]):
    """Windows of `sequence_length` tokens, one after the other without overlap; a rest too short for one is left out.

    With `limit`, as many windows as hold that many tokens (at least one), spread evenly from first to last.
    """

    def __init__(self, tokens: Tokens, sequence_length: int, limit: int | None = None) -> None:
        count = len(tokens) // sequence_length
        self.windows = tokens[: count * sequence_length].reshape(count, sequence_length)
        kept = count if limit is None else min(count, max(1, limit // sequence_length))
        self.chosen = np.arange(kept) * count // max(kept, 1)

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """{"input_ids": int64 [T], "labels": the same tensor}."""
        return _batch(self.windows[self.chosen[index]])

    def __getitems__(self, indices: Sequence[int]) -> dict[str, torch.Tensor]:
        """A whole batch at once, {"input_ids": int64 [B, T], "labels": the same tensor}: one copy instead of B."""
        return _batch(self.windows[self.chosen[list(indices)]])


def _batch(tokens: Tokens) -> dict[str, torch.Tensor]:
    # torch widens them, not numpy, whose memory is not counted with torch's; it warns of what cannot be written to.
    ids = torch.from_numpy(np.require(tokens, requirements="W")).to(torch.int64, copy=True)
    return {"input_ids": ids, "labels": ids}


def read_files(root: Path, paths: Sequence[Path]) -> list[File]:
    """Names relative to `root`, sizes and content hashes, sorted by name; empty files are left out.

    Raises:
        ConfigError: a file cannot be read.
    """
    files = []
    for path in paths:
        try:
            with path.open("rb") as stream:
                digest = hashlib.file_digest(stream, "sha256") if hasattr(hashlib, "file_digest") else _digest(stream)
                size = stream.tell()
        except OSError as error:
            raise ConfigError(f"data: {path} cannot be read: {error.strerror}") from error
        if size:
            files.append(File(path.relative_to(root).as_posix(), path, size, digest.hexdigest()))
    return sorted(files, key=lambda file: file.name)


def _digest(stream: Any) -> Any:
    digest = hashlib.sha256()
    while chunk := stream.read(CHUNK):
        digest.update(chunk)
    return digest


def split_by_file(files: Sequence[File], fraction: float) -> Spans:
    """Each file to evaluation where the hash of its name falls below `fraction`, so that adding files moves no other.

    Files of equal content go where the first of them goes. With two different files or more neither side is empty.

    Raises:
        ConfigError: fewer than two different files.
    """
    first: dict[str, str] = {}
    for file in files:
        first.setdefault(file.digest, file.name)
    place = {name: int(hashlib.sha256(name.encode()).hexdigest()[:13], 16) / 16**13 for name in first.values()}
    if len(place) < 2:
        raise ConfigError(
            f"data.split=file needs two different files or more, here is {len(place)}; "
            "data.split=position takes evaluation from the end of the text"
        )
    ranked = sorted(place, key=lambda name: place[name])
    held_out = {name for name in ranked[1:-1] if place[name] < fraction} | {ranked[0]}
    train: list[Span] = []
    evaluation: list[Span] = []
    for file in files:
        side = evaluation if first[file.digest] in held_out else train
        side.append(Span(file.path, 0, file.size, last=True))
    return train, evaluation


def split_by_position(files: Sequence[File], fraction: float) -> Spans:
    """The last `fraction` of all bytes to evaluation; cut after a line if one ends nearby, else after a character."""
    total = sum(file.size for file in files)
    left = total - int(total * fraction)
    train: list[Span] = []
    evaluation: list[Span] = []
    for file in files:
        if left >= file.size:
            train.append(Span(file.path, 0, file.size, last=True))
        elif left <= 0:
            evaluation.append(Span(file.path, 0, file.size, last=True))
        else:
            cut = _cut(file, left)
            train.append(Span(file.path, 0, cut, last=False))
            evaluation.append(Span(file.path, cut, file.size, last=True))
        left -= file.size
    return train, evaluation


def _cut(file: File, near: int) -> int:
    """A byte offset of at least `near`: after the next newline within 4 KiB, else at the next start of a character."""
    with file.path.open("rb") as stream:
        stream.seek(near - 1)
        ahead = stream.read(4096)
    newline = ahead.find(b"\n")
    if newline >= 0 and near + newline < file.size:
        return near + newline
    skip = 1
    while skip < len(ahead) and ahead[skip] & 0xC0 == 0x80:
        skip += 1
    return near - 1 + skip


def token_bundle(
    files: Sequence[File],
    tokenizer: PreTrainedTokenizerBase,
    *,
    split: Literal["file", "position"],
    evaluation_fraction: float,
    evaluation_tokens: int,
    sequence_length: int,
    what: str,
) -> DataBundle:
    """The corpus as windows for training and evaluation. `what` names it in the description.

    Raises:
        ConfigError: a side is shorter than one window, a file is not text that the tokenizer can take, or the cache
            cannot be written.
    """
    divide = split_by_file if split == "file" else split_by_position
    spans = divide(files, evaluation_fraction)
    content = _sha256([[file.name, file.digest] for file in files])
    vocabulary = vocabulary_size(tokenizer)
    settings = {
        "format": FORMAT,
        "content": content,
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "split": split,
        "fraction": evaluation_fraction,
    }
    train, evaluation = _cached(_sha256(settings), spans, tokenizer, token_dtype(vocabulary))
    for side, tokens in (("training", train), ("evaluation", evaluation)):
        if len(tokens) < sequence_length:
            raise ConfigError(
                f"data: {what} gives {len(tokens)} tokens for {side}, fewer than "
                f"data.sequence_length={sequence_length}; give more text, a shorter data.sequence_length or another "
                "data.evaluation_fraction"
            )
    held_out = TokenWindows(evaluation, sequence_length, limit=evaluation_tokens)
    return DataBundle(
        train=TokenWindows(train, sequence_length),
        evaluation=held_out,
        spec=DataSpec(vocabulary=vocabulary, sequence_length=sequence_length),
        fingerprint=content,
        description=(
            f"{what}: {len(files):,} files, {len(train):,} tokens to train on, {len(evaluation):,} held out by {split} "
            f"({held_out.windows.shape[1] * len(held_out):,} of them evaluated)"
        ),
    )


def vocabulary_size(tokenizer: PreTrainedTokenizerBase) -> int:
    """One more than the largest id: the length, unless a tokenizer's ids have holes."""
    return max(len(tokenizer), 1 + max(tokenizer.get_vocab().values()))


def token_dtype(vocabulary: int) -> np.dtype[Any]:
    """The smallest unsigned type that holds every id."""
    return np.dtype(np.uint8 if vocabulary <= 1 << 8 else np.uint16 if vocabulary <= 1 << 16 else np.uint32)


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """sha256 of what decides a tokenizer's output; truncation and padding, which calls change, are left out."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        rules = {
            key: value for key, value in json.loads(backend.to_str()).items() if key not in ("truncation", "padding")
        }
    else:
        rules = {"class": type(tokenizer).__name__, "vocabulary": tokenizer.get_vocab()}
    return _sha256([rules, tokenizer.eos_token_id])


def _sha256(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def encode(span: Span, tokenizer: PreTrainedTokenizerBase, as_bytes: bool) -> Iterator[Tokens]:
    """The span's token ids in pieces, and the tokenizer's end-of-text token, where it has one, after a document's last.

    Long files are encoded in pieces of about a megabyte that end with a line.

    Raises:
        ConfigError: the file is not UTF-8 and the tokenizer is not byte-level.
    """
    with span.path.open("rb") as stream:
        stream.seek(span.start)
        while (left := span.end - stream.tell()) > 0:
            piece = stream.read(min(CHUNK, left))
            if as_bytes:
                yield np.frombuffer(piece, np.uint8)
                continue
            if len(piece) < left:
                piece += stream.readline(left - len(piece))
            try:
                text = piece.decode()
            except UnicodeDecodeError as error:
                at = stream.tell() - len(piece) + error.start
                raise ConfigError(
                    f"data: {span.path} is not UTF-8 text (byte {error.object[error.start]:#04x} at {at}); leave it "
                    "out with data.glob, or use a model that reads bytes"
                ) from error
            yield np.asarray(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], np.int64)
    if span.last and not as_bytes and tokenizer.eos_token_id is not None:
        yield np.asarray([tokenizer.eos_token_id], np.int64)


def cache_root() -> Path:
    """`LEANFIT_CACHE`, else `$XDG_CACHE_HOME/leanfit`, else `~/.cache/leanfit`.

    Raises:
        ConfigError: `LEANFIT_CACHE` names the home of a user that is not there.
    """
    if chosen := os.environ.get("LEANFIT_CACHE"):
        try:
            return Path(chosen).expanduser()
        except RuntimeError:
            user = Path(chosen).parts[0]
            raise ConfigError(f"LEANFIT_CACHE={chosen}: there is no user {user[1:]}; name another directory") from None
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "leanfit"


def _cached(key: str, spans: Spans, tokenizer: PreTrainedTokenizerBase, dtype: np.dtype[Any]) -> tuple[Tokens, Tokens]:
    """The memory-mapped arrays of an entry (training, evaluation), written first where they are not there or broken."""
    entry = cache_root() / "tokens" / key
    if (arrays := _open_entry(entry, dtype)) is not None:
        return arrays
    try:
        beside = entry.with_name(f".{key}.{uuid.uuid4().hex}")
        beside.mkdir(parents=True)
        try:
            _write_entry(beside, spans, tokenizer, dtype)
            # A broken entry is moved away, not overwritten: another process may have it mapped.
            if entry.exists() and _open_entry(entry, dtype) is None:
                entry.rename(beside / "broken")
            try:
                beside.rename(entry)
            except OSError:
                if _open_entry(entry, dtype) is None:
                    raise
        finally:
            shutil.rmtree(beside, ignore_errors=True)
            shutil.rmtree(entry / "broken", ignore_errors=True)
    except OSError as error:
        raise ConfigError(
            f"data: the token cache {cache_root()} cannot be written ({error.strerror}); set LEANFIT_CACHE to a "
            "directory that can"
        ) from error
    written = _open_entry(entry, dtype)
    if written is None:
        raise ConfigError(f"data: the token cache {entry} was removed while it was written; run again")
    return written


def _write_entry(directory: Path, spans: Spans, tokenizer: PreTrainedTokenizerBase, dtype: np.dtype[Any]) -> None:
    as_bytes = is_byte_tokenizer(tokenizer)
    counts = []
    for name, side in zip(("train", "evaluation"), spans, strict=True):
        count = 0
        with (directory / f"{name}.bin").open("wb") as out:
            for span in side:
                for ids in encode(span, tokenizer, as_bytes):
                    out.write(ids.astype(dtype, copy=False).tobytes())
                    count += len(ids)
        counts.append(count)
    (directory / "meta.json").write_text(json.dumps({"dtype": dtype.name, "counts": counts}), encoding="utf-8")


def _open_entry(entry: Path, dtype: np.dtype[Any]) -> tuple[Tokens, Tokens] | None:
    """None where the entry is absent, or its files are not as long as they were written."""
    try:
        meta = json.loads((entry / "meta.json").read_text(encoding="utf-8"))
        arrays = []
        for name, count in zip(("train", "evaluation"), meta["counts"], strict=True):
            path = entry / f"{name}.bin"
            if path.stat().st_size != count * dtype.itemsize:
                return None
            # An empty file cannot be mapped.
            arrays.append(np.memmap(path, dtype, mode="r") if count else np.empty(0, dtype))
    except (OSError, ValueError, KeyError):
        return None
    train, evaluation = arrays
    return train, evaluation
