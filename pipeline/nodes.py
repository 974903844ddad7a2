"""Several machines under torchrun: `run.py` is started on each; that of node 0 leads, the others start ranks when told.

They talk over a TCPStore that node 0 hosts at `parallelism.rendezvous`. Node 0 alone does all that is not a fit. It
first waits for the others and compares what they were asked for with what it was. A node whose process is gone is
noticed by its silence; if node 0 is gone, its store is.
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import socket
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from torch.distributed import TCPStore  # type: ignore[attr-defined]

from pipeline.errors import ConfigError, LeanfitError
from pipeline.parallelism.base import Meeting, Parallelism
from pipeline.parallelism.launched import Launched
from pipeline.schema import RunConfig, values_of
from pipeline.versions import versions

JOIN = 600.0
"""Seconds in which all nodes must have been started."""
SILENCE = 60.0
"""Seconds without a word of a node, which speaks twice a second, after which it is taken to be gone."""
LAST_WORDS = 10.0
"""Seconds without a word where ranks have failed already, and in which a node may say why."""
LOOK = 10.0
"""Seconds in which a node must see the run directory: a network's file system may need some."""
BYE = 5.0
"""Seconds in which the others are to have read how the run ended."""
OWN = ("parallelism.node_rank", "parallelism.rendezvous")
"""What may differ from node to node."""


@dataclass(frozen=True)
class Call:
    """What node 0 tells the others to take part in: the fit of a stage."""

    stage: str
    resume: bool
    host: str
    port: int


class Board:
    """Messages by key, as JSON, that all nodes see. Nothing here waits."""

    def __init__(self, store: TCPStore, where: str) -> None:
        self.store, self.where = store, where

    def put(self, key: str, value: Any) -> None:
        """Raises LeanfitError where node 0 is gone."""
        with self._told():
            self.store.set(key, json.dumps(value))

    def get(self, key: str) -> Any:
        """What was put, or None. Raises LeanfitError where node 0 is gone."""
        with self._told():
            return json.loads(self.store.get(key)) if self.store.check([key]) else None

    def claim(self, key: str) -> bool:
        """Whether this is the first call for `key`."""
        with self._told():
            return bool(self.store.add(key, 1) == 1)

    @contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:  # torch's DistNetworkError and DistStoreError
            raise LeanfitError(f"node 0 ({self.where}) is gone without a word") from error


class Leader:
    """Node 0's side. `board` is None where there are no other nodes."""

    def __init__(self, board: Board, parallelism: Parallelism, directory: Path) -> None:
        self.board, self.parallelism, self.directory = board, parallelism, directory
        self.others = range(1, parallelism.nodes)
        self.fits = 0
        self.names = {node: f"node {node}" for node in self.others}
        self._words: dict[int, tuple[int, float]] = {}

    def gather(self, config: RunConfig) -> None:
        """Wait for the other nodes.

        Raises:
            ConfigError: one was asked for something else, or does not see the run directory.
            LeanfitError: one did not come.
        """
        joined = self._all("joined", JOIN)
        missing = [node for node in self.others if node not in joined]
        if missing:
            raise LeanfitError(
                f"parallelism.nodes={self.parallelism.nodes}: node {', '.join(map(str, missing))} did not come to "
                f"{self.board.where} in {JOIN:.0f} s; start the same command there"
            )
        self.names = {node: f"node {node} ({said['host']})" for node, said in joined.items()}
        own = asked(config)
        if problems := [told for node in self.others for told in differences(self.names[node], own, joined[node])]:
            raise ConfigError(problems)
        token, file = secrets.token_hex(8), self.directory / ".nodes"
        file.write_text(token, encoding="utf-8")
        self.board.put("place", {"directory": str(self.directory), "token": token})
        sees = self._all("sees", JOIN)
        file.unlink(missing_ok=True)
        blind = [self.names[node] for node in self.others if not sees.get(node)]
        if blind:
            raise ConfigError(
                f"parallelism.nodes={self.parallelism.nodes}: {' and '.join(blind)} cannot see {self.directory}, where "
                "node 0 works; give a place that all nodes share: hydra.run.dir=DIR"
            )

    def _all(self, key: str, seconds: float) -> dict[int, Any]:
        """What each other node says by `key`, waiting for it."""
        said: dict[int, Any] = {}
        deadline = time.monotonic() + seconds
        while len(said) < len(self.others) and time.monotonic() < deadline:
            said = {node: value for node in self.others if (value := self.board.get(f"{key}/{node}")) is not None}
            time.sleep(0.1)
        return said

    def begin(self, stage: str, resume: bool, meeting: Meeting) -> None:
        """Have the other nodes start their ranks."""
        self._words = {}
        self.fits += 1
        self.board.put(f"fit/{self.fits}", asdict(Call(stage, resume, meeting.host, meeting.port)))

    def beats(self) -> list[bytes | None]:
        """What the ranks of the other nodes wrote last, in order."""
        found: list[bytes | None] = []
        for node in self.others:
            said = self.board.get(f"beats/{self.fits}/{node}") or [None] * self.parallelism.devices
            found += [None if beat is None else bytes.fromhex(beat) for beat in said]
        return found

    def trouble(self, silence: float = SILENCE) -> str | None:
        """Why another node's part of the fit has failed, or that nothing is heard of it any more."""
        now = time.monotonic()
        for node in self.others:
            ended = self.board.get(f"ended/{self.fits}/{node}")
            if ended is not None and ended["why"]:
                return f"{self.names[node]}: {ended['why']}"
            word = self.board.get(f"word/{node}") or 0
            if word != self._words.get(node, (None, 0.0))[0]:
                self._words[node] = word, now
            if ended is None and now - self._words[node][1] > silence:
                return f"{self.names[node]} is gone"
        return None

    def last_words(self) -> str | None:
        """Why another node's part failed, giving each time to say it."""
        deadline = time.monotonic() + LAST_WORDS + 1
        while time.monotonic() < deadline:
            if told := self.trouble(LAST_WORDS):
                return told
            if all(self.board.get(f"ended/{self.fits}/{node}") is not None for node in self.others):
                return None
            time.sleep(0.2)
        return None

    def stop(self) -> None:
        """Have the other nodes end their ranks."""
        self.board.put(f"stop/{self.fits}", True)

    def close(self, code: int, told: str) -> None:
        """Tell the other nodes how the run ended, and wait a little until they have read it."""
        self.board.put("outcome", {"code": code, "told": told})
        self._all("bye", BYE)


