"""The progress bar, on real fits: on a screen, in a pipe, in a sweep."""

from __future__ import annotations

import io
import os
import pty
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.cells import cell_len
from rich.console import Console

from pipeline.report import progress as module
from pipeline.report.console import Mode, console, mode
from pipeline.report.metrics import MetricsCsv
from pipeline.report.progress import Progress

Fit = Callable[..., Any]


STEPS = {"train": 60, "distill": 40}


def count(batch: dict[str, torch.Tensor]) -> int:
    return batch["x"].numel()


def plain() -> Console:
    return Console(file=io.StringIO(), width=100, highlight=False)


def written(target: Console) -> str:
    assert isinstance(target.file, io.StringIO)
    return target.file.getvalue()


def run_two_stages(progress: Progress, path: Path, tiny_fit: Fit, log_every: int = 5) -> None:
    with progress:
        for stage, steps in (("train", 60), ("distill", 40)):
            tiny_fit([MetricsCsv(path, stage=stage, count=count, log_every=log_every), progress], steps=steps)
        with progress.phase("evaluating"):
            pass


def test_a_pipe_gets_a_plain_line_every_tenth_of_the_run(tmp_path: Path, tiny_fit: Fit) -> None:
    target = plain()
    run_two_stages(Progress(STEPS, "lines", target=target), tmp_path / "metrics.csv", tiny_fit)
    text = written(target)
    assert all(character == "\n" or character.isprintable() for character in text)
    lines = text.splitlines()
    steps = [tuple(line.split("  ")[:2]) for line in lines]
    assert [s for s in steps if s[0] == "train"] == [("train", f"{n}/60") for n in (10, 20, 30, 40, 50, 60)]
    assert [s for s in steps if s[0] == "distill"] == [("distill", f"{n}/40") for n in (10, 20, 30, 40)]
    for line in lines[:-1]:
        assert "loss " in line
        assert " tokens/s" in line
        assert "RSS " in line
    assert all(line.endswith(" left") for line in lines[:5])
    assert lines[-1].startswith("evaluating")
    assert max(map(cell_len, lines)) <= 100


def test_rows_that_are_rarer_than_tenths_are_each_shown_once(tmp_path: Path, tiny_fit: Fit) -> None:
    target = plain()
    run_two_stages(Progress(STEPS, "lines", target=target), tmp_path / "metrics.csv", tiny_fit, log_every=25)
    shown = [line.split("  ")[1] for line in written(target).splitlines()[:-1]]
    assert shown == ["25/60", "50/60", "60/60", "25/40", "40/40"]


def test_the_values_shown_are_those_of_metrics_csv(tmp_path: Path, tiny_fit: Fit) -> None:
    from pipeline.report.metrics_file import read_metrics
    from pipeline.report.units import significant

    target = plain()
    run_two_stages(Progress(STEPS, "lines", target=target), tmp_path / "metrics.csv", tiny_fit)
    losses = {(row.stage, row.step): row.loss for row in read_metrics(tmp_path / "metrics.csv")}
    for line in written(target).splitlines()[:-1]:
        stage, steps, loss = line.split("  ")[:3]
        expected = losses[stage, int(steps.split("/")[0])]
        assert expected is not None
        assert loss == f"loss {significant(expected, 4)}"


def test_a_resumed_fit_says_from_where(tmp_path: Path, tiny_fit: Fit) -> None:
    saved = str(tmp_path / "last.ckpt")
    tiny_fit([], steps=20, save=saved)
    target = plain()
    with Progress({"train": 60}, "lines", target=target) as progress:
        metrics = MetricsCsv(tmp_path / "metrics.csv", stage="train", count=count, log_every=5)
        tiny_fit([metrics, progress], steps=60, ckpt_path=saved)
    first, *rest = written(target).splitlines()
    assert first == "train  goes on from step 20 of 60"
    assert rest
    assert not any("goes on" in line for line in rest)


def test_a_sweep_is_silent(tmp_path: Path, tiny_fit: Fit) -> None:
    target = plain()
    run_two_stages(Progress(STEPS, "silent", target=target), tmp_path / "metrics.csv", tiny_fit)
    assert written(target) == ""


