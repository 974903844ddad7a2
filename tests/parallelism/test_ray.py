"""Ranks on a real Ray cluster against one device, started as a run starts them; what is refused."""

import importlib.util
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch

from pipeline import rules
from pipeline.composing import compose
from pipeline.errors import ConfigError, LeanfitError
from pipeline.heartbeat import unpack
from pipeline.interrupts import lives
from pipeline.launch import beat_file, launch
from pipeline.recipes import lock_text
from pipeline.schema import values_of
from pipeline.walk import stages_of
from tests.parallelism.test_parity import COMMON, assert_same_weights, outcome, train

ROOT = Path(__file__).parents[2]
installed = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs leanfit[ray]")


def on_ray(directory, *words):
    """Stage 0's fit as a run does it."""
    config = compose([*COMMON, *words])
    directory.mkdir()
    lock = {"data": config.data.open(config.model.tokenizer()).fingerprint}
    locked = lock_text(values_of(config), config.choices, lock)
    (directory / "recipe.lock.yaml").write_text(locked, encoding="utf-8")
    return launch(config, stages_of(config)[0], directory, resume=False)


def gone(directory):
    """Whether no process of Ray is left, within 30 s, that was started for a run in this directory."""
    until = time.monotonic() + 30
    while (left := remaining(directory)) and time.monotonic() < until:
        time.sleep(0.2)
    return not left


def cleaned(before):
    """Whether no files of a cluster are left, within 10 s, whose process is gone; others' may be at work meanwhile."""
    until = time.monotonic() + 10
    while (left := abandoned() - before) and time.monotonic() < until:
        time.sleep(0.2)
    return not left


def abandoned():
    places = Path("/tmp").glob("leanfit-ray-*-*")
    return {place for place in places if not lives(int(place.name.split("-")[2]))}


def remaining(directory):
    left = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            told = (path / "environ").read_bytes() + (path / "cmdline").read_bytes()
        except OSError:
            continue
        if f"LEANFIT_TEST={directory}".encode() in told and int(path.name) != os.getpid():
            left.append(path.name)
    return left


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    directory = tmp_path_factory.mktemp("single")
    train(directory, compose(COMMON))
    return outcome(directory)


