"""What the nodes of a run tell each other, played by threads of one process over a real store."""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipeline import app, nodes
from pipeline.chain import Stage
from pipeline.composing import compose
from pipeline.errors import ConfigError, LeanfitError, ReceiptError
from pipeline.launch import follow
from pipeline.nodes import address, differences, joined, leading, outcome
from pipeline.parallelism.base import Meeting
from pipeline.schema import RunConfig
from tests.test_faults import free_port

SETTINGS = ["device=cpu", "parallelism=ddp", "parallelism.devices=1", "parallelism.nodes=2"]


@pytest.fixture(scope="module")
def config() -> RunConfig:
    return compose([*SETTINGS, "parallelism.rendezvous=127.0.0.1:1", "parallelism.node_rank=0"])


@pytest.fixture
def two(config: RunConfig) -> list[RunConfig]:
    """What is typed on each of two nodes."""
    where = f"127.0.0.1:{free_port()}"
    return [replace(config, parallelism=replace(config.parallelism, rendezvous=where, node_rank=n)) for n in (0, 1)]


class Node(threading.Thread):
    """The second node, in a thread: how it ended is in `end`."""

    def __init__(self, config: RunConfig) -> None:
        super().__init__(daemon=True)
        self.config = config
        self.end: Any = None
        self.start()

    def run(self) -> None:
        try:
            self.end = follow(self.config, [Stage(0, "train", "train")], joined(self.config))
        except LeanfitError as error:
            self.end = error

    def ended(self) -> Any:
        self.join(timeout=30)
        return self.end


def lead(config: RunConfig, directory: Path) -> None:
    with leading(config, directory):
        pass


def test_the_others_end_as_the_first_does(two: list[RunConfig], tmp_path: Path) -> None:
    node = Node(two[1])
    with leading(two[0], tmp_path) as leader:
        assert leader is not None
        assert node.is_alive()
    assert node.ended() == (0, "")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("error", "end"),
    [
        (LeanfitError("stage 'train': no"), (1, "stage 'train': no")),
        (ConfigError(["model.width=3: no", "and no"]), (2, "model.width=3: no; and no")),
        (ReceiptError("gate"), (3, "gate")),
        (KeyboardInterrupt(), (130, "stopped by SIGINT")),
        (SystemExit(143), (143, "stopped by SIGTERM")),
        (ValueError("odd"), (1, "ValueError: odd")),
    ],
)
def test_an_error_of_the_first_is_told_to_the_others(error: BaseException, end: tuple[int, str]) -> None:
    assert outcome(error) == end


def test_an_error_reaches_the_others(two: list[RunConfig], tmp_path: Path) -> None:
    node = Node(two[1])
    with pytest.raises(LeanfitError, match="no memory"), leading(two[0], tmp_path):
        raise LeanfitError("no memory")
    assert node.ended() == (1, "no memory")


def test_nodes_that_were_asked_for_different_things_name_the_key(two: list[RunConfig], tmp_path: Path) -> None:
    other = replace(two[1], trainer=replace(two[1].trainer, seed=7), resume=True)
    node = Node(other)
    with pytest.raises(ConfigError) as refused, leading(two[0], tmp_path):
        pass
    key, resume = refused.value.problems
    assert key.startswith("trainer.seed=7 on node 1 (")
    assert key.endswith("0 on node 0; type the same on each node")
    assert resume.startswith("resume is given on node 1")
    code, told = node.ended()
    assert code == 2
    assert key in told


