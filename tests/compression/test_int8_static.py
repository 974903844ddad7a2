"""Static W8A8: scales are what calibration shows, outputs what compressed-tensors computes."""

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from pipeline.artifact import store
from pipeline.compression.int8_static import Int8Static, quantize_int8_static
from pipeline.errors import LeanfitError
from pipeline.layers.quantized import quantized_layers
from pipeline.layers.select import select
from pipeline.layers.sparsity import mask_of, set_mask
from pipeline.models.architecture import describe
from tests.tiny import efficientnet, opt
from tests.tiny import odd_llama as llama
from tests.tiny import uneven_batches as batches

IDS = {"input_ids": torch.arange(32).view(2, 16)}


def quantized(model, observer="minmax", data=None, **settings):
    architecture = describe(model)
    layers = select(model, architecture).layers
    return quantize_int8_static(model, layers, architecture, data or batches(), observer, **settings)


def test_the_scale_is_the_largest_magnitude_of_all_calibration_inputs():
    reference = opt()
    seen = {}
    names = [f"model.decoder.layers.0.{n}" for n in ("self_attn.q_proj", "self_attn.out_proj", "fc1", "fc2")]
    for name in names:
        reference.get_submodule(name).register_forward_pre_hook(
            lambda m, a, name=name: seen.setdefault(name, []).append(a[0].detach().abs().max())
        )
    for batch in batches():
        reference(**batch)
    model = quantized(opt())
    for name in names:  # of the first block: later ones see what quantized blocks give
        scale = model.get_submodule(name).input_scale
        assert scale.shape == (1,)
        torch.testing.assert_close(scale[0], torch.stack(seen[name]).max() / 127.5)


def test_later_blocks_are_calibrated_on_what_the_quantized_ones_give():
    model = quantized(opt())
    seen = []
    name = "model.decoder.layers.1.self_attn.q_proj"
    model.get_submodule(name).register_forward_pre_hook(lambda m, a: seen.append(a[0].abs().max()))
    for batch in batches():
        model(**batch)
    torch.testing.assert_close(model.get_submodule(name).input_scale[0], max(seen) / 127.5, rtol=1e-4, atol=0)


@pytest.mark.parametrize("build", [opt, llama, efficientnet])
@pytest.mark.parametrize("observer", ["minmax", "percentile", "mse"])
def test_outputs_stay_close(build, observer):
    model = build().eval()
    inputs = {"pixel_values": torch.randn(2, 1, 16, 16)} if build is efficientnet else IDS
    before = model(**inputs).logits
    made = quantized(model, observer, [inputs] if build is efficientnet else None)
    assert not [m for m in made.modules() if isinstance(m, nn.Conv2d)]
    assert 0 < ((made(**inputs).logits - before).norm() / before.norm()) < 0.1


def test_observers_clip_an_outlier_that_the_largest_magnitude_does_not():
    def outlier():
        model = opt()
        model.model.decoder.embed_positions.weight.data[2] *= 500  # one position of sixteen
        return model

    name = "model.decoder.layers.0.fc2"
    scales = {
        observer: float(quantized(outlier(), observer, percentile=90.0).get_submodule(name).input_scale)
        for observer in ("minmax", "percentile", "mse")
    }
    assert scales["percentile"] < 0.7 * scales["minmax"]
    assert scales["mse"] <= scales["minmax"]


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("build", [opt, llama])
def test_plain_transformers_opens_it_and_computes_the_same(build, tmp_path):
    model = quantized(build()).eval()
    made = store.save(model, tmp_path / "a", chain=[], probe=IDS)
    assert made["format"] == "int-quantized"
    ours = store.load(tmp_path / "a")
    assert torch.equal(ours(**IDS).logits, model(**IDS).logits)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "a").eval()
    other = IDS["input_ids"].flip(1)
    for ids in (IDS["input_ids"], other, other[:1]):
        want = theirs(input_ids=ids).logits
        assert ((ours(input_ids=ids).logits - want).abs().max() / want.abs().max()) < 1e-3


def test_convolutions_are_loaded_back(tmp_path):
    probe = {"pixel_values": torch.randn(2, 1, 16, 16)}
    model = quantized(efficientnet(), data=[probe])
    assert store.save(model, tmp_path / "a", chain=[], probe=probe)["format"] == "leanfit"
    assert torch.equal(store.load(tmp_path / "a")(**probe).logits, model(**probe).logits)


def test_masked_weights_stay_zero():
    model = opt()
    layer = model.model.decoder.layers[0].fc1
    set_mask(layer, mask_of(layer.weight.detach().abs(), 0.5, None))
    pruned = layer.weight == 0
    made = quantized(model).model.decoder.layers[0].fc1
    assert made.sparse
    assert not made.integers()[pruned].any()


def test_hostile_weights_and_inputs_are_named():
    model = opt()
    model.model.decoder.layers[1].fc2.weight.data[3, 4] = float("nan")
    with pytest.raises(LeanfitError, match=r"layers\.1\.fc2.*NaN"):
        quantized(model)
    assert not quantized_layers(model)
    model = opt()
    model.model.decoder.embed_tokens.weight.data[5] = float("inf")
    with pytest.raises(LeanfitError, match="NaN or infinity"):
        quantized(model, data=[{"input_ids": torch.full((1, 8), 5)}])
    with pytest.raises(LeanfitError, match="never reaches"):
        quantize_int8_static(opt(), ["model.decoder.layers.0.fc1"], describe(opt()), [])


def test_settings_are_checked():
    with pytest.raises(TypeError):
        Int8Static(name="int8_static", ignore=())
