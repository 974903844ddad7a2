"""The task against independent computations: numpy for losses and baselines, transformers' generate for decoding."""

import math
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from transformers import OPTForCausalLM, PreTrainedTokenizerFast

from pipeline.data.base import DataBundle, DataSpec
from pipeline.data.tokens import TokenWindows
from pipeline.errors import ConfigError
from pipeline.layers.decoding import decode
from pipeline.models.byte_tokenizer import byte_tokenizer
from pipeline.models.gpt import GPT
from pipeline.models.llama import Llama
from pipeline.tasks.causal_lm import CausalLM, generate

LENGTH = 48
SPEC = DataSpec(vocabulary=256, sequence_length=LENGTH)
TASK = CausalLM()


def gpt() -> OPTForCausalLM:
    torch.manual_seed(0)
    settings = GPT(name="gpt", layers=2, heads=2, width=32, dropout=0.1, activation="gelu", tie_embeddings=False)
    model = settings.build(SPEC)
    # Wider weights than at initialisation: an argmax that is not a matter of rounding.
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4)
    return model


def opened(train: bytes, evaluation: bytes, length: int = LENGTH) -> DataBundle:
    return DataBundle(
        train=TokenWindows(np.frombuffer(train, np.uint8), length),
        evaluation=TokenWindows(np.frombuffer(evaluation, np.uint8), length),
        spec=DataSpec(vocabulary=256, sequence_length=length),
        fingerprint="",
        description="",
    )


TEXT = b"def add(a, b):\n    return a + b\n" * 20
DATA = opened(TEXT, bytes(np.random.default_rng(0).integers(97, 123, size=5 * LENGTH + 7, dtype=np.uint8)))


def nats_by_numpy(logits: torch.Tensor, ids: torch.Tensor) -> np.ndarray:
    """[B, T - 1] in float64."""
    scores = logits.detach().double().numpy()[:, :-1]
    logsum = np.log(np.exp(scores - scores.max(-1, keepdims=True)).sum(-1)) + scores.max(-1)
    return logsum - np.take_along_axis(scores, ids.numpy()[:, 1:, None], -1)[..., 0]


def test_loss_is_the_mean_over_all_but_the_first_token() -> None:
    model = gpt().eval()
    ids = torch.randint(256, (3, LENGTH))
    loss = TASK.loss(model, {"input_ids": ids, "labels": ids})
    assert loss.dtype == torch.float32
    assert loss.requires_grad
    assert loss.item() == pytest.approx(nats_by_numpy(model(input_ids=ids).logits, ids).mean(), rel=1e-5)
    assert loss.item() == pytest.approx(model(input_ids=ids, labels=ids).loss.item(), rel=1e-6)
    assert TASK.count({"input_ids": ids, "labels": ids}) == 3 * LENGTH


def test_loss_gradient_is_that_of_transformers_own() -> None:
    model = gpt().eval()
    ids = torch.randint(256, (3, LENGTH))
    TASK.loss(model, {"input_ids": ids, "labels": ids}).backward()
    ours = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    model(input_ids=ids, labels=ids).loss.backward()
    for name, parameter in model.named_parameters():
        assert torch.allclose(ours[name], parameter.grad, rtol=1e-4, atol=1e-7), name


@pytest.mark.parametrize(("dtype", "expected"), [(torch.bfloat16, torch.float32), (torch.float64, torch.float64)])
def test_loss_of_half_precision_logits_is_computed_in_float32(dtype: torch.dtype, expected: torch.dtype) -> None:
    model = gpt().eval().to(dtype)
    ids = torch.randint(256, (2, LENGTH))
    loss = TASK.loss(model, {"input_ids": ids, "labels": ids})
    assert loss.dtype == expected
    assert loss.item() == pytest.approx(nats_by_numpy(model(input_ids=ids).logits, ids).mean(), rel=1e-5)


def test_loss_does_not_copy_the_logits() -> None:
    seen = {}

    class Given(nn.Module):
        def forward(self, input_ids: torch.Tensor, use_cache: bool) -> SimpleNamespace:
            seen["logits"] = torch.zeros(*input_ids.shape, 256, requires_grad=True)
            return SimpleNamespace(logits=seen["logits"])

    ids = torch.zeros(4, 8, dtype=torch.long)
    loss = TASK.loss(Given(), {"input_ids": ids, "labels": ids})
    nats = loss.grad_fn.next_functions[0][0]
    saved = nats.next_functions[0][0]._saved_result
    # log_softmax's own result is the one tensor of that size; a cut view would have been copied to fewer rows.
    assert saved.shape == (32, 256)
    loss.backward()
    assert bool((seen["logits"].grad[:, -1] == 0).all())


def test_evaluation_is_the_perplexity_of_every_predicted_token() -> None:
    model = gpt().train()
    found = TASK.evaluate(model, DATA, batch_size=2, device="cpu")
    assert model.training
    model.eval()
    ids = torch.stack([DATA.evaluation[i]["input_ids"] for i in range(5)])
    with torch.no_grad():
        nats = nats_by_numpy(model(input_ids=ids).logits, ids)
    assert (found.metric, found.direction, found.n) == ("perplexity", "lower", 5 * (LENGTH - 1))
    assert found.loss == pytest.approx(nats.mean(), rel=1e-5)
    assert found.value == pytest.approx(math.exp(nats.mean()), rel=1e-4)
    assert TASK.evaluate(model, DATA, batch_size=5, device="cpu").loss == pytest.approx(found.loss, rel=1e-6)
    assert not model.training


def test_a_diverged_model_has_infinite_perplexity_not_a_crash() -> None:
    model = gpt()
    with torch.no_grad():
        model.lm_head.weight.mul_(1e5)
    assert TASK.evaluate(model, DATA, batch_size=2, device="cpu").value == math.inf


