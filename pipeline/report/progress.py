"""One progress bar over a whole run: stage, step, loss, throughput, memory, time left.

On a terminal it moves; into a file or a pipe it is a plain line every tenth of the run; within a sweep it is silent.
The training loop only sets numbers: drawing happens in rich's own thread, four times a second.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Any

from lightning.pytorch.callbacks import Callback
from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from pipeline.report.console import Mode, console
from pipeline.report.metrics import MetricsCsv, memory_in_use
from pipeline.report.metrics_file import Row
from pipeline.report.units import format_bytes, format_clock, format_count, format_seconds, significant

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

REFRESH = 4
"""Drawings a second on a terminal; one takes half a millisecond."""
BAR_WIDTH = 20
QUIET = 20.0
"""Seconds for which a phase prints nothing of how far it is, where nothing moves."""


class Progress(Callback):
    """The bar of a run: one instance, given to every fit of it, beside the fit's MetricsCsv (whose rows it shows).

    Args:
        steps: stage -> optimizer steps, in order, of every stage that trains: the bar's length. A fit of another stage
            or length than named here corrects it.
        mode: see `pipeline.report.console.mode`.
        unit: what MetricsCsv counts.
        target: where to draw; by default the program's own console.

    Use it as a context manager, so that the terminal is as it was when the run ends or fails:

        with Progress({"train": 200, "distill": 50}, mode(console())) as progress:
            Trainer(callbacks=[MetricsCsv(...), progress]).fit(...)
            with progress.phase("evaluating"):
                ...
    """

    def __init__(
        self, steps: Mapping[str, int], mode: Mode, unit: str = "tokens/s", target: Console | None = None
    ) -> None:
        self.console = console() if target is None else target
        self._steps, self._mode, self._unit = dict(steps), mode, unit
        self._live: Live | None = None
        self._label = ""
        self._fit: tuple[str, int, int] | None = None  # stage, its step, its steps
        self._before = 0  # steps of the run that lie before this fit
        self._done = 0  # steps of the run so far
        self._metrics: MetricsCsv | None = None
        self._row: Row | None = None
        self._memory_label = ""
        self._fit_start = (0, 0.0)  # step and time from which the pace is taken
        self._printed_tenth = 0
        self._printed_row: Row | None = None
        self._phase_start: float | None = None
        self._far = ""  # how far the phase is
        self._told = 0.0  # when that was printed, or the phase began

    def __enter__(self) -> Progress:
        if self._mode == "live" and self._live is None:
            self._live = Live(
                get_renderable=self._draw, console=self.console, refresh_per_second=REFRESH, transient=True
            )
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """Take the bar off the screen; safe to call twice."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Show `name` (evaluating, saving, ...) while something other than a fit runs; print its seconds after it."""
        outer = (self._label, self._fit, self._phase_start, self._far)
        start = time.monotonic()
        self._label, self._fit, self._phase_start, self._far, self._told = name, None, start, "", start
        try:
            yield
        finally:
            self._label, self._fit, self._phase_start, self._far = outer
        self.say(f"{name}  {format_seconds(time.monotonic() - start)}")

    def far(self, text: str) -> None:
        """How far the phase under way is: beside its name, or a line now and then."""
        self._far, now = text, time.monotonic()
        if self._mode == "lines" and now - self._told > QUIET:
            self._told = now
            self.say("  ".join(self._facts()))

    def say(self, text: str) -> None:
        """Print a line above the bar; silent within a sweep."""
        if self._mode != "silent":
            self.console.print(Text(text), soft_wrap=True)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._metrics = next((c for c in trainer.callbacks if isinstance(c, MetricsCsv)), None)  # type: ignore[attr-defined]
        stage = self._metrics.stage if self._metrics else "train"
        step, steps = trainer.global_step, max(trainer.max_steps, 0)
        self._steps[stage] = steps
        names = list(self._steps)
        self._before = sum(self._steps[name] for name in names[: names.index(stage)])
        self._memory_label = memory_in_use(str(trainer.strategy.root_device))[1]
        self._row = self._printed_row = None
        self._done = self._before + step
        self._label, self._fit, self._fit_start = stage, (stage, step, steps), (step, time.monotonic())
        self._printed_tenth = self._tenth()
        if not trainer.is_global_zero:
            self._mode = "silent"
            self.stop()
        elif 0 < step < steps:
            self.say(f"{stage}  goes on from step {step} of {steps}")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._fit is None or trainer.global_step == self._fit[1]:
            return
        stage, _, steps = self._fit
        self._fit = (stage, trainer.global_step, steps)
        self._done = self._before + trainer.global_step
        self._row = None if self._metrics is None else self._metrics.last
        fresh = self._metrics is None or self._row is not self._printed_row
        if self._mode == "lines" and fresh and self._tenth() > self._printed_tenth and trainer.global_step != steps:
            self._printed_tenth, self._printed_row = self._tenth(), self._row
            self.say("  ".join([*self._facts(), *self._left()]))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._row = None if self._metrics is None else self._metrics.last
        self.say("  ".join([*self._facts(), format_seconds(time.monotonic() - self._fit_start[1])]))
        self._label, self._fit = "", None

    def _tenth(self) -> int:
        return 10 * self._done // max(1, sum(self._steps.values()))

    def _left(self) -> list[str]:
        """The time that the training still ahead takes at this fit's pace so far."""
        if self._fit is None or self._fit[1] <= self._fit_start[0]:
            return []
        pace = (time.monotonic() - self._fit_start[1]) / (self._fit[1] - self._fit_start[0])
        return [f"{format_clock(pace * max(0, sum(self._steps.values()) - self._done))} left"]

    def _facts(self) -> list[str]:
        """What stands in a line or beside the bar, most important first."""
        fit, row, phase_start = self._fit, self._row, self._phase_start
        if fit is None:
            if phase_start is None:
                return [self._label]
            return [self._label, *([self._far] if self._far else []), format_clock(time.monotonic() - phase_start)]
        stage, step, steps = fit
        facts = [stage, f"{step}/{steps}" if steps else str(step)]
        if row is not None:
            facts += [] if row.loss is None else [f"loss {significant(row.loss, 4)}"]
            facts += [] if row.tokens_per_second is None else [f"{format_count(row.tokens_per_second)} {self._unit}"]
            facts += [] if row.memory is None else [f"{self._memory_label} {format_bytes(row.memory)}"]
        return facts

    def _draw(self) -> Table:
        """The bar and its facts on one line, cut at the right edge of the screen; no bar where nothing trains."""
        total = sum(self._steps.values())
        facts = Text("  ".join([*self._facts(), *self._left()]), no_wrap=True, overflow="ellipsis")
        grid = Table.grid(padding=(0, 1))
        if total:
            grid.add_column(width=BAR_WIDTH)
            grid.add_column(no_wrap=True, overflow="ellipsis")
            grid.add_row(ProgressBar(total=total, completed=self._done, width=BAR_WIDTH), facts)
        else:
            grid.add_row(facts)
        return grid
