"""The loss in parts against the loss of whole logits."""

import pytest
import torch
from torch import nn

from pipeline.errors import ConfigError
from pipeline.layers.chunked_loss import before_head, chunked_cross_entropy, require_plain_head
from pipeline.layers.sliced_loss import IGNORED
from pipeline.memory.measure import measure_peak
from pipeline.tasks.causal_lm import CausalLM
from tests.tiny import llama, opt

IDS = torch.randint(64, (3, 11), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("build", [opt, llama])
@pytest.mark.parametrize("chunks", [2, 3, 8, 33, 1000])
def test_loss_and_gradients_are_those_of_whole_logits(build, chunks):
    labels = IDS.clone()
    labels[0, 4:7] = IGNORED
    batch, results = {"input_ids": IDS, "labels": labels}, []
    for parts in (1, chunks):
        model = build().double()
        loss = CausalLM().loss(model, batch, parts)
        loss.backward()
        results.append((loss.detach(), [weight.grad for weight in model.parameters()]))
    (loss, gradients), (other, others) = results
    torch.testing.assert_close(other, loss, rtol=1e-12, atol=0)
    for one, two in zip(gradients, others, strict=True):
        torch.testing.assert_close(two, one, rtol=1e-10, atol=1e-14)


def test_logits_are_never_whole():
    vocabulary, tokens, width = 20_000, 256, 16
    head = nn.Linear(width, vocabulary, bias=False)
    targets = torch.randint(vocabulary, (1, tokens))

    def peak(chunks):
        hidden = torch.randn(1, tokens, width, requires_grad=True)
        with measure_peak("cpu") as peak:
            chunked_cross_entropy(hidden, head, targets, chunks).backward()
        return peak.bytes

    logits = 4 * vocabulary * tokens
    assert peak(1) > 2 * logits
    assert peak(16) < 0.5 * logits


def test_the_head_is_found_again_after_an_error_in_the_model():
    model = opt()
    with pytest.raises(IndexError):
        before_head(model, torch.full((1, 4), 1000))
    assert model(input_ids=IDS).logits.shape == (3, 11, 64)


def test_logits_that_the_model_changes_after_its_head_are_refused():
    class Capped(type(llama())):
        def forward(self, **inputs):
            output = super().forward(**inputs)
            output.logits = torch.tanh(output.logits)
            return output

    model = llama()
    require_plain_head(model, "memory.loss_chunks=4")
    model.__class__ = Capped
    with pytest.raises(ConfigError, match=r"memory\.loss_chunks=4.*use memory\.loss_chunks=1"):
        require_plain_head(model, "memory.loss_chunks=4")
    with pytest.raises(ConfigError, match="loss_chunks=1"):
        require_plain_head(nn.Linear(2, 2), "memory.loss_chunks=4")
