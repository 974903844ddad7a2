"""NF4 as a method: what it touches, what it stores, what it reports."""

from pathlib import Path

import pytest
import torch
from torch import nn

import pipeline
from pipeline.app import main
from pipeline.artifact import store
from pipeline.compression.nf4 import NF4, quantize_nf4
from pipeline.errors import LeanfitError
from pipeline.layers.quantized import quantized_layers
from pipeline.layers.sparsity import n_of_m_mask, set_mask
from pipeline.report.result import read_result
from tests.tiny import context, efficientnet, opt
from tests.tiny import odd_llama as llama


def method(**changes):
    values = {"block_size": 64, "double_quant": True, "embeddings": False, "ignore": ()}
    return NF4(name="nf4", **{**values, **changes})


def saved(model, directory):
    probe = {"input_ids": torch.randint(0, 64, (2, 16))}
    manifest = store.save(model, directory, chain=[], probe=probe)
    return manifest, probe


@pytest.mark.parametrize("make", [opt, llama])
@pytest.mark.parametrize("double", [True, False])
def test_a_language_model_is_stored_and_opened_the_same(make, double, tmp_path):
    model = make().eval()
    ids = torch.randint(0, 64, (2, 16))
    before = model(input_ids=ids).logits
    link = method(double_quant=double)
    assert link.preflight(model, context(model)) == []
    made = link.finalize(model, context(model))
    after = made(input_ids=ids).logits
    assert 0 < ((after - before).norm() / before.norm()) < 0.2
    manifest, _ = saved(made, tmp_path / "a")
    assert manifest["format"] == "leanfit"
    loaded = pipeline.load(tmp_path / "a")
    assert torch.equal(loaded(input_ids=ids).logits, after)
    detail = link.detail(made, context(made))
    assert detail["layers"] == len(quantized_layers(made)) > 0
    assert (detail["block_size"], detail["double_quant"]) == (64, double)
    assert set(detail["bits"].values()) == {4}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_models_keep_their_dtype_through_the_artifact(dtype, tmp_path):
    model = opt(tied=False).to(dtype)
    made = method(embeddings=True).finalize(model, context(model))
    ids = torch.randint(0, 64, (2, 16))
    want = made(input_ids=ids).logits
    saved(made, tmp_path / "a")
    loaded = pipeline.load(tmp_path / "a")
    assert loaded(input_ids=ids).logits.dtype == dtype
    assert torch.equal(loaded(input_ids=ids).logits, want)


def test_tables_are_quantized_where_asked_for():
    model = opt(tied=False)
    made = method(embeddings=True).finalize(model, context(model))
    assert "model.decoder.embed_tokens" in quantized_layers(made)
    model = opt(tied=False)
    assert "model.decoder.embed_tokens" not in quantized_layers(method().finalize(model, context(model)))


def test_convolutions_need_no_block_size_that_divides():
    model = efficientnet()
    link = method(block_size=48)
    assert link.preflight(model, context(model)) == []
    x = torch.randn(2, 1, 16, 16)
    before = model(pixel_values=x).logits
    made = link.finalize(model, context(model))
    assert not [m for m in made.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert ((made(pixel_values=x).logits - before).norm() / before.norm()) < 0.5


def test_masked_weights_stay_zero_and_are_stored_as_a_bitmask(tmp_path):
    model = opt()
    fc = model.model.decoder.layers[0].fc1
    set_mask(fc, n_of_m_mask(torch.rand_like(fc.weight), 1, 8))
    mask = fc.weight_mask
    made = method().finalize(model, context(model))
    layer = made.model.decoder.layers[0].fc1
    assert (layer.dequantized()[~mask] == 0).all()
    manifest, probe = saved(made, tmp_path / "a")
    assert "model.decoder.layers.0.fc1.weight_packed" in manifest["encodings"]
    loaded = pipeline.load(tmp_path / "a")
    assert torch.equal(loaded.model.decoder.layers[0].fc1.dequantized(), layer.dequantized())
    assert torch.equal(loaded(**probe).logits, made(**probe).logits)


def test_bad_weights_and_empty_choices_are_errors():
    model = opt()
    model.model.decoder.layers[1].fc2.weight.data[3, 4] = float("inf")
    with pytest.raises(LeanfitError, match=r"layers\.1\.fc2.*NaN or infinity"):
        method().finalize(model, context(model))
    with pytest.raises(LeanfitError, match="no layer"):
        quantize_nf4(opt(), [])
    assert "did you mean" in method(ignore=("fc11",)).preflight(opt(), context(opt()))[0]


@pytest.mark.parametrize("override", ["block_size=1", "block_size=0", "double_quant=2", "bits=4", "embeddings=maybe"])
def test_bad_settings_end_with_exit_code_2(override, capsys):
    assert main(["compression=nf4", f"compression.nf4.{override}"]) == 2
    assert "compression.nf4." in capsys.readouterr().err


@pytest.mark.slow
def test_a_whole_run_of_a_classifier(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "run"
    arguments = ["model=efficientnet", "data=digits", "trainer=smoke", "device=cpu", "compression=nf4"]
    assert main([*arguments, f"hydra.run.dir={run}"]) == 0
    result = read_result(run / "result.json")
    assert result["artifact"]["reload"] == {"ok": True, "max_abs_diff": 0.0}
    assert result["size"]["ratio"] > 3
