"""fp8 as a method: what it stores, and that plain transformers opens it."""

from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
)

import pipeline
from pipeline.app import main
from pipeline.artifact import store
from pipeline.artifact.receipt import examine
from pipeline.compression.fp8 import Fp8, quantize_fp8
from pipeline.errors import LeanfitError
from pipeline.layers import float8
from pipeline.layers.quantized import quantized_layers
from pipeline.report.result import read_result
from tests.tiny import context, efficientnet, opt
from tests.tiny import odd_llama as llama


def method(activations="auto", ignore=()):
    return Fp8(name="fp8", activations=activations, ignore=ignore)


@pytest.mark.parametrize("make", [opt, llama])
@pytest.mark.parametrize("activations", ["none", "dynamic"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_plain_transformers_opens_it_and_agrees(make, activations, dtype, tmp_path):
    model = make().to(dtype).eval()
    ids = torch.randint(0, 64, (2, 16))
    made = method(activations).finalize(model, context(model))
    manifest = store.save(made, tmp_path / "a", chain=[], probe={"input_ids": ids})
    assert manifest["format"] == "float-quantized"
    assert "transformers" in manifest["opens_with"]
    receipt = examine(tmp_path / "a")
    assert (receipt.ok, receipt.problems, receipt.max_abs_diff) == (True, [], 0.0)
    assert receipt.transformers_max_rel_diff == 0.0
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    scheme = next(m.quantization_scheme for m in plain.modules() if hasattr(m, "quantization_scheme"))
    assert (scheme.input_activations is None) == (activations == "none")


@pytest.mark.parametrize("activations", ["none", "dynamic"])
def test_the_error_is_that_of_three_mantissa_bits(activations):
    model = opt()
    ids = torch.randint(0, 64, (2, 16))
    before = model(input_ids=ids).logits
    made = method(activations).finalize(model, context(model))
    assert 0 < ((made(input_ids=ids).logits - before).norm() / before.norm()) < 0.08


def test_auto_casts_activations_only_where_the_device_multiplies_them(monkeypatch):
    model = opt()
    made = method().finalize(model, context(model))
    detail = method().detail(made, context(made))
    assert (detail["activations"], detail["kernel"]) == ("none", {"dequantize": 12})
    monkeypatch.setattr(float8, "multiplies_float8", lambda device: True)
    model = opt()
    made = method().finalize(model, context(model))
    detail = method().detail(made, context(made))
    assert (detail["activations"], detail["kernel"]) == ("dynamic", {"scaled_mm": 12})


def test_what_was_chosen_is_the_arithmetic_where_it_is_opened(tmp_path):
    model = opt()
    made = method("dynamic").finalize(model, context(model))
    ids = torch.randint(0, 64, (2, 16))
    store.save(made, tmp_path / "a", chain=[], probe={"input_ids": ids})
    loaded = pipeline.load(tmp_path / "a")
    assert {layer.activations for layer in quantized_layers(loaded).values()} == {"dynamic"}
    assert torch.equal(loaded(input_ids=ids).logits, made(input_ids=ids).logits)


def test_convolutions_are_opened_by_pipeline_load(tmp_path):
    model = efficientnet()
    x = torch.randn(2, 1, 16, 16)
    before = model(pixel_values=x).logits
    made = method("dynamic").finalize(model, context(model))
    after = made(pixel_values=x).logits
    assert ((after - before).norm() / before.norm()) < 0.15
    assert store.save(made, tmp_path / "a", chain=[], probe={"pixel_values": x})["format"] == "leanfit"
    assert torch.equal(pipeline.load(tmp_path / "a")(pixel_values=x).logits, after)


def test_bad_weights_and_empty_choices_are_errors():
    model = opt()
    model.model.decoder.layers[1].fc2.weight.data[3, 4] = float("nan")
    with pytest.raises(LeanfitError, match=r"layers\.1\.fc2.*NaN"):
        method().finalize(model, context(model))
    with pytest.raises(LeanfitError, match="no layer"):
        quantize_fp8(opt(), [])


@pytest.mark.parametrize("override", ["activations=static", "activations=null", "bits=8"])
def test_bad_settings_end_with_exit_code_2(override, capsys):
    assert main(["compression=fp8", f"compression.fp8.{override}"]) == 2
    assert "compression.fp8." in capsys.readouterr().err


@pytest.mark.slow
def test_a_whole_run_with_dynamic_activations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "run"
    arguments = ["model=gpt_nano", "trainer=smoke", "device=cpu", "compression=fp8"]
    assert main([*arguments, "compression.fp8.activations=dynamic", f"hydra.run.dir={run}"]) == 0
    result = read_result(run / "result.json")
    assert result["artifact"]["format"] == "float-quantized"
    assert result["artifact"]["reload"] == {"ok": True, "max_abs_diff": 0.0}
    assert result["stages"][0]["detail"]["kernel"] == {"float": 12}
