"""The `calibration` group: which data, and how much of it, a calibrated method of compression looks at."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Annotated

from annotated_types import Ge, Lt

from pipeline.registry import register


@register("calibration", "settings")
@dataclass(frozen=True, kw_only=True)
class Calibration:
    """`source`: `train`, the training split, of which evaluation sees nothing; or a text file or a folder of them.

    `samples` are drawn without repetition by `seed`; `length` is theirs in tokens (null: data.sequence_length);
    `batch_size` is how many go through the model at once.
    """

    name: str
    source: str
    samples: Annotated[int, Ge(1)]
    length: Annotated[int, Ge(2)] | None
    seed: Annotated[int, Ge(0), Lt(2**32)]
    batch_size: Annotated[int, Ge(1)]

    def problems(self) -> list[str]:
        """A source that is not there. Imports no torch."""
        path = os.path.expanduser(self.source)
        if self.source == "train" or os.path.isfile(path) or os.path.isdir(path):
            return []
        return [f"calibration.source={self.source} is neither 'train' nor a text file or a folder of them"]
