"""Starts the ranks of a fit as workers of Ray Train, waits for them, and says which failed.

`python -m pipeline.ray_driver RUN_DIR STAGE resume|fresh`, a process of its own, as torchrun is: Ray's processes end
with it, however it ends. Ranks run what every rank runs, `pipeline.worker.work`.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

from pipeline import environment, interrupts
from pipeline.composing import compose
from pipeline.device.system_memory import oom_kills, suspicion
from pipeline.errors import LeanfitError
from pipeline.heartbeat import children, state
from pipeline.launch import error_file
from pipeline.parallelism.ray import SHOWN, SOCKETS, STORAGE, OnRay, prefix
from pipeline.preemption import stop_file
from pipeline.walk import stages_of

SETTINGS = {
    "RAY_USAGE_STATS_ENABLED": "0",  # it would tell Ray's makers of the run
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # a preempted run is resumed by its user, not begun again by Ray
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "600",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}
"""Environment variables of Ray; a user's own are left alone."""
STORE = 80 * 2**20
"""Bytes of Ray's shared memory, about the least it takes: ranks talk to each other, not through it."""
PATIENCE = 15.0
"""Seconds for a cluster to be put away."""
SERVICES = ("gcs_server", "raylet")
"""Processes of a cluster of ours without which ranks cannot go on."""


class Lost(LeanfitError):
    """A process that is gone; what ranks say of it, that a connection was lost, explains nothing."""


