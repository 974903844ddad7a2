"""What cuBLAS holds on an NVIDIA GPU beside the tensors: a workspace for each thread that multiplies matrices.

torch gives each of its handles one (ATen/cuda/CublasHandlePool.cpp), takes it from the same pool as tensors, and keeps
it. A handle belongs to a thread, and autograd runs the backward pass in a thread of its own: a fit holds two, an
evaluation one. A product with a bias is cuBLASLt's, which has a workspace of its own. On one H200 (torch 2.11) that is
all by which 60 runs differed from the sum of their tensors, but for a few: benchmarks/README.md.
"""

from __future__ import annotations

import os
import re

from pipeline.device.cuda import capability
from pipeline.schema import RunConfig

WORKSPACES = "kernels' workspaces"
"""Their kind in a plan."""
LARGE = 4096 * 8 * 1024
"""Bytes, of compute capability 9.0 and later."""
SMALL = 4096 * 2 * 1024 + 16 * 8 * 1024
"""Bytes, of those before."""
WITH_BIAS = (1024 * 1024, 64 * 1024)
"""Blocks more of a thread whose products have a bias: cuBLASLt's own workspace (`CUBLASLT_WORKSPACE_SIZE` is not set),
and what was measured beside it on an H200. Both are of the pool of small blocks."""
PRODUCTS = frozenset({"aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm"})
BIASED = "aten::addmm"


def workspace(config: RunConfig) -> int:
    """Bytes of one workspace on the device of `config`; 0 where it has none. A GPU that is not here is taken for a
    recent one, which takes more."""
    if config.device.kind() != "cuda":
        return 0
    if said := os.environ.get("CUBLAS_WORKSPACE_CONFIG"):
        return sum(int(size) * int(count) * 1024 for size, count in re.findall(r":(\d+):(\d+)", said))
    major, _ = capability()
    return SMALL if 0 < major < 9 else LARGE
