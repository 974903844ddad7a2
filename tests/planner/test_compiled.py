"""Compiled fits are planned by the compiler's own programs: beside real ones, with nothing of theirs left behind."""

import json
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch._inductor.graph import GraphLowering
from torch._inductor.select_algorithm import extern_kernels
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from pipeline.chain import Fit, Stage
from pipeline.composing import compose
from pipeline.data.base import DataSpec
from pipeline.layers.sliced_loss import whole_cross_entropy
from pipeline.models.architecture import describe
from pipeline.planner import compiled, formula
from pipeline.planner.fakes import tracing
from pipeline.planner.live import Live
from pipeline.planner.plan import COMPILED, known
from pipeline.planner.training import trace_training
from pipeline.tasks import lookup
from pipeline.trainer.settings import missing_compiler
from tests.planner.test_formula import trained
from tests.planner.test_plan import GPT, LLAMA, predicted_and_measured

COMPILE = "trainer.compile=true"


@pytest.mark.slow
@pytest.mark.skipif(missing_compiler("cpu") is not None, reason="needs a C++ compiler")
def test_a_compiled_fit_holds_what_was_planned(tmp_path):
    words = [*GPT, COMPILE, "memory.activation_checkpointing=full", "memory.loss_chunks=2"]
    _, predicted, measured, model = predicted_and_measured(words, tmp_path)
    assert predicted.bytes == pytest.approx(measured, rel=0.001)
    assert (predicted.source, predicted.below) == ("traced", None)
    assert all(weight.isfinite().all() for weight in model.parameters())


def test_it_is_computed_as_it_is_traced_and_less_than_plain_blocks_hold():
    computed, traced, plain = trained([*LLAMA, COMPILE]), trained([*LLAMA, COMPILE], trace_training), trained(LLAMA)
    assert computed.bytes == pytest.approx(traced.bytes, rel=0.002)
    assert computed.bytes < 0.9 * plain.bytes
    assert computed.kinds["weights"] == plain.kinds["weights"]
    assert (computed.plain, traced.plain) == ("", "")


def test_adapters_beside_a_compressed_base_are_part_of_the_program():
    words = [*LLAMA, "adapter=lora", "compression=nf4", "precision=bf16-mixed"]
    found, plain = (trained([*words, *more], trace_training) for more in ([COMPILE], []))
    assert found.plain == ""
    assert found.bytes < 0.8 * plain.bytes


@pytest.mark.parametrize("how", [formula.training, trace_training], ids=["computed", "traced"])
def test_blocks_that_do_not_become_one_program_are_taken_for_plain_ones_which_the_margin_tells(how, monkeypatch):
    plain = LlamaDecoderLayer.forward

    def broken(*args, **kwargs):
        torch._dynamo.graph_break()
        return plain(*args, **kwargs)

    monkeypatch.setattr(LlamaDecoderLayer, "forward", broken)
    found = trained([*LLAMA, COMPILE], how)
    assert found.plain.startswith("Unsupported: ")
    config = compose([*LLAMA, COMPILE, "plan.calibrate=false"])
    assert known(config, "train", found, "traced", convolutions=False).below == COMPILED
    assert known(config, "train", replace(found, plain=""), "traced", convolutions=False).below is None


RESULTS = Path(__file__).parents[2] / "benchmarks/results"
RECORDED = {
    "bf16-mixed": "gpu-nvidia-h200-2026-11-28-0343.json",
    "bf16-true": "gpu-nvidia-h200-2026-11-28-0358.json",
}


@pytest.mark.parametrize("precision", RECORDED)
def test_a_gpu_held_what_the_programs_for_a_cpu_hold(precision, monkeypatch):
    """GPT-2 of 124M, 32 sequences of 1,024 tokens. The loss was not compiled then, and was torch's own."""
    rows = json.loads((RESULTS / RECORDED[precision]).read_text(encoding="utf-8"))["rows"]
    (recorded,) = (
        row
        for row in rows
        if (row["model"], row["precision"], row["compiled"], row["side"]) == ("GPT-2 124M", precision, True, "runner")
    )
    words = ["job=plan", "model=gpt_124m", f"precision={precision}", COMPILE, "trainer.batch_size=32"]
    config = compose([*words, "device=cuda", "device.memory=139GiB"])
    with torch.device("meta"):
        model = config.precision.convert(config.model.build(DataSpec(vocabulary=50_304, sequence_length=1024)))
    ids = torch.zeros(32, 1024, dtype=torch.long)
    monkeypatch.setattr(formula, "compiled_criterion", lambda _: whole_cross_entropy)
    stage = Stage(0, "train", "train", fit=Fit(100, 1e-4))
    batch = {"input_ids": ids, "labels": ids}
    found = formula.training(config, stage, model, lookup.get("causal_lm"), describe(model), batch)
    assert found.bytes == pytest.approx(recorded["allocated"], rel=0.005)


def doubled(x):
    return (x.sin() * 2).exp()


def test_one_program_for_shapes_that_change_from_call_to_call_makes_tensors_of_those_shapes():
    imitation = compiled.Imitation()
    with tracing(), (live := Live()), compiled.without_kernels():
        run = imitation(doubled)
        for rows, columns in ((4, 8), (6, 10), (7, 5)):
            fake = torch.empty(rows, columns, requires_grad=True)
            live.mark("call")
            found = run(fake)
            made = [block.bytes for block, sign, _ in live.timeline.events[live.timeline.marks[-1][0] :] if sign > 0]
            assert made == [4 * rows * columns]
            found.sum().backward()
            assert fake.grad.shape == found.shape == (rows, columns)
    assert imitation.plain == ""
    torch._dynamo.reset()


@pytest.mark.skipif(missing_compiler("cpu") is not None, reason="needs a C++ compiler")
def test_what_is_compiled_afterwards_computes():
    before = GraphLowering.compile_to_module
    with tracing(), (live := Live()):
        fake = torch.empty(64, 64, requires_grad=True)
        with compiled.without_kernels():
            compiled.Imitation()(doubled)(fake).sum().backward()
        assert fake.grad is not None
        assert live.timeline.peak().bytes >= 3 * 4 * 64 * 64
    assert GraphLowering.compile_to_module is before
    torch._dynamo.reset()
    x = torch.randn(64, 64, requires_grad=True)
    y = x.detach().clone().requires_grad_()
    found, expected = torch.compile(doubled)(x), doubled(y)
    found.sum().backward()
    expected.sum().backward()
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(x.grad, y.grad)
    torch._dynamo.reset()


def test_operators_of_which_torch_knows_no_fake_compute_nothing():
    operators = compiled._Operators(extern_kernels)
    with tracing(), (live := Live()):
        one = torch.empty(40_000, 40_000, dtype=torch.float8_e4m3fn)
        out = torch.empty(40_000, 40_000, dtype=torch.bfloat16)
        scale = torch.empty(())
        held, started = live.timeline.peak().bytes, time.process_time()
        assert operators._scaled_mm(one, one.t(), scale, scale, out_dtype=torch.bfloat16, out=out) is out
        assert operators.mm(out, out, out=torch.empty_like(out)).shape == out.shape
        assert time.process_time() - started < 10  # such a product takes minutes
    assert live.timeline.peak().bytes == held + out.nbytes
