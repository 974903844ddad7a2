"""Checkpoints of a fit on disk: one file, or a directory to which each rank wrote its own part.

Either takes the place of the former one at once, so that a run killed while saving keeps that. A directory is reached
through a link, because no system replaces a directory in one step. Imports torch only where it reads or writes.
"""

from __future__ import annotations

import os
import shutil
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

EXTRA = "meta.pt"
"""The file of a sharded checkpoint that holds all but weights and optimizer state, as Lightning names it."""


def exists(path: Path) -> bool:
    """Whether a whole checkpoint is there."""
    return path.is_file() or is_sharded(path)


def is_sharded(path: Path) -> bool:
    return (path / EXTRA).is_file()


def fresh_directory(path: Path) -> Path:
    """An empty place beside the checkpoint `path` for the shards of the next one; two take turns."""
    current = path.readlink().name if path.is_symlink() else None
    place = next(path.with_name(name) for name in (f".{path.name}.0", f".{path.name}.1") if name != current)
    shutil.rmtree(place, ignore_errors=True)
    return place


def publish(written: Path, path: Path) -> None:
    """Make `written`, a file or a directory beside it, the checkpoint `path`; the former one is removed after that."""
    former = path.parent / path.readlink() if path.is_symlink() else None
    if written.is_dir():
        link = written.with_name(f"{written.name}.link")
        link.unlink(missing_ok=True)
        link.symlink_to(written.name)
        written = link
    written.replace(path)
    if former is not None:
        shutil.rmtree(former, ignore_errors=True)


def save(checkpoint: dict[str, Any], path: Path) -> None:
    """One file, whole or not at all.

    Raises:
        OSError: it cannot be written, the disk is full say. What was written of it is gone then: it would hold the
            space that the run's last words need.
    """
    import torch

    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with partial.open("wb") as stream:
            torch.save(checkpoint, stream)
            stream.flush()
            os.fsync(stream.fileno())
    except BaseException as error:
        partial.unlink(missing_ok=True)
        # On its way out torch tells of positions in its file, not of the disk, and the stream fails to write what it
        # still holds.
        cause: BaseException | None = error
        while cause is not None:
            if isinstance(cause, OSError) and cause.errno:
                raise OSError(cause.errno, cause.strerror, str(path)) from error
            cause = cause.__context__
        raise
    publish(partial, path)


def weights(path: Path, device: str = "cpu") -> dict[str, torch.Tensor]:
    """The weights of a checkpoint of either kind, whole: {name: tensor}; on 'meta' their shapes."""
    import torch

    if is_sharded(path):
        return _read_shards(path, "state_dict", device)["state_dict"]  # type: ignore[no-any-return]
    return torch.load(path, map_location=device, weights_only=True)["state_dict"]  # type: ignore[no-any-return]


def step(path: Path) -> int:
    """Optimizer steps that were taken when it was saved."""
    import torch

    return int(torch.load(_beside_shards(path), map_location="cpu", weights_only=False)["global_step"])


def callback_states(path: Path) -> dict[str, Any]:
    """What each callback of the fit had to keep, by its `state_key`."""
    import torch

    held = torch.load(_beside_shards(path), map_location="cpu", mmap=True, weights_only=False)
    return held["callbacks"]  # type: ignore[no-any-return]


def _beside_shards(path: Path) -> Path:
    """The file of a checkpoint of either kind that holds all that is no weight and no optimizer's state."""
    return path / EXTRA if is_sharded(path) else path


def read(path: Path) -> dict[str, Any]:
    """All of a checkpoint of either kind, whole, as one device's training left it. It may run code: for own runs."""
    import torch

    if not is_sharded(path):
        return torch.load(path, map_location="cpu", weights_only=False)  # type: ignore[no-any-return]
    whole = torch.load(path / EXTRA, map_location="cpu", weights_only=False)
    parts = _read_shards(path)
    whole["state_dict"] = parts.pop("state_dict")
    # An optimizer goes by the order of its parameters; what they are called is of no matter to it.
    whole["optimizer_states"] = [parts[f"optimizer_{index}"] for index in range(len(parts))]
    return whole  # type: ignore[no-any-return]


def _read_shards(path: Path, only: str | None = None, device: str = "cpu") -> dict[str, Any]:
    """What the ranks wrote, each tensor put together; of all top-level entries, or that one alone."""
    import torch
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata
    from torch.distributed.checkpoint.state_dict_loader import load

    reader = FileSystemReader(path)
    described = reader.read_metadata()
    places = {key: place for key, place in (described.planner_data or {}).items() if only in (None, place[0])}
    flat: dict[str, Any] = {}
    for key in places:
        entry = described.state_dict_metadata[key]
        if isinstance(entry, TensorStorageMetadata):
            flat[key] = torch.empty(entry.size, dtype=entry.properties.dtype, device=device)
        else:
            flat[key] = None
    if device != "meta":
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # that is what no_dist asks for
            load(flat, storage_reader=reader, no_dist=True)
    nested: dict[Any, Any] = {}
    for key, place in places.items():
        _put(nested, place, flat[key])
    return nested


def _put(container: Any, place: tuple[str | int, ...], value: Any) -> None:
    """Set `container[place[0]][place[1]]... = value`; a whole number counts in a list, which grows as needed."""
    for key, following in zip(place, (*place[1:], None), strict=True):
        if isinstance(key, int):
            container.extend(None for _ in range(key + 1 - len(container)))
            there = container[key]
        else:
            there = container.get(key)
        if following is None:
            container[key] = value
        else:
            if there is None:
                there = container[key] = [] if isinstance(following, int) else {}
            container = there