def test_other_versions_are_refused(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    own = nodes.asked(config)
    said = {**own, "versions": {**nodes.versions(), "torch": "2.0.0"}}
    (told,) = differences("node 1 (b)", own, said)
    assert told.startswith("node 1 (b) has torch 2.0.0, node 0 ")


def test_a_run_directory_that_a_node_does_not_see_is_refused(
    two: list[RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nodes, "LOOK", 0.3)
    put = nodes.Board.put

    def elsewhere(self: nodes.Board, key: str, value: Any) -> None:
        put(self, key, {**value, "directory": "/nowhere"} if key == "place" else value)

    monkeypatch.setattr(nodes.Board, "put", elsewhere)
    node = Node(two[1])
    with pytest.raises(ConfigError, match=r"node 1 \(.*\) cannot see .* that all nodes share: hydra.run.dir=DIR"):
        lead(two[0], tmp_path)
    assert node.ended()[0] == 2


def test_a_node_that_does_not_come_or_whose_number_is_taken_is_told(
    two: list[RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nodes, "JOIN", 0.3)
    with pytest.raises(LeanfitError, match=r"node 0 is not at 127.0.0.1:.* start the same command there"):
        joined(two[1])
    with pytest.raises(LeanfitError, match=r"parallelism.nodes=2: node 1 did not come to 127.0.0.1:"):
        lead(two[0], tmp_path)
    monkeypatch.setattr(nodes, "JOIN", 30.0)
    first = Node(two[1])
    with leading(two[0], tmp_path):
        with pytest.raises(ConfigError, match=r"parallelism.node_rank=1: another node has that number"):
            joined(two[1])
        with pytest.raises(ConfigError, match="node 0 cannot listen there; is the port taken"):
            lead(two[0], tmp_path)
    assert first.ended() == (0, "")


def test_silence_and_failures_of_a_node_are_noticed(two: list[RunConfig], tmp_path: Path) -> None:
    node = threading.Thread(target=lambda: two.append(joined(two[1])))  # type: ignore[arg-type]
    node.start()
    with leading_without_look(two[0], tmp_path, node) as leader:
        follower: Any = two[2]
        leader.begin("train", False, Meeting("127.0.0.1", 1))
        until = time.monotonic() + 30  # what node 0 puts on the board may take a while
        while (call := follower.called()) is None and time.monotonic() < until:
            time.sleep(0.05)
        assert call == nodes.Call("train", False, "127.0.0.1", 1)
        assert leader.beats() == [None]
        assert not follower.report([b"beat"])
        assert leader.beats() == [b"beat"]
        assert leader.trouble() is None
        assert "is gone" in str(leader.trouble(silence=-1))
        follower.done("rank 1 was killed by SIGKILL")
        while (told := leader.trouble()) is None:  # what is put arrives a moment later
            pass
        assert told.endswith("rank 1 was killed by SIGKILL")
        leader.stop()
        while not follower.report([None]):
            pass
    node.join()


def leading_without_look(config: RunConfig, directory: Path, node: threading.Thread) -> Any:
    """`leading`, where the other node has seen the run directory."""

    class Seen(nodes.Leader):
        def gather(self, config: RunConfig) -> None:
            node.join()

    class Context:
        def __enter__(self) -> nodes.Leader:
            self.patched = pytest.MonkeyPatch()
            self.patched.setattr(nodes, "Leader", Seen)
            self.patched.setattr(nodes, "BYE", 0.1)
            self.inner = leading(config, directory)
            leader = self.inner.__enter__()
            assert leader is not None
            return leader

        def __exit__(self, *error: Any) -> bool | None:
            try:
                return self.inner.__exit__(*error)
            finally:
                self.patched.undo()

    return Context()


def test_a_name_that_no_machine_has_is_not_waited_for(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("SLURM_JOB_NODELIST", "n[1-2].invalid"), ("SLURM_JOB_ID", "1")):
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("SLURM_STEP_NODELIST", raising=False)

    def unknown(*_: Any) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(nodes.socket, "getaddrinfo", unknown)
    by_slurm, by_hand = (
        replace(config, parallelism=replace(config.parallelism, rendezvous=said)) for said in (None, "typo:1")
    )
    with pytest.raises(ConfigError, match=r"rendezvous=null: no machine is known by the name n1.*, as SLURM calls"):
        lead(by_slurm, tmp_path)
    with pytest.raises(ConfigError, match=r"rendezvous=typo:1: no machine is known by the name typo; use HOST:PORT"):
        joined(by_hand)


def test_slurm_says_where_node_0_is(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    assert address(config.parallelism) == ("127.0.0.1", 1)
    for name, value in (("SLURM_JOB_NODELIST", "gpu[003-006,9]"), ("SLURM_JOB_ID", "1234567"), ("SLURM_STEP_ID", "2")):
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("SLURM_STEP_NODELIST", raising=False)
    assert address(replace(config.parallelism, rendezvous=None)) == ("gpu003", 15000 + 4569)


def test_one_machine_leads_nobody(config: RunConfig, tmp_path: Path) -> None:
    alone = compose(["device=cpu", "parallelism=ddp"])
    with leading(alone, tmp_path) as leader:
        assert leader is None
    assert os.listdir(tmp_path) == []
    assert signal.getsignal(signal.SIGTERM) is not None


PAGE = (Path(__file__).parents[1] / "docs" / "training.md").read_text(encoding="utf-8")
TYPED = [line.split()[2:] for line in PAGE.splitlines() if line.startswith("python run.py") and "nodes=" in line]


@pytest.mark.parametrize("words", TYPED)
def test_the_commands_of_the_page_compose(words: list[str]) -> None:
    assert compose(words).parallelism.ranks == 8


def test_a_program_that_mpirun_starts_in_copies_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "4")
    assert app.main(["device=cpu", f"hydra.run.dir={tmp_path}/run"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(
        "error: a launcher has started this program 4 times, which starts its ranks itself; start it"
    )
    assert not (tmp_path / "run").exists()


def test_a_job_of_a_sweep_that_is_started_in_copies_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As submitit does with hydra.launcher.tasks_per_node=2."""
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")
    words = ["device=cpu", "trainer=smoke", "trainer.max_steps=0", "trainer.seed=0", f"hydra.sweep.dir={tmp_path}"]
    assert app.main(["-m", *words]) == 1
    error = json.loads((tmp_path / "0" / "result.json").read_text())["error"]
    assert error["message"].startswith("a launcher has started this program 2 times")


def test_another_node_makes_no_run_of_its_own_and_ends_as_the_first(
    two: list[RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    host, port = address(two[1].parallelism)
    words = [
        *SETTINGS,
        f"parallelism.rendezvous={host}:{port}",
        "parallelism.node_rank=1",
        f"hydra.run.dir={tmp_path}/other",
    ]
    codes: list[int] = []
    node = threading.Thread(target=lambda: codes.append(app.main(words)))
    node.start()
    with pytest.raises(LeanfitError, match="no memory"), leading(two[0], tmp_path):
        raise LeanfitError("no memory")
    node.join(timeout=30)
    assert codes == [1]
    assert "node 0: no memory" in capsys.readouterr().err.splitlines()
    assert not (tmp_path / "other").exists()