@contextmanager
def leading(config: RunConfig, directory: Path) -> Iterator[Leader | None]:
    """In the process that works on a run: the other nodes, if there are any, until it ends, however it does."""
    parallelism = config.parallelism
    if not parallelism.needs_followers:
        yield None
        return
    host, port = _known(parallelism)
    where = f"{host}:{port}"
    try:
        store = TCPStore(host, port, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=30))
    except RuntimeError as error:
        why = "is the port taken, or by another run?" if "EADDRINUSE" in str(error) else "is it this machine's name?"
        raise ConfigError(f"parallelism.rendezvous={where}: node 0 cannot listen there; {why}") from error
    leader = Leader(Board(store, where), parallelism, directory)
    code, told = 0, ""
    try:
        _say(f"node 0 waits at {where} for {parallelism.nodes - 1} more")
        leader.gather(config)
        yield leader
    except BaseException as error:
        code, told = outcome(error)
        raise
    finally:
        # A second signal must not keep the others from hearing of the first.
        with suppress(LeanfitError):
            leader.close(code, told)


def outcome(error: BaseException) -> tuple[int, str]:
    """(exit code, one line) that an error of node 0 comes to on the others."""
    if isinstance(error, KeyboardInterrupt):
        return 128 + signal.SIGINT, "stopped by SIGINT"
    if isinstance(error, SystemExit):
        code = error.code if isinstance(error.code, int) else 1
        return code, f"stopped by {signal.Signals(code - 128).name}" if code > 128 else f"ended with {code}"
    told = "; ".join(str(error).split("\n")) or type(error).__name__
    return (error.exit_code, told) if isinstance(error, LeanfitError) else (1, f"{type(error).__name__}: {told}")


class Follower:
    """Another node's side."""

    def __init__(self, board: Board, parallelism: Parallelism) -> None:
        self.board, self.node, self.parallelism = board, parallelism.own_node, parallelism
        self.fit = 0
        self._words = 0
        self._end: tuple[int, str] | None = None

    def join(self, config: RunConfig) -> None:
        """Raises ConfigError where another node has this one's number."""
        if not self.board.claim(f"claim/{self.node}"):
            raise ConfigError(
                f"parallelism.node_rank={self.node}: another node has that number; "
                f"give each of 0 to {self.parallelism.nodes - 1} once"
            )
        self.board.put(f"joined/{self.node}", {"host": socket.gethostname(), "versions": versions(), **asked(config)})

    def look(self, place: Mapping[str, str]) -> None:
        """Say whether this node sees node 0's run directory."""
        file, deadline = Path(place["directory"]) / ".nodes", time.monotonic() + LOOK
        sees = False
        while not sees and time.monotonic() < deadline and self.ended() is None:
            with suppress(OSError):
                sees = file.read_text(encoding="utf-8") == place["token"]
            time.sleep(0.1)
        self.board.put(f"sees/{self.node}", sees)

    def ended(self) -> tuple[int, str] | None:
        """(exit code, one line) of node 0, once it has ended. Lets it know that this node is still there."""
        if self._end is None:
            self._words += 1
            self.board.put(f"word/{self.node}", self._words)
            if (end := self.board.get("outcome")) is not None:
                self._end = end["code"], end["told"]
                self.board.put(f"bye/{self.node}", True)
        return self._end

    def called(self) -> Call | None:
        """The next fit, once node 0 has begun it."""
        said = self.board.get(f"fit/{self.fit + 1}")
        if said is None:
            return None
        self.fit += 1
        return Call(**said)

    def report(self, beats: Sequence[bytes | None]) -> bool:
        """Pass on what this node's ranks wrote; whether they are to be ended."""
        said = [None if beat is None else beat.hex() for beat in beats]
        if self.ended() is not None:
            return True
        self.board.put(f"beats/{self.fit}/{self.node}", said)
        return self.board.get(f"stop/{self.fit}") is not None

    def done(self, why: str | None) -> None:
        """This node's part of the fit is over; `why` it failed."""
        if self._end is None:
            self.board.put(f"ended/{self.fit}/{self.node}", {"why": why})


