"""What training wins back of what compression lost, beside a control, by seed: QAT, pruning and distilling, students.

Each row compares models made from one dense base: compressed without training; with the method's training; and with
a control's, which takes as many steps, at the same rate, on the same batches, without what the method adds:

    QAT             control: the float model trained on, then rounded
    pruned, self    control: the task's loss alone under the same masks (the method adds the dense model as a teacher)
    half the layers control: the task's loss alone

A share is (compressed - trained) / (compressed - dense), of the metric itself. Training on improves a dense model as
well, so the last column takes that longer-trained model for `dense`. A seed decides the order of the training text, the
calibration windows and, where there is little text, which; the base stays. The stages are the program's own
(pipeline.walk), all but the receipt.

    python benchmarks/recovery.py --base outputs/.../artifact     # a GPT that `compression.py` trained, say
    python benchmarks/recovery.py --quick                         # two minutes: does it all run?
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compression import trained

from pipeline import environment

environment.prepare()  # as the program does, before torch is there

HERE = Path(__file__).resolve().parent
LR = 2.5e-4
"""Of every link: a quarter of the base's 1e-3, as a link takes it by default."""
LEFT = -100
"""Where the plot is cut, in percent."""
STUDENT_LR = 1e-3
"""Of students that lose half of their layers, which are further from where they were."""


@dataclass(frozen=True)
class Row:
    """`links`: the chain but for the training that is compared. `kind` names the method and its control."""

    label: str
    kind: str
    links: tuple[str, ...]
    settings: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return "".join(letter if letter.isalnum() else "_" for letter in self.label)


KINDS = {
    "qat": ("QAT", "trained on, then rounded"),
    "prune": ("distilled", "task's loss alone"),
    "student": ("distilled", "task's loss alone"),
    "little": ("distilled", "task's loss alone"),
    "conv": ("QAT", "trained on, then rounded"),
}
"""kind -> (method, control)."""
ROWS = [
    Row("2 bits", "qat", ("int4",), ("bits=2",)),
    Row("3 bits", "qat", ("int4",), ("bits=3",)),
    Row("magnitude 80%", "prune", ("magnitude",), ("sparsity=0.8", "steps=0")),
    Row("sparsegpt 70%", "prune", ("sparsegpt",), ("sparsity=0.7", "steps=0")),
    Row("half of the FFN", "prune", ("structured",), ("ffn=0.5", "steps=0")),
    Row("half of the layers", "student", ()),
    Row("half of the layers, little text", "little", ()),
    Row("EfficientNet, 2 bits", "conv", ("int4",), ("bits=2", "group_size=null")),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, help="an artifact of a dense language model; default: one is trained")
    parser.add_argument("--base-steps", type=int, default=1600, help="how long it is trained")
    parser.add_argument("--steps", type=int, default=60, help="of each training that is compared")
    parser.add_argument("--seeds", type=int, nargs="*", default=[1, 2, 3])
    parser.add_argument("--tokens", type=int, default=16384, help="held-out tokens")
    parser.add_argument("--little", type=int, default=128, help="windows of text where there is little")
    parser.add_argument("--only", nargs="*", help="labels of rows, or beginnings of them")
    parser.add_argument("--quick", action="store_true", help="few steps, one seed: figures mean nothing")
    parser.add_argument("--out", type=Path, default=Path("outputs/benchmarks/recovery"))
    options = parser.parse_args()
    if options.quick:
        options.base_steps, options.steps, options.seeds, options.tokens = 20, 4, options.seeds[:1], 2048
    options.out.mkdir(parents=True, exist_ok=True)
    base = options.base or trained("gpt", options.base_steps, options.out / "base")
    bench = Bench(base.resolve(), options.out.resolve(), options.steps, options.tokens, options.little)
    chosen = [row for row in ROWS if not options.only or any(row.label.startswith(start) for start in options.only)]
    found = []
    for seed in options.seeds:
        for row in chosen:
            found.append({"row": row.label, "kind": row.kind, "seed": seed, **bench.measure(row, seed)})
            print(line(found[-1]), flush=True)
    (options.out / "recovery.json").write_text(json.dumps({"steps": options.steps, "rows": found}, indent=1))
    print("\n" + "\n".join(table(found)))
    plot(found, options.steps, options.out / "recovery.png")
    print(f"\n{options.out}/recovery.json, {options.out}/recovery.png")


