"""What a run depended on: versions of Python and of the packages that decide its numbers."""

from __future__ import annotations

import functools
import platform
from importlib.metadata import version

from pipeline import __version__

PACKAGES = ("torch", "lightning", "transformers", "compressed-tensors", "safetensors", "numpy")


def versions() -> dict[str, str]:
    """Package -> version, and "python"; recorded in manifests and lock files."""
    own = {"python": platform.python_version(), "leanfit": __version__}
    return own | {package: _installed(package) for package in PACKAGES}


@functools.cache  # a plan asks once for each phase, and what is imported stays
def _installed(package: str) -> str:
    return version(package)
