"""`model=efficientnet`: transformers' EfficientNet (Tan & Le, 2019, arXiv:1905.11946), made to learn from scratch.

transformers' class is meant to be filled with published weights. Fresh from its constructor it does not train: batch
norm scales are drawn around 0 (std 0.02), so that every block shrinks its signal fifty times, and the running
statistics follow the last batch alone (the momentum 0.99 is TensorFlow's convention, where PyTorch means 0.01).
`initialise` draws the weights as the paper's code does, and the momentum is PyTorch's.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from annotated_types import Ge, Gt, Lt

from pipeline.errors import ConfigError
from pipeline.models.base import Model, TaskName
from pipeline.registry import register

if TYPE_CHECKING:
    from torch import nn
    from transformers import EfficientNetForImageClassification

    from pipeline.data.base import DataSpec

# One entry a stage of B0 (the paper's table 1).
KERNELS = (3, 3, 5, 3, 5, 5, 3)
WIDTHS_IN = (32, 16, 24, 40, 80, 112, 192)
WIDTHS_OUT = (16, 24, 40, 80, 112, 192, 320)
REPEATS = (1, 2, 2, 3, 3, 4, 1)
EXPANSIONS = (1, 6, 6, 6, 6, 6, 6)
STEM_STRIDE = 2
"""Fixed in transformers' class, so that a saved model opens with plain transformers."""
TOP_CHANNELS = 1280
WIDTH_UNIT = 8
CLASSIFIER_DEVIATION = 0.01
BATCH_NORM_MOMENTUM = 0.1
"""PyTorch's default, which the class gives to the expansion norms in any case; the statistics cover some 20 batches."""


@register("model", "efficientnet")
@dataclass(frozen=True, kw_only=True)
class EfficientNet(Model):
    """Sizes relative to B0. Blocks of a stage: B0's times `depth_coefficient`, rounded up, so at 0.25 or less one each.

    `strides`: one for each stage that is kept, the first 1 to 7 of B0's, after the stem's 2; small images are learned
    faster with fewer. `dropout` is before the classifier; `drop_connect` is that of the last block's branch, growing
    linearly from 0 in the first (transformers drops elements, where the paper drops whole branches).
    """

    task: ClassVar[TaskName] = "image_classification"

    width_coefficient: Annotated[float, Gt(0)]
    depth_coefficient: Annotated[float, Gt(0)]
    strides: tuple[Literal[1, 2], ...]
    dropout: Annotated[float, Ge(0), Lt(1)]
    drop_connect: Annotated[float, Ge(0), Lt(1)]

    def problems(self) -> list[str]:
        stages = len(self.strides)
        if 1 <= stages <= len(REPEATS):
            return []
        limit = f"give 1 to {len(REPEATS)}, one a stage, each 1 or 2"
        return [f"model.strides={list(self.strides)} has {stages} entries; {limit}"]

    def smallest_image(self) -> int:
        """Pixels a side below which a layer of stride 2 would be left with a single pixel to halve."""
        return STEM_STRIDE * math.prod(self.strides)

    def build(self, spec: DataSpec) -> EfficientNetForImageClassification:
        """Fresh float32 weights from the global torch seed, for [B, spec.channels, spec.image_size, spec.image_size].

        Raises:
            ConfigError: the strides halve an image more often than its size allows.
        """
        from transformers import EfficientNetConfig, EfficientNetForImageClassification

        if spec.classes is None or spec.channels is None or spec.image_size is None:
            raise ValueError("the data's spec has no classes, channels or image size")
        if spec.image_size < self.smallest_image():
            raise ConfigError(
                f"data.image_size={spec.image_size} is too small for model.strides={list(self.strides)}, which divide "
                f"it by {self.smallest_image()} (the stem's 2 included); choose data.image_size>="
                f"{self.smallest_image()} or fewer strides of 2"
            )
        stages = len(self.strides)
        config = EfficientNetConfig(
            num_channels=spec.channels,
            image_size=spec.image_size,
            width_coefficient=self.width_coefficient,
            depth_coefficient=self.depth_coefficient,
            depth_divisor=WIDTH_UNIT,
            kernel_sizes=list(KERNELS[:stages]),
            in_channels=list(WIDTHS_IN[:stages]),
            out_channels=list(WIDTHS_OUT[:stages]),
            strides=list(self.strides),
            num_block_repeats=list(REPEATS[:stages]),
            expand_ratios=list(EXPANSIONS[:stages]),
            hidden_dim=scaled_width(TOP_CHANNELS, self.width_coefficient),
            batch_norm_momentum=BATCH_NORM_MOMENTUM,
            dropout_rate=self.dropout,
            drop_connect_rate=self.drop_connect,
        )
        config.num_labels = spec.classes
        model = EfficientNetForImageClassification(config)
        initialise(model)
        return model


def scaled_width(channels: int, coefficient: float) -> int:
    """`channels` x `coefficient` to the nearest multiple of 8, never more than a tenth below it (the paper's rule)."""
    wanted = channels * coefficient
    width = max(WIDTH_UNIT, int(wanted + WIDTH_UNIT / 2) // WIDTH_UNIT * WIDTH_UNIT)
    return width if width >= 0.9 * wanted else width + WIDTH_UNIT


def initialise(model: nn.Module) -> None:
    """Weights in place, as in the paper's code (tensorflow/tpu, efficientnet_model.py).

    Convolutions: normal with variance 2 / fan-out, where a depthwise filter's fan-out is its own area. Norms: scale 1,
    shift 0. Biases: 0. The classifier differs: the paper's spread, 1 / sqrt(classes), starts ten classes off with
    confident guesses, so its weights are normal with deviation 0.01.
    """
    from torch import nn

    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            fan_out = module.out_channels // module.groups * math.prod(module.kernel_size)
            nn.init.normal_(module.weight, std=math.sqrt(2 / fan_out))
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=CLASSIFIER_DEVIATION)
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)
        else:
            continue
        if module.bias is not None:
            nn.init.zeros_(module.bias)
