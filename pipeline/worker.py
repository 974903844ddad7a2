"""One rank of a distributed fit: reads what the run directory says, fits one stage, leaves last.ckpt and the figures.

Started by `pipeline.launch`: `python -m torch.distributed.run ... -m pipeline.worker RUN_DIR STAGE resume|fresh`.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from pipeline.app import compose
from pipeline.chain import Stage
from pipeline.fitting import Fitted, fit
from pipeline.heartbeat import Beats
from pipeline.launch import beat_file, error_file, figures_file, watch_parent
from pipeline.layers.logit_cache import LogitCache
from pipeline.layers.sync_norm import synchronise_batch_norms
from pipeline.recording import place, reading, records
from pipeline.report.console import console, mode
from pipeline.report.progress import Progress
from pipeline.schema import RunConfig
from pipeline.stage_input import prepared
from pipeline.tasks import lookup
from pipeline.walk import stages_of


def main(arguments: list[str]) -> None:
    """A rank: `RUN_DIR STAGE resume|fresh`. Everything it needs is in the run directory."""
    watch_parent()
    run_dir, name, how = Path(arguments[0]), arguments[1], arguments[2]
    config = compose([f"recipe={run_dir / 'recipe.lock.yaml'}"])
    line = stages_of(config)
    stage = next(stage for stage in line if stage.name == name)
    rank = int(os.environ["RANK"])
    try:
        fitted = fit_stage(config, stage, line, run_dir, rank, resume=how == "resume")
    except BaseException as error:
        with contextlib.suppress(FileExistsError), error_file(run_dir, stage).open("x", encoding="utf-8") as file:
            file.write(f"rank {rank}: {type(error).__name__}: {error}")
        raise
    if rank == 0:
        fitted.write(figures_file(run_dir, stage))


def fit_stage(
    config: RunConfig, stage: Stage, line: Sequence[Stage], run_dir: Path, rank: int, *, resume: bool
) -> Fitted:
    """The stage's fit on this rank; rank 0 shows the progress."""
    tokenizer = config.model.tokenizer()
    data = config.data.open(tokenizer)
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
            callbacks=[
                Beats(beat_file(run_dir, stage, rank)), *(stage.method.callbacks(context) if stage.method else [])
            ],
            progress=progress,
            loss=stage.method.loss(context) if stage.method else None,
            resume=resume,
        )  # fmt: skip


if __name__ == "__main__":
    main(sys.argv[1:])
