"""int8 QAT: what it trains is what it converts to; chains, checkpoints and mistakes."""

import copy

import pytest
import torch
from torch import nn

from pipeline.app import main
from pipeline.composing import compose
from pipeline.compression.int8 import Int8
from pipeline.compression.int8_qat import Int8Qat
from pipeline.errors import ConfigError, LeanfitError
from pipeline.layers import kernels
from pipeline.layers.quantized import quantized_layers
from pipeline.layers.sparsity import set_mask
from pipeline.report.result import read_result
from pipeline.stage_input import load_checkpoint
from tests import tiny
from tests.tiny import labelled_batch as batch
from tests.tiny import trained


def qat(**changes):
    return Int8Qat(name="int8_qat", **{"steps": None, "lr": None, "ignore": (), **changes})


def llama():
    return tiny.odd_llama(layers=2, num_attention_heads=4, num_key_value_heads=2).train()


def efficientnet():
    return tiny.efficientnet().train()


def opt():
    return tiny.opt().train()


def context(model, steps=5):
    return tiny.context(model, steps=steps)


@pytest.mark.parametrize("make", [opt, llama, efficientnet])
def test_the_converted_model_gives_what_the_trained_one_gave_to_the_last_bit(make):
    method, model = qat(), make()
    untouched = {name: value.clone() for name, value in model.state_dict().items()}
    names = method.layers(model, context(model))
    prepared = method.prepare(model, context(model))
    assert list(prepared.state_dict()) == list(untouched)
    assert all(torch.equal(value, untouched[name]) for name, value in prepared.state_dict().items())
    trained(prepared).eval()
    assert all(prepared.get_submodule(name).weight.grad.abs().sum() > 0 for name in names)
    inputs = {name: value for name, value in batch(model).items() if name != "labels"}
    with torch.no_grad():
        want = prepared(**inputs).logits
        made = method.finalize(prepared, context(model))
        with kernels.forced("float"):
            found = made(**inputs).logits
    assert torch.equal(found, want)
    assert tuple(quantized_layers(made)) == names
    assert method.detail(made, context(made))["layers"] == len(names)


@pytest.mark.parametrize("make", [opt, efficientnet])
def test_without_training_it_is_int8(make):
    model = make().eval()
    inputs = {name: value for name, value in batch(model).items() if name != "labels"}
    method, plain = qat(), Int8(name="int8", ignore=())
    ours = method.finalize(method.prepare(copy.deepcopy(model), context(model)), context(model))
    theirs = plain.finalize(model, context(model))
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    assert all(torch.equal(value, theirs.state_dict()[name]) for name, value in ours.state_dict().items())
    assert torch.equal(ours(**inputs).logits, theirs(**inputs).logits)


def test_a_checkpoint_of_the_fit_loads_into_a_model_prepared_anew_masks_included(tmp_path):
    method, model = qat(), opt()
    set_mask(model.model.decoder.layers[0].fc1, torch.rand(64, 32) > 0.5)
    fresh = opt()
    prepared = trained(method.prepare(model, context(model)))
    state = {f"model.{name}": value for name, value in prepared.state_dict().items()}
    torch.save({"state_dict": state}, tmp_path / "last.ckpt")
    again = method.prepare(fresh, context(fresh))
    load_checkpoint(again, tmp_path / "last.ckpt")
    inputs = batch(model)
    assert torch.equal(again(**inputs).loss, prepared(**inputs).loss)
    assert torch.equal(again.model.decoder.layers[0].fc1.weight_mask, prepared.model.decoder.layers[0].fc1.weight_mask)


def test_masks_are_applied_again_when_it_converts():
    method, model = qat(), opt()
    layer = model.model.decoder.layers[0].fc1
    mask = torch.rand(64, 32) > 0.5
    set_mask(layer, mask)
    prepared = trained(method.prepare(model, context(model)))  # without the callback that holds masks
    assert (layer.weight[~mask] != 0).any()
    made = method.finalize(prepared, context(model)).get_submodule("model.decoder.layers.0.fc1")
    assert made.sparse
    assert (made.weight[~mask] == 0).all()


def test_ignored_layers_compute_as_before():
    model = opt()
    method = qat(ignore=("self_attn", "*.layers.0"))
    method.prepare(model, context(model))
    kinds = {name: type(module) for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert {name for name, kind in kinds.items() if kind is not nn.Linear} == {
        "model.decoder.layers.1.fc1", "model.decoder.layers.1.fc2",
    }  # fmt: skip


def test_mistakes_are_told():
    assert qat().problems() == qat(steps=1).problems() == []
    (told,) = qat(steps=0).problems()
    assert told == (
        "compression.int8_qat.steps=0 trains nothing, which is round to nearest: use compression=int8, or give steps "
        "(null: a quarter of trainer.max_steps)"
    )
    with pytest.raises(ConfigError, match="steps=0 trains nothing"):
        compose(["compression=int8_qat", "compression.int8_qat.steps=0"])
    with pytest.raises(ConfigError, match="cannot follow"):
        compose(["compression=[int8,int8_qat]"])
    model = opt()
    model.model.decoder.layers[1].fc2.weight.data[3, 4] = float("nan")
    with pytest.raises(LeanfitError, match=r"model\.decoder\.layers\.1\.fc2.*NaN"):
        qat().prepare(model, context(model))


@pytest.mark.slow
@pytest.mark.parametrize(
    "extra", [["precision=16-mixed", "memory.activation_checkpointing=full"], ["precision=bf16-true"]]
)
def test_a_pruned_model_trains_and_converts_in_other_precisions(extra, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = ["model=gpt_nano", "trainer=smoke", "trainer.max_steps=8", "data.evaluation_tokens=1024", "device=cpu"]
    code = main([*arguments, "compression=[magnitude,int8_qat]", *extra, f"hydra.run.dir={tmp_path / 'run'}"])
    result = read_result(tmp_path / "run" / "result.json")
    assert code == 0, result["error"]
    assert result["stages"][1]["train"]["steps"] == 2
    assert result["stages"][1]["detail"]["sparsity"] >= 0.5
    assert result["artifact"]["reload"] == {"ok": True, "max_abs_diff": 0.0}
