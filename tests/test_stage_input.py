"""What is said where the weights of a checkpoint do not fit."""

from pathlib import Path

import torch

from pipeline.stage_input import remedy

NOTHING = torch.zeros(1)


def test_adapters_without_the_layers_that_they_lie_beside_are_named() -> None:
    """As a fit beside a compressed base (QLoRA) leaves them: no choice of a model makes them fit."""
    adapters = {"fc.bias": NOTHING, "fc.lora_A": NOTHING, "fc.lora_B": NOTHING}
    told = remedy("artifact=last.ckpt", Path("last.ckpt"), adapters)
    assert told.endswith("give the artifact of its run")
    whole = remedy("artifact=last.ckpt", Path("last.ckpt"), {**adapters, "fc.weight": NOTHING})
    assert "adapter=CHOICE" in whole
