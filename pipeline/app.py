"""The program: command line in, exit code out.

1. `arguments.parse` makes the command line safe for Hydra. 2. `composing` makes it a config: a mistake ends here with
exit 2, all problems at once, before any directory is made or torch is imported.
3. Hydra makes the run directory and calls `task`, which hands the frozen config to the runner.

Exit codes: 0 done; 1 failed while running; 2 bad config; 3 a receipt, gate or verification not met; 130 Ctrl-C;
143 SIGTERM. A sweep runs every job, then exits 1 if any failed.
"""

from __future__ import annotations

from pipeline import interrupts  # noqa: F401 (first: the imports below take a while)

# isort: split

import fcntl
import gc
import json
import logging
import os
import re
import shutil
import signal
import sys
import threading
import traceback
from argparse import Namespace
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import hydra
import hydra._internal.hydra
from hydra.conf import HydraConf
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, read_write
from omegaconf.errors import OmegaConfBaseException

from pipeline import arguments, checkpoints, environment, provenance, recipes
from pipeline.composing import VERSION_BASE, check, checked, decoded, loader, placed
from pipeline.composing import compose as compose  # where it was until now
from pipeline.errors import ConfigError, LeanfitError
from pipeline.parallelism.launched import started_in_copies
from pipeline.registry import conf_root
from pipeline.schema import RunConfig

log = logging.getLogger(__name__)
ADVERTISERS = ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.rank_zero")
"""Loggers that Lightning's tips go to."""


class Outcome:
    """What happened in this process's jobs, for the exit code."""

    error: BaseException | None = None
    run_dir: Path | None = None
    status: str | None = None
    sweep_dir: Path | None = None
    failed: bool = False
    """Whether a job of a sweep failed: one that another run kept from its directory leaves no record there."""
    terminated: int | None = None
    """The signal that ended the run."""
    resumable: bool = False
    """Whether what runs is a job that `resume` can go on with, once it left something to go on from."""
    composed: provenance.Composition | None = None
    """What the command line says, where it is a single run."""


