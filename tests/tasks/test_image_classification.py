"""Image classification on real digits: loss and accuracy against references, speed in turns, a model that learns."""

import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sklearn.dummy import DummyClassifier
from sklearn.metrics import accuracy_score, log_loss
from torch import nn
from torch.utils.data import Dataset

from pipeline.data.base import DataBundle, DataSpec
from pipeline.data.digits import Digits
from pipeline.models.efficientnet import EfficientNet
from pipeline.tasks import lookup
from pipeline.tasks.image_classification import ImageClassification

TASK = ImageClassification()
DIGITS = Digits(name="digits", image_size=16, interpolation="bilinear", evaluation_fraction=0.2, seed=0)
SMALL = EfficientNet(
    name="efficientnet",
    width_coefficient=0.25,
    depth_coefficient=0.25,
    strides=(1, 1, 2, 1, 1, 2, 1),
    dropout=0.0,
    drop_connect=0.0,
)


class Flat(nn.Module):
    """A linear classifier with the calling convention of transformers' image models."""

    def __init__(self, pixels: int = 256, classes: int = 10) -> None:
        super().__init__()
        self.linear = nn.Linear(pixels, classes)

    def forward(self, pixel_values: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.linear(pixel_values.flatten(1)))


class Slow(Flat):
    """Notes who was called when; `seconds` is what a call takes at least."""

    def __init__(self, calls: list[str], name: str, seconds: float) -> None:
        super().__init__()
        self.calls, self.name, self.seconds = calls, name, seconds

    def forward(self, pixel_values: torch.Tensor) -> SimpleNamespace:
        assert not self.training
        assert not torch.is_grad_enabled()
        self.calls.append(f"{self.name}{len(pixel_values)}")
        time.sleep(self.seconds)
        return super().forward(pixel_values)


class Rows(Dataset[dict[str, torch.Tensor]]):
    def __init__(self, labels: list[int]) -> None:
        self.labels = labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        return {"pixel_values": torch.full((1, 16, 16), float(i)), "labels": torch.tensor(self.labels[i])}


def rows(train: list[int], evaluation: list[int], classes: int = 3) -> DataBundle:
    spec = DataSpec(classes=classes, channels=1, image_size=16)
    return DataBundle(Rows(train), Rows(evaluation), spec, fingerprint="", description="")


@pytest.fixture(scope="module")
def bundle() -> DataBundle:
    return DIGITS.open(None)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def batch_of(bundle: DataBundle, start: int, size: int) -> dict[str, torch.Tensor]:
    items = [bundle.train[i % len(bundle.train)] for i in range(start, start + size)]  # type: ignore[arg-type]
    return {key: torch.stack([item[key] for item in items]) for key in items[0]}


