"""int4 QAT: what it trains is what it converts to, on every grid; chains and mistakes."""

import copy

import pytest
import torch
from torch import nn

from pipeline.app import main
from pipeline.composing import compose
from pipeline.compression.int4 import Int4
from pipeline.compression.int4_qat import Int4Qat, convert_int4_qat, prepare_int4_qat
from pipeline.errors import ConfigError, LeanfitError
from pipeline.layers import kernels
from pipeline.layers.quantized import quantized_layers
from pipeline.layers.sparsity import set_mask
from pipeline.report.result import read_result
from tests import tiny
from tests.tiny import labelled_batch as batch
from tests.tiny import trained

GRID = {"bits": 4, "group_size": 16, "symmetric": True}


def qat(**changes):
    return Int4Qat(name="int4_qat", **{**GRID, "steps": None, "lr": None, "ignore": (), **changes})


def llama():
    return tiny.odd_llama(layers=2, num_attention_heads=4, num_key_value_heads=2).train()


def efficientnet():
    return tiny.efficientnet().train()


def opt():
    return tiny.opt().train()


def context(model, steps=5):
    return tiny.context(model, steps=steps)


@pytest.mark.parametrize("make", [opt, llama, efficientnet])
@pytest.mark.parametrize("grid", [GRID, {"bits": 2, "symmetric": False}, {"bits": 3, "group_size": None}], ids=str)
def test_the_converted_model_gives_what_the_trained_one_gave_to_the_last_bit(make, grid):
    method, model = qat(**grid), make()
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
        with kernels.forced("float"):  # few rows are summed in another order
            assert torch.equal(made(**inputs).logits, want)
        torch.testing.assert_close(made(**inputs).logits, want)
    assert tuple(quantized_layers(made)) == names
    assert {layer.grid.symmetric for layer in quantized_layers(made).values()} == {method.symmetric}


def test_without_training_it_is_int4():
    model = opt().eval()
    method, plain = qat(), Int4(name="int4", **GRID, embeddings=False, ignore=())
    ours = method.finalize(method.prepare(copy.deepcopy(model), context(model)), context(model))
    theirs = plain.finalize(model, context(model))
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    assert all(torch.equal(value, theirs.state_dict()[name]) for name, value in ours.state_dict().items())


@pytest.mark.parametrize("seed", [0, 1, 3])
def test_training_with_the_rounding_fits_what_rounding_afterwards_does_not(seed):
    torch.manual_seed(seed)
    # Inputs alike in fours: what one weight loses by rounding, another can give back.
    x = torch.randn(512, 4).repeat_interleave(4, 1) + 0.05 * torch.randn(512, 16)
    y = x @ torch.randn(16, 8)

    def loss(aware):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(16, 8, bias=False))
        if aware:
            prepare_int4_qat(model, ["0"], None, bits=2)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
        for step in range(200):
            optimizer.param_groups[0]["lr"] = 0.02 * (1 - step / 200)
            optimizer.zero_grad()
            (model(x) - y).pow(2).mean().backward()
            optimizer.step()
        return (convert_int4_qat(model, ["0"], None, bits=2)(x) - y).pow(2).mean().item()

    assert loss(aware=True) < 0.7 * loss(aware=False)


@pytest.mark.parametrize("symmetric", [True, False])
def test_masks_are_applied_again_when_it_converts(symmetric):
    method, model = qat(symmetric=symmetric), opt()
    layer = model.model.decoder.layers[0].fc1
    mask = torch.rand(64, 32) > 0.5
    set_mask(layer, mask)
    prepared = trained(method.prepare(model, context(model)))  # without the callback that holds masks
    assert (layer.weight[~mask] != 0).any()
    made = method.finalize(prepared, context(model)).get_submodule("model.decoder.layers.0.fc1")
    assert made.sparse
    assert (made.dequantized()[~mask] == 0).all()


def test_mistakes_are_told():
    assert qat().problems() == qat(steps=1).problems() == []
    (told,) = qat(steps=0).problems()
    assert told == (
        "compression.int4_qat.steps=0 trains nothing, which is round to nearest: use compression=int4, or give steps "
        "(null: a quarter of trainer.max_steps)"
    )
    with pytest.raises(ConfigError, match="steps=0 trains nothing"):
        compose(["compression=int4_qat", "compression.int4_qat.steps=0"])
    wrong = ("bits=5", "steps=-1", "lr=0", "group_size=1")
    with pytest.raises(ConfigError) as told:
        compose(["compression=int4_qat", *(f"compression.int4_qat.{setting}" for setting in wrong)])
    assert all(any(f"int4_qat.{setting}" in line for line in told.value.problems) for setting in wrong)
    model = opt()
    assert "group_size=24 does not divide" in qat(group_size=24).preflight(model, context(model))[0]
    assert "did you mean" in qat(ignore=("fc11",)).preflight(model, context(model))[0]
    model.model.decoder.layers[1].fc2.weight.data[3, 4] = float("inf")
    with pytest.raises(LeanfitError, match=r"model\.decoder\.layers\.1\.fc2.*infinity"):
        qat().prepare(model, context(model))


@pytest.mark.slow
@pytest.mark.parametrize(
    "extra", [["precision=16-mixed", "memory.activation_checkpointing=full"], ["precision=bf16-true"]]
)
def test_a_pruned_model_trains_and_converts_in_other_precisions(extra, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = ["model=gpt_nano", "trainer=smoke", "trainer.max_steps=8", "data.evaluation_tokens=1024", "device=cpu"]
    code = main([*arguments, "compression=[magnitude,int4_qat]", *extra, f"hydra.run.dir={tmp_path / 'run'}"])
    result = read_result(tmp_path / "run" / "result.json")
    assert code == 0, result["error"]
    assert result["stages"][1]["train"]["steps"] == 2
    assert result["stages"][1]["detail"]["sparsity"] >= 0.5
    assert result["artifact"]["reload"] == {"ok": True, "max_abs_diff": 0.0}