_outcome = Outcome()


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line (default: the process's own) and return the exit code. Never raises."""
    global _outcome
    _outcome = Outcome()
    environment.prepare()
    debug = "1" in (os.environ.get("HYDRA_FULL_ERROR"), os.environ.get("LEANFIT_DEBUG"))
    try:
        with _signals(_outcome):
            return _main(list(sys.argv[1:] if argv is None else argv))
    except BaseException as error:
        return _report(error, _outcome, debug)


def _main(argv: list[str]) -> int:
    if any(flag in argv for flag in ("--help", "-h")):
        from pipeline.usage import usage

        print(usage())
        return 0
    args = arguments.parse(argv)
    source = _loader(args)
    sweep = args.multirun or "hydra.mode=MULTIRUN" in args.overrides
    config = None
    if not (args.hydra_help or args.shell_completion or args.info or args.experimental_rerun):
        config = _check_all(args, source, sweep)
    if args.resolve and not args.cfg:
        raise ConfigError("--resolve goes with --cfg: write --cfg job --resolve (command line)")
    if config is not None and not args.cfg:
        _started_once(config)
        if config.parallelism.own_node > 0:
            return _follow(config)
    with _hydra_arguments(arguments.rebuilt(args)), _run_directory("hydra.sweep.dir" if sweep else "hydra.run.dir"):
        launch()
    if _outcome.error is not None:
        raise _outcome.error
    if sweep and _outcome.sweep_dir is not None:
        return 1 if _outcome.failed else sweep_exit_code(_outcome.sweep_dir)
    return {"failed": 1, "gate": 3}.get(_outcome.status or "", 0)


def _loader(args: Namespace) -> provenance.Loader:
    """A loader over the folders that the command line names. Makes `--config-path` absolute, for Hydra."""
    extra = Path(args.config_dir).absolute() if args.config_dir else None
    if extra is not None and not extra.is_dir():
        raise ConfigError(f"--config-dir {args.config_dir}: no such directory (command line)")
    conf = Path(args.config_path).absolute() if args.config_path else conf_root()
    if not conf.is_dir():
        raise ConfigError(f"--config-path {args.config_path}: no such directory (command line)")
    args.config_path = str(conf) if args.config_path else None
    for name, folder in zip(environment.FOLDERS, (args.config_path, extra), strict=True):
        os.environ[name] = str(folder or "")
    return loader(conf, extra)


def _started_once(config: RunConfig) -> None:
    """Raises ConfigError where each of several ranks would do the whole run."""
    copies = started_in_copies(os.environ)
    if copies > 1 and not config.parallelism.needs_followers:
        raise ConfigError(
            f"a launcher has started this program {copies} times, which starts its ranks itself; start it once, with "
            f"parallelism=ddp parallelism.devices={copies} and parallelism.launcher=torchrun, srun or mpirun"
        )


def _follow(config: RunConfig) -> int:
    """On another node than the first: serve its fits, and end as it does."""
    from pipeline.launch import follow
    from pipeline.nodes import joined
    from pipeline.walk import stages_of

    code, told = follow(config, stages_of(config), joined(config))
    if code:
        print(f"node 0: {told}", file=sys.stderr)
    return code


def _check_all(args: Namespace, source: provenance.Loader, sweep: bool) -> RunConfig | None:
    """The config of a single run. Raises where the command line cannot run: a config with problems, or a sweep none of
    whose jobs can."""
    name = args.config_name or "config"
    if not sweep:
        config, _outcome.composed = checked(args.overrides, source, sweep=False, quiet=True, config_name=name)
        return config
    found: dict[str, None] = {}
    for overrides in _jobs(args.overrides, source):
        try:
            check(overrides, source, sweep=True, config_name=name)
            return None
        except ConfigError as error:
            found.update(dict.fromkeys(error.problems))
    if found:
        raise ConfigError(list(found))
    return None


def _jobs(overrides: Sequence[str], source: provenance.Loader) -> Iterator[list[str]]:
    """The overrides of each job of a sweep. Nothing where a sweeper other than Hydra's own decides about them."""
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper

    if any(line.startswith(("hydra/sweeper", "hydra.sweeper")) for line in overrides):
        return
    parser = OverridesParser.create(config_loader=source)
    parsed, problems = [], []
    for line in overrides:
        try:
            override = parser.parse_override(line)
            override.config_loader = source
            if not override.is_hydra_override():
                parsed.append(override)
        except (HydraException, ValueError, TypeError) as error:
            problems.append(f"'{line}' cannot be understood: {' '.join(str(error).split())} (command line)")
    if problems:
        raise ConfigError(problems)
    try:
        batches = BasicSweeper.split_arguments(parsed, None)
    except HydraException as error:
        raise ConfigError(f"{' '.join(str(error).split())} (command line)") from None
    for batch in batches:
        yield from batch


class Sweeps(Callback):
    """Remembers where the sweep's jobs are, since the exit code follows from what they wrote."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        _outcome.sweep_dir = Path(str(config.hydra.sweep.dir)).absolute()


class OwnRecord(Callback):
    """Before Hydra writes its record of the run into `.hydra`: where another run is at work, that one's stays there."""

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        try:
            run_dir = Path(str(config.hydra.run.dir))
        except OmegaConfBaseException:  # a name that only Hydra's record of the run can say
            return
        if not run_dir.is_dir():
            return
        try:
            with _alone_in(run_dir):
                pass
        except ConfigError:  # as `task` is about to say
            with read_write(config.hydra):
                config.hydra.output_subdir = None


class SweepLoader(provenance.Loader):
    """In a sweep, a job that cannot be composed still gets its directory: `task` finds the problems again and records
    them as that job's failure, and the other jobs run."""

    def load_sweep_config(self, master_config: DictConfig, sweep_overrides: list[str]) -> DictConfig:
        try:
            return super().load_sweep_config(master_config, sweep_overrides)
        except Exception:
            config = super().load_sweep_config(master_config, [])
            config.hydra.overrides.task = list(sweep_overrides)
            return config


@hydra.main(version_base=VERSION_BASE, config_path=str(conf_root()), config_name="config")
def launch(_: DictConfig) -> None:
    """Hydra's task function: one job in its run directory."""
    task()


def task() -> None:
    """Run the job where no other one is at work, record how it ended."""
    environment.prepare()  # a launcher of other processes (joblib, submitit) comes in here
    job = HydraConfig.get()
    run_dir, sweep = Path(job.runtime.output_dir), job.mode == RunMode.MULTIRUN
    overrides = _as_composed(job.overrides.task)
    _outcome.run_dir = run_dir
    _without_adverts()
    failure: dict[str, Any] | None = None
    try:
        with _alone_in(run_dir):
            try:
                _outcome.status = _ran(job, run_dir, overrides, sweep)
            except Exception as error:
                if sweep:
                    _record_failure(run_dir, error, overrides)
                raise
    except Exception as error:
        log.error("failed", exc_info=error)
        _outcome.error = None if sweep else error
        if sweep:
            failure = _failure(error, overrides)
            _outcome.status, _outcome.failed = "failed", True
    if sweep:
        from pipeline.report.result import read_result
        from pipeline.report.table import job_line

        print(job_line(failure or read_result(run_dir / "result.json"), job.job.num), flush=True)


def _ran(job: HydraConf, run_dir: Path, overrides: Sequence[str], sweep: bool) -> str:
    """Check the job's config where it runs, copy its recipes, hand it to the runner: the status of its result."""
    if not any(line.startswith("resume=") for line in overrides):
        # What an earlier run left in this directory says nothing of this one, however it ends.
        (run_dir / "result.json").unlink(missing_ok=True)
    composed = None if sweep else _outcome.composed
    if composed is None:  # a sweep's job may be in a process of its own
        source = provenance.Loader(GlobalHydra.instance().config_loader().get_search_path())
        composed = provenance.compose(source, overrides, job.job.config_name or "config")
    config = decoded(composed, overrides, sweep, quiet=False)
    _started_once(config)  # submitit starts as many as hydra.launcher.tasks_per_node says
    _outcome.resumable = config.job in ("run", "compress") and not sweep
    _copy_recipes(composed.recipes, run_dir / (job.output_subdir or ".hydra"))
    with _no_garbage("pipeline.runner"):
        from pipeline.runner import run

    try:
        result = run(config, run_dir)
    except ConfigError as error:  # found only with the model's shapes at hand
        raise ConfigError([placed(told, composed) for told in error.problems]) from error
    return str(result.get("status", "ok"))


@contextmanager
def _alone_in(run_dir: Path) -> Iterator[None]:
    """Two runs in one directory would train from each other's checkpoints: the later one is refused. A file system that
    knows no locks keeps none from it."""
    held = os.open(run_dir, os.O_RDONLY)
    try:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            said = f"another run is at work in this directory, {run_dir}; let it end, or choose another hydra.run.dir"
            raise ConfigError(said) from None
        except OSError as error:
            log.info("nothing keeps another run out of this directory: %s", error)
        yield
    finally:
        os.close(held)


@contextmanager
def _no_garbage(module: str) -> Iterator[None]:
    """What the first import of `module` makes stays, all but nothing of it garbage: it is neither looked at meanwhile,
    an eighth of what imports take, nor whenever garbage is collected later."""
    first = module not in sys.modules and gc.isenabled()
    if first:
        gc.disable()
    try:
        yield
    finally:
        if first:
            gc.freeze()
            gc.enable()


def _without_adverts() -> None:
    """Lightning advertises its maker's services in the log of every run."""
    for name in ADVERTISERS:
        logger = logging.getLogger(name)
        if _no_advert not in logger.filters:
            logger.addFilter(_no_advert)


def _no_advert(record: logging.LogRecord) -> bool:
    return not re.search(r"\bTip: .*\blit(logger|models)\b", record.getMessage())


def _as_composed(lines: Any) -> list[str]:
    """Hydra keeps override lines in a config, where reading one would resolve the `${` of a prompt."""
    plain = OmegaConf.to_container(lines, resolve=False)
    assert isinstance(plain, list)
    return [str(line) for line in plain]


def _copy_recipes(files: Sequence[Path], directory: Path) -> None:
    """Every recipe file of the composition, beside Hydra's own record: files elsewhere may change."""
    for number, file in enumerate(files):
        directory.mkdir(parents=True, exist_ok=True)
        target = directory / f"recipe.{number}.{file.name}"
        if file.absolute() != target.absolute():
            shutil.copyfile(file, target)


def _record_failure(run_dir: Path, error: Exception, overrides: Sequence[str]) -> None:
    """The smallest result.json that says a job failed, unless the runner wrote one."""
    from pipeline.report.result import write_result

    target = run_dir / "result.json"
    if not target.exists():
        write_result(target, _failure(error, overrides))


def _failure(error: Exception, overrides: Sequence[str]) -> dict[str, Any]:
    from pipeline.report.result import new_result

    result = new_result("run", [arguments.typed(line) for line in overrides], {})
    result["error"] = {"type": type(error).__name__, "message": str(error)}
    return result


def sweep_exit_code(directory: Path) -> int:
    """1 if any job under a sweep's directory failed or left no result, else 3 if a gate was not met, else 0."""
    statuses = set()
    for record in directory.rglob("overrides.yaml"):
        result = record.parent.parent / "result.json"
        try:
            statuses.add(json.loads(result.read_text(encoding="utf-8"))["status"])
        except (OSError, ValueError, KeyError, TypeError):
            statuses.add("failed")
    return 1 if "failed" in statuses else 3 if "gate" in statuses else 0


@contextmanager
def _hydra_arguments(argv: list[str]) -> Iterator[None]:
    """Hydra reads sys.argv, prints its own tracebacks unless told not to, and builds its own loader: for one call each
    of these is ours."""
    internals: Any = hydra._internal.hydra
    before = (sys.argv, os.environ.get("HYDRA_FULL_ERROR"), internals.ConfigLoaderImpl)
    sys.argv = [sys.argv[0] if sys.argv else "leanfit", *argv]
    os.environ["HYDRA_FULL_ERROR"] = "1"
    internals.ConfigLoaderImpl = SweepLoader
    try:
        yield
    finally:
        sys.argv, full_error, internals.ConfigLoaderImpl = before
        if full_error is None:
            os.environ.pop("HYDRA_FULL_ERROR", None)
        else:
            os.environ["HYDRA_FULL_ERROR"] = full_error


@contextmanager
def _run_directory(key: str) -> Iterator[None]:
    """Hydra makes the run's directory and opens its log: what goes wrong there is a mistake in `key`."""
    try:
        yield
    except (OSError, ValueError) as error:
        cause = error if isinstance(error, OSError) else error.__cause__
        if _outcome.run_dir is not None or not isinstance(cause, OSError) or cause.filename is None:
            raise
        raise ConfigError(f"{key}: {cause.filename} cannot be made: {cause.strerror}; choose another place") from error


@contextmanager
def _signals(outcome: Outcome) -> Iterator[None]:
    """SIGTERM ends the run like Ctrl-C does, and which of the two it was is remembered: libraries exit with codes of
    their own on the way out."""

    def stop(number: int, frame: FrameType | None) -> None:
        outcome.terminated = number
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(128 + number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _report(error: BaseException, outcome: Outcome, debug: bool) -> int:
    """Say what happened on stderr and give the exit code."""
    if outcome.terminated is not None or isinstance(error, KeyboardInterrupt):
        number = outcome.terminated or signal.SIGINT
        where = f" (resume={outcome.run_dir})" if _can_resume(outcome) else ""
        print(f"stopped by {signal.Signals(number).name}{where}", file=sys.stderr)
        return 128 + number
    if isinstance(error, SystemExit):
        if type(error).__name__ == "SIGTERMException":
            return 143
        return error.code if isinstance(error.code, int) else 0 if error.code is None else 1
    if debug:
        traceback.print_exception(error)
    if isinstance(error, BrokenPipeError):
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (the interpreter flushes stdout once more at exit)
        return 1
    if isinstance(error, ConfigError):
        for told in error.problems:
            print(f"error: {' '.join(told.split())}", file=sys.stderr)
        return error.exit_code
    if isinstance(error, HydraException) and outcome.run_dir is None:
        print(f"error: {_one_line(error)}", file=sys.stderr)
        return 2
    place = f" (log: {recipes.label(outcome.run_dir / 'run.log')})" if outcome.run_dir else ""
    print(f"error: {_one_line(error)}{place}", file=sys.stderr)
    return error.exit_code if isinstance(error, LeanfitError) else 1


def _can_resume(outcome: Outcome) -> bool:
    """Whether the run left its lock and something to go on from."""
    directory = outcome.run_dir
    if directory is None or not outcome.resumable or not (directory / recipes.LOCK).is_file():
        return False
    return checkpoints.exists(directory / "checkpoints" / "last.ckpt") or any(directory.glob("stages/*/manifest.json"))


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    text = text if len(text) <= 600 else f"{text[:600]}..."
    return text if isinstance(error, LeanfitError) and text else f"{type(error).__name__}: {text}".rstrip(": ")