class Bench:
    """Runs chains on a base and keeps what each gave below `out`, so that a benchmark cut off goes on."""

    def __init__(self, base: Path, out: Path, steps: int, tokens: int, little: int) -> None:
        self.base, self.out, self.steps, self.little = base, out, steps, little
        self.held_out = [f"data.evaluation_tokens={tokens}"]

    def measure(self, row: Row, seed: int) -> dict[str, float]:
        """The metric of `dense`, `compressed`, `control` and `method`, and of `longer`, the dense model trained on."""
        conv = row.kind == "conv"
        base = self.digits(seed) if conv else self.base
        lr = STUDENT_LR if row.kind in ("student", "little") else LR
        text = self.little_text(seed) if row.kind == "little" else []
        draw = [f"trainer.seed={seed}", f"calibration.seed={seed}", *text]
        links = [*draw, *(f"compression.{row.links[0]}.{setting}" for setting in row.settings)] if row.links else draw
        found = {"dense": self.value("dense-conv" if conv else "dense", seed if conv else 0, base, None)}
        if row.kind in ("student", "little"):
            found["compressed"] = self.value("half", 0, base, None, halved=True)
            for role, logits in (("control", False), ("method", True)):
                chain = ["compression=distill", "compression.distill.layers=null"]
                found[role] = self.value(f"{row.name}-{role}", seed, base, [*chain, *links, *self.distill(logits, lr)])
            return found
        only = [f"compression={row.links[0]}", *links]
        found["compressed"] = self.value(f"{row.name}-compressed", seed, base, only)
        longer = f"longer-{'conv' if conv else 'text'}"
        onward = ["compression=distill", "compression.distill.layers=all", f"compression.distill.teacher={base}"]
        found["longer"] = self.value(longer, seed, base, [*draw, *onward, *self.distill(False, lr)], keep=True)
        if row.kind == "prune":
            for role, logits in (("control", False), ("method", True)):
                chain = [f"compression=[{row.links[0]},distill]", *links, *self.distill(logits, lr)]
                found[role] = self.value(f"{row.name}-{role}", seed, base, chain)
            return found
        found["control"] = self.value(f"{row.name}-control", seed, self.place(longer, seed) / "last", only)
        grid = [setting.replace("compression.int4.", "compression.int4_qat.") for setting in links]
        fit = [f"compression.int4_qat.steps={self.steps}", f"compression.int4_qat.lr={lr}"]
        found["method"] = self.value(f"{row.name}-method", seed, base, ["compression=int4_qat", *grid, *fit])
        return found

    def distill(self, logits: bool, lr: float) -> list[str]:
        """A distillation by its default losses; without `logits` the task's loss is all there is."""
        weights = [] if logits else ["task_weight=1", "logits_weight=0"]
        return [f"compression.distill.{key}" for key in (f"steps={self.steps}", f"lr={lr}", *weights)]

    def place(self, name: str, seed: int) -> Path:
        return self.out / "runs" / f"{name}-{seed}"

    def value(
        self, name: str, seed: int, artifact: Path, settings: list[str] | None, keep: bool = False, halved: bool = False
    ) -> float:
        """The metric on held-out data of what the chain of `settings` makes of `artifact` (None: of that as it is).

        `keep`: the model stays, in the place's folder `last`. `halved`: every second layer is dropped first.
        """
        place = self.place(name, seed)
        record = place / "value.json"
        if record.is_file():
            return float(json.loads(record.read_text())["value"])

        from pipeline.artifact import store
        from pipeline.composing import compose
        from pipeline.compression.distill import drop_layers
        from pipeline.models.architecture import describe
        from pipeline.tasks import lookup

        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True)
        started = time.process_time()
        made = artifact if settings is None else chained(artifact, settings, place)
        seconds = time.process_time() - started
        model = store.load(made)
        if halved:
            model = drop_layers(model, describe(model), len(describe(model).blocks) // 2)
        kind = store.read_manifest(artifact)["data"]["name"]
        model_choice = ["model=efficientnet"] if kind == "digits" else self.held_out
        config = compose([f"data={kind}", *model_choice])
        data = config.data.open(store.load_tokenizer(artifact))
        value = lookup.get(config.data.task).evaluate(model, data, 32, "cpu").value
        if keep:
            shutil.copytree(made, place / "last")
        shutil.rmtree(place / "stages", ignore_errors=True)
        shutil.rmtree(place / "checkpoints", ignore_errors=True)
        record.write_text(json.dumps({"value": value, "cpu_seconds": seconds, "settings": settings}))
        return value

    def little_text(self, seed: int) -> list[str]:
        """Overrides to train on a few windows of the training text, one after the other from a drawn place on."""
        import numpy as np

        from pipeline.artifact import store
        from pipeline.composing import compose

        folder = self.out / f"little-{seed}"
        folder.mkdir(exist_ok=True)
        tokenizer = store.load_tokenizer(self.base)
        windows = compose(self.held_out).data.open(tokenizer).train.windows  # type: ignore[attr-defined]
        start = int(np.random.default_rng(seed).integers(len(windows) - self.little))
        assert tokenizer is not None
        text = str(tokenizer.decode(windows[start : start + self.little].ravel().tolist()))
        (folder / "text.txt").write_text(text, encoding="utf-8")
        return [
            "data=text", f"data.path={folder}", "data.split=position", "data.evaluation_fraction=0.05"
        ]  # fmt: skip

    def digits(self, seed: int) -> Path:
        """A small EfficientNet trained on digits, by the program's defaults."""
        place = self.out / f"digits-{seed}"
        if not (place / "stages" / "00-train").is_dir():
            place.mkdir(exist_ok=True)
            steps = ["trainer.max_steps=4"] if self.steps < 10 else []
            chained(None, ["model=efficientnet", "data=digits", f"trainer.seed={seed}", *steps], place)
        return place / "stages" / "00-train"


def chained(artifact: Path | None, settings: Sequence[str], place: Path) -> Path:
    """Where the last stage left its model: the chain of `settings` on `artifact`, or a training from the start."""
    from pipeline.artifact import store
    from pipeline.composing import compose
    from pipeline.report.progress import Progress
    from pipeline.report.result import new_result
    from pipeline.runner import with_data_of
    from pipeline.tasks import lookup
    from pipeline.walk import Run, begin, changing_stages, stages_of, walk

    job = [] if artifact is None else ["job=compress", f"artifact={artifact}"]
    config = compose([*job, "device=cpu", "trainer.evaluate_every=0", "trainer.checkpoint_every=1000000", *settings])
    if artifact is not None:
        config = with_data_of(config, artifact, place)
    tokenizer = config.model.tokenizer() if artifact is None else store.load_tokenizer(artifact)
    data = config.data.open(tokenizer)
    task = lookup.get(config.data.task)
    line = stages_of(config)
    steps = {stage.name: stage.fit.steps for stage in line if stage.fit}
    progress = Progress(steps, "silent", task.unit)
    run = Run(config, place, task, data, tokenizer, [], progress, new_result(config.job, [], dict(config.choices)))
    walk(run, line, begin(run, line))
    return run.snapshot(changing_stages(line)[-1])


def shares(found: dict[str, Any]) -> dict[str, float]:
    """What `control` and `method` won back of the loss, and what `method` did where `longer` is the dense model."""
    lost = found["compressed"] - found["dense"]
    result = {role: (found["compressed"] - found[role]) / lost if lost else math.nan for role in ("control", "method")}
    if "longer" in found and found["compressed"] != found["longer"]:
        result["longer"] = (found["compressed"] - found["method"]) / (found["compressed"] - found["longer"])
    return result


def line(found: dict[str, Any]) -> str:
    values = "  ".join(f"{role} {found[role]:.4f}" for role in ("dense", "compressed", "control", "method"))
    share = "  ".join(f"{role} {100 * value:.0f}%" for role, value in shares(found).items())
    return f"seed {found['seed']}  {found['row']:<32} {values}  |  {share}"


def spread(values: Sequence[float], form: str = "{:.3f}") -> str:
    """Mean, and lowest to highest in brackets where they differ."""
    low, mean, high = (form.format(value) for value in (min(values), statistics.mean(values), max(values)))
    return mean if low == high else f"{mean} ({low} to {high})"


def table(found: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Lines of a table in Markdown."""
    yield "| | compressed | control | method | control won back | method won back | of the longer-trained |"
    yield "|---|---|---|---|---|---|---|"
    for label in dict.fromkeys(row["row"] for row in found):
        rows = [row for row in found if row["row"] == label]
        values = [spread([row[role] for row in rows]) for role in ("compressed", "control", "method")]
        each = [shares(row) for row in rows]
        parts = [
            spread([100 * one[role] for one in each], "{:.0f}") + " %" if all(role in one for one in each) else ""
            for role in ("control", "method", "longer")
        ]
        yield f"| {label} | {' | '.join([*values, *parts])} |"
    for kind, name in (("qat", "dense, trained on"), ("conv", "EfficientNet, trained on")):
        rows = [row for row in found if row["kind"] == kind]
        if rows:
            dense, longer = (spread([row[role] for row in rows]) for role in ("dense", "longer"))
            yield f"\n{name}: {dense} before, {longer} after"


def plot(found: Sequence[dict[str, Any]], steps: int, path: Path) -> None:
    """A bar for the share that control and method won back, a dot for each seed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    labels = list(dict.fromkeys(row["row"] for row in found))
    figure, axes = plt.subplots(figsize=(8, 0.62 * len(labels) + 1.4), layout="constrained")
    for role, color, shift in (("control", "#b0b0b0", -0.19), ("method", "#1f77b4", 0.19)):
        for place, label in enumerate(labels):
            values = [100 * shares(row)[role] for row in found if row["row"] == label]
            axes.barh(place + shift, statistics.mean(values), height=0.36, color=color)
            axes.plot(values, [place + shift] * len(values), "o", color="black", markersize=3)
            if min(values) < LEFT:
                said = f" {min(values):.0f} to {max(values):.0f} %"
                axes.text(LEFT, place + shift, said, va="center", fontsize=7, backgroundcolor=color)
    kinds = {row["row"]: KINDS[row["kind"]] for row in found}
    axes.set_yticks(range(len(labels)), [f"{label}\n{' / '.join(kinds[label][::-1])}" for label in labels], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(left=max(LEFT, axes.get_xlim()[0]))
    axes.axvline(50, color="black", linewidth=0.8, linestyle=":")
    axes.axvline(100, color="black", linewidth=0.8)
    axes.set_xlabel(f"won back by {steps} steps, % of what compression lost (dots: seeds)")
    handles = [plt.Rectangle((0, 0), 1, 1, color=color) for color in ("#b0b0b0", "#1f77b4")]
    axes.legend(handles, ["control", "method"], loc="upper left", bbox_to_anchor=(0, 1.1), ncols=2, frameon=False)
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
