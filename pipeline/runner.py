"""Runs one job of a decoded config in a run directory, and leaves result.json and the report whatever happens."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline import recipes
from pipeline.artifact import receipt, store
from pipeline.data.base import DataBundle
from pipeline.errors import ConfigError, LeanfitError, ReceiptError
from pipeline.memory.measure import measure_peak
from pipeline.report.markdown import write_report
from pipeline.report.progress import Progress
from pipeline.report.result import new_result, write_result
from pipeline.report.table import closing_lines, closing_table
from pipeline.schema import RunConfig, data_of
from pipeline.tasks.lookup import get_task
from pipeline.versions import versions
from pipeline.walk import Run, evaluate, walk


def run(config: RunConfig, run_dir: Path) -> dict[str, Any]:
    """Do `config.job` in `run_dir` and return what result.json says.

    Raises:
        ConfigError: found only with the model's shapes at hand (a group size that does not divide).
        ReceiptError: the receipt, a gate or `job=verify` was not met.
    """
    result = new_result(config.job, list(config.overrides), dict(config.choices))
    progress = Progress(sweep=config.sweep)
    jobs: dict[str, Callable[[RunConfig, Path, dict[str, Any], Progress], None]] = {
        "run": train_and_compress,
        "compress": train_and_compress,
        "evaluate": evaluate_artifact,
        "verify": verify_artifact,
        "generate": generate_text,
    }
    try:
        with progress:
            jobs[config.job](config, run_dir, result, progress)
        result["status"] = "ok"
    except ReceiptError as error:
        result["status"] = "gate"
        result["error"] = {"type": type(error).__name__, "message": str(error)}
        raise
    except BaseException as error:
        result["error"] = {"type": type(error).__name__, "message": str(error) or type(error).__name__}
        raise
    finally:
        if not (isinstance(result["error"], dict) and result["error"]["type"] == ConfigError.__name__ and config.resume):
            write_result(run_dir / "result.json", result)
        if config.job in ("run", "compress") and result["status"] != "failed":
            write_lock(config, run_dir, result)
            write_report(run_dir, result)
            if not config.sweep:
                progress.console.print(closing_table(result))
                for line in closing_lines(result, run_dir):
                    progress.console.print(line, soft_wrap=True, highlight=False)
    return result
