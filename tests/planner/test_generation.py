"""What generation is planned to hold beside what `job=generate` and the task's own decoding hold."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.app import main
from pipeline.composing import compose
from pipeline.compression.base import Context
from pipeline.layers.linear import WeightOnlyLinear
from pipeline.layers.quantized import quantized_layers
from pipeline.memory.measure import measure_peak
from pipeline.models.architecture import describe
from pipeline.planner.generation import longest
from pipeline.planner.plan import plan
from pipeline.tasks import lookup

ROOT = Path(__file__).parents[2]
GPT = ["model=gpt_nano", "trainer=smoke", "trainer.max_steps=1", "trainer.evaluate_every=0", "device=cpu"]
LLAMA = [*GPT, "model=llama", "model.layers=2", "model.width=64", "model.heads=4", "model.key_value_heads=2"]
PROMPT = "def fit(model):\n"
"""As many tokens as a plan supposes."""


@pytest.mark.parametrize(
    "words",
    [
        [*GPT, "generate.max_new_tokens=2"],
        [*GPT, "generate.max_new_tokens=100"],
        [*GPT, "generate.max_new_tokens=130"],
        [*LLAMA, "generate.max_new_tokens=60", "generate.temperature=0.8"],
    ],
)
def test_generation_is_predicted_within_one_percent_before_and_past_the_last_position(words):
    config = compose([*words, "job=plan"])
    tokenizer = config.model.tokenizer()
    data = config.data.open(tokenizer)
    predicted = plan(config, data).phases["generate"]
    model, settings = config.model.build(data.spec), config.generate
    with measure_peak("cpu", [*model.parameters(), *model.buffers()]) as peak:
        lookup.get("causal_lm").generate(
            model, tokenizer, PROMPT, settings.max_new_tokens, settings.temperature, config.trainer.seed
        )
    assert predicted.source == "traced"
    assert predicted.bytes == pytest.approx(peak.bytes, rel=0.01)
    assert sum(predicted.kinds.values()) == predicted.bytes
    assert predicted.kinds["key-value cache"] > 0


@pytest.mark.parametrize("tokens", [8, 100])
@pytest.mark.parametrize("precision", ["32", "bf16-true"])
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_weights_that_a_token_gives_to_a_kernel_are_held_once(bits, precision, tokens):
    words = [*LLAMA, "model.layers=4", "compression=int4", f"compression.int4.bits={bits}", f"precision={precision}"]
    config = compose([*words, "compression.int4.group_size=32", f"generate.max_new_tokens={tokens}", "job=plan"])
    tokenizer = config.model.tokenizer()
    data = config.data.open(tokenizer)
    predicted = plan(config, data).phases["generate"]
    method, model = config.chain["int4"], config.precision.convert(config.model.build(data.spec))
    context = Context(stage="int4", architecture=describe(model), device="cpu", steps=0, seed=0)
    model = method.finalize(method.prepare(model, context), context)
    stored = sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()])
    with measure_peak("cpu", [*model.parameters(), *model.buffers()]) as peak:
        lookup.get("causal_lm").generate(model, tokenizer, PROMPT, tokens, 0.0, 0)
    assert predicted.bytes == pytest.approx(peak.bytes, rel=0.01)
    assert all(size >= 0 for size in predicted.kinds.values())
    layers = [layer for layer in quantized_layers(model).values() if isinstance(layer, WeightOnlyLinear)]
    assert len(layers) == 4 * 7
    assert not any(layer.weight_packed.numel() for layer in layers)
    assert predicted.kinds["weights"] > 0.8 * stored


def test_a_longer_text_takes_a_larger_cache_and_the_formula_says_so_too():
    words = [*LLAMA, "job=plan", "data.sequence_length=512"]
    few, many = (compose([*words, f"generate.max_new_tokens={tokens}"]) for tokens in (10, 480))
    data = few.data.open(few.model.tokenizer())
    short, long = (plan(config, data).phases["generate"].kinds["key-value cache"] for config in (few, many))
    # Layers, keys and values, positions, heads that are cached, their size, bytes of a float.
    assert long >= 2 * 2 * 494 * 2 * 16 * 4 > short
    assert plan(many, data, level="formula").phases["generate"].source == "computed"


@pytest.mark.parametrize(
    ("prompt", "tokens", "limit", "expected"),
    [(16, 200, None, (215, False)), (16, 49, 64, (64, False)), (16, 50, 64, (64, True)), (100, 5, 64, (36, False))],
)
def test_the_cache_grows_to_the_models_last_position_at_most(prompt, tokens, limit, expected):
    assert longest(prompt, tokens, limit) == expected


def test_a_run_plans_no_generation_and_an_image_classifier_none_ever():
    config = compose(GPT)
    assert "generate" not in plan(config, config.data.open(config.model.tokenizer())).phases
    images = compose(["job=plan", "model=efficientnet", "data=digits", "trainer=smoke", "device=cpu"])
    assert "generate" not in plan(images, images.data.open(None)).phases


def test_generation_says_what_was_predicted_beside_what_was_measured(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main([*GPT, "compression=int8", "plan.calibrate=false", "hydra.run.dir=run"]) == 0
    words = ["job=generate", f"artifact={tmp_path / 'run/artifact'}", f"prompt={PROMPT}", "device=cpu"]
    done = subprocess.run(
        [sys.executable, ROOT / "run.py", *words, "generate.max_new_tokens=30", f"hydra.run.dir={tmp_path / 'out'}"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    memory = json.loads((tmp_path / "out" / "result.json").read_text(encoding="utf-8"))["memory"]
    assert memory["measured"]["generate"] > 0
    assert abs(memory["error"]["generate"]) < 0.01
