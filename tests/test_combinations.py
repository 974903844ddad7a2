"""Every pair of choices of how to train is run here, or refused by a rule that names what to choose instead.

`docs/combinations.md` is what this file finds: `python tests/test_combinations.py` writes it.
"""

import functools
import importlib.util
import itertools
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pipeline import rules
from pipeline.composing import compose
from pipeline.report.metrics import read_metrics
from pipeline.trainer import compiling
from tests.parallelism.test_parity import COMMON, LLAMA, train
from tests.ranks import made_by_ranks

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "combinations.md"
GROUPS = {
    "precision": {
        name: [f"precision={name}"] for name in ("32-true", "64-true", "16-mixed", "bf16-mixed", "16-true", "bf16-true")
    }
    | {
        "stochastic rounding": ["precision=bf16-true", "precision.stochastic_rounding=true"],
        "bfloat16 gradients": ["precision.gradient_dtype=bfloat16"],
        "float8": ["precision=fp8-mixed", "precision.emulate=true"],
    },
    "optimizer": {name: [f"optimizer={name}"] for name in ("adamw", "adamw8bit", "adafactor", "sgd", "muon")},
    "memory": {
        "full checkpointing": ["memory.activation_checkpointing=full"],
        "selective checkpointing": ["memory.activation_checkpointing=selective"],
        "gradients released": ["memory.release_gradients=true"],
        "step in backward": ["memory.step_in_backward=true", "trainer.grad_clip=null"],
        "loss in chunks": ["memory.loss_chunks=4"],
        "activations on disk": ["memory.activation_offload=disk"],
        "state on disk": ["memory.optimizer_offload=disk"],
        "accumulation": ["trainer.micro_batch_size=2"],
        "compiled": ["trainer.compile=true"],
    },
    "adapter": {name: [f"adapter={name}"] for name in ("lora", "dora")},
    "parallelism": {
        "ddp": ["parallelism=ddp", "parallelism.devices=2"],
        "fsdp": ["parallelism=fsdp", "parallelism.devices=2"],
        "tp": ["parallelism=tp", "parallelism.devices=2"],
        "fsdp_tp": ["parallelism=fsdp_tp", "parallelism.devices=4"],
        "deepspeed": [
            "parallelism=deepspeed",
            "parallelism.devices=2",
            "parallelism.stage=3",
            "parallelism.persistence_threshold=0",
        ],
    },
}
LIKE = {"ray": "ddp", "ray_fsdp": "fsdp", "horovod": "ddp"}
"""Choices that start ranks, or send gradients, in another way than one above, and do what it does otherwise."""
TRACED = "aot_eager"
"""Compiling but for the kernels themselves, which take a minute: tests/trainer/test_compiling.py makes them."""
SMALL = [*COMMON, *LLAMA, "model.layers=1", "trainer.max_steps=2"]
FIELDS = {"memory": ("memory", "trainer")}
"""Groups of a config that a choice here sets; the one of its own name, if not said."""
PAIRS = [
    ((one, first), (two, second))
    for one, two in itertools.combinations(GROUPS, 2)
    for first in GROUPS[one]
    for second in GROUPS[two]
]


@functools.cache
def alone(group=None, choice=None):
    """The config with one choice. Weights in float16 need an epsilon that they can hold."""
    words = [] if group is None else GROUPS[group][choice]
    return compose([*SMALL, *words, *(["optimizer.eps=1e-4"] if choice == "16-true" else [])])


def config_of(pair):
    config = alone()
    for group, choice in pair:
        one = alone(group, choice)
        fields = {field: getattr(one, field) for field in FIELDS.get(group, (group,))}
        named = {field: one.choices[field] for field in fields}
        config = replace(config, **fields, choices={**config.choices, **named})
    if config.precision.dtype == "float16" and hasattr(config.optimizer, "eps"):
        config = replace(config, optimizer=replace(config.optimizer, eps=1e-4))
    return config


@functools.cache
def refusal(pair):
    """What the rules say against a pair; None where it may run."""
    problems = rules.problems(config_of(pair))
    return problems[0] if problems else None


def label(pair):
    return "+".join(choice.replace(" ", "_") for _, choice in pair)


def devices(pair):
    return config_of(pair).parallelism.devices


def check(directory):
    losses = [row.loss for row in read_metrics(directory / "metrics.csv")]
    assert len(losses) == 2
    assert all(math.isfinite(loss) for loss in losses)
    assert losses[1] != losses[0]
    assert len({weights.read_text() for weights in directory.glob("weights-*.txt")}) <= 1  # of ranks with one model