@pytest.fixture(scope="module")
def cluster():
    """Address of a cluster that is there already, with two CPUs, and asks for a token."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    os.environ.update(token)
    command = [
        *(sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", f"--port={port}", "--num-cpus=2"),
        *("--include-dashboard=false", "--object-store-memory=80000000", "--disable-usage-stats"),
        f"--temp-dir={tempfile.gettempdir()}/leanfit-{port}",
    ]
    head = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(600):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.1)
        yield f"127.0.0.1:{port}"
    finally:
        for process in [*psutil.Process(head.pid).children(recursive=True), head]:
            process.kill()  # it would drain for half a minute if it were asked to end
        head.wait(timeout=60)
        shutil.rmtree(f"{tempfile.gettempdir()}/leanfit-{port}", ignore_errors=True)
        for name in token:
            del os.environ[name]


@installed
@pytest.mark.slow
def test_two_ranks_of_a_cluster_of_its_own_train_as_one_device_does(alone, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("LEANFIT_TEST", str(tmp_path))
    before = abandoned()
    fitted = on_ray(tmp_path / "run", "parallelism=ray")
    same_training(tmp_path / "run", alone)
    assert fitted.train["samples"] == 20 * 8
    assert "train  20/20" in capfd.readouterr().out  # progress of rank 0, wherever it runs
    assert gone(tmp_path)
    assert cleaned(before)
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [
        "checkpoints", "metrics.csv", "recipe.lock.yaml", "run.log"
    ]  # fmt: skip


@installed
@pytest.mark.slow
def test_sharded_ranks_of_a_cluster_that_is_there_train_as_one_device_does(alone, cluster, tmp_path):
    on_ray(tmp_path / "run", "parallelism=ray_fsdp", f"parallelism.address={cluster}")
    same_training(tmp_path / "run", alone)


def same_training(directory, alone):
    losses, weights = outcome(directory)
    expected, one = alone
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=0)
    assert_same_weights(weights, one, 1e-3)


@installed
@pytest.mark.slow
def test_a_rank_that_is_killed_ends_the_run_which_names_it(cluster, tmp_path):
    words = ["parallelism=ray", f"parallelism.address={cluster}", "trainer.max_steps=1000000"]
    stage = stages_of(compose([*COMMON, *words]))[0]
    run = tmp_path / "run"
    killed = []

    def kill():
        while not (run / "metrics.csv").exists():
            time.sleep(0.1)
        os.kill(unpack(beat_file(run, stage, 1).read_bytes()).process, signal.SIGKILL)
        killed.append(time.monotonic())

    thread = threading.Thread(target=kill, daemon=True)
    thread.start()
    with pytest.raises(LeanfitError, match=r"^stage 'train' on 2 devices: rank 1 was killed or crashed"):
        on_ray(run, *words)
    assert time.monotonic() - killed[0] < 30


@installed
@pytest.mark.slow
@pytest.mark.parametrize(
    ("process", "said"),
    [
        ("gcs_server", "Ray's gcs_server was killed or crashed"),
        ("raylet", "Ray's raylet was killed or crashed"),
        ("ray::TrainController", "Ray's controller of the ranks was killed or crashed"),
        ("pipeline.ray_driver", "what started the ranks was killed by SIGKILL"),
    ],
)
def test_what_is_killed_of_a_cluster_of_its_own_ends_the_run_which_names_it(process, said, tmp_path, monkeypatch):
    monkeypatch.setenv("LEANFIT_TEST", str(tmp_path))
    before = abandoned()
    killed = []

    def kill():
        while not (tmp_path / "run" / "metrics.csv").exists():
            time.sleep(0.1)
        for number in remaining(tmp_path):
            words = Path(f"/proc/{number}/cmdline").read_text().replace("\0", " ")
            if process in words.split("--", 1)[0]:
                os.kill(int(number), signal.SIGKILL)
                killed.append(time.monotonic())

    threading.Thread(target=kill, daemon=True).start()
    with pytest.raises(LeanfitError, match=f"^stage 'train' on 2 devices: {said}"):
        on_ray(tmp_path / "run", "parallelism=ray", "trainer.max_steps=1000000")
    assert gone(tmp_path)
    assert time.monotonic() - killed[0] < 30
    assert cleaned(before)
    assert not {".ray", ".shown-00-train"} & {path.name for path in (tmp_path / "run").iterdir()}


@installed
@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["parallelism.address=ray://head:10001"],
         "parallelism.address=ray://head:10001 is no cluster's; use HOST:PORT, auto, or null to start one"),
        (["parallelism.address=head"],
         "parallelism.address=head is no cluster's; use HOST:PORT, auto, or null to start one"),
        (["parallelism.nodes=2"],
         "parallelism.nodes=2: a cluster that the run starts is this machine; use parallelism.nodes=1, or "
         "parallelism.address=HOST:PORT"),
    ],
)  # fmt: skip
def test_what_is_no_cluster_is_refused(words, said):
    with pytest.raises(ConfigError) as refused:
        compose([*COMMON, "parallelism=ray", *words])
    assert refused.value.problems == [f"{said} (command line)"]


@installed
@pytest.mark.parametrize("address", ["auto", "10.0.0.1:6379", "[::1]:6379", "head.cluster:6379"])
def test_addresses_of_clusters_pass(address):
    words = ["parallelism=ray_fsdp", f'parallelism.address="{address}"']
    assert compose([*COMMON, *words, "parallelism.nodes=2", "parallelism.devices=2"]).parallelism.address == address


@pytest.mark.parametrize(("name", "instead"), [("ray", "ddp"), ("ray_fsdp", "fsdp")])
def test_without_ray_one_line_names_the_extra(name, instead, monkeypatch):
    spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in ("ray", "pyarrow") else spec(name))
    with pytest.raises(ConfigError) as refused:
        compose([*COMMON, f"parallelism={name}"])
    assert refused.value.problems == [
        f"parallelism={name} needs Ray Train: pip install 'leanfit[ray]', or use parallelism={instead} (command line)"
    ]


def test_rules_know_that_ranks_on_ray_hold_parts_of_the_model():
    rounding = ["precision=bf16-true", "precision.stochastic_rounding=true"]
    assert rules.problems(compose([*COMMON, "parallelism=ray", *rounding])) == []
    with pytest.raises(ConfigError, match="parallelism=ray_fsdp steps shards as they are; use"):
        compose([*COMMON, "parallelism=ray_fsdp", *rounding])


def test_a_config_is_read_without_ray():
    program = "import sys, pipeline.parallelism.ray_fsdp; print({'ray', 'torch'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_nothing_at_an_address_is_told_at_once():
    from pipeline.ray_driver import reach

    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{closed.getsockname()[1]}"
        with pytest.raises(LeanfitError, match=f"no Ray cluster at parallelism.address={address}: .*refused"):
            reach(address)


@installed
def test_a_lost_rank_explains_more_than_those_that_lost_it():
    from ray.exceptions import RayActorError

    from pipeline.ray_driver import Lost, failure

    lost = SimpleNamespace(health_check_failure=RayActorError())
    both = failure({0: RuntimeError("Connection closed by peer"), 1: lost}, " (perhaps)")
    assert isinstance(both, Lost)
    assert str(both) == "rank 1 was killed or crashed (perhaps)"
    assert str(failure({1: ValueError("too\nlong")}, " (perhaps)")) == "rank 1: ValueError: too"
    assert str(failure({0: LeanfitError("diverged")}, " (perhaps)")) == "rank 0: diverged"


@installed
def test_a_rank_that_rays_monitor_of_memory_killed_ran_out_of_memory():
    from ray.exceptions import RayActorError

    from pipeline.ray_driver import failure

    killed = RayActorError(error_msg="Task was killed due to the node running low on memory.")
    assert str(failure({0: killed}, "")) == "rank 0 was killed or crashed (out of memory)"


@pytest.mark.parametrize(("devices", "nodes", "fits"), [(4, 1, True), (4, 2, False), (2, 2, True), (5, 1, False)])
def test_ranks_must_find_room_on_each_node(devices, nodes, fits):
    from pipeline.ray_driver import require_room

    resources = ({"CPU": 4.0}, {"CPU": 2.0, "GPU": 1.0}, {})
    cluster = [{"Alive": True, "Resources": each} for each in resources]
    cluster.append({"Alive": False, "Resources": {"CPU": 64.0}})
    asked = SimpleNamespace(devices=devices, nodes=nodes)
    if fits:
        require_room(cluster, asked, cuda=False)
    else:
        with pytest.raises(LeanfitError, match="those of the cluster have 4, 2, 0: choose"):
            require_room(cluster, asked, cuda=False)
    with pytest.raises(LeanfitError, match="with so many GPUs"):
        require_room(cluster, asked, cuda=True)


def test_a_rank_that_does_not_see_the_run_directory_says_so(tmp_path):
    from pipeline.ray_driver import rank

    with pytest.raises(LeanfitError, match=rf"{tmp_path} is not on .*; use hydra\.run\.dir=DIR with one that all"):
        rank({"run_dir": str(tmp_path)})


def test_ranks_that_ray_placed_otherwise_than_asked_say_what_to_ask(tmp_path, monkeypatch):
    from pipeline.ray_driver import rank

    (tmp_path / "recipe.lock.yaml").touch()
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(LeanfitError, match=r"Ray placed 2 ranks on .*, not 4; use .*devices=2 parallelism\.nodes=2"):
        rank({"run_dir": str(tmp_path), "devices": 4})
