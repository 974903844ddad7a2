"""Devices are found without torch, and what cannot be had is said in one line."""

import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.composing import compose
from pipeline.device import auto, cpu, cuda, mps
from pipeline.device.auto import Auto
from pipeline.device.cpu import CPU
from pipeline.device.cuda import CUDA
from pipeline.device.mps import MPS
from pipeline.errors import ConfigError
from pipeline.registry import lookup
from pipeline.report.result import read_result

ROOT = Path(__file__).parents[2]


def test_no_device_imports_torch_to_find_out_what_is_here():
    code = """
import sys
from pipeline.registry import lookup
for name in ("auto", "cpu", "cuda", "mps", "tpu"):
    device = lookup("device", name)(name=name, memory=None)
    device.kind(), device.problems(1)
assert not {"torch", "lightning"} & set(sys.modules), sorted(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=cpu.__file__.split("/pipeline/")[0])


def test_the_processor_is_always_here_and_named_with_its_cores():
    device = CPU(name="cpu", memory=None)
    assert device.kind() == "cpu"
    assert device.problems(1) == []
    assert device.description().endswith((" core", " cores"))
    assert cpu.processor() in device.description()


def test_cores_are_those_this_process_may_use():
    if not hasattr(os, "sched_setaffinity"):
        pytest.skip("this system cannot pin a process")
    allowed = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(allowed)})
        assert cpu.cores() == 1
        assert CPU(name="cpu", memory=None).description().endswith(", 1 core")
    finally:
        os.sched_setaffinity(0, allowed)
    assert cpu.cores() == len(allowed)


def test_processes_beyond_four_a_core_are_refused(monkeypatch):
    monkeypatch.setattr(cpu, "cores", lambda: 2)
    assert CPU(name="cpu", memory=None).problems(8) == []
    [said] = CPU(name="cpu", memory=None).problems(9)
    assert said.startswith("parallelism.devices=9: ")
    assert "at most 8" in said


# A driver of our own in C: what the real one answers, and that it is asked in the right order and types.
DRIVER = """
static int ready = 0;
int cuInit(unsigned flags) {{ ready = {status} == 0; return {status}; }}
int cuDeviceGetCount(int *count) {{ if (!ready) return 3; *count = {count}; return 0; }}
"""


@pytest.fixture
def driver(tmp_path):
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("needs a C compiler")

    def build(count, status=0):
        source, library = tmp_path / "driver.c", tmp_path / f"driver{count}_{status}.so"
        source.write_text(DRIVER.format(count=count, status=status))
        subprocess.run([compiler, "-shared", "-fPIC", "-o", library, source], check=True)
        return str(library)

    return build


def test_gpus_are_counted_by_the_driver(driver):
    assert cuda.gpus(driver(3)) == 3
    assert cuda.gpus(driver(0)) == 0


def test_a_driver_that_fails_or_is_absent_means_no_gpu(driver, tmp_path):
    assert cuda.gpus(driver(3, status=100)) == 0
    assert cuda.gpus(str(tmp_path / "absent.so")) == 0


def test_no_nvidia_gpu_is_said_with_what_to_use_instead(monkeypatch):
    monkeypatch.setattr(cuda, "gpus", lambda: 0)
    assert CUDA(name="cuda", memory=None).problems(1) == [
        "device=cuda: no NVIDIA GPU found on this machine; use device=cpu"
    ]


def test_more_gpus_than_there_are_is_a_problem(monkeypatch):
    monkeypatch.setattr(cuda, "gpus", lambda: 2)
    monkeypatch.setattr(cuda, "torch_without_cuda", lambda: None)
    assert CUDA(name="cuda", memory=None).problems(2) == []
    [said] = CUDA(name="cuda", memory=None).problems(3)
    assert said == "parallelism.devices=3: this machine has 2 NVIDIA GPUs; use at most 2"


@pytest.mark.parametrize(("version", "expected"), [("2.13.0+cpu", True), ("2.13.0+cu130", False), ("2.13.0", False)])
def test_a_torch_without_cuda_is_told_by_its_version(monkeypatch, version, expected):
    monkeypatch.setattr(cuda, "torch_without_cuda", cuda.torch_without_cuda.__wrapped__)  # which remembers nothing
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version)
    assert (cuda.torch_without_cuda() == version) is expected
    monkeypatch.setattr(cuda, "gpus", lambda: 1)
    assert bool(CUDA(name="cuda", memory=None).problems(1)) is expected


@pytest.mark.parametrize(
    ("system", "machine", "expected"),
    [("Darwin", "arm64", True), ("Darwin", "x86_64", False), ("Linux", "arm64", False)],
)
def test_an_apple_gpu_is_a_mac_with_apple_silicon(monkeypatch, system, machine, expected):
    monkeypatch.setattr(platform, "system", lambda: system)
    monkeypatch.setattr(platform, "machine", lambda: machine)
    assert mps.apple_gpu() is expected
    assert (MPS(name="mps", memory=None).problems(1) == []) is expected
    assert MPS(name="mps", memory=None).problems(2) != []


@pytest.mark.parametrize(
    ("gpus", "build", "apple", "kind", "why"),
    [
        (2, None, False, "cuda", "device=auto: cuda, 2 NVIDIA GPUs found"),
        (1, None, True, "cuda", "device=auto: cuda, 1 NVIDIA GPU found"),
        (0, None, True, "mps", "device=auto: mps, this is Apple silicon"),
        (0, "2.13.0+cpu", False, "cpu", "device=auto: cpu, no GPU found"),
        (
            1,
            "2.13.0+cpu",
            False,
            "cpu",
            "device=auto: cpu, because the installed torch 2.13.0+cpu cannot use the NVIDIA GPU",
        ),
    ],
)
def test_auto_takes_the_best_and_says_why(monkeypatch, gpus, build, apple, kind, why):
    monkeypatch.setattr(auto, "gpus", lambda: gpus)
    monkeypatch.setattr(cuda, "gpus", lambda: gpus)
    monkeypatch.setattr(auto, "torch_without_cuda", lambda: build)
    monkeypatch.setattr(cuda, "torch_without_cuda", lambda: build)
    monkeypatch.setattr(auto, "apple_gpu", lambda: apple)
    monkeypatch.setattr(mps, "apple_gpu", lambda: apple)
    device = Auto(name="auto", memory=None)
    assert device.kind() == kind
    assert device.reason() == why
    assert device.problems(1) == []
    assert len(device.problems(1000)) == 1


def test_only_a_device_that_was_chosen_for_the_user_gives_a_reason():
    for name in ("cpu", "cuda", "mps", "tpu"):
        assert lookup("device", name)(name=name, memory=None).reason() is None


def test_a_tpu_is_refused_in_one_line_that_says_which_torch_is_in_the_way():
    for words in (["device=tpu"], ["parallelism=xla"]):
        with pytest.raises(ConfigError) as refused:
            compose(words)
        (line,) = refused.value.problems
        assert line.startswith(words[0])
        assert "torch_xla ends at 2.9.0, which needs torch 2.9.0, and this program needs torch 2.11" in line
        assert "; use " in line


@pytest.mark.slow
def test_a_run_says_once_which_device_was_chosen_and_records_it(tmp_path):
    for words, lines in ((["device=auto"], 1), (["device=cpu"], 0)):
        directory = tmp_path / words[0].partition("=")[2]
        run = [sys.executable, "run.py", *words, "model=gpt_nano", "trainer=smoke", "trainer.max_steps=1"]
        run += ["data.evaluation_tokens=1024", f"hydra.run.dir={directory}"]
        done = subprocess.run(run, cwd=ROOT, capture_output=True, text=True, check=True)
        assert [line.startswith("device=auto: ") for line in done.stdout.splitlines()].count(True) == lines
        reason = read_result(directory / "result.json")["device"]["reason"]
        assert (reason is not None and reason in done.stdout) if lines else reason is None


@pytest.mark.gpu
@pytest.mark.skipif(
    CUDA(name="cuda", memory=None).problems(1) != [], reason="needs an NVIDIA GPU and a torch that can use it"
)
def test_the_real_driver_agrees_with_torch():
    import torch

    assert cuda.gpus() == torch.cuda.device_count()
    assert CUDA(name="cuda", memory=None).description() == torch.cuda.get_device_name(0)


def test_a_memory_that_is_said_counts_instead_of_what_is_found():
    assert CUDA(name="cuda", memory="80GiB").capacity() == 80 * 2**30
    assert Auto(name="auto", memory=1_000).capacity() == 1_000
    assert CUDA(name="cuda", memory="80QB").memory_problems() == [
        "device.memory=80QB is no size: give a number of bytes, or a size such as 2.5MB or 6GiB"
    ]
