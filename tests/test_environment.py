"""Settings of the process: what nobody set is set, what a user set stays."""

from __future__ import annotations

import os

import pytest
import torch

from pipeline import environment

OWN = {"PATH": "/bin"}
SET = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": environment.DEFAULTS["GOMP_SPINCOUNT"]}


@pytest.mark.parametrize(
    ("own", "expected"),
    [
        ({}, SET),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, {"OMP_WAIT_POLICY": "ACTIVE"}),
        ({"OMP_WAIT_POLICY": "PASSIVE"}, {"OMP_WAIT_POLICY": "PASSIVE"}),
        ({"GOMP_SPINCOUNT": "7"}, {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "7"}),
        ({"OMP_WAIT_POLICY": "ACTIVE", "GOMP_SPINCOUNT": "7"}, {"OMP_WAIT_POLICY": "ACTIVE", "GOMP_SPINCOUNT": "7"}),
    ],
)
def test_threads_wait_as_the_user_says_and_else_spin_a_while_then_sleep(monkeypatch, own, expected):
    monkeypatch.setattr(os, "environ", {**OWN, **own})
    for _ in range(2):  # a child process does it again
        environment.prepare()
        assert {name: value for name, value in os.environ.items() if name in environment.WAITING} == expected
    assert OWN.items() <= os.environ.items()


def test_a_child_process_finds_this_package_before_what_its_user_added(monkeypatch):
    monkeypatch.setattr(os, "environ", {"PYTHONPATH": "/theirs"})
    first, second = environment.child()["PYTHONPATH"].split(os.pathsep)
    assert os.path.isfile(f"{first}/pipeline/environment.py")
    assert second == "/theirs"


@pytest.mark.skipif("PYTEST_XDIST_WORKER" not in os.environ, reason="this process is the only one")
def test_a_worker_of_several_computes_in_as_many_threads_as_the_processes_that_it_starts():
    assert torch.get_num_threads() == int(os.environ["OMP_NUM_THREADS"])
