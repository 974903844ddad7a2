import copy
import gc
import pickle
import weakref

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM

from pipeline.layers import kernels
from pipeline.layers.linear import Int8Linear, Siblings
from pipeline.layers.quantized import KINDS, quantized_layers
from pipeline.layers.schemes import quantize_layers
from tests.preempting import interrupted

SHARED = kernels.choose(torch.device("cpu"), torch.float32, 1) in kernels.FBGEMM


def three(bias=True, join=True):
    torch.manual_seed(0)
    biased = [bias in (True, "first"), bias is True, bias is True]
    made = nn.ModuleList(
        KINDS["int8", nn.Linear].from_float(nn.Linear(96, out, bias=has))
        for out, has in zip((72, 40, 40), biased, strict=True)
    )
    if join:
        Siblings(list(made))
    return made


@pytest.mark.parametrize("bias", [True, False, "first"])
@pytest.mark.parametrize("shape", [(1, 1, 96), (1, 96), (2, 3, 96), (40, 96)])
def test_siblings_give_what_each_gives_alone(bias, shape):
    x = torch.randn(shape)
    for layer, alone in zip(three(bias), three(bias, join=False), strict=True):
        torch.testing.assert_close(layer(x), alone(x), rtol=1e-6, atol=1e-6)


def test_every_kernel_gives_the_same_with_siblings():
    x = torch.randn(1, 1, 96)
    for kernel in kernels.KERNELS:
        if kernel == "float" or kernels.works(kernel, torch.device("cpu")):
            with kernels.forced(kernel):
                for layer, alone in zip(three(), three(join=False), strict=True):
                    torch.testing.assert_close(layer(x), alone(x), rtol=1e-6, atol=1e-6)


def test_any_order_and_any_input_gives_that_input_s_output():
    layers, alone = three(), three(join=False)
    x, other = torch.randn(1, 96), torch.randn(1, 96)
    calls = [(1, x), (0, x), (1, other), (2, x), (2, x), (1, x), (0, other), (0, x), (1, x), (1, x), (2, other)]
    for index, given in calls:
        torch.testing.assert_close(layers[index](given), alone[index](given), rtol=1e-6, atol=1e-6)


def test_a_buffer_that_is_filled_anew_for_each_token_is_read_anew():
    layers, alone, x = three(), three(join=False), torch.randn(1, 96)
    for _ in range(3):
        x.normal_()
        for layer, single in zip(layers, alone, strict=True):
            torch.testing.assert_close(layer(x), single(x), rtol=1e-6, atol=1e-6)


@pytest.mark.skipif(not SHARED, reason="this processor's int8 kernel does not share products")
def test_one_product_serves_all_and_lets_go_of_the_input(monkeypatch):
    products = []
    kept = kernels._fbgemm
    monkeypatch.setattr(kernels, "_fbgemm", lambda *given: products.append(given) or kept(*given))
    layers, x = three(), torch.randn(1, 1, 96)
    for layer in layers:
        layer(x)
    assert len(products) == 1
    gone = weakref.ref(x)
    del x
    products.clear()
    gc.collect()
    assert gone() is None


def test_new_weights_of_one_sibling_are_used():
    layers, x = three(), torch.randn(1, 96)
    for layer in layers:
        layer(x)
    fresh = KINDS["int8", nn.Linear].from_float(nn.Linear(96, 40))
    layers[1].load_state_dict(fresh.state_dict())
    layers[0](x)
    torch.testing.assert_close(layers[1](x), fresh(x), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_has_siblings_of_its_own(copied):
    layers, x = three(), torch.randn(1, 96)
    want = [layer(x) for layer in layers]
    twin = copied(layers)
    twin[0].bias.data += 1
    assert twin[0]._siblings is twin[2]._siblings is not layers[0]._siblings
    assert torch.equal(twin[0](x), want[0] + 1) or torch.allclose(twin[0](x), want[0] + 1)
    assert all(torch.equal(layer(x), before) for layer, before in zip(layers, want, strict=True))
    assert set(twin.state_dict()) == set(layers.state_dict())


def names(model):
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    return [name for name in linears if "head" not in name]


def test_a_model_s_projections_are_joined_and_its_tokens_are_what_they_were():
    torch.manual_seed(0)
    shape = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    opt = OPTForCausalLM(OPTConfig(**shape, ffn_dim=64, word_embed_proj_dim=32)).eval()
    llama = LlamaForCausalLM(LlamaConfig(**shape, intermediate_size=64, num_key_value_heads=1)).eval()
    for model, joined in ((opt, {3}), (llama, {2, 3})):
        quantize_layers(model, names(model), "int8")
        found = quantized_layers(model).values()
        groups = {id(layer._siblings): layer._siblings for layer in found if layer._siblings is not None}
        assert {len(group.layers) for group in groups.values()} == joined
        tokens = torch.randint(0, 64, (1, 1))
        with torch.inference_mode():
            together = model(input_ids=tokens).logits
            for layer in found:
                assert isinstance(layer, Int8Linear)
                layer._siblings = None
            torch.testing.assert_close(model(input_ids=tokens).logits, together, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("replaced", [False, True])
def test_a_bias_that_is_changed_after_the_first_token_is_read(replaced):
    layers, alone, x = three(), three(join=False), torch.randn(1, 1, 96)
    for made in (layers, alone):
        for layer in made:
            layer(x)
        if replaced:
            made[1].bias = nn.Parameter(made[1].bias + 1)
        else:
            made[1].bias.data += 1
    for layer, single in zip(layers, alone, strict=True):
        torch.testing.assert_close(layer(x), single(x), rtol=1e-6, atol=1e-6)


def test_the_product_of_a_token_on_another_device_is_not_a_cpus():
    assert not kernels.is_fast_token(torch.empty(1, 1, 96, device="meta"), 96)


def test_an_input_that_is_too_long_to_be_shared_is_not_held():
    layers, x = three(), torch.randn(kernels.INTEGER_ROWS + 1, 96)
    layers[0](x)
    gone = weakref.ref(x)
    del x
    assert gone() is None


@pytest.mark.parametrize("line", range(24))
def test_threads_that_share_a_model_get_each_its_own_outputs(line):
    layers, alone = three(), three(join=False)
    x, other = torch.randn(1, 96), torch.randn(1, 96)
    found = {}
    outputs, met = interrupted(
        lambda: [layer(x) for layer in layers],
        lambda: found.update(first=layers[0](other), second=layers[1](other)),
        line,
        Siblings.take,
    )
    assert met
    found["third"] = layers[2](other)
    for layer, output, theirs in zip(alone, outputs, found.values(), strict=True):
        torch.testing.assert_close(output, layer(x), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(theirs, layer(other), rtol=1e-6, atol=1e-6)
