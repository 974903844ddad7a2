"""Tensors in files: the same values and the same arithmetic, no memory, no trace left, and the source untouched."""

import subprocess
import sys

import pytest
import torch
from torch import nn

from pipeline.compression.int4 import quantize_int4
from pipeline.compression.int4_awq import quantize_int4_awq
from pipeline.compression.int4_gptq import quantize_gptq
from pipeline.compression.int8_smoothquant import quantize_int8_smoothquant
from pipeline.compression.magnitude import prune_magnitude
from pipeline.compression.sparsegpt import prune_sparsegpt
from pipeline.compression.wanda import prune_wanda
from pipeline.layers.blockwise import segments
from pipeline.layers.offload import OffloadError, beside, offload, offload_module, place_of, place_of_model
from pipeline.layers.quantized import quantized_layers
from pipeline.layers.select import select
from pipeline.models.architecture import describe
from tests import tiny

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int32, torch.int8, torch.uint8, torch.bool]


def offloaded(model, directory):
    for module in model.modules():
        offload_module(module, directory)
    return model


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (0, 3), (1,), (3, 5), (2, 3, 4)], ids=str)
def test_values_shape_and_dtype_are_kept_and_no_file_is_left(tmp_path, dtype, shape):
    source = (torch.randn(shape) * 10).to(dtype)
    copy = offload(source, tmp_path)
    assert copy.dtype == dtype
    assert torch.equal(copy, source)
    assert copy.data_ptr() % 64 == 0
    assert list(tmp_path.iterdir()) == []
    assert place_of(copy) == (tmp_path if source.numel() else None)
    assert place_of(source) is None


def test_views_that_are_not_contiguous_and_other_dtypes_are_converted_as_torch_does(tmp_path, monkeypatch):
    monkeypatch.setattr("pipeline.layers.offload.PIECE", 7)
    source = torch.randn(12, 10).t()[::2]
    assert torch.equal(offload(source, tmp_path), source)
    assert torch.equal(offload(source, tmp_path, torch.bfloat16), source.to(torch.bfloat16))


def test_writing_to_the_copy_leaves_the_source_as_it_was(tmp_path):
    source = torch.ones(1000)
    copy = offload(source, tmp_path)
    copy.zero_()
    assert torch.equal(source, torch.ones(1000))
    assert torch.equal(copy, torch.zeros(1000))


def test_a_tensor_goes_where_the_other_is(tmp_path):
    mask = torch.ones(4, dtype=torch.bool)
    assert beside(mask, torch.ones(4)) is mask
    assert place_of(beside(mask, offload(torch.ones(4), tmp_path))) == tmp_path


def test_where_no_file_can_be_written_the_place_is_named(tmp_path):
    with pytest.raises(OffloadError, match=r"nowhere: .*No such file"):
        offload(torch.ones(4), tmp_path / "nowhere")


def test_tied_weights_stay_tied(tmp_path):
    model = offloaded(tiny.opt(tied=True), tmp_path)
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert place_of_model(model) == tmp_path


METHODS = {
    "int4": lambda m, layers, batches: quantize_int4(m, layers, 16),
    "int4_gptq": lambda m, layers, batches: quantize_gptq(m, layers, batches, describe(m), 16),
    "int4_awq": lambda m, layers, batches: quantize_int4_awq(m, layers, describe(m), batches, 16)[0],
    "int8_smoothquant": lambda m, layers, batches: quantize_int8_smoothquant(m, layers, describe(m), batches)[0],
    "sparsegpt": lambda m, layers, batches: prune_sparsegpt(m, layers, 0.5, batches, describe(m)),
    "wanda": lambda m, layers, batches: prune_wanda(m, layers, 0.5, batches, describe(m)),
    "magnitude": lambda m, layers, batches: prune_magnitude(m, layers, 0.5),
}


@pytest.mark.parametrize("build", [tiny.opt, tiny.llama], ids=["opt", "llama"])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_gives_the_very_tensors_that_it_gives_in_memory(tmp_path, method, build):
    batches = tiny.uneven_batches()
    results = []
    for model in (build(), offloaded(build(), tmp_path)):
        layers = select(model, describe(model)).layers
        results.append(METHODS[method](model, layers, batches).state_dict())
    assert results[0].keys() == results[1].keys()
    for name, tensor in results[0].items():
        assert torch.equal(tensor, results[1][name]), name


@pytest.mark.parametrize("method", [name for name in METHODS if name.startswith("int")])
def test_quantized_layers_lie_where_the_models_weights_do_though_a_method_scaled_them_before(tmp_path, method):
    model = offloaded(tiny.llama(), tmp_path)
    METHODS[method](model, select(model, describe(model)).layers, tiny.uneven_batches())
    found = quantized_layers(model)
    assert found
    assert {place_of(buffer) for layer in found.values() for buffer in layer.buffers()} == {tmp_path}


def test_masks_and_pruned_weights_stay_in_files(tmp_path):
    model = offloaded(tiny.llama(), tmp_path)
    layers = select(model, describe(model)).layers
    prune_magnitude(model, layers, 0.5)
    for name in layers:
        layer = model.get_submodule(name)
        assert place_of(layer.weight) == place_of(layer.weight_mask) == tmp_path


def test_hidden_states_between_blocks_wait_in_files_where_the_weights_do(tmp_path):
    for model, place in ((tiny.llama(), None), (offloaded(tiny.llama(), tmp_path), tmp_path)):
        layers = select(model, describe(model)).layers
        found = segments(model, describe(model), layers, tiny.uneven_batches(), "cpu")
        assert {place_of(call.hidden) for segment in found for call in segment.calls} == {place}


GROWTH = """
import sys, torch
from pathlib import Path
from pipeline.layers.offload import offload
def anonymous():
    return next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith("RssAnon")) / 1024
source = torch.zeros(1).expand(32 << 20)
torch.zeros(1 << 20).sum()
before = anonymous()
copy = offload(source, Path(sys.argv[1]))
copy.add_(1)
float(copy.sum())
offloaded = anonymous() - before
held = source.clone().add_(1)
print(offloaded, anonymous() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_128_mb_in_files_take_no_anonymous_memory_written_to_or_read(tmp_path):
    run = subprocess.run([sys.executable, "-c", GROWTH, str(tmp_path)], capture_output=True, text=True, check=True)
    offloaded, held = map(float, run.stdout.split())
    assert offloaded < 40
    assert held > 100


def test_what_is_put_away_already_is_left_alone(tmp_path):
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    offload_module(model, tmp_path)
    assert place_of_model(model) is None
    offload_module(model[0], tmp_path)
    kept = model[0].weight.data_ptr()
    offload_module(model[0], tmp_path)
    assert model[0].weight.data_ptr() == kept
