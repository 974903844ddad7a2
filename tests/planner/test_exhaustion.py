"""Memory that runs out, really: the process may take no more than so much, and torch's allocator is refused."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pipeline import environment
from pipeline.app import main
from pipeline.composing import compose
from pipeline.errors import exhausted
from pipeline.planner.exhaustion import explained, lighter
from pipeline.planner.plan import plan

LARGE = [
    "model=gpt", "model.layers=2", "trainer=smoke", "trainer.max_steps=2", "trainer.batch_size=128", "device=cpu",
    "data.evaluation_tokens=2048", "trainer.evaluation_batch_size=4", "trainer.evaluate_every=0",
    "plan.calibrate=false",  # by what other tests ran
]  # fmt: skip
LIMITED = """
import resource, sys
from pipeline import environment
environment.prepare()
import torch
import pipeline.runner
from pipeline.app import main
from transformers import OPTForCausalLM

(torch.randn(64, 64) @ torch.randn(64, 64)).sum()
told = next(line for line in open("/proc/self/status") if line.startswith("VmData"))
limit = 1024 * int(told.split()[1]) + int(sys.argv[1])
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
sys.exit(main(sys.argv[2:]))
"""


def limited(room: int, *words: str, place: Path) -> subprocess.CompletedProcess[str]:
    """The program with `room` bytes beside what its imports take."""
    command = [sys.executable, "-c", LIMITED, str(room), *words]
    # The limit counts what glibc keeps of what was freed, below a block that is still there, by chance; oneDNN, which
    # maps room for its code, finds none then. So that glibc gives back all at once:
    returning = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    variables = {**environment.child(), "OMP_NUM_THREADS": "1", **returning}
    return subprocess.run(command, cwd=place, env=variables, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), True),
        (MemoryError(), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory"), True),
        (RuntimeError("could not create a primitive"), True),
        (RuntimeError("rank 1: OutOfMemoryError: CUDA out of memory"), True),
        (RuntimeError("MPS backend out of memory (MPS allocated: 5 GB)"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
    ],
)  # fmt: skip
def test_what_says_that_memory_ran_out(error, expected):
    assert exhausted(error) is expected


def test_what_needs_less_computes_the_same_and_leaves_what_was_typed(tmp_path):
    config = compose([*LARGE, "memory.loss_chunks=1"])
    found = plan(config, config.data.open(config.model.tokenizer()))
    next_one = lighter(config, found, "train", tmp_path)
    kept = ("model", "data", "precision", "optimizer", "adapter", "chain")
    assert all(getattr(next_one.config, key) == getattr(config, key) for key in kept)
    assert next_one.config.trainer.batch_size == config.trainer.batch_size
    assert next_one.config.memory.loss_chunks == 1
    after = plan(next_one.config, config.data.open(config.model.tokenizer()))
    assert after.phases["train"].bytes < 0.76 * found.phases["train"].bytes
    assert lighter(replace(config, job="compress"), found, "train", tmp_path) is None
    assert next_one.changes[0] in explained("no room", "train", found, next_one)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="limits memory as Linux does")
def test_a_run_that_runs_out_of_memory_says_what_needs_less_or_goes_on_with_it(tmp_path, monkeypatch):
    place = "hydra.run.dir=run"
    stopped = limited(520_000_000, *LARGE, place, place=tmp_path)
    assert stopped.returncode == 1
    last = stopped.stderr.strip().splitlines()[-1]
    assert last.startswith("error: out of memory in train")
    assert "fit.on_oom=adapt" in last
    adapted = limited(520_000_000, *LARGE, "fit.on_oom=adapt", place, place=tmp_path)
    assert adapted.returncode == 0, adapted.stderr
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["memory"]["adapted"]
    monkeypatch.chdir(tmp_path)
    assert main([*LARGE, *result["memory"]["adapted"], "hydra.run.dir=asked"]) == 0
    asked = json.loads((tmp_path / "asked" / "result.json").read_text())
    assert result["quality"]["after"] == pytest.approx(asked["quality"]["after"], rel=1e-4)
    assert result["memory"]["predicted"] == asked["memory"]["predicted"]
