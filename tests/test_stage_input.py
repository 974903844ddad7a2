"""What is said where the weights of a checkpoint do not fit."""

from pathlib import Path

import pytest
import torch

from pipeline.artifact import store
from pipeline.composing import compose
from pipeline.compression.magnitude import prune_magnitude
from pipeline.errors import ConfigError
from pipeline.models.byte_tokenizer import byte_tokenizer
from pipeline.stage_input import context_of, remedy
from pipeline.walk import changing_stages, preflight, stages_of
from tests import tiny

NOTHING = torch.zeros(1)


def test_adapters_without_the_layers_that_they_lie_beside_are_named() -> None:
    """As a fit beside a compressed base (QLoRA) leaves them: no choice of a model makes them fit."""
    adapters = {"fc.bias": NOTHING, "fc.lora_A": NOTHING, "fc.lora_B": NOTHING}
    told = remedy("artifact=last.ckpt", Path("last.ckpt"), adapters)
    assert told.endswith("give the artifact of its run")
    whole = remedy("artifact=last.ckpt", Path("last.ckpt"), {**adapters, "fc.weight": NOTHING})
    assert "adapter=CHOICE" in whole


def test_a_teacher_of_stacked_experts_may_follow_a_link_that_has_taken_them_apart(tmp_path: Path) -> None:
    """A checkpoint that lies apart from its run is of the model before all links."""
    model = tiny.mixtral(vocab_size=256)
    model.save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    weights = {f"model.{name}": value for name, value in model.state_dict().items()}
    torch.save({"state_dict": weights, "global_step": 1}, tmp_path / "teacher.ckpt")

    def look(teacher: str) -> None:
        config = compose([
            "model=hf", f"model.pretrained={tmp_path}/model", "data.sequence_length=16", "trainer=smoke", "device=cpu",
            "compression=[magnitude,distill]", "compression.distill.student=null",
            f"compression.distill.teacher={tmp_path}/{teacher}",
        ])  # fmt: skip
        tokenizer = config.model.tokenizer()
        preflight(config, config.data.open(tokenizer), tokenizer, tmp_path, changing_stages(stages_of(config)))

    look("teacher.ckpt")
    weights["model.more"] = torch.zeros(1)
    torch.save({"state_dict": weights, "global_step": 1}, tmp_path / "other.ckpt")
    with pytest.raises(ConfigError, match="1 tensor too many"):
        look("other.ckpt")


def test_what_earlier_links_and_the_artifact_keep_of_a_layer_is_known_before_there_are_masks(tmp_path: Path) -> None:
    model = tiny.opt()
    fc1, fc2 = (f"model.decoder.layers.0.{name}" for name in ("fc1", "fc2"))
    store.save(
        prune_magnitude(model, [fc1], 0.75), tmp_path / "a", chain=[], probe={"input_ids": torch.ones(1, 4).long()}
    )
    config = compose(["compression=[wanda,mixed_bits]", "compression.wanda.ignore=[fc2]"])
    further = compose(["job=compress", f"artifact={tmp_path}/a", "compression=[wanda,mixed_bits]"])
    for given, kept in ((config, (0.5, 1)), (further, (0.25, 0.5))):
        wanda, mixed_bits = (context_of(given, stage, tiny.opt()) for stage in stages_of(given)[1:3])
        assert (mixed_bits.kept(fc1), mixed_bits.kept(fc2)) == kept
        assert wanda.kept(fc2) == 1
    chain = "compression=[wanda,distill,mixed_bits]"
    student = compose(["job=compress", f"artifact={tmp_path}/a", chain, f"compression.distill.student={tmp_path}/a"])
    assert context_of(student, stages_of(student)[3], tiny.opt()).kept(fc1) == 1  # whose masks are others
