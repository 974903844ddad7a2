"""Results as runs write them, for the tests of this folder."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import pytest

from pipeline.report.result import new_result


@pytest.fixture(autouse=True)
def _drawn(drawing: Callable[[], AbstractContextManager[object]]) -> Iterator[None]:
    with drawing():
        yield


def language_result() -> dict[str, Any]:
    """An int8 run of a language model that went well."""
    choices = {"model": "gpt", "data": "pystdlib", "compression": ["int8"], "precision": "16-mixed"}
    result = new_result("run", ["compression=int8", "precision=16-mixed"], choices)
    result["status"] = "ok"
    result["precision"].update(requested="16-mixed", used="16-mixed")
    result["parallelism"].update(strategy="single", devices=1, nodes=1)
    result["device"].update(kind="cpu", name="a processor, 2 cores")
    result["train"].update(steps=200, samples=3200, tokens=819_200, seconds=41.2, samples_per_second=77.7)
    result["train"].update(tokens_per_second=19_883.0, loss_first=5.61, loss_last=2.19)
    result["memory"]["measured"].update(train=215_000_000, evaluate=88_000_000)
    result["memory"]["kind"] = "allocated"
    result["quality"].update(metric="perplexity", direction="lower", before=8.912, after=8.934, loss_before=2.187)
    result["quality"].update(loss_after=2.19, baseline=28.3, n=65_536)
    result["size"].update(parameters_before=4_910_000, parameters_after=4_910_000, nonzero_after=4_909_800)
    result["size"].update(bytes_before=19_640_000, bytes_after=5_400_000, ratio=3.637, ratio_float32=3.637)
    result["size"]["claim"] = "smaller"
    result["speed"].update(unit="tokens/s", before=410.0, after=905.0, ratio=2.207, batch_size=1)
    result["speed"].update(latency_before=0.00244, latency_after=0.0011)
    result["stages"].append(
        {
            "name": "int8",
            "method": "int8",
            "config": {"ignore": []},
            "seconds": 0.4,
            "quality_after": 8.934,
            "bytes_after": 5_400_000,
            "train": None,
            "memory": {"train": None, "compress": 7_000_000, "train_predicted": None},
            "detail": {"layers": 24, "kernel": "torch._int_mm"},
        }
    )
    files = [{"name": "model.safetensors", "bytes": 5_400_000, "sha256": "0" * 64}]
    reload = {"ok": True, "max_abs_diff": 0.0}
    result["artifact"].update(path="artifact", format="int-quantized", files=files, reload=reload)
    result["seconds"] = 74.0
    return result


def distilled_result() -> dict[str, Any]:
    """The same run with a link before it that had a fit of its own, in more memory than stage 0's."""
    result = language_result()
    memory = {"train": 400_000_000, "compress": 6_000_000, "train_predicted": 398_000_000}
    link = {**result["stages"][0], "name": "distill", "method": "distill", "train": result["train"], "memory": memory}
    result["stages"].insert(0, link)
    return result


def image_result() -> dict[str, Any]:
    """A pruned image classifier that became neither smaller, nor faster, nor better."""
    result = language_result()
    result["choices"] = {"model": "efficientnet", "data": "digits", "compression": ["magnitude"]}
    result["overrides"] = ["model=efficientnet", "data=digits", "compression=magnitude"]
    result["quality"].update(metric="accuracy", direction="higher", before=0.981, after=0.962, baseline=0.101, n=360)
    result["size"].update(bytes_before=1_000_000, bytes_after=1_250_000, ratio=0.8, ratio_float32=0.8, claim="none")
    result["size"].update(parameters_before=250_000, parameters_after=250_000, nonzero_after=125_000)
    result["speed"].update(unit="samples/s", before=2000.0, after=800.0, ratio=0.4, batch_size=32)
    result["speed"].update(latency_before=0.016, latency_after=0.04)
    result["stages"][0].update(name="magnitude", method="magnitude", quality_after=0.962, bytes_after=1_250_000)
    return result


@pytest.fixture
def language() -> dict[str, Any]:
    return language_result()


@pytest.fixture
def distilled() -> dict[str, Any]:
    return distilled_result()


@pytest.fixture
def image() -> dict[str, Any]:
    return image_result()


@pytest.fixture
def tiny_fit() -> Callable[..., Any]:
    """`tiny_fit(callbacks, steps, accumulate, batch, validate, ckpt_path)`: a real Lightning fit of a linear model."""
    import warnings

    import torch
    from lightning.pytorch import LightningModule, Trainer
    from torch import nn
    from torch.utils.data import DataLoader
    from torchdata.stateful_dataloader import StatefulDataLoader

    class Regression(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.layer = nn.Linear(4, 1)
            self.losses: list[float] = []
            self.rates: list[float] = []

        def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
            loss = (self.layer(batch["x"]).squeeze(-1) - batch["y"]).square().mean()
            self.losses.append(float(loss.detach()))
            return loss

        def validation_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> None:
            import time

            time.sleep(0.05)

        def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, closure: Any) -> None:
            self.rates.append(optimizer.param_groups[0]["lr"])
            optimizer.step(closure=closure)

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), lr=0.01)
            schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (step + 1))
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    class Points(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
        def __init__(self, size: int) -> None:
            self.size = size

        def __len__(self) -> int:
            return self.size

        def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
            x = torch.randn(4, generator=torch.Generator().manual_seed(index))
            return {"x": x, "y": x.sum()}

    def run(
        callbacks: list[Any],
        *,
        steps: int = 20,
        accumulate: int = 1,
        size: int = 1000,
        validate: int = 0,
        ckpt_path: str | None = None,
        save: str | None = None,
        epochs: int = -1,
    ) -> Any:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*does not have many workers.*")
            warnings.filterwarnings("ignore", message=".*have no `val_dataloader`.*")
            warnings.filterwarnings("ignore", message=".*set_vital.*")
            warnings.filterwarnings("ignore", message=".*less than the number of training batches.*")
            warnings.filterwarnings("ignore", message=".*treespec, LeafSpec.*")
            trainer = Trainer(
                max_steps=steps,
                max_epochs=epochs,
                accumulate_grad_batches=accumulate,
                accelerator="cpu",
                callbacks=callbacks,
                logger=False,
                enable_progress_bar=False,
                enable_model_summary=False,
                enable_checkpointing=False,
                val_check_interval=validate or None,
                check_val_every_n_epoch=None if validate else 1,
                limit_val_batches=1 if validate else 0,
                num_sanity_val_steps=0,
            )
            module = Regression()
            loader = StatefulDataLoader(Points(size), batch_size=5)
            validation = DataLoader(Points(5), batch_size=5) if validate else None
            trainer.fit(module, loader, validation, ckpt_path=ckpt_path, weights_only=False)
            if save:
                trainer.save_checkpoint(save)
        return module

    return run
