"""`data=pystdlib`: the source text of the running interpreter's standard library. Nothing to download."""

from __future__ import annotations

import os
import platform
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar

from annotated_types import Ge, Gt, Lt

from pipeline.data.base import Data, DataBundle
from pipeline.data.text import evaluation_problems, tokenizer_of
from pipeline.errors import ConfigError
from pipeline.models.base import TaskName
from pipeline.registry import register

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LEFT_OUT = frozenset({"site-packages", "dist-packages", "test", "tests", "idlelib", "encodings", "__pycache__"})
"""Folders that hold installed packages, tests (some on purpose not valid text), an application, or (`encodings`) a
hundred character tables that are near copies of each other, which would put the same lines on both sides of a split."""


@register("data", "pystdlib")
@dataclass(frozen=True, kw_only=True)
class PyStdlib(Data):
    """Split by file: `evaluation_fraction` of the files is held out, `evaluation_tokens` of their tokens evaluated."""

    task: ClassVar[TaskName] = "causal_lm"

    sequence_length: Annotated[int, Ge(2)]
    evaluation_fraction: Annotated[float, Gt(0), Lt(1)]
    evaluation_tokens: Annotated[int, Ge(1)]

    def problems(self) -> list[str]:
        return evaluation_problems(self.evaluation_tokens, self.sequence_length)

    def open(self, tokenizer: PreTrainedTokenizerBase | None) -> DataBundle:
        """Raises ConfigError where the interpreter comes without its sources, or they are too short to split."""
        from pipeline.data.tokens import read_files, token_bundle

        root = Path(sysconfig.get_paths()["stdlib"])
        files = read_files(root, stdlib_sources(root))
        if not files:
            raise ConfigError(f"data=pystdlib found no .py file in {root}; choose data=text and data.path=FOLDER")
        return token_bundle(
            files,
            tokenizer_of(tokenizer),
            split="file",
            evaluation_fraction=self.evaluation_fraction,
            evaluation_tokens=self.evaluation_tokens,
            sequence_length=self.sequence_length,
            what=f"Python {platform.python_version()} standard library",
        )


def stdlib_sources(root: Path) -> list[Path]:
    """The .py files below `root`, sorted, without what `LEFT_OUT` names."""
    found = []
    for folder, below, files in os.walk(root):
        below[:] = set(below) - LEFT_OUT  # not walked: installed packages are the most of it
        found += [Path(folder, name) for name in files if name.endswith(".py")]
    return sorted(found)
