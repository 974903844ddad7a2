"""One rank of a distributed fit: reads what the run directory says, fits one stage, leaves last.ckpt and the figures.

Started by `pipeline.launch`: `python -m torch.distributed.run ... -m pipeline.worker RUN_DIR STAGE resume|fresh`.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from pipeline.app import compose
from pipeline.chain import stages
from pipeline.fitting import fit
from pipeline.tasks import lookup
from pipeline.walk import prepared


def main(arguments: list[str]) -> None:
    """A rank: `RUN_DIR STAGE resume|fresh`. Everything it needs is in the run directory."""
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
