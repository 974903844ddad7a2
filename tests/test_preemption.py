"""SIGTERM and Ctrl-C in the middle of a step: it is finished and saved, then they count; a second one at once."""

from __future__ import annotations

import os
import signal
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import lightning.pytorch as lightning
import pytest
import torch
from torch.utils.data import DataLoader

from pipeline import preemption
from pipeline.errors import LeanfitError
from pipeline.interrupts import PARENT, parent
from pipeline.preemption import StopAfterStep


class Stopped(BaseException):
    pass


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """What the program does at either signal."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise Stopped(number)

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    assert all(signal.getsignal(number) is stop for number in before)
    for number, handler in before.items():
        signal.signal(number, handler)


class Module(lightning.LightningModule):
    """Does `act` in the middle of batch `at`, and counts batches that were begun."""

    def __init__(self, at: int, act: Any) -> None:
        super().__init__()
        self.layer, self.at, self.act, self.begun = torch.nn.Linear(2, 1), at, act, 0

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        self.begun += 1
        if batch_idx == self.at:
            self.act()
        return self.layer(batch).sum()  # type: ignore[no-any-return]

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(module: Module, saved: list[int], accumulate: int = 1, file: Path | None = None) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lightning.Trainer(
            accelerator="cpu", max_steps=8, accumulate_grad_batches=accumulate, logger=False, barebones=False,
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
            callbacks=[StopAfterStep(lambda trainer: saved.append(trainer.global_step), file)],
        ).fit(module, DataLoader(torch.ones(64, 2), batch_size=2))  # fmt: skip


def tell(number: int) -> Any:
    return lambda: os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize(("accumulate", "begun", "step"), [(1, 3, 3), (4, 4, 1)])
def test_the_step_is_finished_and_saved_first(number: int, accumulate: int, begun: int, step: int) -> None:
    module, saved = Module(2, tell(number)), list[int]()
    with pytest.raises(Stopped) as stopped:
        fit(module, saved, accumulate)
    assert stopped.value.args == (number,)
    assert saved == [step]
    assert module.begun == begun


@pytest.mark.parametrize(("accumulate", "begun", "step"), [(1, 3, 3), (4, 4, 1)])
def test_a_fit_in_another_thread_is_told_by_a_file(tmp_path: Path, accumulate: int, begun: int, step: int) -> None:
    file, saved, told = tmp_path / "stop", list[int](), list[str]()
    module = Module(2, file.touch)

    def work() -> None:
        try:
            fit(module, saved, accumulate, file)
        except LeanfitError as error:
            told.append(str(error))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(timeout=60)
    assert told == ["stopped by SIGTERM"]
    assert saved == [step]
    assert module.begun == begun


def test_a_fit_that_nobody_stops_saves_nothing_more() -> None:
    module, saved = Module(-1, None), list[int]()
    fit(module, saved)
    assert (module.begun, saved) == (8, [])


def twice() -> None:
    for _ in range(2):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)


def test_a_second_signal_counts_at_once() -> None:
    saved = list[int]()
    with pytest.raises(Stopped):
        fit(Module(2, twice), saved)
    assert saved == []


def test_a_rank_that_is_told_once_more_by_what_started_it_still_saves_its_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PARENT, parent())
    saved = list[int]()
    with pytest.raises(Stopped):
        fit(Module(2, twice), saved)
    assert saved == [3]


def test_a_rank_on_another_machine_than_the_program_is_told_by_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(PARENT, "elsewhere 1")
    file, saved = tmp_path / "stop", list[int]()
    with pytest.raises(Stopped) as stopped:
        fit(Module(2, file.touch), saved, file=file)
    assert stopped.value.args == (signal.SIGTERM,)
    assert saved == [3]


@pytest.mark.parametrize("of_ranks", [False, True])
def test_a_step_that_takes_too_long_is_not_waited_for(monkeypatch: pytest.MonkeyPatch, of_ranks: bool) -> None:
    if of_ranks:
        monkeypatch.setenv(PARENT, parent())
    monkeypatch.setattr(preemption, "PATIENCE", 0.2)

    def slow() -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(20)

    saved, started = list[int](), time.monotonic()
    with pytest.raises(Stopped):
        fit(Module(2, slow), saved)
    assert saved == []
    assert time.monotonic() - started < 15