def main(arguments: list[str]) -> None:
    """Exits with 1 where the fit failed; why is in the stage's error file."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    os.setpgid(0, 0)  # a terminal's Ctrl-C is for the program, which tells this process; Ray's own would end at once
    threading.Thread(target=end_with, args=[os.getppid()], daemon=True).start()
    run_dir, name = Path(arguments[0]).absolute(), arguments[1]
    config = compose([f"recipe={run_dir / 'recipe.lock.yaml'}"])
    parallelism, cuda = config.parallelism, config.device.kind() == "cuda"
    assert isinstance(parallelism, OnRay)
    stage = next(stage for stage in stages_of(config) if stage.name == name)
    shown = run_dir / f"{SHOWN}{stage.directory}"
    told = {
        "run_dir": str(run_dir), "stage": name, "resume": arguments[2] == "resume", "devices": parallelism.devices,
        "directory": os.getcwd(), "shown": str(shown), "terminal": sys.stdout.isatty(),
    }  # fmt: skip
    told_by_rank, stop = error_file(run_dir, stage), stop_file(run_dir, stage)
    stop.unlink(missing_ok=True)
    try:
        with cluster(parallelism, told_by_rank, cuda=cuda), copied(shown):
            signal.signal(signal.SIGTERM, partial(ask, stop))  # Ray has put in one of its own
            train(told, parallelism, run_dir / STORAGE, cuda=cuda)
    except Exception as error:  # or whatever keeps a cluster from working
        traceback.print_exc()
        if isinstance(error, Lost) or not told_by_rank.exists():
            told_by_rank.write_text(said(error), encoding="utf-8")
        sys.exit(1)
    finally:
        for leftover in (shown, stop):
            leftover.unlink(missing_ok=True)
        shutil.rmtree(run_dir / STORAGE, ignore_errors=True)


def ask(stop: Path, number: int, frame: FrameType | None) -> None:
    """At the first signal let ranks end their step and save it; at the next one end."""
    if stop.exists():
        sys.exit(128 + number)
    stop.touch()


def end_with(parent: int) -> None:
    """End this process in order, so that its cluster is put away, when the program that started it is gone."""
    while os.getppid() == parent:
        time.sleep(1)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(PATIENCE)
    os._exit(1)


@contextlib.contextmanager
def cluster(parallelism: OnRay, failure: Path, *, cuda: bool) -> Iterator[None]:
    """Connected to the cluster of `address`, or to one of this machine that lasts as long as the context. Where that
    one does not, the file `failure` says so."""
    os.environ.update({name: value for name, value in SETTINGS.items() if name not in os.environ})
    if parallelism.address is None:
        # A token of this run's own, so that nobody else on the network gives orders to the cluster. Left to itself Ray
        # would write one into the home directory. It looks when it is imported.
        os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(32))
    import ray

    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    over, name = threading.Event(), prefix(os.getpid())
    with tempfile.TemporaryDirectory(prefix=name, dir=SOCKETS, ignore_cleanup_errors=True) as directory:
        if parallelism.address is None:
            ranks = parallelism.ranks
            ray.init(
                address="local",
                num_cpus=ranks,
                num_gpus=ranks if cuda else 0,
                include_dashboard=False,
                object_store_memory=STORE,
                _temp_dir=directory,
                **quiet,
            )
            threading.Thread(target=end_without_services, args=[failure, over], daemon=True).start()
        else:
            reach(parallelism.address)
            names = ("PYTHONPATH", "OMP_NUM_THREADS", interrupts.PARENT, *environment.DEFAULTS)
            variables = {name: os.environ[name] for name in names if name in os.environ}
            try:
                ray.init(address=parallelism.address, runtime_env={"env_vars": variables}, **quiet)
            except ConnectionError as error:
                token = "; where it asks for a token, set RAY_AUTH_MODE=token"
                raise LeanfitError(f"no Ray cluster at parallelism.address={parallelism.address}{token}") from error
        try:
            require_room(ray.nodes(), parallelism, cuda=cuda)  # type: ignore[no-untyped-call]
            yield
        finally:
            over.set()
            ray.shutdown()


def end_without_services(failure: Path, over: threading.Event) -> None:
    """End this process, its ranks and all else of its cluster where one of `SERVICES` is gone before that is `over`.

    Ray notices some a minute later, and then ranks say no more than that a connection was lost.
    """
    began = {process: command(process) for process in children(os.getpid())}
    services = {process: name for process, name in began.items() if name in SERVICES}
    cluster: list[int] = []
    while not (gone := [name for process, name in services.items() if state(process) in ("", "Z")]):
        cluster = descendants(os.getpid())  # once a raylet is gone, its workers are nobody's
        if over.wait(0.5):
            return
    if over.is_set():
        return
    for process in cluster:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
    failure.write_text(f"Ray's {gone[0]} was killed or crashed", encoding="utf-8")
    os._exit(1)  # files are removed as those of a driver that was killed


def command(process: int) -> str:
    """The name of the program that a process runs; none where the system does not tell."""
    try:
        told = Path(f"/proc/{process}/cmdline").read_bytes()
    except OSError:
        return ""
    return Path(os.fsdecode(told.partition(b"\0")[0])).name


def descendants(process: int) -> list[int]:
    """Processes that this one has started, and that those have."""
    return [each for child in children(process) for each in (child, *descendants(child))]


def reach(address: str) -> None:
    """Raises LeanfitError where nothing answers at HOST:PORT: Ray itself would try for minutes."""
    if address == "auto":
        return
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
    except (OSError, OverflowError) as error:
        raise LeanfitError(f"no Ray cluster at parallelism.address={address}: {error}") from error


def require_room(nodes: list[dict[str, Any]], parallelism: OnRay, *, cuda: bool) -> None:
    """Raises LeanfitError where the cluster can never hold the ranks, which Ray would wait for."""
    kind = "GPU" if cuda else "CPU"
    rooms = sorted((int(node["Resources"].get(kind, 0)) for node in nodes if node["Alive"]), reverse=True)
    if sum(room >= parallelism.devices for room in rooms) < parallelism.nodes:
        has = ", ".join(str(room) for room in rooms)
        raise LeanfitError(
            f"{parallelism.nodes} x {parallelism.devices} ranks need as many nodes with so many {kind}s; "
            f"those of the cluster have {has}: choose parallelism.nodes and parallelism.devices by that"
        )


def train(told: Mapping[str, Any], parallelism: OnRay, storage: Path, *, cuda: bool) -> None:
    """Run the ranks to their end. Raises LeanfitError where one fails."""
    from ray.exceptions import RayActorError
    from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError, WorkerGroupError
    from ray.train.torch import TorchConfig, TorchTrainer

    trainer = TorchTrainer(
        rank,
        train_loop_config=dict(told),
        torch_config=TorchConfig(backend="nccl" if cuda else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=parallelism.ranks,
            use_gpu=cuda,
            placement_strategy="STRICT_PACK" if parallelism.nodes == 1 else "PACK",
        ),
        run_config=RunConfig(
            name="fit",
            storage_path=str(storage),
            failure_config=FailureConfig(max_failures=0, controller_failure_limit=0),  # type: ignore[call-arg]
        ),
    )
    # Another machine's count is not at hand.
    before = oom_kills() if parallelism.address is None else None
    try:
        trainer.fit()
    except WorkerGroupError as error:
        raise failure(error.worker_failures, suspicion(before)) from error
    except RayActorError as error:
        raise Lost(f"Ray's controller of the ranks was killed or crashed{suspicion(before)}") from error
    except TrainingFailedError as error:
        raise LeanfitError(said(error)) from error


def rank(told: Mapping[str, Any]) -> None:
    """One rank, in a worker process of Ray, which has set torchrun's variables and the process group up."""
    run_dir, here = Path(told["run_dir"]), socket.gethostname()
    if not (run_dir / "recipe.lock.yaml").is_file():
        raise LeanfitError(f"{run_dir} is not on {here}; use hydra.run.dir=DIR with one that all nodes share")
    count = int(os.environ["LOCAL_WORLD_SIZE"])
    if count != told["devices"]:
        world = int(os.environ["WORLD_SIZE"])
        raise LeanfitError(
            f"Ray placed {count} ranks on {here}, not {told['devices']}; "
            f"use parallelism.devices={count} parallelism.nodes={max(1, world // count)}"
        )
    from pipeline.worker import work

    os.chdir(told["directory"] if Path(told["directory"]).is_dir() else run_dir)
    with (run_dir / "run.log").open("ab") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    if os.environ["RANK"] == "0":
        stream = Path(told["shown"]).open("a", encoding="utf-8", buffering=1)  # noqa: SIM115
        stream.isatty = lambda: told["terminal"]  # type: ignore[method-assign]
        sys.stdout = stream
    try:
        work(run_dir, told["stage"], resume=told["resume"])
    except BaseException:
        traceback.print_exc()
        raise
    finally:
        sys.stdout.flush()


