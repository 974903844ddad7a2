"""Logits of a model, computed once for the inputs of a fit, written to disk and read back from there.

A row is one sample: a window of tokens, an image. It is found by a hash of its inputs, so it is stored once however
many epochs, batches or processes it comes in, and an input that was not recorded (changed at random, say) is an error
and not another sample's answer. A cache is a directory, there whole or not at all:

    rows.bin     of each row the logits in float16, less the row's largest (softmax does not see that, and rounding is
                 finest where the probability is), and of the k largest their classes in the smallest integer
    index.bin    of each row the hash of its inputs, and the CRC-32 of its bytes, checked whenever it is read
    cache.json   what it was recorded for, its shape, and the sha256 of that and the index
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
import zlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from pipeline.errors import LeanfitError
from pipeline.layers.quantize import at_least_float32, is_finite

Array = np.ndarray[Any, np.dtype[Any]]
Inputs = Mapping[str, Tensor]

ROWS, INDEX, ABOUT = "rows.bin", "index.bin", "cache.json"
ENTRY = np.dtype([("key", "<u8"), ("check", "<u4")])
LOWEST = float(np.finfo(np.float16).min)
VERIFIED_AT_ONCE = 64 << 20
"""Bytes that `LogitCache.verify` holds."""


class LogitCacheError(LeanfitError):
    """A cache that is damaged, or does not hold what it is asked for."""


def row_keys(inputs: Inputs) -> Array:
    """uint64 [B]: a hash of each sample of a batch, over names, dtypes, shapes and bytes.

    Among a million samples two have the same one with a probability of 3e-8.
    """
    hashes = [hashlib.blake2b(digest_size=8) for _ in next(iter(inputs.values()))]
    for name, tensor in sorted(inputs.items()):
        said = f"{name} {tensor.dtype} {list(tensor.shape[1:])}".encode()
        flat = tensor.detach().cpu().reshape(len(hashes), -1).contiguous()
        for one, row in zip(hashes, flat.view(torch.uint8).numpy(), strict=True):
            one.update(said)
            one.update(row)
    return np.frombuffer(b"".join(one.digest() for one in hashes), "<u8")


def row_type(shape: tuple[int, ...], classes: int, top_k: int | None) -> np.dtype[Any]:
    """A row of logits [*shape, k]: float16, and `ids` where k is less than `classes`."""
    count = classes if top_k is None else min(top_k, classes)
    parts: list[Any] = [("logits", "<f2", (*shape, count))]
    if count < classes:
        parts.append(("ids", np.min_scalar_type(classes - 1).newbyteorder("<"), (*shape, count)))
    return np.dtype(parts)


def bytes_needed(rows: int, shape: tuple[int, ...], classes: int, top_k: int | None) -> int:
    """Bytes of rows and index on disk."""
    return rows * (row_type(shape, classes, top_k).itemsize + ENTRY.itemsize)


def largest_top_k(free: int, rows: int, shape: tuple[int, ...], classes: int) -> int:
    """The largest k, less than `classes`, of which so many rows fit into `free` bytes; 0 where none does."""
    one = bytes_needed(rows, shape, classes, 1)
    more = bytes_needed(rows, shape, classes, 2) - one if classes > 2 else one
    return 0 if one > free else min(classes - 1, 1 + (free - one) // more)


def compact(logits: Tensor, top_k: int | None) -> Array:
    """Logits [B, ..., V] as B rows of `row_type`.

    Raises:
        LeanfitError: NaN or infinity among them.
    """
    if not is_finite(logits):
        raise LeanfitError("NaN or infinity among the teacher's logits; it cannot be learned from")
    values, ids = at_least_float32(logits), None
    if top_k is not None and top_k < logits.shape[-1]:
        values, ids = values.topk(top_k, dim=-1)
    # Below the smallest float16 a probability is 0 anyway.
    values = (values - values.amax(-1, keepdim=True)).clamp(min=LOWEST).half()
    rows = np.empty(len(logits), row_type(tuple(logits.shape[1:-1]), logits.shape[-1], top_k))
    rows["logits"] = values.cpu().numpy()
    if ids is not None:
        rows["ids"] = ids.cpu().numpy()
    return rows


def write(
    directory: Path,
    about: Mapping[str, Any],
    batches: Iterable[Inputs],
    forward: Callable[[Inputs], Tensor],
    top_k: int | None,
    notes: Mapping[str, Any] | None = None,
) -> None:
    """Write what `forward` says of every sample in `batches`, each once, to `directory`; what was there goes.

    `about` and `notes` are JSON: what the cache is for, and what else is to be known; the seconds it took are added.

    Raises:
        LeanfitError: the disk is full, a logit is no number, or samples differ in shape.
    """
    partial = directory.with_name(f".{directory.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    started = time.perf_counter()
    try:
        with (partial / ROWS).open("wb") as rows, (partial / INDEX).open("wb") as index:
            layout = _append(rows, index, batches, forward, top_k)
        record = {
            "about": dict(about),
            "layout": layout,
            "notes": {**(notes or {}), "seconds": time.perf_counter() - started},
        }
        digest = _digest(record, (partial / INDEX).read_bytes())
        with (partial / ABOUT).open("wb") as file:
            file.write(json.dumps({**record, "digest": digest}, indent=1).encode())
            _flush(file)
        shutil.rmtree(directory, ignore_errors=True)
        partial.replace(directory)
    except OSError as error:
        raise LeanfitError(f"logits cannot be written to {directory}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _append(
    rows: BinaryIO,
    index: BinaryIO,
    batches: Iterable[Inputs],
    forward: Callable[[Inputs], Tensor],
    top_k: int | None,
) -> dict[str, Any]:
    """Write each sample of `batches` that is new; the layout of the rows, as JSON."""
    seen: set[int] = set()
    layout: dict[str, Any] = {}
    for inputs in batches:
        keys = row_keys(inputs)
        places = {key: place for place, key in enumerate(keys.tolist()) if key not in seen}
        if not places:
            continue
        logits = forward(inputs)
        found = {"shape": list(logits.shape[1:-1]), "classes": logits.shape[-1], "top_k": top_k}
        layout = layout or found
        if layout != found:
            raise LeanfitError(f"logits of {found} among those of {layout}: samples must be alike")
        fresh = list(places.values())
        made = compact(logits, top_k)[fresh]
        entries = np.empty(len(fresh), ENTRY)
        entries["key"], entries["check"] = keys[fresh], _checks(made)
        rows.write(made.tobytes())
        index.write(entries.tobytes())
        seen.update(places)
    _flush(rows)
    _flush(index)
    return layout


class LogitCache:
    """A cache that was written before, mapped into memory and not read until it is asked.

    Raises:
        LogitCacheError: there is none, or it is damaged.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        try:
            said = json.loads((directory / ABOUT).read_bytes())
            record = {key: said[key] for key in ("about", "layout", "notes")}
            raw = (directory / INDEX).read_bytes()
            if said["digest"] != _digest(record, raw):
                raise LogitCacheError(f"{directory}: {ABOUT} or {INDEX} was altered")
            index = np.frombuffer(raw, ENTRY)
            layout = record["layout"]
            kind = row_type(tuple(layout["shape"]), layout["classes"], layout["top_k"])
            held, wanted = (directory / ROWS).stat().st_size, len(index) * kind.itemsize
            if held != wanted:
                raise LogitCacheError(f"{directory}: {ROWS} has {held} bytes instead of {wanted}")
            self._rows: Array = np.memmap(directory / ROWS, kind, mode="r", shape=(len(index),))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise LogitCacheError(f"{directory}: holds no logits that can be read: {error}") from error
        self.about: dict[str, Any] = record["about"]
        self.notes: dict[str, Any] = record["notes"]
        self.bytes = held + len(raw) + (directory / ABOUT).stat().st_size
        self._order = np.argsort(index["key"], kind="stable")
        self._keys = index["key"][self._order]
        self._index_checks = index["check"]

    def __len__(self) -> int:
        return len(self._keys)

    def verify(self) -> None:
        """Read every row. Raises LogitCacheError where one is not as it was written."""
        step = max(1, VERIFIED_AT_ONCE // self._rows.dtype.itemsize)
        for start in range(0, len(self), step):
            self._read(np.arange(start, min(start + step, len(self))))

    def read(self, inputs: Inputs) -> tuple[Tensor, Tensor | None]:
        """(logits float32 [B, ..., k], their classes int64 [B, ..., k] or None where all are there), beside `inputs`.

        Raises:
            LogitCacheError: a sample was not recorded, or its row was altered since.
        """
        keys = row_keys(inputs)
        places = np.searchsorted(self._keys, keys).clip(max=len(self) - 1)
        if missing := int((self._keys[places] != keys).sum()):
            raise LogitCacheError(
                f"{self.directory}: {missing} of a batch's {len(keys)} samples were not recorded; the data gives "
                "others than before the fit (changed at random?)"
            )
        rows = self._read(self._order[places])
        device = next(iter(inputs.values())).device
        logits = torch.from_numpy(rows["logits"].copy()).to(device).float()
        if "ids" not in (rows.dtype.names or ()):
            return logits, None
        return logits, torch.from_numpy(rows["ids"].copy()).long().to(device)  # in torch's memory, which is measured

    def _read(self, places: Array) -> Array:
        rows = np.array(self._rows[places])
        if damaged := int((_checks(rows) != self._index_checks[places]).sum()):
            raise LogitCacheError(f"{self.directory}: {damaged} of {len(rows)} rows of {ROWS} were altered")
        return rows


def _checks(rows: Array) -> Array:
    """CRC-32 of each row's bytes."""
    raw = memoryview(rows.tobytes())
    size = rows.dtype.itemsize
    return np.array([zlib.crc32(raw[start : start + size]) for start in range(0, len(raw), size)], "<u4")


def _digest(record: Mapping[str, Any], index: bytes) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode() + index).hexdigest()


def _flush(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())