@pytest.mark.parametrize("pair", [p for p in PAIRS if devices(p) == 1 and not refusal(p)], ids=label)
def test_on_one_device(pair, tmp_path, monkeypatch):
    monkeypatch.setattr(compiling, "BACKEND", TRACED)
    train(tmp_path, config_of(pair))
    check(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("pair", [p for p in PAIRS if devices(p) > 1 and not refusal(p)], ids=label)
def test_on_several_devices(pair, tmp_path_factory):
    check(made_by_ranks(__file__, devices(pair), tmp_path_factory) / label(pair))


@pytest.mark.parametrize("pair", [p for p in PAIRS if refusal(p)], ids=label)
def test_a_refusal_names_the_choice_and_another(pair):
    told = refusal(pair)
    assert "; use " in told
    assert any(f"{group}" in told for group, _ in pair), told


@pytest.mark.parametrize("name", LIKE)
def test_what_does_as_another_choice_does_goes_with_the_same(name, monkeypatch):
    spec, like = importlib.util.find_spec, LIKE[name]
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda word: spec(word) or (word in ("ray", "pyarrow", "horovod")) or None
    )
    own = compose([*SMALL, f"parallelism={name}", "parallelism.devices=2"])
    pairs = [(part, one) for part, choices in GROUPS.items() if part != "parallelism" for one in choices]
    for group, choice in pairs:
        config = config_of(((group, choice), ("parallelism", like)))
        expected = [told.replace(f"parallelism={like}", f"parallelism={name}") for told in rules.problems(config)]
        choices = {**config.choices, "parallelism": name}
        told = rules.problems(replace(config, parallelism=own.parallelism, choices=choices))
        if name == "horovod" and config.precision.label == "bf16-true":
            (said,) = told
            assert "sums no bfloat16 gradients" in said
        else:
            assert told == expected, (group, choice)


def page():
    """The table of docs/combinations.md."""
    lines = [
        "# What goes together",
        "",
        "Made by `python tests/test_combinations.py`, from the rules. A `✓` is run by that file (two steps of a small",
        "Llama on a CPU), a number is refused before anything starts, with the line below. How near losses on several",
        "devices come to those on one: `test_parity.py` and `test_shards.py` of `tests/parallelism`. What may follow",
        "what in a chain: `tests/compression/test_conformance.py`.",
        "",
        "`ray` goes with what `ddp` goes with, `ray_fsdp` with what `fsdp` does, `horovod` with what `ddp` does, but",
        "for weights in bfloat16, whose gradients it does not sum. Their rules are compared by that file, and how near",
        "they come to one device by `tests/parallelism/test_ray.py` and `test_horovod.py`; pairs are not run again.",
    ]
    notes: list[str] = []
    for one, two in itertools.combinations(GROUPS, 2):
        lines += [
            "",
            f"## {one} and {two}",
            "",
            "| | " + " | ".join(GROUPS[two]) + " |",
            "|---" * (len(GROUPS[two]) + 1) + "|",
        ]
        for first in GROUPS[one]:
            cells = []
            for second in GROUPS[two]:
                told = refusal(((one, first), (two, second)))
                if told and told not in notes:
                    notes.append(told)
                cells.append(str(notes.index(told) + 1) if told else "✓")
            lines.append(f"| {first} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", "## Why not", "", *(f"{n}. {note}" for n, note in enumerate(notes, 1))]) + "\n"


def test_the_page_says_what_the_rules_say():
    assert PAGE.read_text(encoding="utf-8") == page()


def test_a_choice_that_is_not_tried_here_is_new():
    from pipeline import registry

    tried = {word for choices in GROUPS.values() for words in choices.values() for word in words}
    tried |= {f"parallelism={name}" for name in LIKE}
    for group in ("precision", "optimizer", "adapter", "parallelism"):
        for name in registry.available(group):
            assert f"{group}={name}" in tried or f"{group}={name}" in {
                "precision=32", "adapter=none", "parallelism=single", "parallelism=xla", "parallelism=mpi"
            }, f"{group}={name}"  # fmt: skip


if __name__ == "__main__":
    if len(sys.argv) == 1:
        PAGE.write_text(page(), encoding="utf-8")
    else:
        from lightning.pytorch.strategies import model_parallel

        model_parallel._setup_device_mesh = functools.cache(model_parallel._setup_device_mesh)  # see test_parity
        torch.set_num_threads(1)
        compiling.BACKEND = TRACED
        for pair in PAIRS:
            if devices(pair) == int(sys.argv[1]) and not refusal(pair):
                train(Path(sys.argv[2]) / label(pair), config_of(pair))
