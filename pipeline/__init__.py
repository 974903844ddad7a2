"""leanfit: a declarative pipeline that trains, compresses and deploys models within a memory budget.

`pipeline.load(directory)` opens an artifact. Nothing heavy is imported until it is used.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

__version__ = "0.1.0"


def load(directory: str | Path, device: str = "cpu", sparse_kernels: bool = True) -> nn.Module:
    """The model of an artifact directory, in eval mode, on `device`.

    `sparse_kernels`: 2:4 layers run by a GPU's kernels for them, where there are some; else as dense ones.

    Raises:
        ArtifactError: a file is missing, truncated, altered, or of a newer schema.
    """
    from pipeline.artifact.store import load as load_artifact

    return load_artifact(Path(directory), device=device, sparse_kernels=sparse_kernels)
