"""One rank of a distributed fit: reads what the run directory says, fits one stage, leaves last.ckpt and the figures.

Started by what `parallelism.command` says: `python -m pipeline.worker RUN_DIR STAGE resume|fresh`.
"""

from __future__ import annotations

from pipeline import interrupts

if __name__ == "__main__":
    interrupts.watch_parent()  # first: the imports below take a while

# isort: split

import contextlib
import os
import signal
import socket
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from types import FrameType

from pipeline.chain import Stage
from pipeline.composing import compose
from pipeline.errors import LeanfitError
from pipeline.fitting import Fitted, fit
from pipeline.heartbeat import Beats
from pipeline.launch import beat_file, error_file, figures_file
from pipeline.layers.logit_cache import LogitCache
from pipeline.layers.sync_norm import synchronise_batch_norms
from pipeline.recording import place, reading, records
from pipeline.report.console import console, mode
from pipeline.report.progress import Progress
from pipeline.schema import RunConfig
from pipeline.stage_input import prepared
from pipeline.tasks import lookup
from pipeline.walk import stages_of, teacher_tensors


def main(arguments: list[str]) -> None:
    """A rank: `RUN_DIR STAGE resume|fresh`. Everything it needs is in the run directory and the environment."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _stop)
    work(Path(arguments[0]), arguments[1], resume=arguments[2] == "resume")


def work(run_dir: Path, name: str, *, resume: bool) -> None:
    """This rank's part of the fit of stage `name`; rank 0 leaves the figures, the first that fails says why."""
    config = compose([f"recipe={run_dir / 'recipe.lock.yaml'}"])
    os.environ.update(config.parallelism.place(os.environ))
    line = stages_of(config)
    stage = next(stage for stage in line if stage.name == name)
    rank = int(os.environ["RANK"])
    beats = Beats(beat_file(run_dir, stage, rank))
    try:
        fitted = fit_stage(config, stage, line, run_dir, rank, beats, resume=resume)
    except BaseException as error:
        why = f"stopped by {signal.Signals(_stopped).name}" if _stopped else f"{type(error).__name__}: {error}"
        with contextlib.suppress(FileExistsError), error_file(run_dir, stage).open("x", encoding="utf-8") as file:
            file.write(f"rank {rank}: {why}")
        raise
    if rank == 0:
        fitted.write(figures_file(run_dir, stage))


_stopped = 0
"""The signal that stopped this rank."""


def _stop(number: int, frame: FrameType | None) -> None:
    global _stopped
    _stopped = number
    raise SystemExit(128 + number)


def fit_stage(
    config: RunConfig, stage: Stage, line: Sequence[Stage], run_dir: Path, rank: int, beats: Beats, *, resume: bool
) -> Fitted:
    """The stage's fit on this rank; rank 0 shows the progress."""
    tokenizer = config.model.tokenizer()
    data = config.data.open(tokenizer)
    if config.lock is not None and config.lock["data"] != data.fingerprint:
        raise LeanfitError(f"the data on {socket.gethostname()} is not that of node 0 (another fingerprint)")
    task = lookup.get(config.data.task)
    model, context = prepared(config, run_dir, data, tokenizer, line, stage)
    synchronise_batch_norms(model)
    if records(stage):
        context = reading(context, LogitCache(place(run_dir, stage)))
    steps = {stage.name: stage.fit.steps if stage.fit else 0}
    progress = Progress(steps, mode(console(), sweep=config.sweep or rank > 0), task.unit)
    with progress:
        return fit(
            config, stage, model, task, data, context.architecture, run_dir,
            callbacks=[beats, *(stage.method.callbacks(context) if stage.method else [])],
            progress=progress,
            loss=stage.method.loss(context) if stage.method else None,
            resume=resume,
            beside=partial(teacher_tensors, context.teacher),
        )  # fmt: skip


if __name__ == "__main__":
    main(sys.argv[1:])
