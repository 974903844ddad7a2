"""The peak of training anybody's model: predicted beside what the allocator's events say of the real one."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils import parametrizations, prune
from torch.utils.checkpoint import checkpoint
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

import pipeline.memory
from pipeline.memory.measure import measure_peak

CONVOLUTIONS = partial(
    nn.Sequential,
    nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(),
    nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10),
)  # fmt: skip
WIDER = partial(
    nn.Sequential,
    nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 64, 3, stride=2, padding=1), nn.ReLU(),
    nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10),
)  # fmt: skip


class Recommender(nn.Module):
    """Bags of items and a perceptron."""

    def __init__(self) -> None:
        super().__init__()
        self.items = nn.EmbeddingBag(5000, 32, mode="mean")
        self.layers = nn.Sequential(nn.Linear(32, 256), nn.GELU(), nn.Linear(256, 5000))

    def forward(self, seen: torch.Tensor) -> torch.Tensor:
        return self.layers(self.items(seen))


class Branching(nn.Module):
    """Little is held but where gradients of several branches meet."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(64, 512)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.inner(x)
        return torch.cat([x[row : row + 1] for row in range(3)])


class Windows(nn.Module):
    """Buffers that are parts of others, and one row for all."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(64, 64)
        table = torch.randn(2000, 64)
        self.register_buffer("table", table)
        self.register_buffer("first", table[:1000])
        self.register_buffer("row", torch.ones(1, 64).expand(2000, 64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x) + self.first[: len(x)] + self.row[: len(x)]


class Transposing(nn.Module):
    """Between two layers one that takes channels before steps."""

    def __init__(self, between: nn.Module) -> None:
        super().__init__()
        self.first, self.between, self.last = nn.Linear(16, 16), between, nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.between(self.first(x).transpose(1, 2)).transpose(1, 2))


class Answering(nn.Module):
    """A dict with its loss."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(64, 512)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": self.inner(x).square().mean()}


def pruned() -> nn.Module:
    return prune.random_unstructured(nn.Linear(128, 256), "weight", 0.5)


def bert() -> nn.Module:
    size = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 256}
    return BertForSequenceClassification(BertConfig(vocab_size=500, **size))


def llama() -> nn.Module:
    size = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=100, intermediate_size=128, **size))


def experts() -> nn.Module:
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    return MixtralForCausalLM(MixtralConfig(vocab_size=100, intermediate_size=96, num_local_experts=4, **sizes))


