"""What a run depended on: versions of Python and of the packages that decide its numbers."""

from __future__ import annotations

import platform
from importlib.metadata import version

PACKAGES = ("leanfit", "torch", "lightning", "transformers", "torchao", "compressed-tensors", "safetensors", "numpy")


def versions() -> dict[str, str]:
    """Package -> version, and "python"; recorded in manifests and lock files."""
    return {"python": platform.python_version(), **{package: version(package) for package in PACKAGES}}