def joined(config: RunConfig) -> Follower:
    """The follower that this process is, once node 0 is there.

    Raises:
        ConfigError: no machine has node 0's name.
        LeanfitError: node 0 does not come.
    """
    host, port = _known(config.parallelism)
    where = f"{host}:{port}"
    _say(f"node {config.parallelism.own_node} waits for node 0 at {where}")
    deadline = time.monotonic() + JOIN
    while not _listens(host, port):
        if time.monotonic() > deadline:
            raise LeanfitError(f"node 0 is not at {where} after {JOIN:.0f} s; start the same command there")
        time.sleep(0.5)
    store = TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=30))
    follower = Follower(Board(store, where), config.parallelism)
    follower.join(config)
    return follower


def _listens(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), timeout=1).close()
    except OSError:
        return False
    return True


def _known(parallelism: Parallelism) -> tuple[str, int]:
    """`address`, of a machine whose name is known here. Raises ConfigError: waiting would not make it known."""
    host, port = address(parallelism)
    try:
        socket.getaddrinfo(host, port)
    except socket.gaierror as error:
        if error.errno != socket.EAI_AGAIN:  # which a name server may get over
            rendezvous = getattr(parallelism, "rendezvous", None)
            said = f"parallelism.rendezvous={rendezvous or 'null'}"
            name = host if rendezvous else f"{host}, as SLURM calls node 0"
            raise ConfigError(f"{said}: no machine is known by the name {name}; use HOST:PORT of node 0") from error
    return host, port


def address(parallelism: Parallelism) -> tuple[str, int]:
    """Where node 0 listens: as said, or the first node of the SLURM job and a port that follows from its number."""
    assert isinstance(parallelism, Launched)
    if parallelism.rendezvous is not None:
        host, _, port = parallelism.rendezvous.rpartition(":")
        return host, int(port)
    from lightning.fabric.plugins.environments.slurm import SLURMEnvironment

    nodes = os.environ.get("SLURM_STEP_NODELIST") or os.environ["SLURM_JOB_NODELIST"]
    number = int(os.environ["SLURM_JOB_ID"]) + int(os.environ.get("SLURM_STEP_ID", "0"))
    return SLURMEnvironment.resolve_root_node_address(nodes), 15000 + number % 10000


def asked(config: RunConfig) -> dict[str, Any]:
    """What a node was asked for: every value by its full key, and whether it goes on with an earlier run."""
    values = dict(_flat(values_of(config)))
    return {"values": {key: value for key, value in values.items() if key not in OWN}, "resume": config.resume}


def _flat(values: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(values, Mapping) and values:
        for name, value in values.items():
            yield from _flat(value, f"{key}.{name}" if key else str(name))
    else:
        yield key, json.loads(json.dumps(values))


def differences(name: str, own: Mapping[str, Any], said: Mapping[str, Any]) -> list[str]:
    """What a node was asked for, or runs, that node 0 was not or does not; one line for each."""
    here, there = own["values"], said["values"]
    found = [
        f"{key}={there.get(key)} on {name}, {here.get(key)} on node 0; type the same on each node"
        for key in {**here, **there}
        if here.get(key) != there.get(key)
    ]
    if own["resume"] != said["resume"]:
        found.append(f"resume is given on {'node 0' if own['resume'] else name} alone; type the same on each node")
    mine = versions()
    found += [
        f"{name} has {package} {said['versions'].get(package)}, node 0 {mine.get(package)}; install the same on both"
        for package in {**mine, **said["versions"]}
        if mine.get(package) != said["versions"].get(package)
    ]
    return found


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
