"""Names that checkpoints of a family have for the layers of its experts."""

import pytest
import torch

from pipeline.layers.public_names import joined, public_names, under_own_names, under_public_names
from pipeline.layers.select import select, split_experts
from pipeline.models.architecture import describe
from tests.layers.test_experts import gpt_oss, llama4, nemotron, phimoe, qwen
from tests.tiny import mixtral


def names_of(build):
    model = split_experts(build())
    return public_names(model, select(model, describe(model)).layers)


def test_layers_of_an_expert_have_the_names_of_its_family():
    assert names_of(mixtral)["model.layers.1.mlp.experts.3.gate_up_proj"] == [
        "model.layers.1.block_sparse_moe.experts.3.w1",
        "model.layers.1.block_sparse_moe.experts.3.w3",
    ]
    assert names_of(mixtral)["model.layers.1.mlp.experts.3.down_proj"] == [
        "model.layers.1.block_sparse_moe.experts.3.w2"
    ]
    assert names_of(qwen)["model.layers.0.mlp.experts.4.gate_up_proj"] == [
        "model.layers.0.mlp.experts.4.gate_proj",
        "model.layers.0.mlp.experts.4.up_proj",
    ]
    assert "model.layers.0.mlp.experts.4.down_proj" not in names_of(qwen)  # it is called so


def test_other_layers_and_tensors_have_theirs_too():
    assert names_of(phimoe)["model.layers.0.mlp.router.weight"] == ["model.layers.0.block_sparse_moe.gate.weight"]
    assert names_of(nemotron)["model.layers.1.mixer.q_proj"] == ["backbone.layers.1.mixer.q_proj"]
    assert names_of(nemotron)["model.layers.1.norm.weight"] == ["backbone.layers.1.norm.weight"]


@pytest.mark.parametrize("build", [gpt_oss, llama4])
def test_a_family_whose_checkpoints_hold_stacked_experts_has_none(build):
    assert names_of(build) is None


@pytest.mark.parametrize("change", [lambda t: t.flip(-1), lambda t: t.mT, lambda t: t[:-1]])
def test_a_conversion_that_does_more_than_part_and_rename_gives_none(monkeypatch, change):
    from transformers import core_model_loading

    real = core_model_loading.revert_weight_conversion

    def changing(model, tensors):
        stacked = {name: change(tensor) if tensor.ndim == 3 else tensor for name, tensor in tensors.items()}
        return real(model, stacked)

    assert names_of(mixtral) is not None
    monkeypatch.setattr(core_model_loading, "revert_weight_conversion", changing)
    assert names_of(mixtral) is None


@pytest.mark.parametrize("change", [torch.clone, lambda t: t.view(1, 0)])
def test_a_conversion_of_what_is_no_expert_gives_none(monkeypatch, change):
    """As the rows of queries, which some families have in another order."""
    from transformers import core_model_loading

    real = core_model_loading.revert_weight_conversion

    def changing(model, tensors):
        return real(model, {name: change(t) if "q_proj" in name else t for name, t in tensors.items()})

    monkeypatch.setattr(core_model_loading, "revert_weight_conversion", changing)
    assert names_of(mixtral) is None


NAMES = {"a.0.first": ["b.0.gate", "b.0.up"], "a.0.down": ["b.0.down"], "a.router.weight": ["b.gate.weight"]}
TENSORS = {
    "a.0.first.weight_packed": torch.arange(12).view(4, 3),
    "a.0.first.weight_scale": torch.rand(4, 2),
    "a.0.first.weight_shape": torch.tensor([4, 24]),
    "a.0.down.weight_packed": torch.arange(3).view(3, 1),
    "a.0.down.weight_shape": torch.tensor([3, 8]),
    "a.router.weight": torch.rand(2, 2),
    "a.router.bias": torch.rand(2),
    "scalar": torch.rand(()),
}


def test_tensors_are_parted_by_rows_and_renamed():
    stored = under_public_names(TENSORS, NAMES)
    assert stored.keys() == {
        *(f"b.0.{layer}.weight_{leaf}" for layer in ("gate", "up") for leaf in ("packed", "scale", "shape")),
        "b.0.down.weight_packed", "b.0.down.weight_shape", "b.gate.weight", "a.router.bias", "scalar",
    }  # fmt: skip
    assert stored["b.0.gate.weight_packed"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert stored["b.0.up.weight_packed"].tolist() == [[6, 7, 8], [9, 10, 11]]
    assert stored["b.0.gate.weight_shape"].tolist() == stored["b.0.up.weight_shape"].tolist() == [2, 24]


@pytest.mark.parametrize("order", [1, -1])
def test_what_is_stored_becomes_what_it_was_in_whatever_order_it_comes(order):
    stored = list(under_public_names(TENSORS, NAMES).items())[::order]
    back = {name: joined(name, parts) for name, parts in under_own_names(stored, NAMES)}
    assert back.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert back[name].dtype == tensor.dtype
        assert torch.equal(back[name], tensor), name


def test_a_tensor_of_which_a_part_is_missing_does_not_come():
    stored = under_public_names(TENSORS, NAMES)
    del stored["b.0.up.weight_scale"]
    assert "a.0.first.weight_scale" not in dict(under_own_names(stored.items(), NAMES))


def test_parting_takes_no_memory():
    stored = under_public_names(TENSORS, NAMES)
    held = {tensor.untyped_storage().data_ptr() for tensor in TENSORS.values()}
    assert {t.untyped_storage().data_ptr() for n, t in stored.items() if not n.endswith("weight_shape")} <= held
