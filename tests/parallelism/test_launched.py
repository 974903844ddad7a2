"""What starts the ranks: command lines, what a rank finds in its environment, what is refused."""

import shutil

import pytest
import yaml

from pipeline.composing import compose
from pipeline.errors import LeanfitError
from pipeline.launch import killed
from pipeline.parallelism.base import Meeting
from pipeline.parallelism.launched import PLACES, started_in_copies
from pipeline.registry import conf_root, lookup

WORKER = ["python", "-m", "pipeline.worker", "/run", "train", "fresh"]
SLURM = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_STEP_ID": "0", "SLURM_NODEID": "1",
         "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NUM_NODES": "2", "SLURM_NTASKS": "2"}  # fmt: skip


def ddp(**changes):
    settings = yaml.safe_load((conf_root() / "parallelism" / "ddp.yaml").read_text()) | changes
    return lookup("parallelism", "ddp")(**settings)


@pytest.fixture(autouse=True)
def no_launcher_around(monkeypatch):
    for name in {*SLURM, *(name for places in PLACES.values() for names in places for name in names)}:
        monkeypatch.delenv(name, raising=False)


def test_torchrun_starts_the_ranks_of_this_node():
    meeting = Meeting("n1", 5000)
    alone = ddp(devices=3).command(WORKER, meeting)
    assert "--nproc_per_node=3" in alone
    assert "--standalone" in alone
    assert alone[-5:] == WORKER[1:]
    several = ddp(nodes=2, rendezvous="n1:29400", node_rank=1).command(WORKER, meeting)
    for word in ("--nnodes=2", "--node_rank=1", "--master_addr=n1", "--master_port=5000"):
        assert word in several
    assert "--standalone" not in several


@pytest.mark.parametrize("launcher", ["mpirun", "srun"])
def test_mpirun_and_srun_start_the_ranks_of_all_nodes_and_hand_variables_on(launcher):
    command = ddp(launcher=launcher, nodes=2, devices=4).command(
        WORKER, Meeting("n1", 5000, {"LEANFIT_PARENT": "n1 3"})
    )
    started = command[command.index(launcher) :]
    assert started[-6:] == WORKER
    assert {"MASTER_ADDR=n1", "MASTER_PORT=5000", "LEANFIT_PARENT=n1 3"} <= set(started[started.index("env") :])
    per_node = [["--nodes=2"], ["--ntasks=8"], ["--ntasks-per-node=4"], ["--overlap"]]
    counts = {"mpirun": [["-n", "8"]], "srun": per_node}[launcher]
    assert all(set(words) <= set(started) for words in counts)


@pytest.mark.parametrize(
    ("launcher", "environ"),
    [
        ("mpirun", {"OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_LOCAL_RANK": "1", "OMPI_COMM_WORLD_SIZE": "4"}),
        ("mpirun", {"PMI_RANK": "3", "MPI_LOCALRANKID": "1", "PMI_SIZE": "4"}),
        ("srun", {"SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_NTASKS": "4"}),
    ],
)
def test_a_rank_finds_its_place_whatever_else_is_in_the_environment(launcher, environ):
    stale = {"RANK": "9", "WORLD_SIZE": "10", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "1"}
    place = ddp(launcher=launcher, nodes=2, devices=2).place({**stale, **environ})
    assert {key: place[key] for key in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "GROUP_RANK")} == {
        "RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "GROUP_RANK": "1",
    }  # fmt: skip