def everything(data: Dataset[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    items = [data[i] for i in range(len(data))]  # type: ignore[arg-type]
    return {key: torch.stack([item[key] for item in items]) for key in items[0]}


def test_the_task_is_found_by_its_name() -> None:
    assert isinstance(lookup.get("image_classification"), ImageClassification)
    assert SMALL.task == DIGITS.task == TASK.name


def test_loss_is_the_mean_negative_log_likelihood(bundle: DataBundle) -> None:
    model, batch = Flat(), batch_of(bundle, 0, 24)
    loss = TASK.loss(model, batch)
    probabilities = model(batch["pixel_values"]).logits.detach().double().softmax(-1).numpy()
    assert loss.item() == pytest.approx(log_loss(batch["labels"], probabilities, labels=range(10)), rel=1e-5)
    assert (loss.dtype, loss.shape) == (torch.float32, ())
    assert loss.requires_grad
    assert TASK.count(batch) == 24


@pytest.mark.parametrize(
    ("weights", "loss"),
    [(torch.bfloat16, torch.float32), (torch.float16, torch.float32), (torch.float64, torch.float64)],
)
def test_images_follow_the_weights_and_the_loss_is_wide(
    bundle: DataBundle, weights: torch.dtype, loss: torch.dtype
) -> None:
    model = Flat().to(weights)
    found = TASK.loss(model, batch_of(bundle, 0, 8))
    assert found.dtype == loss
    found.backward()
    assert model.linear.weight.grad is not None
    assert TASK.evaluate(model, bundle, 64, "cpu").n == 360


@pytest.mark.parametrize("batch_size", [1, 7, 360, 1000])
def test_accuracy_and_loss_are_those_of_scikit_learn_whatever_the_batch(bundle: DataBundle, batch_size: int) -> None:
    model = Flat()
    quality = TASK.evaluate(model, bundle, batch_size, "cpu")
    held_out = everything(bundle.evaluation)
    logits = model(held_out["pixel_values"]).logits.detach().double()
    assert quality.value == pytest.approx(accuracy_score(held_out["labels"], logits.argmax(-1)), abs=1e-6)
    assert quality.loss == pytest.approx(log_loss(held_out["labels"], logits.softmax(-1).numpy()), rel=1e-5)
    assert (quality.metric, quality.direction, quality.n) == ("accuracy", "higher", 360)
    assert 0 < quality.value < 1


def test_accuracy_weighs_images_not_classes() -> None:
    model = Flat(classes=3)
    nn.init.zeros_(model.linear.weight)
    model.linear.bias.data = torch.tensor([1.0, 0.0, 0.0])
    assert TASK.evaluate(model, rows([0], [0, 0, 0, 1, 2]), 2, "cpu").value == pytest.approx(3 / 5)


@pytest.mark.parametrize("training", [True, False])
def test_evaluation_uses_running_statistics_and_restores_the_mode(bundle: DataBundle, training: bool) -> None:
    model = SMALL.build(bundle.spec).train(training)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    first = TASK.evaluate(model, bundle, 360, "cpu")
    assert model.training is training
    # Batch statistics would make the outcome depend on the batch.
    assert TASK.evaluate(model, bundle, 90, "cpu").loss == pytest.approx(first.loss, rel=1e-4)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_the_mode_is_restored_when_evaluation_fails(bundle: DataBundle) -> None:
    model = Flat(pixels=5).train()
    with pytest.raises(RuntimeError):
        TASK.evaluate(model, bundle, 8, "cpu")
    assert model.training


def test_baseline_is_scikit_learns_most_frequent_class(bundle: DataBundle) -> None:
    train, held_out = everything(bundle.train)["labels"], everything(bundle.evaluation)["labels"]
    dummy = DummyClassifier(strategy="most_frequent").fit(np.zeros((len(train), 1)), train)
    assert TASK.baseline(bundle) == pytest.approx(dummy.score(np.zeros((len(held_out), 1)), held_out))
    # The class is the training split's, not the one most frequent where it is measured.
    assert TASK.baseline(rows([2, 2, 1], [1, 1, 1, 2])) == pytest.approx(1 / 4)


def test_speed_takes_turns_over_one_batch_in_eval_mode(bundle: DataBundle) -> None:
    calls: list[str] = []
    models = {name: Slow(calls, name, seconds).train() for name, seconds in (("a", 0.002), ("b", 0.02))}
    speed = TASK.speed(models, bundle, "cpu")
    assert calls[:4] == ["a32", "a32", "b32", "b32"], "a warm-up for each"
    rounds = calls[4:]
    assert len(rounds) >= 10
    assert rounds == ["a32", "b32"] * (len(rounds) // 2)
    assert list(speed) == ["a", "b"]
    for name, least in (("a", 0.002), ("b", 0.02)):
        found = speed[name]
        assert (found.unit, found.batch_size) == ("samples/s", 32)
        assert found.latency >= least
        assert found.per_second == pytest.approx(32 / found.latency)
    assert all(model.training for model in models.values())


def test_probe_and_speed_make_do_with_fewer_images() -> None:
    few = rows([0], [0, 1])
    assert TASK.probe(few)["pixel_values"].tolist() == [[[[float(i)] * 16] * 16] for i in range(2)]
    assert TASK.speed({"a": Flat(classes=3)}, few, "cpu")["a"].batch_size == 2


def test_probe_is_four_fixed_images_without_labels(bundle: DataBundle) -> None:
    probe = TASK.probe(bundle)
    assert set(probe) == {"pixel_values"}
    assert (probe["pixel_values"].shape, probe["pixel_values"].dtype) == ((4, 1, 16, 16), torch.float32)
    assert torch.equal(probe["pixel_values"], everything(bundle.evaluation)["pixel_values"][:4])


def test_thirty_steps_teach_the_small_model_most_of_the_digits(bundle: DataBundle) -> None:
    model = SMALL.build(bundle.spec)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    before = TASK.evaluate(model, bundle, 120, "cpu")
    assert before.loss == pytest.approx(np.log(10), abs=0.1)
    for step in range(30):
        optimizer.zero_grad()
        TASK.loss(model, batch_of(bundle, 32 * step, 32)).backward()
        optimizer.step()
    after = TASK.evaluate(model, bundle, 120, "cpu")
    # As transformers initialises it, the model is still at chance here.
    assert after.loss < 0.75 * before.loss
    assert after.value > 4 * TASK.baseline(bundle)
