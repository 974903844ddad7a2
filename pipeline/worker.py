"""One rank of a distributed fit, and how ranks are started: torchrun on this module, with the run's frozen config.

The command line is never replayed in the ranks (under `-m` that would rerun the sweep in each of them): a rank reads what
the run directory says, fits one stage, and rank 0 leaves last.ckpt and the figures for the process that waits.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from pipeline.chain import Stage, stages
from pipeline.errors import LeanfitError
from pipeline.fitting import Fitted
from pipeline.schema import RunConfig


def launch(config: RunConfig, stage: Stage, run_dir: Path, *, resume: bool) -> Fitted:
    """Fit `stage` in `parallelism.devices` processes and wait. Raises LeanfitError when a rank fails."""
    figures = run_dir / f"fitted-{stage.directory}.json"
    figures.unlink(missing_ok=True)
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
        f"--nproc_per_node={config.parallelism.devices}",
        *("-m", "pipeline.worker", str(run_dir), stage.name, "resume" if resume else "fresh"),
    ]
    threads = max(1, (os.cpu_count() or 1) // config.parallelism.devices)
    environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads))}
    with (run_dir / "run.log").open("ab") as log:
        code = subprocess.run(command, env=environment, stdout=None, stderr=log, check=False).returncode
    if code or not figures.is_file():
        raise LeanfitError(f"stage '{stage.name}': a rank failed (exit {code}); see {run_dir / 'run.log'}")
    fitted = Fitted.read(figures)
    figures.unlink()
    return fitted


def main(arguments: list[str]) -> None:
    """A rank: `RUN_DIR STAGE resume|fresh`. Everything it needs is in the run directory."""
    from pipeline.app import compose
    from pipeline.fitting import fit
    from pipeline.tasks import lookup
    from pipeline.walk import prepared

    run_dir, name, how = Path(arguments[0]), arguments[1], arguments[2]
    config = compose([f"recipe={run_dir / 'recipe.lock.yaml'}"])
    line = stages(config.chain, config.trainer.max_steps if config.job == "run" else 0, config.optimizer.lr)
    stage = next(stage for stage in line if stage.name == name)
    data = config.data.open(config.model.tokenizer())
    model, context = prepared(config, run_dir, data, line, stage)
    fitted = fit(
        config, stage, model, lookup.get(config.data.task), data, context.architecture, run_dir,
        callbacks=stage.method.callbacks(context) if stage.method else [],
        loss=stage.method.loss(context) if stage.method else None,
        resume=how == "resume",
    )  # fmt: skip
    if int(os.environ["RANK"]) == 0:
        fitted.write(run_dir / f"fitted-{stage.directory}.json")


if __name__ == "__main__":
    main(sys.argv[1:])
