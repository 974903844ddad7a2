"""2:4 layers. On the CPU torch's operators for them are stood in for by products of what their compressed forms hold;
all of torch's code above these operators runs as it does on a GPU."""

import copy
import pickle
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.sparse._semi_structured_conversions import sparse_semi_structured_to_dense_cutlass

import pipeline
from pipeline.artifact import receipt, store
from pipeline.compression.magnitude import Magnitude, prune_magnitude
from pipeline.layers import sparse24
from pipeline.layers.fused import nearly
from pipeline.layers.offload import place_of
from pipeline.layers.schemes import quantization_detail, quantize_layers
from pipeline.layers.sparse24 import KERNELS, SparseLinear, compress, decompress, multiply, sparse_layers, use_kernels
from pipeline.layers.sparsity import is_two_of_four, n_of_m_mask, set_mask
from pipeline.memory.measure import storage_bytes
from tests.tiny import context, llama, opt, token_batches

HERE = torch.cuda.is_available()
DTYPES = (torch.float16, torch.bfloat16)


def as_read(dense):
    """What the kernels read of [in, tokens]: of one that is not contiguous, as if its transpose were."""
    assert dense.shape[0] % 8 == 0
    assert dense.shape[1] % 8 == 0
    return dense if dense.is_contiguous() else dense.as_strided(dense.shape, (1, dense.shape[0]))


def product(weight, dense, bias):
    """In float32, rounded once: [out, tokens]."""
    sums = weight.float() @ as_read(dense).float()
    return (sums if bias is None else sums + bias.float().view(-1, 1)).to(weight.dtype)


def cutlass_mm(packed, meta, dense, *, out_dtype=None):
    return product(sparse_semi_structured_to_dense_cutlass(packed, meta), dense, None)


def cutlass_addmm(bias, packed, meta, dense, *, alpha=1, beta=1, out_dtype=None):
    assert bias.shape == packed.shape[:1]
    return product(sparse_semi_structured_to_dense_cutlass(packed, meta), dense, bias)


def cslt_compress(weight):
    """Values, then two bits for each that say its place in its four: one tensor of 9/16 of the elements."""
    fours = weight.view(len(weight), -1, 4)
    places = (fours == 0).to(torch.uint8).sort(dim=-1, stable=True).indices[..., :2].sort(-1).values
    codes = (places[..., 0] | places[..., 1] << 2).view(-1, 4)
    words = codes[:, 0] | codes[:, 1] << 4 | codes[:, 2] << 8 | codes[:, 3] << 12
    return torch.cat((fours.gather(-1, places).flatten(), words.to(torch.int16).view(weight.dtype)))


