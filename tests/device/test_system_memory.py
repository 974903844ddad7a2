"""How much memory the system gives a process, and what it has killed for want of it: as Linux tells, and really."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.control_group import control_group, within
from pipeline.device import system_memory
from pipeline.device.cpu import CPU
from pipeline.device.system_memory import limit_files, machine_memory, oom_kills, suspicion

WHOLE = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
VERSION_1 = "11:cpuset:/\n4:memory:/slurm/job_7\n0::/\n"
VERSION_2 = "0::/user.slice/run.scope\n"


def pretend(monkeypatch: pytest.MonkeyPatch, directory: Path, own: str, limits: dict[str, str]) -> None:
    (directory / "own").write_text(own)
    for name, said in limits.items():
        file = directory / "groups" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(said)
    monkeypatch.setattr(system_memory, "OWN_GROUP", directory / "own")
    monkeypatch.setattr(system_memory, "GROUPS", directory / "groups")


@pytest.mark.parametrize(
    ("own", "limits", "expected"),
    [
        (VERSION_2, {"memory.max": "max\n"}, WHOLE),
        ("0::/\n", {"memory.max": "1000000\n"}, 1_000_000),  # as it looks inside a container
        (VERSION_2, {"user.slice/run.scope/memory.max": "3000\n", "user.slice/memory.max": "max\n"}, 3_000),
        (VERSION_2, {"user.slice/run.scope/memory.max": "max\n", "user.slice/memory.max": "2000\n"}, 2_000),
        (VERSION_1, {"memory/memory.limit_in_bytes": "9223372036854771712\n"}, WHOLE),
        (VERSION_1, {"memory/slurm/job_7/memory.limit_in_bytes": "5000\n", "memory.max": "1\n"}, 5_000),
        (VERSION_1, {}, WHOLE),
    ],
)
def test_the_least_of_the_limits_around_this_process_counts(tmp_path, monkeypatch, own, limits, expected):
    pretend(monkeypatch, tmp_path, own, limits)
    assert machine_memory() == CPU(name="cpu", memory=None).capacity() == expected


def test_a_system_without_control_groups_has_the_machines_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(system_memory, "OWN_GROUP", tmp_path / "none")
    monkeypatch.setattr(system_memory, "GROUPS", tmp_path)
    assert machine_memory() == WHOLE


def in_group(limit: int, code: str) -> subprocess.CompletedProcess[str]:
    """`code` in a Python that a real control group limits."""
    try:
        with control_group(limit) as group:
            command = within(group, [sys.executable, "-c", code])
            return subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        pytest.skip(f"no control group can be made here: {error}")


def test_a_real_control_groups_limit_is_found():
    told = in_group(300_000_000, "from pipeline.device.cpu import CPU; print(CPU(name='', memory=None).capacity())")
    assert abs(int(told.stdout) - 300_000_000) < 2**16


@pytest.mark.skipif(sys.platform != "linux", reason="as Linux counts")
def test_the_limits_of_this_process_are_where_linux_keeps_them():
    assert [file for file in limit_files() if file.is_file()] or not system_memory.GROUPS.is_dir()


@pytest.mark.parametrize(
    ("counters", "expected"),
    [("nr_free 3\noom_kill 2\n", " (out of memory)"), ("oom_kill 1\n", ""), ("nr_free 3\n", " (out of memory?)")],
)
def test_what_was_killed_since_is_told_by_the_systems_count(tmp_path, monkeypatch, counters, expected):
    monkeypatch.setattr(system_memory, "COUNTERS", tmp_path / "vmstat")
    system_memory.COUNTERS.write_text(counters)
    assert suspicion(1) == expected
    assert suspicion(None) == " (out of memory?)"


def test_a_real_kill_for_want_of_memory_is_counted():
    before = oom_kills()
    if in_group(50_000_000, "bytearray(200_000_000)").returncode != -9:
        pytest.skip("this system does not kill what exceeds its group")
    assert suspicion(before) == (" (out of memory?)" if before is None else " (out of memory)")
