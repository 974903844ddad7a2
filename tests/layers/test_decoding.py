from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import OpenAIGPTConfig, OpenAIGPTLMHeadModel

from pipeline.layers.decoding import decode
from tests.tiny import llama, opt

IDS = torch.randint(64, (2, 12), generator=torch.Generator().manual_seed(0))


def gpt1():
    """It takes no cache."""
    torch.manual_seed(0)
    return OpenAIGPTLMHeadModel(OpenAIGPTConfig(vocab_size=64, n_positions=32, n_embd=32, n_layer=2, n_head=2))


@pytest.mark.parametrize("build", [opt, llama, gpt1])
def test_steps_with_a_cache_or_without_one_give_the_logits_of_the_whole(build):
    model = build().eval()
    with torch.no_grad():
        whole = model(input_ids=IDS).logits
        logits, cache = decode(model, IDS[:, :5])
        steps = [logits]
        for position in range(5, IDS.shape[1]):
            logits, cache = decode(model, IDS[:, position : position + 1], cache)
            steps.append(logits)
    torch.testing.assert_close(torch.cat(steps, 1), whole[:, 4:], rtol=1e-4, atol=1e-5)


def test_of_a_prompt_only_the_last_tokens_logits_are_computed_whether_a_model_can_leave_out_others_or_not():
    model, seen = llama().eval(), []
    model.lm_head.register_forward_hook(lambda _, args, logits: seen.append(logits.shape[1]))

    class Plain(nn.Module):
        def forward(self, input_ids, use_cache, cache=None):
            return SimpleNamespace(logits=model(input_ids=input_ids).logits, cache=None)

    with torch.no_grad():
        (found, _), (plain, _) = decode(model, IDS), decode(Plain(), IDS)
    assert found.shape == plain.shape == (2, 1, 64)
    assert seen == [1, 12]
    torch.testing.assert_close(found, plain)


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_the_cache_goes_by_the_name_in_the_models_signature(name):
    class Model(nn.Module):
        exec(
            f"def forward(self, input_ids, use_cache, {name}=None):\n"
            f"    return SimpleNamespace(logits=input_ids, {name}=({name} or 0) + 1)",
            {"SimpleNamespace": SimpleNamespace},
            locals(),
        )

    _, cache = decode(Model(), IDS)
    assert cache == 1
    assert decode(Model(), IDS, cache)[1] == 2


@pytest.mark.parametrize(
    ("dtype", "tokens", "expected"), [(torch.float32, 1, False), (torch.float32, 2, True), (torch.bfloat16, 1, True)]
)
def test_one_float32_token_is_decoded_without_onednn_which_is_there_again_after_an_error(dtype, tokens, expected):
    seen = []

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1, dtype=dtype))

        def forward(self, input_ids, use_cache, cache=None):
            seen.append(torch.backends.mkldnn.enabled)
            raise RuntimeError("no logits")

    before = torch.backends.mkldnn.enabled
    with pytest.raises(RuntimeError, match="no logits"):
        decode(Model(), IDS[:1, :tokens])
    assert seen == [expected and before]
    assert torch.backends.mkldnn.enabled == before