def cslt_sparse_mm(
    packed, dense, bias=None, alpha=None, out_dtype=None, transpose_result=False, alg_id=0, split_k=1, split_k_mode=-1
):
    inputs = dense.shape[0]
    outputs = packed.numel() * 16 // 9 // inputs
    values, words = packed[: outputs * inputs // 2].view(-1, 2), packed[outputs * inputs // 2 :].view(torch.int16)
    codes = torch.stack([words.int() >> shift & 15 for shift in (0, 4, 8, 12)], -1).view(-1)
    places = torch.stack((codes & 3, codes >> 2), -1).long()
    weight = torch.zeros(len(places), 4, dtype=packed.dtype).scatter_(1, places, values).view(outputs, inputs)
    found = product(weight, dense, bias)
    return found.t().contiguous() if transpose_result else found


def checked_as_on_a_gpu(cls, weight, check=sparse24.SparseSemiStructuredTensor._validate_device_dim_dtype_shape):
    """torch's own check of a weight, but for the device."""
    names = ("dim", "is_contiguous", "dtype", "shape")
    check.__func__(cls, SimpleNamespace(is_cuda=True, **{name: getattr(weight, name) for name in names}))


@pytest.fixture(scope="module")
def operators():
    """The operators of a GPU, on the CPU."""
    with torch.library._scoped_library("aten", "IMPL") as library, pytest.MonkeyPatch.context() as patch:
        library.impl("_sparse_semi_structured_mm", cutlass_mm, "CPU")
        library.impl("_sparse_semi_structured_addmm", cutlass_addmm, "CPU")
        library.impl("_cslt_compress", cslt_compress, "CPU")
        library.impl("_cslt_sparse_mm", cslt_sparse_mm, "CPU")
        form = sparse24.SparseSemiStructuredTensor
        patch.setattr(form, "_validate_device_dim_dtype_shape", classmethod(checked_as_on_a_gpu))
        yield


@pytest.fixture
def gpu(operators, monkeypatch):
    """A CPU that passes for a GPU."""
    monkeypatch.setattr(sparse24, "DEVICE", "cpu")
    sparse24.refusal.cache_clear()
    yield
    sparse24.refusal.cache_clear()


def two_of_four(outputs, inputs, dtype=torch.float32, fewer=0.1, seed=0):
    """A weight that keeps two of each four inputs, and of these not all."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(outputs, inputs, generator=generator)
    mask = n_of_m_mask(torch.rand(weight.shape, generator=generator), 2, 4)
    mask &= torch.rand(weight.shape, generator=generator) >= fewer
    return (weight * mask).to(dtype)


def linear(outputs, inputs, dtype=torch.bfloat16, bias=True):
    """A dense layer with a 2:4 weight, as an artifact is opened."""
    torch.manual_seed(0)
    layer = nn.Linear(inputs, outputs, bias=bias).to(dtype)
    layer.weight = nn.Parameter(two_of_four(outputs, inputs, dtype))
    return layer.requires_grad_(False).eval()


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 6), st.integers(1, 6), st.integers(0, 2**31), st.floats(0, 1))
def test_two_of_four_is_what_masks_make_and_one_more_is_not(outputs, fours, seed, fewer):
    weight = two_of_four(outputs, 4 * fours, fewer=fewer, seed=seed)
    assert is_two_of_four(weight) == bool(weight.any())
    weight[outputs - 1, 4 * (fours - 1) :] = torch.tensor([1.0, 0.0, -1e-30, torch.nan])
    assert not is_two_of_four(weight)
    assert not is_two_of_four(torch.zeros(2, 6))
    assert not is_two_of_four(torch.zeros(2, 8))  # which any pruning may leave


@pytest.mark.parametrize("kernel", KERNELS)
def test_sizes_are_the_multiples_that_torch_takes(kernel):
    form, outputs, inputs = KERNELS[kernel]
    for dtype in DTYPES:
        asked = form._DTYPE_SHAPE_CONSTRAINTS[dtype]
        assert (asked.sparse_min_rows, asked.sparse_min_cols) == (outputs, inputs)


@settings(deadline=None, max_examples=40)
@given(
    st.sampled_from(sorted(KERNELS)), st.sampled_from(DTYPES), st.integers(1, 4), st.integers(1, 4),
    st.integers(1, 19), st.booleans(), st.floats(0, 1), st.integers(0, 2**31),
)  # fmt: skip
def test_a_compressed_product_is_the_dense_one_for_any_shape_and_number_of_tokens(
    operators, kernel, dtype, down, across, tokens, biased, fewer, seed
):
    _, outputs, inputs = KERNELS[kernel]
    weight = two_of_four(down * outputs, across * inputs, dtype, fewer, seed)
    form = compress(weight, kernel)
    assert torch.equal(decompress(form), weight)
    # Half of its values, and two bits for each that is kept: 9/16 of sixteen bits.
    assert 16 * storage_bytes([form]) == 9 * weight.nbytes
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, weight.shape[1], generator=generator).to(dtype)
    bias = torch.randn(len(weight), generator=generator).to(dtype) if biased else None
    want = F.linear(x.double(), weight.double(), None if bias is None else bias.double()).to(dtype)
    with torch.no_grad():
        found = multiply(x, form, bias)
    assert found.dtype == dtype
    assert found.shape == want.shape
    torch.testing.assert_close(found, want, rtol=torch.finfo(dtype).eps, atol=1e-5)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("kernel", KERNELS)
def test_tokens_may_lie_anyhow_and_results_lie_in_rows(operators, kernel, mode):
    weight = two_of_four(64, 128, torch.bfloat16)
    form = compress(weight, kernel)
    x = torch.randn(3, 16, 256).bfloat16()
    with mode():
        for part in (x[0, 0, :128], x[:1, -1, :128], x[:, 3, 128:], x[..., :128], x[..., 128:].transpose(0, 1)):
            found, want = multiply(part, form, None), F.linear(part, weight)
            assert nearly(found, want)
            assert found.shape == want.shape
            assert found.is_contiguous()


def test_a_kernel_is_tried_once_on_a_layer_with_every_pattern(gpu):
    weight, _, _ = sparse24.small_layer(torch.float16)
    assert is_two_of_four(weight)
    assert len({tuple(four) for four in (weight.view(-1, 4) != 0).tolist()}) == 11
    for kernel in KERNELS:
        for dtype in DTYPES:
            assert sparse24.refusal(kernel, torch.device("cpu"), dtype) == ""


def test_a_kernel_that_is_not_there_says_so_and_the_next_is_taken(gpu, monkeypatch):
    def absent(weight):
        raise RuntimeError("cuSPARSELt not supported on your machine.\nException raised from ...")

    weight = two_of_four(64, 128, torch.bfloat16)
    assert sparse24.choose(weight) == ("cusparselt", "")
    sparse24.refusal.cache_clear()
    monkeypatch.setattr(torch, "_cslt_compress", absent)
    assert sparse24.choose(weight) == ("cutlass", "")
    assert sparse24.said_of(weight[:48]) == (
        "dense, cusparselt: cuSPARSELt not supported on your machine.; cutlass takes multiples of 32 x 64, not 48 x 128"
    )


@pytest.mark.parametrize("wrong", ["product", "bias", "weight"])
def test_a_kernel_that_is_wrong_is_not_used(gpu, monkeypatch, wrong):
    real = sparse24.decompress if wrong == "weight" else sparse24.multiply

    def off(*arguments):
        if wrong == "bias":
            return real(*arguments[:2], None)
        return real(*arguments) * 1.01

    monkeypatch.setattr(sparse24, real.__name__, off)
    assert sparse24.refusal("cutlass", torch.device("cpu"), torch.float16) == "wrong results"
    assert sparse24.choose(two_of_four(32, 64, torch.float16))[0] is None


def test_what_has_no_kernel_is_told_why(gpu, monkeypatch):
    weight = two_of_four(64, 128, torch.bfloat16)
    assert sparse24.said_of(weight.float()) == "dense, no 2:4 kernels for float32"
    assert sparse24.said_of(torch.ones_like(weight)) == "dense, not 2:4"
    assert sparse24.said_of(weight.view(64, 32, 2, 2)) == "dense, no 2:4 kernels for convolutions"
    assert sparse24.said_of(weight[:8]) == (
        "dense, cusparselt takes multiples of 16 x 16, not 8 x 128; cutlass takes multiples of 32 x 64, not 8 x 128"
    )
    monkeypatch.setattr(sparse24, "DEVICE", "cuda")
    assert sparse24.said_of(weight) == "dense, no 2:4 kernels on cpu"


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_layer_runs_compressed_and_gives_what_the_dense_one_gives(gpu, dtype, bias):
    dense = linear(48, 64, dtype, bias)
    layer = SparseLinear.over(dense)
    assert layer.kernel == "2:4 cusparselt"
    assert not layer.training
    assert [name for name, _ in layer.named_parameters()] == (["bias"] if bias else [])
    assert torch.equal(layer.dense(), dense.weight)
    x = torch.randn(2, 5, 64).to(dtype)
    assert nearly(layer(x), dense(x))


def test_where_the_kernel_cannot_take_the_tokens_the_dense_weight_does(gpu, monkeypatch):
    dense = linear(64, 128)
    layer = SparseLinear.over(dense)
    monkeypatch.setattr(sparse24, "multiply", lambda *_: pytest.fail("the kernel was called"))
    x = torch.randn(3, 128).bfloat16().requires_grad_()
    layer(x).float().sum().backward()
    assert torch.equal(x.grad, F.linear(torch.ones(3, 64).bfloat16(), dense.weight.t()))
    assert layer(x[:0].detach()).shape == (0, 64)
    with torch.autocast("cpu", dtype=torch.float16):
        assert layer(x.detach().float()).dtype == torch.float16
        assert torch.equal(layer(x.detach()), dense(x.detach()))
    with pytest.raises(RuntimeError, match="dtype"):
        layer(x.detach().float())


def test_a_layer_is_moved_cast_copied_saved_and_loaded_as_its_dense_weight(gpu):
    dense = linear(64, 128)
    layer = SparseLinear.over(dense)
    form = layer.form
    assert layer.to("cpu", torch.bfloat16).form is form  # nothing to do
    state = layer.state_dict()
    assert state.keys() == dense.state_dict().keys()
    assert torch.equal(state["weight"], dense.weight)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert twin.kernel == "2:4 cusparselt"
        assert twin.form is not form
        assert torch.equal(twin.dense(), dense.weight)
    layer.float()
    assert layer.kernel == "dense, no 2:4 kernels for float32"
    assert torch.equal(layer.weight, dense.weight.float())
    layer.half()
    assert layer.kernel == "2:4 cusparselt"
    assert torch.equal(layer.dense(), dense.weight.half())
    layer.to("meta")
    assert layer.kernel == "dense, no 2:4 kernels on meta"

    layer, other = SparseLinear.over(dense), two_of_four(64, 128, torch.bfloat16, seed=1)
    layer.load_state_dict({"weight": other, "bias": dense.bias})
    assert layer.form is not None
    assert torch.equal(layer.dense(), other)
    layer.load_state_dict({"weight": torch.ones_like(other), "bias": dense.bias})
    assert layer.kernel == "dense, not 2:4"
    assert layer.weight.eq(1).all()


def pruned(model, dtype=torch.bfloat16):
    """`model` with 2:4 masks on its linear layers, but for the head."""
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and "head" not in name]
    return prune_magnitude(model.to(dtype), names, sparsity=0.5, pattern="2:4")


def test_of_a_model_the_named_two_of_four_layers_alone_are_taken(gpu):
    model = nn.ModuleDict({"a": linear(32, 64), "b": linear(32, 64), "dense": nn.Linear(64, 32).bfloat16()})
    model["tied"] = nn.Linear(64, 32).bfloat16()
    model["tied"].weight = model["b"].weight
    model["left"], model["conv"] = linear(32, 64), nn.Conv2d(4, 4, 1).bfloat16()
    nn.init.zeros_(model["conv"].weight)
    model.requires_grad_(False)
    made = use_kernels(model, ["a", "b", "dense", "tied", "conv"])
    assert made is model
    assert list(sparse_layers(model)) == ["a"]
    assert torch.equal(next(sparse24.compressed_weights(model)), model["a"].dense())


def test_in_train_mode_a_layer_is_dense_and_trains(gpu):
    layer = SparseLinear.over(linear(64, 128))
    assert layer.form is not None
    layer.train().requires_grad_()
    layer(torch.randn(2, 128).bfloat16()).float().sum().backward()
    assert layer.weight.grad is not None
    assert layer.eval().kernel == "dense, in training"  # the gradient is still to be taken
    layer.requires_grad_(False).train().eval()
    assert layer.kernel == "2:4 cusparselt"


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    """A Llama in bfloat16, pruned to 2:4."""
    place = tmp_path_factory.mktemp("sparse") / "artifact"
    probe = {"input_ids": token_batches(1)[0]["input_ids"]}
    manifest = store.save(pruned(llama()), place, chain=[], probe=probe)
    assert len(manifest["encodings"]) == 14
    return place


def test_an_opened_artifact_computes_the_same_by_kernels_in_fewer_bytes(artifact, gpu, monkeypatch):
    ids = token_batches(1)[0]
    dense, model = store.load(artifact), pipeline.load(artifact)
    assert {layer.kernel for layer in sparse_layers(model).values()} == {"2:4 cusparselt"}
    assert len(sparse_layers(model)) == 14
    want, counted = store.output_of(dense, ids), mock.Mock(wraps=multiply)
    monkeypatch.setattr(sparse24, "multiply", counted)
    found = store.output_of(model, ids)
    assert counted.call_count == 14
    assert float((found.double() - want.double()).norm() / want.double().norm()) < 0.02
    assert store.count(model) == store.count(dense)
    weights = sum(layer.dense().nbytes for layer in sparse_layers(model).values())
    held = storage_bytes(layer.form for layer in sparse_layers(model).values())
    assert 16 * held == 9 * weights
    left = storage_bytes(dense.parameters()) - storage_bytes(model.parameters())
    assert left == weights


def test_what_is_opened_to_be_trained_or_proved_is_dense(artifact, gpu):
    trainable = store.load(artifact, trainable=True, sparse_kernels=True)
    assert not sparse_layers(trainable)
    assert not sparse_layers(store.load(artifact))
    proof = receipt.examine(artifact)
    assert proof.ok
    assert proof.max_abs_diff == 0


def test_a_model_saved_from_compressed_layers_is_the_one_saved_from_dense(artifact, gpu, tmp_path):
    probe = {"input_ids": token_batches(1)[0]["input_ids"]}
    for name, model in (("sparse", pipeline.load(artifact)), ("dense", store.load(artifact))):
        store.save(model, tmp_path / name, chain=[], probe=probe)
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("sparse", "dense")]
    assert files[0] == files[1]


def test_without_a_gpu_an_opened_artifact_gives_the_very_outputs_of_dense_layers(artifact, tmp_path):
    ids = token_batches(1)[0]
    dense = pipeline.load(artifact, sparse_kernels=False)
    assert not sparse_layers(dense)
    for model in (pipeline.load(artifact), store.load(artifact, offload_to=tmp_path, sparse_kernels=True)):
        assert {layer.kernel for layer in sparse_layers(model).values()} == {"dense, no 2:4 kernels on cpu"}
        assert torch.equal(store.output_of(model, ids), store.output_of(dense, ids))
    assert all(place_of(weight) == tmp_path for weight in model.parameters())


@pytest.mark.parametrize(("pattern", "told"), [("2:4", "2:4 cusparselt"), ("4:8", "dense, not 2:4")])
def test_a_pruned_link_says_by_what_its_layers_will_run(gpu, pattern, told):
    model = opt().bfloat16()
    method = Magnitude(name="m", sparsity=None, pattern=pattern, schedule="once", steps=0, lr=None, ignore=())
    made = method.finalize(method.prepare(model, context(model)), context(model))
    assert method.detail(made, context(made))["kernel"] == {told: 12}
    unstructured = Magnitude(name="m", sparsity=0.5, pattern=None, schedule="once", steps=0, lr=None, ignore=())
    assert "kernel" not in unstructured.detail(made, context(made))


@pytest.mark.parametrize(("pattern", "told"), [("2:4", ", 2:4 as dense"), ("4:8", "")])
def test_a_quantized_link_says_that_its_kernels_read_the_zeros_too(gpu, pattern, told):
    model = opt()
    architecture = context(model).architecture
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and "head" not in name]
    prune_magnitude(model, names, sparsity=0.5, pattern=pattern)
    quantize_layers(model, names, "weight_only", bits=4, group_size=16)
    ((kernel, layers),) = quantization_detail(model, architecture, ())["kernel"].items()
    assert kernel.endswith(f"dequantize{told}")
    assert layers == 12


@pytest.mark.gpu
@pytest.mark.skipif(not HERE, reason="no CUDA device")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("outputs", "inputs"), [(64, 128), (768, 3072), (3072, 768), (11008, 4096)])
def test_on_a_gpu_a_layer_gives_what_the_masked_dense_one_gives(outputs, inputs, dtype):
    dense = linear(outputs, inputs, dtype)
    set_mask(dense, dense.weight != 0)
    want = copy.deepcopy(dense).double()
    layer = SparseLinear.over(copy.deepcopy(dense).cuda())
    assert layer.kernel in [f"2:4 {kernel}" for kernel in KERNELS], layer.kernel
    for tokens in (1, 2, 7, 8, 33, 512):
        x = torch.randn(tokens, inputs).to(dtype)
        for mode in (torch.no_grad, torch.inference_mode):
            with mode():
                found = layer(x.cuda())
                assert nearly(found.cpu(), want(x.double()).to(dtype)), tokens
    assert torch.equal(layer.dense().cpu(), dense.weight)


@pytest.mark.gpu
@pytest.mark.skipif(not HERE, reason="no CUDA device")
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_on_a_gpu_a_kernel_is_right_or_says_that_it_is_not_there(kernel, dtype):
    said = sparse24.refusal(kernel, torch.device("cuda", 0), dtype)
    assert said == "" or "support" in said, said


@pytest.mark.gpu
@pytest.mark.skipif(not HERE, reason="no CUDA device")
def test_on_a_gpu_the_weights_take_nine_sixteenths():
    layer = linear(4096, 4096).cuda()
    torch.cuda.synchronize()
    sparse24.choose(layer.weight)  # the kernels' own workspaces
    before = torch.cuda.memory_allocated()
    sparse = SparseLinear.over(layer)
    del layer
    torch.cuda.synchronize()
    assert before - torch.cuda.memory_allocated() == pytest.approx(4096 * 4096 * 2 * 7 / 16, rel=0.01)
    assert sparse.form is not None


@pytest.mark.gpu
@pytest.mark.skipif(not HERE, reason="no CUDA device")
def test_on_a_gpu_an_opened_artifact_runs_by_kernels_and_goes_home_dense(tmp_path):
    ids = token_batches(1)[0]
    store.save(pruned(llama()), tmp_path / "artifact", chain=[], probe={"input_ids": ids["input_ids"]})
    dense, model = store.load(tmp_path / "artifact", "cuda"), pipeline.load(tmp_path / "artifact", "cuda")
    assert {layer.kernel[:4] for layer in sparse_layers(model).values()} == {"2:4 "}
    on_gpu = {name: tensor.cuda() for name, tensor in ids.items()}
    want, found = store.output_of(dense, on_gpu).double(), store.output_of(model, on_gpu).double()
    assert float((found - want).norm() / want.norm()) < 0.02
    assert store.count(model) == store.count(dense)
    assert torch.equal(store.output_of(model.cpu(), ids), store.output_of(dense.cpu(), ids))
