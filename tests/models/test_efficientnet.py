"""The EfficientNet that is built: sizes, weights that can learn, sizes that do not fit, reopening in transformers."""

import dataclasses
import math
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForImageClassification

from pipeline.data.base import DataSpec
from pipeline.errors import ConfigError
from pipeline.models.efficientnet import EfficientNet, scaled_width

SPEC = DataSpec(classes=10, channels=1, image_size=32)
SMALL = EfficientNet(
    name="efficientnet",
    width_coefficient=0.25,
    depth_coefficient=0.25,
    strides=(1, 1, 2, 1, 1, 2, 1),
    dropout=0.0,
    drop_connect=0.0,
)
B0 = dataclasses.replace(SMALL, width_coefficient=1.0, depth_coefficient=1.0, strides=(1, 2, 2, 2, 1, 2, 1))


def test_b0_has_the_parameters_of_the_paper() -> None:
    with torch.device("meta"):
        model = B0.build(DataSpec(classes=1000, channels=3, image_size=224))
    # Tan & Le report 5.3M; 5,288,548 is the count of the reference implementations.
    assert sum(parameter.numel() for parameter in model.parameters()) == 5_288_548
    assert {tensor.device.type for tensor in [*model.parameters(), *model.buffers()]} == {"meta"}


def test_logits_have_a_column_a_class_for_the_channels_and_size_of_the_data() -> None:
    for channels, classes, side in ((1, 10, 8), (3, 7, 33)):
        model = SMALL.build(DataSpec(classes=classes, channels=channels, image_size=side))
        assert model.training
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
        assert model(pixel_values=torch.randn(2, channels, side, side)).logits.shape == (2, classes)


def test_strides_decide_the_size_of_the_last_map() -> None:
    images = torch.randn(2, 1, 32, 32)
    for strides, side in (((1, 1, 2, 1, 1, 2, 1), 4), ((1,) * 7, 16), ((1, 2, 2, 2, 1, 2, 1), 1), ((1, 2), 8)):
        model = dataclasses.replace(SMALL, strides=strides).build(SPEC)
        assert model.efficientnet(images).last_hidden_state.shape[-2:] == (side, side)


@pytest.mark.parametrize(
    "strides", [(1,), (1,) * 7, (2, 1, 1, 1, 1, 1, 1), (1, 1, 2, 1, 1, 2, 1), (1, 2, 2, 2, 1, 2, 1)]
)
def test_the_smallest_image_works_and_one_pixel_less_is_refused(strides: tuple[int, ...]) -> None:
    model = dataclasses.replace(SMALL, strides=strides)
    side = model.smallest_image()
    built = model.build(dataclasses.replace(SPEC, image_size=side)).eval()
    assert built(pixel_values=torch.randn(1, 1, side, side)).logits.isfinite().all()
    with pytest.raises(ConfigError, match=rf"^data\.image_size={side - 1} is too small for model\.strides=.*>={side} "):
        model.build(dataclasses.replace(SPEC, image_size=side - 1))
    with pytest.raises(RuntimeError, match="size"):
        built(pixel_values=torch.randn(1, 1, side // 2, side // 2))


@pytest.mark.parametrize("strides", [(), (1,) * 8])
def test_a_wrong_number_of_strides_is_one_line(strides: tuple[int, ...]) -> None:
    [problem] = dataclasses.replace(SMALL, strides=strides).problems()
    assert problem.startswith(f"model.strides={list(strides)} ")
    assert "give 1 to 7" in problem
    assert SMALL.problems() == []


def test_every_layer_starts_with_a_signal_and_a_gradient() -> None:
    torch.manual_seed(0)
    model = dataclasses.replace(SMALL, width_coefficient=0.5).build(SPEC)
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    assert {module.momentum for module in norms} == {0.1}
    assert all(bool((module.weight == 1).all()) and bool((module.bias == 0).all()) for module in norms)
    for module in model.modules():
        # Few weights say little of their deviation: 5 standard errors of it.
        if isinstance(module, nn.Conv2d):
            wanted = math.sqrt(2 / (module.out_channels // module.groups * module.kernel_size[0] ** 2))
            tolerance = 5 / math.sqrt(2 * module.weight.numel())
            assert module.weight.detach().square().mean().sqrt().item() == pytest.approx(wanted, rel=tolerance)
    logits = model(pixel_values=torch.randn(16, 1, 32, 32)).logits
    assert logits.std() < 0.5, "the first guesses are confident"
    nn.functional.cross_entropy(logits, torch.arange(16) % 10).backward()
    assert all(parameter.grad is not None and bool(parameter.grad.any()) for parameter in model.parameters())


def test_weights_follow_the_global_seed() -> None:
    def build(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return torch.cat([parameter.detach().flatten() for parameter in SMALL.build(SPEC).parameters()])

    assert torch.equal(build(1), build(1))
    assert not torch.equal(build(1), build(2))


def test_as_many_stages_are_kept_as_there_are_strides() -> None:
    for stages, blocks in ((1, 1), (4, 8), (7, 16)):
        with torch.device("meta"):
            model = dataclasses.replace(B0, strides=B0.strides[:stages]).build(SPEC)
        assert len(model.efficientnet.encoder.blocks) == blocks
        assert model.efficientnet.encoder.top_conv.in_channels == (16, 24, 40, 80, 112, 192, 320)[stages - 1]


def test_dropout_settings_reach_the_layers() -> None:
    assert {module.p for module in SMALL.build(SPEC).modules() if isinstance(module, nn.Dropout)} == {0.0}
    model = dataclasses.replace(SMALL, dropout=0.3, drop_connect=0.7).build(SPEC)
    assert model.dropout.p == 0.3
    rates = [block.projection.dropout.p for block in model.efficientnet.encoder.blocks]
    assert rates == pytest.approx([0.7 * i / 7 for i in range(7)])


@pytest.mark.parametrize(
    ("channels", "coefficient", "width"), [(32, 0.5, 16), (40, 0.5, 24), (24, 0.5, 16), (1280, 0.01, 16), (16, 0.1, 8)]
)
def test_widths_are_multiples_of_eight_at_most_a_tenth_too_small(channels: int, coefficient: float, width: int) -> None:
    assert scaled_width(channels, coefficient) == width


def test_every_width_agrees_with_the_one_transformers_computes() -> None:
    for hundredths in range(5, 250, 7):
        with torch.device("meta"):
            model = dataclasses.replace(SMALL, width_coefficient=hundredths / 100).build(SPEC)
        # The head's width is told to transformers, the last convolution's is computed there.
        assert model.efficientnet.encoder.top_conv.out_channels == model.classifier.in_features


def test_plain_transformers_opens_what_was_saved(tmp_path: Path) -> None:
    model = SMALL.build(SPEC)
    images = torch.randn(4, 1, 32, 32)
    model(pixel_values=images)
    model.eval().save_pretrained(tmp_path)
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path).eval()
    saved, found = model.state_dict(), loaded.state_dict()
    assert saved.keys() == found.keys()
    assert all(torch.equal(saved[name], found[name]) for name in saved)
    with torch.no_grad():
        # Not exactly equal: weights that lie in the mapped file are aligned otherwise, and oneDNN then adds otherwise.
        torch.testing.assert_close(loaded(pixel_values=images).logits, model(pixel_values=images).logits)
