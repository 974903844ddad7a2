"""manifest.json: what an artifact is, how it was made, and what its files must be. Imports no torch.

It is written last and read first. Reading checks the schema, and that every file has the size and sha256 written here.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pipeline.errors import ArtifactError

SCHEMA = 1
NAME = "manifest.json"
TENSORS = "model.safetensors"
INDEX = "model.safetensors.index.json"
SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
PROBE = "probe.safetensors"
REQUIRED = ("config.json", PROBE)
_TYPES: dict[str, type] = {
    "model": dict, "format": str, "chain": list, "layers": dict, "encodings": dict, "tied": dict, "files": list
}  # fmt: skip


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def weight_files(names: Iterable[str]) -> list[str]:
    """Which of the file `names` of an artifact hold its weights: one file, or the shards of an index."""
    names = set(names)
    return [TENSORS] if TENSORS in names else sorted(filter(SHARD.fullmatch, names)) if INDEX in names else []


def describe_files(directory: Path) -> list[dict[str, Any]]:
    """Name, bytes and sha256 of every file in `directory` but the manifest."""
    paths = sorted(path for path in directory.iterdir() if path.is_file() and path.name != NAME)
    return [{"name": path.name, "bytes": path.stat().st_size, "sha256": sha256(path)} for path in paths]


def digest(manifest: dict[str, Any]) -> str:
    """sha256 of what a manifest says, its own `digest` left out."""
    said = {key: value for key, value in manifest.items() if key != "digest"}
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def write(directory: Path, manifest: dict[str, Any]) -> None:
    """Write whole or not at all."""
    partial = directory / f".{NAME}.{os.getpid()}"
    made = {**manifest, "digest": digest(manifest)}
    partial.write_text(json.dumps(made, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    partial.replace(directory / NAME)


def read(directory: Path) -> dict[str, Any]:
    """The manifest of `directory`, its schema and types checked, its files not yet.

    Raises:
        ArtifactError: there is none, it is no JSON object of the expected form, or its schema is newer.
    """
    path = directory / NAME
    if not path.is_file():
        what = "no such directory" if not directory.is_dir() else f"not an artifact, {NAME} is missing"
        raise ArtifactError(f"{directory}: {what}")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{path}: truncated or altered, it is not JSON ({str(error)[:80]})") from None
    schema = manifest.get("schema") if isinstance(manifest, dict) else None
    if not isinstance(schema, int) or isinstance(schema, bool) or schema < 1:
        raise ArtifactError(f"{path}: altered, schema={schema!r} is not a positive integer")
    if schema > SCHEMA:
        raise ArtifactError(
            f"{path}: schema {schema} is newer than this program's ({SCHEMA}); update leanfit to open it"
        )
    for key, kind in _TYPES.items():
        if not isinstance(manifest.get(key), kind):
            raise ArtifactError(f"{path}: altered, '{key}' is missing or not a JSON {kind.__name__}")
    return dict(manifest)


def check_files(directory: Path, manifest: dict[str, Any], contents: bool = True) -> None:
    """Every listed file is there with its size and (`contents`) sha256, and the required ones are listed.

    Raises:
        ArtifactError: naming the first file that is missing, truncated or altered.
    """
    listed = {}
    for entry in manifest["files"]:
        name = entry.get("name") if isinstance(entry, dict) else None
        if not isinstance(name, str) or not name or name != os.path.basename(name) or name in (".", ".."):
            raise ArtifactError(f"{directory / NAME}: altered, {name!r} is not the name of a file beside it")
        listed[name] = entry
    for name in REQUIRED:
        if name not in listed:
            raise ArtifactError(f"{directory / NAME}: altered, {name} is not among its files")
    weights = weight_files(listed)
    if not weights or (weights != [TENSORS] and len(weights) != int(weights[0][-17:-12])):
        raise ArtifactError(f"{directory / NAME}: altered, {TENSORS} or one of its shards is not among its files")
    for name, entry in listed.items():
        path = directory / name
        if not path.is_file():
            raise ArtifactError(f"{path}: missing")
        size = path.stat().st_size
        if size != entry.get("bytes"):
            state = "truncated" if isinstance(entry.get("bytes"), int) and size < entry["bytes"] else "altered"
            raise ArtifactError(f"{path}: {state}, {size} bytes where the manifest says {entry.get('bytes')}")
        if contents and sha256(path) != entry.get("sha256"):
            raise ArtifactError(f"{path}: altered, its sha256 is not the manifest's")