def test_a_rank_of_a_group_of_another_size_is_refused():
    short = {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_LOCAL_RANK": "0", "OMPI_COMM_WORLD_SIZE": "1"}
    with pytest.raises(LeanfitError, match="mpirun started 1 ranks instead of 2"):
        ddp(launcher="mpirun").place(short)
    with pytest.raises(LeanfitError, match="without OMPI_COMM_WORLD_RANK or PMI_RANK"):
        ddp(launcher="mpirun").place({})


def test_mpi_is_ddp_that_mpirun_starts(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    assert compose(["parallelism=mpi"]).parallelism == ddp(launcher="mpirun")


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (
            {"launcher": "mpirun"},
            "launcher=mpirun: there is no mpirun on PATH; install it, or use parallelism.launcher",
        ),
        ({"nodes": 2, "node_rank": 0}, "parallelism.nodes=2 needs parallelism.rendezvous=HOST:PORT"),
        ({"nodes": 2, "rendezvous": "n1", "node_rank": 0}, "must be HOST:PORT, such as n1:29400"),
        ({"nodes": 2, "rendezvous": "n1:0", "node_rank": 0}, "must be HOST:PORT"),
        ({"nodes": 2, "rendezvous": "n1:x", "node_rank": 0}, "must be HOST:PORT"),
        ({"nodes": 2, "rendezvous": "n1:29400"}, "needs parallelism.node_rank=N, 0 to 1, another one on each node"),
        ({"nodes": 2, "rendezvous": "n1:29400", "node_rank": 2}, "parallelism.nodes=2 are numbered 0 to 1"),
        ({"rendezvous": "n1:29400"}, "parallelism.rendezvous is for several nodes"),
        ({"node_rank": 0}, "parallelism.node_rank is for several nodes"),
        ({"nodes": 2, "rendezvous": "n1:29400", "node_rank": 1}, ""),
        ({}, ""),
    ],
)
def test_what_does_not_start_is_told(changes, told, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert [told in line for line in ddp(**changes).problems()] == ([True] if told else [])


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({}, ""),
        ({"SLURM_STEP_NUM_TASKS": "4"}, "start it by srun --nodes=2 --ntasks-per-node=1"),
        ({"SLURM_STEP_NUM_NODES": "1"}, "start it by srun"),
        ({"SLURM_STEP_ID": None}, "start it by srun"),
    ],
)
def test_slurm_says_which_node_this_is_where_it_runs_one_process_on_each(changes, told, monkeypatch):
    for name, value in {**SLURM, **changes}.items():
        if value is not None:
            monkeypatch.setenv(name, value)
    choice = ddp(nodes=2)
    assert [told in line for line in choice.problems()] == ([True] if told else [])
    assert choice.own_node == 1


def test_a_program_that_a_launcher_of_ranks_started_is_recognised():
    assert started_in_copies({}) == 1
    assert started_in_copies({"WORLD_SIZE": "1", "OMPI_COMM_WORLD_SIZE": "1"}) == 1
    assert started_in_copies({"OMPI_COMM_WORLD_SIZE": "4"}) == 4
    assert started_in_copies({"PMI_SIZE": "2"}) == 2
    assert started_in_copies({"WORLD_SIZE": "8"}) == 8
    assert (
        started_in_copies({"SLURM_NTASKS": "4", "SLURM_JOB_ID": "1"}) == 1
    )  # a script of sbatch, which is one process
    interactive = {"SLURM_NTASKS": "4", "SLURM_STEP_ID": "4294967290", "SLURM_STEP_NUM_TASKS": "1"}
    assert started_in_copies(interactive) == 1  # a shell of salloc -n 4 with LaunchParameters=use_interactive_step
    assert started_in_copies({"SLURM_NTASKS": "4", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "4"}) == 4


TORCHRUN = """
Failures:
[1]:
  rank      : 0 (local_rank: 0)
  exitcode  : 1 (pid: 7)
[2]:
  rank      : 3 (local_rank: 1)
  exitcode  : {} (pid: 8)
"""
OPEN_MPI = "mpirun noticed that process rank 2 with PID 0 on node n1 exited on signal 11 (Segmentation fault)."
SRUN = """
srun: error: n2: task 1: {}
srun: launch/slurm: _step_signal: Terminating StepId=18.0
slurmstepd-n1: error: *** STEP 18.0 ON n1 CANCELLED AT 2026-11-29T14:37:07 ***
srun: error: n1: task 0: {}
"""


@pytest.mark.parametrize(
    ("report", "said"),
    [
        (TORCHRUN.format(-9), "rank 3 was killed by SIGKILL (perhaps)"),
        (TORCHRUN.format(-15), None),  # torchrun's own way to end the others
        (TORCHRUN.format(1), None),
        (OPEN_MPI, "rank 2 was killed by SIGSEGV"),
        (SRUN.format("Killed", "Exited with exit code 1"), "rank 1 was killed by SIGKILL (perhaps)"),
        (SRUN.format("Segmentation fault (core dumped)", "Terminated"), "rank 1 was killed by SIGSEGV"),
        (SRUN.format("Out Of Memory", "Terminated"), "rank 1 was killed by SIGKILL (out of memory)"),
        (SRUN.format("Exited with exit code 1", "Killed"), None),  # by srun, as it did not end
        ("", None),
    ],
)
def test_a_launchers_report_says_which_rank_was_killed(report, said):
    assert killed(report, " (perhaps)") == said
