"""What holds for every method there is, and for every pair that may be chained. A new YAML is tested without a change.

One short whole run a method: one that ends with 0 has decoded, prepared, trained, finalized, saved, loaded in a fresh
process with equal outputs, and come out smaller where it claims to. Pairs go through the same hooks and the same store
as in a run, on a small model and without fits of their own.
"""

import functools
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import pipeline
from pipeline.app import main
from pipeline.artifact import store
from pipeline.chain import order_problems
from pipeline.composing import compose
from pipeline.compression.base import Context
from pipeline.errors import ConfigError
from pipeline.layers.quantized import quantized_layers
from pipeline.memory.measure import measure_peak
from pipeline.models.architecture import describe
from pipeline.planner.links import declare_links, trace_links
from pipeline.registry import available
from pipeline.report.result import read_result, schema_problems
from pipeline.stage_input import context_of
from pipeline.teacher import FrozenTeacher, frozen
from pipeline.walk import stages_of
from tests import tiny

METHODS = [name for name in available("compression") if name != "none"]
PAIRS = [(first, second) for first in METHODS for second in METHODS if first != second]
TINY = [
    "model=gpt_nano", "trainer=smoke", "trainer.max_steps=8", "data.evaluation_tokens=1024", "device=cpu",
    "calibration.samples=16",
]  # fmt: skip


@functools.cache
def method(name: str):
    return compose([f"compression={name}"]).chain[name]


def allowed(first: str, second: str) -> bool:
    return not order_problems({name: method(name) for name in (first, second)})


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_every_method_gives_its_receipt(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    directory = tmp_path / "run"
    code = main([*TINY, f"compression={name}", f"hydra.run.dir={directory}"])
    result = read_result(directory / "result.json")
    assert code == 0, result["error"]
    assert schema_problems(result) == []
    assert result["artifact"]["reload"] == {"ok": True, "max_abs_diff": 0.0}
    assert result["size"]["ratio"] > 1
    assert (result["stages"][0]["train"] is not None) == method(name).trains
    assert pipeline.load(directory / "artifact").training is False


@pytest.mark.parametrize("name", METHODS)
def test_what_every_method_holds_is_predicted(name: str, tmp_path: Path) -> None:
    """By tracing within 5% of what it really holds; by the method's own formula, where it knows one, within 10%."""
    config = compose([*TINY, f"compression={name}"])
    tokenizer = config.model.tokenizer()
    data = config.data.open(tokenizer)
    _, stage, *_ = stages_of(config)
    model = config.model.build(data.spec)
    context = context_of(config, stage, model, data, tokenizer, tmp_path)
    with measure_peak("cpu", [*model.parameters(), *model.buffers()]) as preparing:
        model = stage.method.prepare(model, context)
    context = replace(context, architecture=describe(model))
    with measure_peak("cpu", [*model.parameters(), *model.buffers()]) as finalizing:
        stage.method.finalize(model, context)
    held = max(preparing.bytes, finalizing.bytes)
    traced = trace_links(config, data, tokenizer, untraced="not asked here")
    assert name not in traced.computed
    assert traced.compress[name].bytes == pytest.approx(held, rel=0.05)
    declared = declare_links(config, data, tokenizer)
    if name in declared.compress:
        assert declared.compress[name].bytes == pytest.approx(held, rel=0.1)
    else:
        assert "no formula is known" in declared.open[f"compress: {name}"]


@pytest.mark.parametrize("first", METHODS)
def test_an_order_that_cannot_be_is_refused_before_anything_is_built(first: str) -> None:
    second = next((name for name in METHODS if name != first and not allowed(first, name)), None)
    if second is not None:
        with pytest.raises(ConfigError, match=f"'{second}' cannot follow '{first}'"):
            compose([f"compression=[{first},{second}]"])
    after = next((name for name in METHODS if name != first and allowed(name, first)), None)
    if after is not None:
        assert list(compose([f"compression=[{after},{first}]"]).chain) == [after, first]


def test_quantized_models_are_worked_on_by_nothing_and_all_else_may_be_combined() -> None:
    kinds = {name: method(name).kind for name in METHODS}
    for first, second in PAIRS:
        assert allowed(first, second) == (kinds[first] != "quantization"), (first, second)


def test_the_table_of_methods_names_every_one() -> None:
    text = (Path(__file__).parents[2] / "docs" / "compression.md").read_text(encoding="utf-8")
    rows = "\n".join(line.split("|")[1] for line in text.splitlines() if line.startswith("| "))
    assert [name for name in METHODS if f"`{name}`" not in rows] == []


IDS = {"input_ids": torch.randint(0, 64, (2, 16), generator=torch.Generator().manual_seed(0))}


def small():
    return tiny.opt(hidden_size=64, ffn_dim=128, word_embed_proj_dim=64, activation_function="gelu").train()


def linked(model: torch.nn.Module, name: str, first: bool, directory: Path) -> torch.nn.Module:
    """`model` after one link, as its snapshot gives it to the next."""
    calibration = [{"input_ids": torch.randint(0, 64, (4, 16), generator=torch.Generator().manual_seed(1))}]

    def context(of: torch.nn.Module) -> Context:
        return Context(
            stage=name, architecture=describe(of), device="cpu", steps=4, seed=0, first=first,
            calibration=lambda: calibration, teacher=FrozenTeacher(lambda: frozen(small())),
        )  # fmt: skip

    chosen = method(name)
    model = chosen.prepare(model, context(model))
    made = chosen.finalize(model, context(model)).eval()
    store.save(made, directory, chain=[], probe=IDS)
    back = store.load(directory, trainable=True)
    assert torch.equal(store.output_of(back, IDS), store.output_of(made, IDS))
    return back


@pytest.mark.parametrize("name", [name for name in METHODS if method(name).kind == "quantization"])
def test_a_quantizer_says_beforehand_what_layers_it_leaves(name: str) -> None:
    calibration = [{"input_ids": torch.randint(0, 64, (4, 16), generator=torch.Generator().manual_seed(1))}]

    def context(of: torch.nn.Module) -> Context:
        return Context(
            stage=name, architecture=describe(of), device="cpu", steps=4, seed=0, calibration=lambda: calibration
        )

    chosen, model = method(name), small()
    shapes = small().to("meta")
    promised = chosen.left(shapes, context(shapes))
    made = chosen.finalize(chosen.prepare(model, context(model)), context(model))
    if promised is None:
        assert name == "mixed_bits"
        return

    def told(of: torch.nn.Module) -> tuple[dict[str, str], dict[str, tuple[torch.Size, torch.dtype]]]:
        layers = {layer: repr(module) for layer, module in quantized_layers(of).items()}
        return layers, {key: (value.shape, value.dtype) for key, value in of.state_dict().items()}

    assert told(promised) == told(made)
    assert not quantized_layers(shapes)


@pytest.mark.parametrize(("first", "second"), [pair for pair in PAIRS if allowed(*pair)], ids=str)
def test_every_pair_that_may_be_chained_goes_through_the_store(first: str, second: str, tmp_path: Path) -> None:
    model = linked(small(), first, True, tmp_path / "first")
    before = store.count(model)
    model = linked(model, second, False, tmp_path / "second")
    after = store.count(model)
    assert after.elements <= before.elements
    gone = before.elements - before.nonzero
    if first in ("magnitude", "sparsegpt", "wanda") and gone:
        # What was pruned stays so: as zeros, or with the part of the model that went altogether.
        assert after.elements - after.nonzero >= gone - (before.elements - after.elements)
        assert store.tensor_bytes(tmp_path / "second") <= store.tensor_bytes(tmp_path / "first")
