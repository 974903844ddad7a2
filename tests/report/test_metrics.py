"""The callback behind metrics.csv, on real fits."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline.report import metrics as metrics_module
from pipeline.report.metrics import MetricsCsv, memory_in_use
from pipeline.report.metrics_file import COLUMNS, read_metrics
from pipeline.report.result import empty_train

Fit = Callable[..., Any]


def count(batch: dict[str, torch.Tensor]) -> int:
    return batch["x"].numel()


def metrics(path: Path, **settings: Any) -> MetricsCsv:
    return MetricsCsv(path, **({"stage": "train", "count": count, "log_every": 5} | settings))


class Slow(Callback):
    """Sleeps within the steps that are named."""

    def __init__(self, *steps: int, seconds: float = 0.08) -> None:
        self.steps, self.seconds = steps, seconds

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step + 1 in self.steps:
            time.sleep(self.seconds)


class Killed(Callback):
    """Saves at one step and fails at a later one, in mid-accumulation."""

    def __init__(self, save: int, die: int, path: Path) -> None:
        self.save, self.die, self.path = save, die, path

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self.save and not self.path.exists():
            trainer.save_checkpoint(self.path)
        if trainer.global_step == self.die:
            raise RuntimeError("killed")


def test_rows_come_every_log_every_steps_and_at_the_last(tmp_path: Path, tiny_fit: Fit) -> None:
    tiny_fit([metrics(tmp_path / "metrics.csv")], steps=12)
    with (tmp_path / "metrics.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == COLUMNS == ("step", "stage", "loss", "lr", "tokens_per_second", "memory")
    assert [row["step"] for row in rows] == ["5", "10", "12"]
    assert {row["stage"] for row in rows} == {"train"}


def test_loss_is_the_mean_over_the_micro_batches_since_the_last_row(tmp_path: Path, tiny_fit: Fit) -> None:
    module = tiny_fit([metrics(tmp_path / "metrics.csv")], steps=10, accumulate=3)
    first, second = read_metrics(tmp_path / "metrics.csv")
    assert len(module.losses) == 30
    assert first.loss == pytest.approx(sum(module.losses[:15]) / 15, rel=1e-5)
    assert second.loss == pytest.approx(sum(module.losses[15:]) / 15, rel=1e-5)


def test_the_learning_rate_is_the_one_that_the_step_used(tmp_path: Path, tiny_fit: Fit) -> None:
    module = tiny_fit([metrics(tmp_path / "metrics.csv")], steps=10)
    assert [row.lr for row in read_metrics(tmp_path / "metrics.csv")] == [module.rates[4], module.rates[9]]
    assert module.rates[9] == 0.01 / 10


def test_a_learning_rate_kept_in_a_tensor_is_read_before_the_scheduler_moves_it(tmp_path: Path, tiny_fit: Fit) -> None:
    callback = metrics(tmp_path / "metrics.csv", log_every=1)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=torch.tensor(0.5))
    callback.on_before_optimizer_step(None, None, optimizer)  # type: ignore[arg-type]
    optimizer.param_groups[0]["lr"].fill_(0.25)
    assert float(callback._lr) == 0.5  # type: ignore[arg-type]


def test_an_epoch_that_ends_in_mid_accumulation_still_makes_whole_steps(tmp_path: Path, tiny_fit: Fit) -> None:
    callback = metrics(tmp_path / "metrics.csv", log_every=1)
    tiny_fit([callback], steps=4, accumulate=3, size=25)
    assert [row.step for row in read_metrics(tmp_path / "metrics.csv")] == [1, 2, 3, 4]
    assert callback.totals()["samples"] == 2 * 25


def test_a_fit_that_ends_early_leaves_a_last_row(tmp_path: Path, tiny_fit: Fit) -> None:
    tiny_fit([metrics(tmp_path / "metrics.csv")], steps=-1, epochs=1, size=35)
    assert [row.step for row in read_metrics(tmp_path / "metrics.csv")] == [5, 7]


def test_totals_count_what_was_trained_on(tmp_path: Path, tiny_fit: Fit) -> None:
    callback = metrics(tmp_path / "metrics.csv")
    module = tiny_fit([callback], steps=12, accumulate=2)
    totals = callback.totals()
    assert set(totals) == set(empty_train())
    assert (totals["steps"], totals["samples"], totals["tokens"]) == (12, 12 * 2 * 5, 12 * 2 * 5 * 4)
    assert totals["tokens_per_second"] == pytest.approx(totals["tokens"] / totals["seconds"])
    assert totals["samples_per_second"] == pytest.approx(totals["samples"] / totals["seconds"])
    assert totals["loss_first"] == pytest.approx(sum(module.losses[:2]) / 2, rel=1e-5)
    assert totals["loss_last"] == pytest.approx(sum(module.losses[20:]) / 4, rel=1e-5)


def test_totals_of_images_have_no_tokens(tmp_path: Path, tiny_fit: Fit) -> None:
    callback = metrics(tmp_path / "metrics.csv", unit="samples/s", count=lambda batch: len(batch["x"]))
    tiny_fit([callback], steps=4)
    totals = callback.totals()
    assert totals["tokens"] is totals["tokens_per_second"] is None
    assert totals["samples"] == 20
    assert totals["samples_per_second"] > 0


def test_skipped_steps_are_trained_on_but_rates_leave_them_out(tmp_path: Path, tiny_fit: Fit) -> None:
    callback = metrics(tmp_path / "metrics.csv", skip=lambda step: step in (2, 3))
    tiny_fit([callback, Slow(2, 3, seconds=0.4)], steps=10)
    totals = callback.totals()
    assert totals["samples"] == 50
    assert totals["seconds"] > 0.8
    assert 40 / totals["samples_per_second"] < totals["seconds"] - 0.7
    assert [row.step for row in read_metrics(tmp_path / "metrics.csv")] == [5, 10]


def test_steps_that_are_not_skipped_do_count(tmp_path: Path, tiny_fit: Fit) -> None:
    callback = metrics(tmp_path / "metrics.csv")
    tiny_fit([callback, Slow(2, 3, seconds=0.4)], steps=10)
    assert callback.totals()["seconds"] > 0.8


def test_all_steps_skipped_leave_the_rate_open_but_not_the_time(tmp_path: Path, tiny_fit: Fit) -> None:
    callback = metrics(tmp_path / "metrics.csv", skip=lambda step: True)
    tiny_fit([callback], steps=5)
    (row,) = read_metrics(tmp_path / "metrics.csv")
    assert row.tokens_per_second is None
    assert row.loss is not None
    assert callback.totals()["tokens_per_second"] is None
    assert callback.totals()["seconds"] > 0


def test_validation_is_no_training_time(tmp_path: Path, tiny_fit: Fit) -> None:
    callback = metrics(tmp_path / "metrics.csv")

    class LongValidation(Callback):
        def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
            time.sleep(0.4)

    tiny_fit([callback, LongValidation()], steps=10, validate=5)
    assert callback.totals()["seconds"] < 0.4


def test_a_killed_and_resumed_fit_leaves_the_rows_of_an_uninterrupted_one(tmp_path: Path, tiny_fit: Fit) -> None:
    tiny_fit([metrics(tmp_path / "whole.csv", log_every=4)], steps=20, accumulate=2)
    checkpoint = tmp_path / "last.ckpt"
    path = tmp_path / "metrics.csv"
    with pytest.raises(RuntimeError, match="killed"):
        tiny_fit([metrics(path, log_every=4), Killed(10, 17, checkpoint)], steps=20, accumulate=2)
    assert [row.step for row in read_metrics(path)] == [4, 8, 12, 16]
    callback = metrics(path, log_every=4)
    tiny_fit([callback], steps=20, accumulate=2, ckpt_path=str(checkpoint))
    whole, resumed = read_metrics(tmp_path / "whole.csv"), read_metrics(path)
    assert [row.step for row in resumed] == [4, 8, 12, 16, 20]
    assert [row[:4] for row in resumed] == [row[:4] for row in whole]
    totals = callback.totals()
    assert totals["steps"] == 20
    assert totals["samples"] == 20 * 10
    assert totals["loss_first"] is not None


def test_a_fit_resumed_after_its_last_step_still_has_taken_all_of_them(tmp_path: Path, tiny_fit: Fit) -> None:
    checkpoint = tmp_path / "last.ckpt"
    first, again = metrics(tmp_path / "metrics.csv"), metrics(tmp_path / "metrics.csv")
    tiny_fit([first], steps=6, accumulate=2, save=str(checkpoint))
    tiny_fit([again], steps=6, accumulate=2, ckpt_path=str(checkpoint))
    assert again.totals() == first.totals()
    assert again.totals()["steps"] == 6


def test_the_loss_since_the_last_row_survives_a_resume(tmp_path: Path, tiny_fit: Fit) -> None:
    checkpoint = tmp_path / "last.ckpt"
    first = tiny_fit([metrics(tmp_path / "metrics.csv", log_every=10)], steps=6, save=str(checkpoint))
    # The row that the end of the first fit wrote is closed: what follows counts from there.
    second = tiny_fit([metrics(tmp_path / "metrics.csv", log_every=10)], steps=10, ckpt_path=str(checkpoint))
    rows = read_metrics(tmp_path / "metrics.csv")
    assert [row.step for row in rows] == [6, 10]
    assert rows[0].loss == pytest.approx(sum(first.losses) / 6, rel=1e-5)
    assert rows[1].loss == pytest.approx(sum(second.losses) / 4, rel=1e-5)


def test_a_checkpoint_between_rows_carries_the_sum(tmp_path: Path, tiny_fit: Fit) -> None:
    checkpoint = tmp_path / "last.ckpt"
    path = tmp_path / "metrics.csv"
    with pytest.raises(RuntimeError, match="killed"):
        tiny_fit([metrics(path, log_every=10), Killed(6, 8, checkpoint)], steps=20)
    assert read_metrics(path) == []
    saved = torch.load(checkpoint, weights_only=True)["callbacks"]["MetricsCsv[train]"]
    second = tiny_fit([metrics(path, log_every=10)], steps=10, ckpt_path=str(checkpoint))
    (row,) = read_metrics(path)
    assert saved["steps"] == 6
    assert row.loss == pytest.approx((float(saved["loss_sum"]) + sum(second.losses)) / 10, rel=1e-5)


def test_stages_share_a_file(tmp_path: Path, tiny_fit: Fit) -> None:
    path = tmp_path / "metrics.csv"
    for stage, steps in (("train", 10), ("p1", 5), ("p2", 5)):
        tiny_fit([metrics(path, stage=stage)], steps=steps)
    assert [(row.stage, row.step) for row in read_metrics(path)] == [("train", 5), ("train", 10), ("p1", 5), ("p2", 5)]
    tiny_fit([metrics(path, stage="p1")], steps=10)
    assert [(row.stage, row.step) for row in read_metrics(path)] == [("train", 5), ("train", 10), ("p1", 5), ("p1", 10)]


def test_each_row_is_on_disk_at_once(tmp_path: Path, tiny_fit: Fit) -> None:
    path = tmp_path / "metrics.csv"
    seen = []

    class Look(Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            seen.append((trainer.global_step, len(read_metrics(path))))

    tiny_fit([metrics(path), Look()], steps=11)
    assert (5, 1) in seen
    assert (9, 1) in seen
    assert (10, 2) in seen


def test_the_device_is_waited_for_only_on_log_steps(tmp_path: Path, tiny_fit: Fit) -> None:
    waits = []

    class Watch(TorchDispatchMode):
        def __init__(self, step: int) -> None:
            super().__init__()
            self.step = step

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is torch.ops.aten._local_scalar_dense.default:
                waits.append(self.step)
            return func(*args, **(kwargs or {}))

    class Watched(MetricsCsv):
        def on_train_batch_end(self, trainer: Any, *rest: Any) -> None:
            with Watch(trainer.global_step):
                super().on_train_batch_end(trainer, *rest)

    tiny_fit([Watched(tmp_path / "metrics.csv", stage="train", count=count, log_every=10)], steps=25)
    assert sorted(set(waits)) == [1, 10, 20, 25]


def test_memory_of_this_process_is_its_resident_set(tmp_path: Path) -> None:
    import psutil

    used, label = memory_in_use("cpu")
    assert label == "RSS"
    assert used == pytest.approx(psutil.Process(os.getpid()).memory_info().rss, rel=0.05)


def test_log_every_must_be_positive(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="log_every=0"):
        metrics(tmp_path / "metrics.csv", log_every=0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_memory_on_cuda_is_the_allocators_peak() -> None:
    block = torch.empty(1_000_000, device="cuda")
    used, label = memory_in_use("cuda:0")
    assert label == "peak allocated"
    assert used is not None
    assert used >= block.numel() * 4


@pytest.mark.slow
def test_ranks_log_one_mean_and_count_together(tmp_path: Path) -> None:
    script = """
        import json, sys, warnings
        warnings.simplefilter("ignore")
        import torch
        from lightning.pytorch import Callback, LightningModule, Trainer
        from torch.utils.data import DataLoader, DistributedSampler
        from pipeline.report.metrics import MetricsCsv

        class Mean(LightningModule):
            def __init__(self):
                super().__init__()
                self.weight = torch.nn.Parameter(torch.ones(()))
            def training_step(self, batch, batch_idx):
                return (self.weight * batch["x"]).mean()
            def configure_optimizers(self):
                return torch.optim.SGD(self.parameters(), lr=0.0)
            def train_dataloader(self):
                data = [{"x": torch.tensor([float(n)])} for n in range(40)]
                sampler = DistributedSampler(data, num_replicas=2, rank=self.global_rank, shuffle=False)
                return DataLoader(data, batch_size=2, sampler=sampler)

        class Save(Callback):
            def on_train_end(self, trainer, module):
                json.dump(metrics.totals(), open(f"{sys.argv[1]}/{trainer.global_rank}.json", "w"))

        path = f"{sys.argv[1]}/metrics.csv"
        metrics = MetricsCsv(path, stage="train", count=lambda batch: batch["x"].numel(), log_every=2, data_ranks=2)
        Trainer(
            max_steps=4, accelerator="cpu", devices=2, strategy="ddp_fork", callbacks=[metrics, Save()], logger=False,
            enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
            use_distributed_sampler=False,
        ).fit(Mean())
    """
    root = Path(metrics_module.__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", textwrap.dedent(script), str(tmp_path)], env=environment, check=True)
    rows = read_metrics(tmp_path / "metrics.csv")
    # Both ranks together see 0 to 3, then 4 to 7, and so on: the mean of a step is that of its four numbers.
    assert [(row.step, row.loss) for row in rows] == [(2, 3.5), (4, 11.5)]
    for rank in (0, 1):
        totals = json.loads((tmp_path / f"{rank}.json").read_text(encoding="utf-8"))
        assert totals["samples"] == 4 * 2 * 2
        assert (totals["loss_first"], totals["loss_last"]) == (1.5, 11.5)
