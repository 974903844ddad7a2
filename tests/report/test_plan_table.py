import io
import re

from rich.console import Console

from pipeline.planner.plan import Phase, Plan
from pipeline.report.plan_table import plan_rows, plan_table

KINDS = {
    "activations": 75_800_000, "optimizer state": 26_100_000, "weights": 13_000_000, "key-value cache": 524_000,
    "kernels' workspaces": 67_100_000,
}  # fmt: skip
PHASES = ("load", "train", "validate", "compress", "save", "evaluate", "generate")


def planned():
    phase = Phase(sum(KINDS.values()), KINDS, "aten::native_layer_norm", reserved=200_000_000, margin=0.08)
    return Plan(dict.fromkeys(PHASES, phase))


def test_seven_phases_fit_a_terminal_of_100_columns_with_every_word_whole():
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(plan_table(planned()))
    shown = console.export_text()
    assert "…" not in shown
    for kind in (*KINDS, *PHASES):
        assert re.search(rf"(^|\s){re.escape(kind)}\s", shown), kind
    assert all(len(line) <= 100 for line in shown.splitlines())


def test_the_report_names_the_operator_that_a_terminal_has_no_room_for():
    rows = {label: cells for label, *cells in plan_rows(planned().phases)}
    assert rows["in the operator"] == ["native_layer_norm"] * len(PHASES)
    assert rows["known within"] == ["± 8%"] * len(PHASES)
    assert rows["known how"] == ["traced"] * len(PHASES)


def test_a_margin_that_is_wider_below_is_said_so():
    phase = Phase(1, {}, "", margin=0.1, below=0.5)
    rows = {label: cells for label, *cells in plan_rows({"train": phase})}
    assert rows["known within"] == ["-50 to +10%"]