@pytest.mark.parametrize("width", [100, 80, 30])
def test_the_bar_is_one_line_that_fits_the_screen(tmp_path: Path, tiny_fit: Fit, width: int) -> None:
    target = Console(file=io.StringIO(), width=width, force_terminal=True)
    progress = Progress(STEPS, "live", target=target)
    seen = []

    class Look(module.Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            screen = Console(file=io.StringIO(), width=width)
            screen.print(progress._draw())
            seen.append(written(screen).rstrip("\n"))

    with progress:
        metrics = MetricsCsv(tmp_path / "metrics.csv", stage="train", count=count, log_every=5)
        tiny_fit([metrics, progress, Look()], steps=60)
    assert all("\n" not in line and cell_len(line) <= width for line in seen)
    if width == 100:
        for part in ("train", "30/60", "loss ", " tokens/s", "RSS ", " left"):
            assert part in seen[29]
    # Drawn and taken away: the last thing on the screen is not a bar.
    assert written(target).count("\x1b[?25l") == written(target).count("\x1b[?25h") == 1


def test_the_bar_spans_the_whole_run(tmp_path: Path, tiny_fit: Fit) -> None:
    progress = Progress(STEPS, "silent", target=plain())
    shares = []

    class Look(module.Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            shares.append(progress._done)

    for stage, steps in (("train", 60), ("distill", 40)):
        metrics = MetricsCsv(tmp_path / "metrics.csv", stage=stage, count=count, log_every=5)
        tiny_fit([metrics, progress, Look()], steps=steps)
    assert shares == list(range(1, 101))


def test_without_a_metrics_callback_it_still_shows_steps(tiny_fit: Fit) -> None:
    target = plain()
    with Progress({}, "lines", target=target) as progress:
        tiny_fit([progress], steps=20)
    lines = written(target).splitlines()
    assert lines[0].startswith("train  2/20")
    assert lines[-1].startswith("train  20/20")


def test_phases_nest_and_survive_errors() -> None:
    target = plain()
    progress = Progress(STEPS, "lines", target=target)

    def fail() -> None:
        with progress, progress.phase("compressing: int8"), progress.phase("[evaluating]"):
            assert progress._facts()[0] == "[evaluating]"
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert written(target) == ""
    assert progress._facts() == [""]
    with progress.phase("[evaluating]"):
        pass
    assert written(target).startswith("[evaluating] ")


def test_a_long_phase_says_now_and_then_how_far_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(module.time, "monotonic", lambda: now)
    target = plain()
    with Progress({}, "lines", target=target) as progress, progress.phase("searching"):
        for number in range(50):
            progress.far(f"{number} of 50")
            now += 1
    assert written(target).splitlines() == [
        "searching  21 of 50  0:21",
        "searching  42 of 50  0:42",
        "searching  50 s",
    ]


def test_how_far_a_phase_is_stands_beside_its_name_while_it_lasts() -> None:
    progress = Progress(STEPS, "silent", target=plain())
    with progress.phase("searching"):
        progress.far("3 of 4")
        assert progress._facts()[:2] == ["searching", "3 of 4"]
        with progress.phase("tracing"):
            assert progress._facts()[0] == "tracing"
            assert "3 of 4" not in progress._facts()
    assert progress._facts() == [""]


def test_a_failing_fit_gives_the_terminal_back(tiny_fit: Fit) -> None:
    target = Console(file=io.StringIO(), width=100, force_terminal=True)

    class Fail(module.Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            raise RuntimeError("no")

    def fail() -> None:
        with Progress(STEPS, "live", target=target) as progress:
            tiny_fit([progress, Fail()], steps=5)

    before = sys.stdout
    with pytest.raises(RuntimeError, match="no"):
        fail()
    assert written(target).count("\x1b[?25l") == written(target).count("\x1b[?25h") == 1
    assert sys.stdout is before


class Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("console_of", "sweep", "expected"),
    [
        (lambda: Console(file=Screen(), force_terminal=True), False, "live"),
        (lambda: Console(file=Screen(), force_terminal=True), True, "silent"),
        (lambda: Console(file=io.StringIO()), False, "lines"),
        (lambda: Console(file=io.StringIO(), force_terminal=True), False, "lines"),
        (lambda: Console(file=Screen(), force_terminal=True, force_interactive=False), False, "lines"),
    ],
)
def test_how_it_shows_depends_on_where(console_of: Callable[[], Console], sweep: bool, expected: Mode) -> None:
    assert mode(console_of(), sweep) == expected


def test_the_console_is_one_and_prints_text_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    console.cache_clear()
    try:
        assert console() is console()
        console().print("artifact=/a/[red]b[/red]/:smile: 'x'")
        assert capsys.readouterr().out == "artifact=/a/[red]b[/red]/:smile: 'x'\n"
    finally:
        console.cache_clear()


def shown_on(read: int, write: int, work: Callable[[Console], None]) -> str:
    """What `work` leaves on a console over the file descriptor `write`, read from `read`."""
    parts = []

    def collect() -> None:
        while True:
            try:
                part = os.read(read, 65536)
            except OSError:  # a pseudo-terminal whose other end is closed
                return
            if not part:
                return
            parts.append(part)

    reader = threading.Thread(target=collect)
    reader.start()
    with os.fdopen(write, "w", encoding="utf-8") as file:
        work(Console(file=file, width=100, highlight=False))
    reader.join()
    os.close(read)
    return b"".join(parts).decode()


def evaluate_and_say(target: Console) -> None:
    with Progress({}, mode(target), target=target) as progress, progress.phase("evaluating"):
        time.sleep(0.6)
    target.print("done")


def test_on_a_real_terminal_the_bar_moves_and_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    for name in ("NO_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    text = shown_on(*pty.openpty(), evaluate_and_say)
    assert text.count("evaluating  0:0") >= 2
    assert "\x1b[?25h" in text
    assert text.rstrip().endswith("done")


def test_in_a_real_pipe_there_are_no_control_characters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    first, last = shown_on(*os.pipe(), evaluate_and_say).split("\n")[:2]
    assert first.startswith("evaluating ")
    assert first.isprintable()
    assert last == "done"