def failure(failures: Mapping[int, BaseException], suspicion: str) -> LeanfitError:
    """Which rank failed, and how, of those that Ray saw fail at once; `suspicion` of what ended one is added."""
    from ray.exceptions import RayActorError

    lost = {
        number: cause
        for number, error in failures.items()
        if isinstance(cause := getattr(error, "health_check_failure", error), RayActorError)
    }
    if lost:
        number = min(lost)
        if "low on memory" in str(lost[number]):  # Ray's own monitor, which kills before Linux does
            suspicion = " (out of memory)"
        return Lost(f"rank {number} was killed or crashed{suspicion}")
    number = min(failures)
    return LeanfitError(f"rank {number}: {said(failures[number])}")


def said(error: BaseException) -> str:
    """An error in one line."""
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return text if isinstance(error, LeanfitError) else f"{type(error).__name__}: {text}"


@contextlib.contextmanager
def copied(path: Path) -> Iterator[None]:
    """Copies what rank 0, which may be on another machine, writes to `path` to standard output."""
    path.write_bytes(b"")
    done = threading.Event()

    def copy() -> None:
        with path.open("rb") as source:
            last = False
            while not last:
                last = done.wait(0.1)
                sys.stdout.buffer.write(source.read())
                sys.stdout.buffer.flush()

    thread = threading.Thread(target=copy, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


if __name__ == "__main__":
    from pipeline import ray_driver  # Ray hands functions on by the name of their module, which here is __main__

    ray_driver.main(sys.argv[1:])