def test_baseline_is_smoothed_unigram_perplexity() -> None:
    counts = Counter(TEXT[: len(TEXT) // LENGTH * LENGTH])
    total = sum(counts.values()) + 256
    held_out = b"".join(bytes(row[1:].tolist()) for row in DATA.evaluation.windows)
    nats = [-math.log((counts[byte] + 1) / total) for byte in held_out]
    assert TASK.baseline(DATA) == pytest.approx(math.exp(sum(nats) / len(nats)), rel=1e-9)
    same = opened(b"ab" * 480, b"ab" * 480)
    assert TASK.baseline(same) == pytest.approx(2, rel=0.3)


def test_probe_is_the_beginning_of_two_held_out_windows() -> None:
    probe = TASK.probe(DATA)
    assert list(probe) == ["input_ids"]
    assert (probe["input_ids"].shape, probe["input_ids"].dtype) == ((2, 32), torch.int64)
    assert torch.equal(probe["input_ids"][1], DATA.evaluation[1]["input_ids"][:32])
    assert TASK.probe(opened(TEXT, TEXT[:8], length=8))["input_ids"].shape == (2, 8)


def test_speed_is_measured_for_each_model_in_turns() -> None:
    order: list[str] = []

    class Counted(nn.Module):
        def __init__(self, name: str) -> None:
            super().__init__()
            self.name, self.inner = name, gpt()
            self.config = self.inner.config

        def forward(self, input_ids: torch.Tensor, use_cache: bool, cache: object) -> object:
            assert not self.inner.training
            assert not torch.is_grad_enabled()
            if cache is None:
                order.append(self.name)
            else:
                assert input_ids.shape == (1, 1)
            logits, cache = decode(self.inner, input_ids, cache)
            return SimpleNamespace(logits=logits, cache=cache)

    models = {"before": Counted("b"), "after": Counted("a")}
    found = TASK.speed(models, DATA, "cpu")
    assert set(found) == {"before", "after"}
    # The first two are the warm-up.
    assert order[2:] == ["b", "a"] * ((len(order) - 2) // 2)
    assert len(order) >= 2 + 2 * 3
    for speed in found.values():
        assert (speed.unit, speed.batch_size) == ("tokens/s", 1)
        assert speed.per_second == pytest.approx(1 / speed.latency)
        assert 1e-5 < speed.latency < 10
    assert all(model.training for model in models.values())


@pytest.mark.parametrize("length", [8, 20])
def test_speed_keeps_within_a_short_models_positions(length: int) -> None:
    settings = GPT(name="gpt", layers=1, heads=1, width=8, dropout=0.0, activation="gelu", tie_embeddings=True)
    data = opened(TEXT, TEXT, length)
    assert TASK.speed({"only": settings.build(data.spec)}, data, "cpu")["only"].per_second > 0


@pytest.mark.parametrize("family", ["gpt", "llama"])
def test_greedy_generation_equals_transformers_own(family: str) -> None:
    if family == "gpt":
        model = gpt()
    else:
        settings = Llama(
            name="llama",
            layers=2,
            heads=4,
            key_value_heads=2,
            width=32,
            intermediate=None,
            dropout=0.0,
            tie_embeddings=False,
        )
        torch.manual_seed(0)
        model = settings.build(SPEC)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.mul_(1 if "norm" in name else 4)
    tokenizer = byte_tokenizer()
    ours = generate(model, tokenizer, "def ", max_new_tokens=LENGTH - 4)
    assert model.training
    model.eval()
    ids = torch.tensor([list(b"def ")])
    theirs = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=LENGTH - 4, do_sample=False, pad_token_id=0
    )
    assert ours == tokenizer.decode(theirs[0])
    assert ours.startswith("def ")


def test_generation_goes_past_the_models_last_position() -> None:
    model, tokenizer = gpt(), byte_tokenizer()
    text = generate(model, tokenizer, "x" * 100, max_new_tokens=100)
    assert text.startswith("x" * 100)
    # The first new token sees the more recent half of the positions.
    context = torch.tensor([list(b"x" * (LENGTH // 2))])
    first = model.eval()(input_ids=context).logits[0, -1].argmax()
    assert generate(model, tokenizer, "x" * 100, max_new_tokens=1) == tokenizer.decode([*b"x" * 100, int(first)])
    assert len(generate(model, tokenizer, "def ", 60, temperature=1.0, seed=1)) > 20


def test_sampling_follows_the_seed() -> None:
    model, tokenizer = gpt(), byte_tokenizer()
    with torch.no_grad():
        model.lm_head.weight.mul_(0.1)

    def sample(seed: int) -> str:
        return generate(model, tokenizer, "def ", 30, temperature=1.0, seed=seed)

    state = torch.get_rng_state()
    assert sample(1) == sample(1) == TASK.generate(model, tokenizer, "def ", 30, temperature=1.0, seed=1)
    assert sample(1) != sample(2)
    assert torch.equal(torch.get_rng_state(), state)


def test_generation_stops_at_the_end_token() -> None:
    class Ends(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1))

        def forward(self, input_ids: torch.Tensor, cache: object, **_: object) -> SimpleNamespace:
            following = (input_ids[:, -1:] + 1) % 256
            return SimpleNamespace(logits=nn.functional.one_hot(following, 256), cache=object())

    tokenizer = byte_tokenizer()
    plain = generate(Ends(), tokenizer, "a", 10)
    assert plain == "abcdefghijk"
    with_end = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, eos_token="e")
    assert generate(Ends(), with_end, "a", 10) == "abcd"


def test_an_empty_prompt_is_refused() -> None:
    with pytest.raises(ConfigError, match="prompt is empty"):
        generate(gpt(), byte_tokenizer(), "", 5)