def classify(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    return functional.cross_entropy(model(batch[0]), batch[1])


def last_of_a_sequence(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    return functional.cross_entropy(model(batch[0])[0][-1], batch[1])


def align(model: nn.Module, batch: tuple[torch.Tensor, ...]) -> torch.Tensor:
    return functional.ctc_loss(model(batch[0]).log_softmax(-1), *batch[1:])


def near(loss: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    return lambda model, batch: loss(model(batch[0]), batch[1])


def total(model: nn.Module, batch: tuple[torch.Tensor]) -> torch.Tensor:
    return model(*batch).sum()


def measured(model, optimizer, batch, loss) -> int:
    """The peak over the third step of the real thing."""
    steps = optimizer(model.parameters())
    for _ in range(3):
        state = [value for held in steps.state.values() for value in held.values()]
        alive = [*model.parameters(), *model.buffers(), *state]
        with measure_peak("cpu", alive) as peak:
            given = (
                {name: t.clone() for name, t in batch.items()}
                if isinstance(batch, dict)
                else tuple(t.detach().clone().requires_grad_(t.requires_grad) for t in batch)
            )
            result = loss(model, given) if loss else model(**given).loss
            result.backward()
            del result, given
            steps.step()
            steps.zero_grad()
    return peak.bytes


CASES = {
    "convolutions": (
        CONVOLUTIONS, partial(torch.optim.SGD, lr=0.1, momentum=0.9),
        (torch.randn(16, 3, 32, 32), torch.zeros(16, dtype=torch.long)), classify, 0.05,
    ),
    "wider convolutions, in blocks of channels backwards": (
        WIDER, torch.optim.AdamW, (torch.randn(16, 3, 32, 32), torch.zeros(16, dtype=torch.long)), classify, 0.01,
    ),
    "recurrent, with a workspace": (
        partial(nn.LSTM, 16, 64), torch.optim.AdamW, (torch.randn(20, 8, 16), torch.zeros(8, dtype=torch.long)),
        last_of_a_sequence, 0.01,
    ),
    "a sum, whose gradient is one number that a product copies": (
        partial(nn.Linear, 256, 512), torch.optim.Adagrad, (torch.randn(512, 256),), total, 0.01,
    ),
    "an optimizer that divides by what it reads of its state": (
        partial(nn.Linear, 256, 512), torch.optim.NAdam, (torch.randn(64, 256),), total, 0.01,
    ),
    "an optimizer that asks whether what it reads is 1": (
        partial(nn.Linear, 256, 512), torch.optim.ASGD, (torch.randn(64, 256),), total, 0.01,
    ),
    "branches, whose gradients are added in place": (
        Branching, partial(torch.optim.SGD, lr=0.1), (torch.randn(2048, 64),), total, 0.01,
    ),
    "a weight that is the exponential of a matrix": (
        lambda: parametrizations.orthogonal(nn.Linear(128, 128)), torch.optim.AdamW, (torch.randn(64, 128),), total,
        0.01,
    ),
    "a weight that a hook computes": (pruned, torch.optim.AdamW, (torch.randn(64, 128),), total, 0.01),
    "buffers that are views": (Windows, torch.optim.AdamW, (torch.randn(64, 64),), total, 0.01),
    "alignments": (
        partial(nn.Linear, 32, 20), torch.optim.AdamW,
        (torch.randn(50, 16, 32), torch.ones(16, 10, dtype=torch.long), torch.full((16,), 50), torch.full((16,), 10)),
        align, 0.01,
    ),
    "images made larger, of few channels": (
        partial(nn.Sequential, nn.Linear(64, 64), nn.Upsample(scale_factor=2, mode="bilinear")), torch.optim.AdamW,
        (torch.randn(4, 3, 64, 64),), total, 0.01,
    ),
    "the gradient of a sum, which a kernel copies": (
        partial(nn.Sequential, nn.Linear(64, 256), nn.Softmax(-1)), torch.optim.AdamW, (torch.randn(512, 64),), total,
        0.01,
    ),
    "a mean of squared errors, which keeps the memory of all": (
        partial(nn.Linear, 64, 512), torch.optim.AdamW, (torch.randn(512, 64), torch.randn(512, 512)),
        near(functional.mse_loss), 0.01,
    ),
    "a sum of smooth errors, which keeps the memory of all": (
        partial(nn.Linear, 64, 512), torch.optim.AdamW, (torch.randn(512, 64), torch.randn(512, 512)),
        near(partial(functional.smooth_l1_loss, reduction="sum")), 0.01,
    ),
    "a mean of cross entropies, which keeps the memory of all": (
        partial(nn.Sequential, nn.Linear(64, 512), nn.Sigmoid()), torch.optim.AdamW,
        (torch.randn(512, 64), torch.rand(512, 512)), near(functional.binary_cross_entropy), 0.01,
    ),
    "the largest of each row, whose gradients are put among zeros in place": (
        partial(nn.Linear, 64, 512), torch.optim.AdamW, (torch.randn(512, 64),),
        lambda model, batch: model(*batch).topk(10)[0].sum(), 0.01,
    ),
    "columns by number, as well": (
        partial(nn.Linear, 64, 512), torch.optim.AdamW, (torch.randn(512, 64), torch.zeros(16, dtype=torch.long)),
        lambda model, batch: model(batch[0])[:, batch[1]].square().sum(), 0.01,
    ),
    "zeros in the place of gradients, of which others are made": (
        partial(nn.Linear, 64, 512), torch.optim.AdamW, (torch.randn(512, 64), torch.zeros(16, dtype=torch.long)),
        lambda model, batch: model(batch[0]).index_put((batch[1],), torch.zeros(16, 512)).square().sum(), 0.01,
    ),
    "a mean of soft margins": (
        partial(nn.Linear, 64, 512), torch.optim.AdamW, (torch.randn(512, 64), torch.ones(512, 512)),
        near(functional.soft_margin_loss), 0.01,
    ),
    "a median by sorting a copy": (
        partial(nn.Linear, 64, 512), torch.optim.AdamW, (torch.randn(512, 64),),
        lambda model, batch: model(*batch).kthvalue(3)[0].sum(), 0.01,
    ),
    "images made smaller, smoothly": (
        partial(nn.Linear, 128, 128), torch.optim.AdamW, (torch.randn(4, 8, 64, 128),),
        lambda model, batch: functional.interpolate(
            model(*batch), scale_factor=0.5, mode="bilinear", antialias=True
        ).sum(), 0.01,
    ),
    "patches that are put together": (
        partial(nn.Linear, 900, 900), torch.optim.AdamW, (torch.randn(4, 32, 900),),
        lambda model, batch: functional.fold(model(*batch), (31, 31), 2).sum(), 0.01,
    ),
    "a decomposition in a copy": (
        partial(nn.Linear, 64, 64), torch.optim.AdamW, (torch.randn(300, 64),),
        lambda model, batch: torch.linalg.svdvals(model(*batch)).sum(), 0.01,
    ),
    "a batch norm whose result lies in order, which a linear layer copies and adds its bias in place": (
        partial(Transposing, nn.BatchNorm1d(16)), torch.optim.AdamW, (torch.randn(64, 50, 16),), total, 0.01,
    ),
    "an activation whose result lies in order": (
        partial(Transposing, nn.LogSigmoid()), torch.optim.AdamW, (torch.randn(64, 50, 16),), total, 0.01,
    ),
    "a loss that checks its values": (
        partial(nn.Linear, 64, 512), torch.optim.AdamW, (torch.randn(512, 64), torch.rand(512, 512)),
        lambda model, batch: functional.gaussian_nll_loss(model(batch[0]), batch[1], batch[1]), 0.01,
    ),
    "what a mask chooses, all of it": (
        partial(nn.Linear, 64, 512), torch.optim.AdamW, (torch.randn(512, 64),),
        lambda model, batch: (y := model(*batch))[y.isfinite()].square().sum(), 0.01,
    ),
    "rows that are not left out, by their numbers": (
        partial(nn.Linear, 64, 512), torch.optim.AdamW, (torch.randn(512, 64),),
        lambda model, batch: model(*batch)[(batch[0].sum(1) < 1e9).nonzero(as_tuple=True)].square().sum(), 0.01,
    ),
    "alignments with targets that a mask chooses": (
        partial(nn.Linear, 32, 20), torch.optim.AdamW,
        (torch.randn(50, 16, 32), torch.ones(16, 10, dtype=torch.long), torch.full((16,), 50), torch.full((16,), 10)),
        lambda model, batch: align(model, (batch[0], batch[1].masked_select(batch[1] > 0), *batch[2:])), 0.01,
    ),
    "a covariance, which asks whether there are rows enough": (
        partial(nn.Linear, 64, 256), torch.optim.AdamW, (torch.randn(128, 64),),
        lambda model, batch: model(*batch).T.cov().square().mean(), 0.01,
    ),
    "a layer for each of several weights": (
        partial(nn.Linear, 64, 256), torch.optim.AdamW, (torch.randn(128, 64),),
        lambda model, batch: torch.vmap(functional.linear, (None, 0, 0))(
            *batch, model.weight.view(4, 64, 64), model.bias.view(4, 64)
        ).square().mean(), 0.01,
    ),
    "parts whose number is that of a tensor made of numbers": (
        partial(nn.Linear, 64, 256), torch.optim.AdamW, (torch.randn(128, 64),),
        lambda model, batch: model(*batch).view(torch.div(128, 32, rounding_mode="trunc"), -1, 256).std(1).sum(), 0.01,
    ),
    "a text model given a mask that hides nothing": (
        llama, torch.optim.AdamW,
        {**dict.fromkeys(("input_ids", "labels"), torch.zeros(4, 64, dtype=torch.long)),
         "attention_mask": torch.ones(4, 64, dtype=torch.long)}, None, 0.01,
    ),
    "and one that hides what is behind a text": (
        llama, torch.optim.AdamW,
        {**dict.fromkeys(("input_ids", "labels"), torch.zeros(4, 64, dtype=torch.long)),
         "attention_mask": torch.ones(4, 64, dtype=torch.long).tril(40)}, None, 0.01,
    ),
    "in both directions, with a mask that hides something": (
        bert, torch.optim.AdamW,
        {"input_ids": torch.zeros(4, 256, dtype=torch.long), "labels": torch.zeros(4, dtype=torch.long),
         "attention_mask": torch.ones(4, 256, dtype=torch.long).tril(40)}, None, 0.01,
    ),
    "older checkpointing, of an input that has a gradient": (
        partial(nn.Sequential, nn.Linear(128, 512), nn.GELU(), nn.Linear(512, 128)), torch.optim.AdamW,
        (torch.randn(256, 128, requires_grad=True),),
        lambda model, batch: checkpoint(model, *batch, use_reentrant=True).sum(), 0.01,
    ),
    "channels last": (
        lambda: nn.Conv2d(3, 8, 3).to(memory_format=torch.channels_last), torch.optim.AdamW,
        (torch.randn(16, 3, 64, 64),), total, 0.01,
    ),
    "recommender": (
        Recommender, torch.optim.AdamW, (torch.zeros(64, 20, dtype=torch.long), torch.zeros(64, dtype=torch.long)),
        classify, 0.01,
    ),
    "a mixture of experts, whose products go by groups": (
        experts, torch.optim.AdamW, dict.fromkeys(("input_ids", "labels"), torch.zeros(4, 64, dtype=torch.long)),
        None, 0.01,
    ),
    "bert": (
        bert, partial(torch.optim.AdamW, foreach=False),
        {"input_ids": torch.zeros(8, 64, dtype=torch.long), "labels": torch.zeros(8, dtype=torch.long)}, None, 0.01,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_the_peak_of_training_any_module_is_predicted(name):
    build, optimizer, batch, loss, margin = CASES[name]
    model = build()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    predicted = pipeline.memory.estimate(model, optimizer, batch, loss)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert predicted.bytes == pytest.approx(measured(model, optimizer, batch, loss), rel=margin)
    assert predicted.kinds["weights"] == sum(parameter.nbytes for parameter in model.parameters())


def test_what_an_unknown_model_gives_is_told_apart_from_what_it_holds_within():
    batch = (torch.zeros(64, 10, dtype=torch.long), torch.zeros(64, dtype=torch.long))
    found = pipeline.memory.estimate(Recommender(), torch.optim.SGD, batch, loss=classify)
    logits = 64 * 5000 * 4
    assert 2 * logits <= max(found.course.kinds["logits and loss"]) <= 2 * logits + 64  # and their log-softmax
    assert max(found.course.kinds["activations"]) < logits


def test_a_model_on_meta_is_estimated_with_its_tied_weights_once():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(1024, 1024, bias=False), nn.Linear(1024, 1024, bias=False))
    model[1].weight = model[0].weight
    found = pipeline.memory.estimate(model, torch.optim.SGD, torch.zeros(4, 1024))
    assert found.kinds["weights"] == 4 * 1024**2


@pytest.mark.parametrize("off", [torch.no_grad, torch.inference_mode])
def test_training_is_estimated_where_gradients_are_off_for_who_asks(off):
    asked = (nn.Linear(64, 512), torch.optim.SGD, torch.zeros(16, 64))
    expected = pipeline.memory.estimate(*asked)
    with off():
        assert pipeline.memory.estimate(*asked).kinds == expected.kinds
        assert not torch.is_grad_enabled()


@pytest.mark.parametrize("embedding", [nn.Embedding, nn.EmbeddingBag])
def test_a_sparse_gradient_is_refused_by_name(embedding):
    """What is left of it, were it counted, is half of what an optimizer takes."""
    model = nn.Sequential(embedding(50, 8, sparse=True), nn.Linear(8, 8))
    with pytest.raises(ValueError, match=r"the gradient of 0\.weight is sparse.*give sparse=False"):
        pipeline.memory.estimate(model, torch.optim.Adagrad, torch.zeros(4, 6, dtype=torch.int64))


def test_a_dict_may_have_the_loss():
    found = pipeline.memory.estimate(Answering(), torch.optim.SGD, torch.zeros(16, 64))
    assert found.kinds["gradients"] == 4 * 65 * 512


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (nn.Linear(4, 4).requires_grad_(False), "nothing to train"),
        (nn.LSTM(4, 4), "a tuple without a loss"),
        (nn.LazyLinear(4), "weight has no shape yet"),
        (nn.Linear(5, 4), "the model or its loss fails on tensors of these shapes: RuntimeError: .*reduction dim"),
    ],
)
def test_what_cannot_be_trained_is_said(model, said, capfd):
    with pytest.raises(ValueError, match=said):
        pipeline.memory.estimate(model, torch.optim.SGD, torch.zeros(2, 3, 4))
    assert capfd.readouterr().err == ""


def test_a_model_of_torchscript_is_refused():
    with pytest.warns(DeprecationWarning, match="torch.jit.script"):
        model = torch.jit.script(nn.Linear(4, 4))
    with pytest.raises(ValueError, match="TorchScript"):
        pipeline.memory.estimate(model, torch.optim.SGD, torch.zeros(2, 4))


@pytest.mark.parametrize(
    ("loss", "said"),
    [
        (lambda model, batch: None, "the loss is a NoneType; give a loss that returns a scalar tensor"),
        (lambda model, batch: model(batch).sum(0), r"the loss has the shape \[4\]; give its mean or its sum"),
        (lambda model, batch: model(batch).sum().detach(), "the loss has no gradient"),
        (lambda model, batch: model(batch).unique().sum(), "shapes that hang on values"),
    ],
)
def test_a_loss_that_cannot_be_followed_is_said(loss, said):
    with pytest.raises(ValueError, match=said):
        pipeline.memory.estimate(nn.Linear(4, 4), torch.optim.SGD, torch.zeros(2, 4), loss)


def test_an_optimizer_that_calls_the_model_itself_is_refused():
    with pytest.raises(ValueError, match="LBFGS calls the model as often as it likes"):
        pipeline.memory.estimate(nn.Linear(4, 4), torch.optim.LBFGS, torch.zeros(2, 4))


def test_an_optimizer_that_is_built_already_is_refused():
    """Its parameters are of the model itself, which is not touched."""
    model = nn.Linear(4, 4)
    with pytest.raises(ValueError, match=r"built already, a SGD; give what builds it"):
        pipeline.memory.estimate(model, torch.optim.SGD(model.parameters()), torch.zeros(2, 4))


def test_a_peak_is_shown_without_the_number_of_each_operator():
    found = pipeline.memory.estimate(nn.Linear(4, 4), torch.optim.SGD, torch.zeros(2, 4))
    assert found.course is not None
    assert len(repr(found)) < 500
