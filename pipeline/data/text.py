"""`data=text`: your own text, one file or a folder of them, as bytes or through the model's tokenizer."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from annotated_types import Ge, Gt, Lt

from pipeline.data.base import Data, DataBundle
from pipeline.errors import ConfigError
from pipeline.models.base import TaskName
from pipeline.registry import register

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@register("data", "text")
@dataclass(frozen=True, kw_only=True)
class Text(Data):
    """`path`: a file, or a folder whose files match `glob` (hidden files and folders are left out).

    `split`: `file` holds out whole files by a hash of their names; `position` the end of the text. Byte-level models
    read any file; others need UTF-8.
    """

    task: ClassVar[TaskName] = "causal_lm"

    path: str
    glob: str
    sequence_length: Annotated[int, Ge(2)]
    split: Literal["file", "position"]
    evaluation_fraction: Annotated[float, Gt(0), Lt(1)]
    evaluation_tokens: Annotated[int, Ge(1)]

    def problems(self) -> list[str]:
        found = evaluation_problems(self.evaluation_tokens, self.sequence_length)
        path = Path(os.path.expanduser(self.path))
        if not self.path:
            found.append("data.path is empty; give a text file or a folder of them ('.' is the current one)")
        elif not os.path.exists(path):
            found.append(f"data.path={self.path} does not exist; give a text file or a folder of them")
        elif not path.is_file() and not path.is_dir():
            # A text is read more than once, which a pipe cannot be; a device may have no end.
            found.append(f"data.path={self.path} is a pipe or a device; give a text file or a folder of them")
        elif path.is_file() and self.split == "file":
            found.append(
                f"data.split=file holds out whole files, but data.path={self.path} is a single one; "
                "say data.split=position to hold out its end"
            )
        elif path.is_dir():
            try:
                empty = next(matching_files(path, self.glob), None) is None
            except (ValueError, NotImplementedError) as error:
                found.append(f"data.glob={self.glob} is no pattern for files below data.path: {error}")
            else:
                if empty:
                    found.append(f"data.path={self.path} holds no file that matches data.glob={self.glob}")
        return found

    def open(self, tokenizer: PreTrainedTokenizerBase | None) -> DataBundle:
        """Raises ConfigError where the text cannot be read, decoded, or is too short to split."""
        if found := self.problems():
            raise ConfigError(found)

        from pipeline.data.tokens import read_files, token_bundle

        path = Path(os.path.expanduser(self.path))
        paths = [path] if path.is_file() else list(matching_files(path, self.glob))
        files = read_files(path.parent if path.is_file() else path, paths)
        if not files:
            raise ConfigError(f"data.path={self.path} holds no text: every file is empty")
        return token_bundle(
            files,
            tokenizer_of(tokenizer),
            split=self.split,
            evaluation_fraction=self.evaluation_fraction,
            evaluation_tokens=self.evaluation_tokens,
            sequence_length=self.sequence_length,
            what=f"text {self.path}",
        )


def matching_files(folder: Path, pattern: str) -> Iterator[Path]:
    """Files below `folder` that match, none of whose parts starts with a dot."""
    for path in folder.glob(pattern):
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts):
            yield path


def evaluation_problems(evaluation_tokens: int, sequence_length: int) -> list[str]:
    """A message where the evaluation could not hold one window."""
    if evaluation_tokens >= sequence_length:
        return []
    return [
        f"data.evaluation_tokens={evaluation_tokens} is fewer than data.sequence_length={sequence_length}; "
        f"give at least {sequence_length}"
    ]


def tokenizer_of(tokenizer: PreTrainedTokenizerBase | None) -> PreTrainedTokenizerBase:
    """The model's tokenizer; bytes for a model that has none."""
    if tokenizer is not None:
        return tokenizer
    from pipeline.models.byte_tokenizer import byte_tokenizer

    return byte_tokenizer()
