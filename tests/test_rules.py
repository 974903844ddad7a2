"""One test a rule: the config it refuses, the line it gives, and a config it lets through."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipeline import app, rank_rules, rules
from pipeline.device.auto import Auto
from pipeline.device.cpu import CPU
from pipeline.errors import ConfigError
from pipeline.schema import RunConfig, decode_run


def config(*overrides: str) -> RunConfig:
    """Decoded, rules not yet asked."""
    from pipeline.arguments import parse

    lines = parse(overrides).overrides
    return decode_run(app.provenance.compose(app.loader(), lines), overrides, lambda note: None)


@pytest.fixture(scope="module")
def plain() -> RunConfig:
    return config("device=cpu")


def with_device(plain: RunConfig, kind: str, **changes: Any) -> RunConfig:
    """The config on a machine that has this device."""

    class Here(CPU):
        def kind(self) -> Any:
            return kind

        def problems(self, devices: int) -> list[str]:
            return []

    return replace(plain, device=Here(name=kind, memory=None), **changes)


@pytest.mark.parametrize("job", ["evaluate", "verify", "generate"])
def test_an_artifact_is_taken_as_it_is(job: str) -> None:
    typed = ["compression=int8", "compression.int8.ignore=[a]", "precision=bf16-true"]
    told = rules.artifact_as_it_is(config(f"job={job}", "artifact=x", *typed))
    assert [line.partition(" would change nothing")[0] for line in told] == typed
    harmless = ["model=llama", "compression=none", "precision=32", "data=digits"]
    as_it_is = config(f"job={job}", "artifact=x", *harmless)
    assert rules.artifact_as_it_is(as_it_is) == []
    assert rules.left_aside(as_it_is) == ["model=llama has no part in this: the artifact brings its own model"]


@pytest.mark.parametrize("job", ["evaluate", "verify", "generate"])
def test_what_a_look_at_an_artifact_has_no_use_for_is_told(job: str) -> None:
    typed = ["parallelism=ddp", "optimizer.lr=0.1", "adapter=lora", "memory=lean", "gate.max_quality_drop=0.01"]
    told = rules.left_aside(config(f"job={job}", "artifact=x", *typed))
    assert told == [f"{line} has no part in job={job}" for line in typed]
    assert rules.left_aside(config(*typed)) == []


def test_of_what_is_compressed_again_an_artifact_brings_its_model_and_a_checkpoint_does_not(tmp_path: Path) -> None:
    typed = ["job=compress", "compression=int8", "model=llama", "model.layers=2"]
    told = rules.left_aside(config(*typed, f"artifact={tmp_path}"))
    assert [line.partition(" has no part")[0] for line in told] == typed[2:]
    checkpoint = tmp_path / "last.ckpt"
    checkpoint.touch()
    assert rules.left_aside(config(*typed, f"artifact={checkpoint}")) == []


def test_the_defaults_have_no_problem(plain: RunConfig) -> None:
    assert rules.problems(plain) == []
    assert isinstance(config().device, Auto)


def test_model_and_data_must_be_of_one_task(plain: RunConfig) -> None:
    (line,) = rules.model_and_data(config("data=digits"))
    assert line.startswith("data=digits is for image classification, model=gpt for language modelling; ")
    assert "choose data=pystdlib or text" in line
    assert "model=efficientnet" in line
    (line,) = rules.model_and_data(config("model=efficientnet_b0"))
    assert "model=efficientnet_b0 for image classification" in line
    assert rules.model_and_data(config("model=efficientnet", "data=digits")) == []
    assert rules.model_and_data(plain) == []


def test_a_job_on_an_artifact_does_not_ask_about_the_model() -> None:
    assert rules.model_and_data(config("job=evaluate", "artifact=x", "data=digits")) == []


def test_each_choice_says_what_is_wrong_with_its_own_settings(tmp_path: Path, plain: RunConfig) -> None:
    told = rules.own_problems(
        config(
            "model.heads=3",
            "optimizer=sgd",
            "optimizer.momentum=0",
            "data=text",
            "data.path=/no/such",
            "parallelism.devices=2",
        )
    )
    assert len(told) == 4
    assert [line.partition(".")[0] for line in told] == ["model", "data", "parallelism", "optimizer"]
    assert rules.own_problems(plain) == []


def test_a_link_of_the_chain_says_what_is_wrong_with_its_settings() -> None:
    class Picky:
        def problems(self) -> list[str]:
            return ["compression.int8.ignore=[]: no"]

    faulty = replace(config("compression=int8"), chain={"int8": Picky()})  # type: ignore[dict-item]
    assert rules.own_problems(faulty) == ["compression.int8.ignore=[]: no"]


def test_the_device_must_be_here(plain: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def problems(self: CPU, devices: int) -> list[str]:
        asked.append(devices)
        return ["device=cpu: gone"]

    monkeypatch.setattr(CPU, "problems", problems)
    assert rules.device(config("device=cpu", "parallelism=ddp", "parallelism.devices=2")) == ["device=cpu: gone"]
    assert asked == [2]


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (
            ["trainer.batch_size=7", "parallelism=ddp"],
            "trainer.batch_size=7 is not a multiple of 2 devices; choose 6 or 8",
        ),
        (
            ["trainer.batch_size=16", "trainer.micro_batch_size=3"],
            "trainer.batch_size=16 is not a multiple of trainer.micro_batch_size=3 x 1 device = 3; "
            "choose 15 or 18 or trainer.micro_batch_size=2",
        ),
        (
            ["trainer.batch_size=4", "trainer.micro_batch_size=4", "parallelism=ddp"],
            "trainer.batch_size=4 is not a multiple of trainer.micro_batch_size=4 x 2 devices = 8; "
            "choose 8 or trainer.micro_batch_size=2",
        ),
        (
            ["trainer.batch_size=12", "parallelism=ddp", "parallelism.nodes=4"],
            "trainer.batch_size=12 is not a multiple of 8",
        ),
        (["trainer.batch_size=16", "trainer.micro_batch_size=4", "parallelism=ddp"], ""),
        (
            ["trainer.batch_size=8", "trainer.micro_batch_size=16"],
            "trainer.batch_size=8 is not a multiple of trainer.micro_batch_size=16 x 1 device = 16; "
            "choose 16 or trainer.micro_batch_size=8",
        ),
    ],
)
def test_the_batch_divides_over_devices_and_micro_batches(overrides: list[str], line: str) -> None:
    told = rules.batch_divides(config(*overrides))
    assert [text[: len(line)] for text in told] == ([line] if line else [])


def test_several_nodes_share_fits_of_one_run_at_a_time() -> None:
    two = config("parallelism=ddp", "parallelism.nodes=2")
    assert rank_rules.nodes(two) == []
    (line,) = rank_rules.nodes(replace(two, job="evaluate"))
    assert line == "parallelism.nodes=2: job=evaluate works on one machine; use parallelism=single"
    (line,) = rank_rules.nodes(replace(two, sweep=True))
    assert line.startswith("parallelism.nodes=2: a sweep cannot lead other machines; use parallelism.launcher=srun")
    started_by_srun = replace(two.parallelism, launcher="srun")  # type: ignore[call-arg]
    assert rank_rules.nodes(replace(two, sweep=True, parallelism=started_by_srun)) == []


def test_apple_gpus_have_no_collectives(plain: RunConfig) -> None:
    ddp = config("parallelism=ddp")
    (line,) = rank_rules.distributed_device(with_device(ddp, "mps"))
    assert line.startswith("parallelism=ddp needs device=cpu or device=cuda")
    assert rank_rules.distributed_device(with_device(ddp, "cpu")) == []
    assert rank_rules.distributed_device(with_device(plain, "mps")) == []


def test_apple_gpus_have_no_float64() -> None:
    double = config("precision=64-true")
    (line,) = rules.precision_on_device(with_device(double, "mps"))
    assert line.startswith("precision=64-true: mps has no float64")
    assert rules.precision_on_device(with_device(double, "cpu")) == []
    assert rules.precision_on_device(with_device(config("precision=32"), "mps")) == []


def test_an_epsilon_that_float16_loses() -> None:
    (line,) = rules.float16_epsilon(config("precision=16-true"))
    assert line.startswith("optimizer.eps=1e-08 is lost in float16")
    assert "optimizer.eps=1e-4" in line
    for fine in (
        ["precision=16-true", "optimizer.eps=1e-4"],
        ["precision=16-mixed"],
        ["precision=bf16-true"],
        ["precision=16-true", "optimizer=sgd"],
        ["precision=16-true", "trainer.max_steps=0"],
    ):
        assert rules.float16_epsilon(config(*fine)) == [], fine


def test_the_order_of_the_chain_is_checked() -> None:
    assert rules.chain_order(config("compression=[magnitude,int8]")) == []
    (line,) = rules.chain_order(config("compression=[int8,magnitude]"))
    assert "'magnitude' cannot follow 'int8'; put 'magnitude' before it" in line
    (line,) = rules.chain_order(config("compression=[int8,int4]"))
    assert line == "compression: 'int4' cannot follow 'int8'; choose one of them"


@pytest.mark.parametrize("name", ["train", "evaluate", "save"])
def test_a_link_cannot_have_the_name_of_a_stage_of_every_run(name: str) -> None:
    int8 = config("compression=int8").chain["int8"]
    (line,) = rules.chain_order(replace(config("device=cpu"), chain={name: int8}))
    assert line.startswith(f"compression.{name}: '{name}' is a stage of every run")


def chained(first: list[str], second: list[str], *rest: str) -> list[str]:
    """What the rule says of two links of pruning, [method, key=value, ...] each, with `rest` between."""

    def link(method: str, *changes: str) -> Any:
        (made,) = config(f"compression={method}", *(f"compression.{method}.{one}" for one in changes)).chain.values()
        return made

    chain = {"p1": link(*first), **{name: link(name) for name in rest}, "p2": link(*second)}
    return rules.pruning_grows(replace(config("device=cpu"), chain=chain))


@pytest.mark.parametrize(
    ("first", "second", "told"),
    [
        (["magnitude", "sparsity=0.8"], ["magnitude"], "p2.sparsity=0.5 prunes nothing that 'p1' (sparsity=0.8)"),
        (["magnitude"], ["magnitude"], "choose more than 0.5"),
        (["wanda"], ["sparsegpt"], "compression.p2.sparsity=0.5 prunes nothing"),
        (["wanda"], ["wanda"], "compression.p2.sparsity=0.5 prunes nothing"),
        (["magnitude", "sparsity=0.6"], ["wanda"], "choose more than 0.6"),
        (["magnitude", "pattern=2:4", "sparsity=null"], ["magnitude"], "'p1' (pattern=2:4)"),
        (["magnitude", "pattern=2:4"], ["wanda", "pattern=4:8"], "compression.p2.pattern=4:8 prunes nothing"),
        (["magnitude", "pattern=1:8", "sparsity=null"], ["wanda", "pattern=2:4"], "choose more than 0.875"),
        (["magnitude"], ["magnitude", "sparsity=0.8"], ""),
        (["magnitude"], ["wanda"], ""),  # by row, where magnitude goes by layer
        (["magnitude", "sparsity=0.8"], ["magnitude", "pattern=2:4"], ""),
        (["magnitude", "pattern=4:8"], ["magnitude", "pattern=2:4"], ""),
        (["magnitude", "pattern=2:3", "sparsity=null"], ["magnitude", "pattern=2:4"], ""),
        (["magnitude", "ignore=[fc1]"], ["magnitude"], ""),
        (["magnitude", "sparsity=0"], ["magnitude"], ""),  # what is wrong with the first is told already
    ],
)  # fmt: skip
def test_a_later_pruning_asks_for_more(first: list[str], second: list[str], told: str) -> None:
    said = chained(first, second)
    assert len(said) == bool(told)
    assert all(told in line for line in said)


def test_pruning_starts_anew_after_what_makes_other_layers() -> None:
    assert chained(["magnitude"], ["magnitude"], "distill") != []
    assert chained(["magnitude"], ["magnitude"], "structured") == []
    assert chained(["magnitude"], ["magnitude"], "int8") == []  # the order is refused, which is told by itself


def test_pruning_goes_on_from_what_the_artifact_was_pruned_to(tmp_path: Path) -> None:
    from dataclasses import asdict

    def told(manifest: object) -> list[str]:
        (tmp_path / "manifest.json").write_text(json.dumps(manifest))
        return rules.pruning_grows(config("job=compress", f"artifact={tmp_path}", "compression=magnitude"))

    earlier = config("compression=wanda", "compression.wanda.sparsity=0.8").chain["wanda"]
    link = {"name": "w", "method": "wanda", "config": asdict(earlier)}
    (line,) = told({"chain": [link]})
    assert line.startswith("compression.magnitude.sparsity=0.5 prunes nothing that 'w of the artifact' (sparsity=0.8)")
    unknown = {"name": "x", "method": "x", "config": {"name": "another version's"}}
    for other in ({"chain": []}, {"chain": [link, unknown]}, {}, [], {"chain": 3}, {"chain": [{"name": "w"}]}):
        assert told(other) == []


def test_a_link_cannot_look_at_more_samples_than_there_are() -> None:
    few = ("compression=mixed_bits", "calibration.samples=8")
    assert rules.samples_of_calibration(config(*few, "compression.mixed_bits.samples=8")) == []
    assert rules.samples_of_calibration(config(*few)) == []  # nobody asked for more
    (line,) = rules.samples_of_calibration(config(*few, "compression.mixed_bits.samples=16"))
    assert line == "compression.mixed_bits.samples=16 is more than calibration.samples=8; choose 8 or fewer"


def test_a_teacher_has_something_of_each_text_to_go_on_with() -> None:
    short = ("compression=distill", "data.sequence_length=16")
    going_on = "compression.distill.sequence_weight=1"
    assert rules.texts_to_go_on_with(config(*short)) == []  # it is not asked to
    assert rules.texts_to_go_on_with(config(*short, going_on, "compression.distill.prompt_tokens=15")) == []
    (line,) = rules.texts_to_go_on_with(config(*short, going_on))
    said = "compression.distill.prompt_tokens=16 leaves nothing of data.sequence_length=16 to go on with; choose fewer"
    assert line == said


@pytest.mark.parametrize(
    ("pattern", "said"),
    [
        ("''", "compression.int8.ignore: an empty pattern names no module; leave it out, or write ignore=[] for none"),
        (r"'re:.*\.fc1$'", r"compression.int8.ignore=re:.*\.fc1$: patterns are shell-style (fnmatch), not regular"),
        (r"'re:.*\.fc1$'", "; did you mean '*.fc1'?"),
        ("'re:.*(q|k)_proj'", "or '*.layers.[01].*'"),
    ],
)
def test_patterns_of_layers_to_spare_are_those_of_a_shell(pattern: str, said: str) -> None:
    (line,) = rules.ignore_patterns(config("compression=int8", f"compression.int8.ignore=[lm_head,{pattern}]"))
    assert line.startswith(said) or line.endswith(said)


@pytest.mark.parametrize("job", ["compress", "evaluate", "verify", "generate"])
def test_a_job_on_an_artifact_needs_one(job: str, tmp_path: Path) -> None:
    (line,) = rules.artifact(config(f"job={job}"))
    assert line.startswith(f"job={job} needs artifact=DIR")
    (line,) = rules.artifact(config(f"job={job}", f"artifact={tmp_path}/nowhere"))
    assert line == f"artifact={tmp_path}/nowhere: no such directory"
    (line,) = rules.artifact(config(f"job={job}", f"artifact={tmp_path}"))
    assert line.endswith("no manifest.json there, so it is no artifact")
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "last.ckpt").touch()
    (line,) = rules.artifact(config(f"job={job}", f"artifact={tmp_path}/checkpoints"))
    assert line.endswith(f"did you mean artifact={tmp_path}/checkpoints/last.ckpt?") == (job == "compress")
    (tmp_path / "config.json").touch()
    (line,) = rules.artifact(config(f"job={job}", f"artifact={tmp_path}"))
    assert line.endswith(f"model=hf model.pretrained={tmp_path} trainer.max_steps=0")
    (tmp_path / "config.json").unlink()
    (tmp_path / "artifact").mkdir()
    (tmp_path / "artifact" / "manifest.json").write_text("{}")
    (line,) = rules.artifact(config(f"job={job}", f"artifact={tmp_path}"))
    assert line.endswith(f"did you mean artifact={tmp_path / 'artifact'}?")
    (line,) = rules.artifact(config(f"job={job}", f"artifact={tmp_path}/artifact/manifest.json"))
    assert ("must be a checkpoint of a run" if job == "compress" else "is a file, not a directory") in line
    assert rules.artifact(config(f"job={job}", f"artifact={tmp_path}/artifact")) == []


def test_a_run_takes_no_artifact() -> None:
    (line,) = rules.artifact(config("artifact=x"))
    assert line.startswith("artifact=x goes with job=compress")


def test_compress_needs_a_method() -> None:
    (line,) = rules.something_to_compress(config("job=compress", "artifact=x"))
    assert line.startswith("job=compress needs a method: compression=CHOICE")
    assert rules.something_to_compress(config("job=compress", "artifact=x", "compression=int8")) == []


def test_generate_takes_exactly_one_prompt(tmp_path: Path) -> None:
    file = tmp_path / "prompt.txt"
    file.write_text("def ")
    generate = ("job=generate", "artifact=x")
    assert rules.prompts(config(*generate)) == ["job=generate needs one prompt: prompt=TEXT or prompt_file=PATH"]
    (line,) = rules.prompts(config(*generate, "prompt=a", f"prompt_file={file}"))
    assert line.endswith("not both")
    assert rules.prompts(config(*generate, "prompt=")) == ["prompt is empty; give at least one character"]
    assert rules.prompts(config(*generate, f"prompt_file={file}x")) == [f"prompt_file={file}x: no such file"]
    assert rules.prompts(config(*generate, f"prompt_file={file}")) == []
    assert rules.prompts(config(*generate, "prompt= ")) == []


def test_a_prompt_file_must_hold_text(tmp_path: Path) -> None:
    generate = ("job=generate", "artifact=x")
    file = tmp_path / "prompt.txt"
    file.write_bytes(b"def \xff")
    (line,) = rules.prompts(config(*generate, f"prompt_file={file}"))
    assert line == f"prompt_file={file}: is not UTF-8 text (byte 4); save it as UTF-8"
    file.write_bytes(b"")
    (line,) = rules.prompts(config(*generate, f"prompt_file={file}"))
    assert line == f"prompt_file={file}: is empty; give at least one character"
    (line,) = rules.prompts(config(*generate, f"prompt_file={tmp_path}"))
    assert line == f"prompt_file={tmp_path}: is no file"


@pytest.mark.parametrize("name", ["~", "~nobody-of-this-name/x", "x" * 5000, "a\tb"])
@pytest.mark.parametrize("key", ["artifact", "prompt_file"])
def test_a_strange_path_is_one_line(name: str, key: str) -> None:
    faulty = config("job=generate", *(["artifact=x"] if key != "artifact" else ["prompt=a"]), f"{key}={name}")
    assert any(line.startswith(f"{key}=") for line in rules.problems(faulty))


def test_paths_are_expanded_and_absolute_where_they_exist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("text")
    for spelt in ("~/a.txt", "a.txt", "./a.txt", str(tmp_path / "a.txt")):
        found = config("data=text", f"data.path='{spelt}'", f"artifact={spelt}", f"prompt_file={spelt}")
        places = [found.data.path, found.artifact, found.prompt_file]  # type: ignore[attr-defined]
        assert places == [str(tmp_path / "a.txt")] * 3
        assert f"artifact={spelt}" in found.overrides
        model = config("model=hf", f"model.pretrained='{spelt}'").model
        assert model.pretrained == str(tmp_path / "a.txt")  # type: ignore[attr-defined]
    assert config("model=hf", "model.pretrained=org/name").model.pretrained == "org/name"  # type: ignore[attr-defined]
    assert config("artifact=nowhere").artifact == "nowhere"


def test_a_seed_is_what_every_generator_takes() -> None:
    assert config(f"trainer.seed={2**32 - 1}").trainer.seed == 2**32 - 1
    with pytest.raises(ConfigError, match=r"trainer\.seed=4294967296 must be less than 4294967296"):
        config(f"trainer.seed={2**32}")


def test_other_jobs_take_no_prompt() -> None:
    (line,) = rules.prompts(config("prompt=a"))
    assert line == "prompt goes with job=generate alone"


def test_every_rule_is_asked_and_every_problem_told() -> None:
    faulty = config("data=digits", "prompt=a", "artifact=x", "trainer.batch_size=3", "trainer.micro_batch_size=2")
    assert len(rules.problems(faulty)) == 4
    named = {
        name
        for module in (rules, rank_rules)
        for name, value in vars(module).items()
        if getattr(value, "__module__", "") == module.__name__ and callable(value)
    }
    helpers = {"problems", "steppable", "left_aside"}
    assert {rule.__name__ for rule in rules.RULES} == {n for n in named if not n.startswith("_")} - helpers


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ([], "trainer.grad_clip=1 needs all gradients; use trainer.grad_clip=null"),
        (["trainer.grad_clip=null", "trainer.micro_batch_size=4"], "cannot sum micro batches"),
        (["trainer.grad_clip=null", "precision=16-mixed"], "cannot skip a step that overflowed"),
        (["trainer.grad_clip=null", "parallelism=ddp"], "averaged over devices first; use parallelism=single"),
        (["trainer.grad_clip=null", "precision=bf16-mixed"], ""),
        (["trainer.max_steps=0"], ""),
    ],
)
def test_stepping_in_the_backward_pass_goes_without_what_needs_all_gradients(overrides: list[str], said: str) -> None:
    told = rules.step_in_backward(config("device=cpu", "memory.step_in_backward=true", *overrides))
    assert len(told) == bool(said)
    assert all(said in line and line.startswith("memory.step_in_backward=true") for line in told)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["precision=16-mixed"], ""),
        (["precision=bf16-true", "precision.stochastic_rounding=true"], "use precision.stochastic_rounding=false"),
        (["optimizer=muon"], ""),
        (["optimizer=adamw8bit"], ""),
        (
            ["optimizer=adamw8bit", "parallelism=tp"],
            "adamw8bit steps whole rows; use optimizer=adafactor or adamw or muon or sgd",
        ),
        (["optimizer=muon", "parallelism=deepspeed"], "muon steps whole matrices; use optimizer=adamw or sgd"),
        (["adapter=lora"], ""),
        (["adapter=lora", "compression=nf4"], ""),
        (
            ["adapter=lora", "compression=nf4", "parallelism=tp"],
            "splits layers in float; those of compression.nf4, beside which adapter=lora trains, stay whole: use "
            "parallelism=fsdp",
        ),
        (["compression=int8_qat"], ""),
        (
            ["optimizer.implementation=foreach", "parallelism=fsdp_tp"],
            "parallelism=fsdp_tp leaves some weights whole; optimizer.implementation=foreach takes weights that are "
            "split alike: use optimizer.implementation=auto or plain",
        ),
        (["compression=int8_qat", "parallelism=tp"], "compression.int8_qat trains a whole model; use parallelism=ddp"),
        (["compression=magnitude"], ""),
        (
            ["compression=magnitude", "compression.magnitude.schedule=cubic"],
            "compression.magnitude trains a whole model; use parallelism=ddp",
        ),
        (["compression=int8", "precision=bf16-mixed"], ""),
        (["compression=int8_qat", "parallelism=ddp"], ""),
    ],
)
def test_sharded_models_go_without_what_takes_them_whole(overrides: list[str], said: str) -> None:
    told = rank_rules.sharded(config("device=cpu", "parallelism=fsdp", *overrides))
    assert len(told) == bool(said)
    assert all(said in line and line.startswith("parallelism=") for line in told)


@pytest.mark.parametrize("name", ["ddp", "fsdp", "tp", "fsdp_tp"])
def test_gradients_between_devices_are_in_the_weights_dtype(name: str) -> None:
    (told,) = rank_rules.gradient_dtype(
        config("device=cpu", f"parallelism={name}", "precision.gradient_dtype=bfloat16")
    )
    assert told.startswith(
        f"precision.gradient_dtype=bfloat16: parallelism={name} sums gradients in the weights' dtype"
    )
    assert told.endswith("use precision.gradient_dtype=null, or parallelism=single")
    assert rank_rules.gradient_dtype(config("device=cpu", "precision.gradient_dtype=bfloat16")) == []


def test_gradients_are_sent_in_bfloat16_between_gpus_only() -> None:
    asked = config("device=cpu", "parallelism=ddp", "parallelism.gradient_compression=bfloat16")
    (told,) = rank_rules.gradient_compression(asked)
    assert told.endswith("needs device=cuda; use parallelism.gradient_compression=float16")
    assert rank_rules.gradient_compression(with_device(asked, "cuda")) == []
    assert rank_rules.gradient_compression(config("device=cpu", "parallelism=ddp")) == []


@pytest.mark.parametrize("name", ["ddp", "ray"])
def test_a_static_graph_is_not_planned_from_a_micro_batch(name: str) -> None:
    two = [f"parallelism={name}", "parallelism.devices=2", "trainer.batch_size=8"]
    static = "parallelism.static_graph=true"
    (told,) = rank_rules.static_graph(config(*two, static, "trainer.micro_batch_size=2"))
    assert told == (
        "parallelism.static_graph=true cannot sum micro batches (trainer.micro_batch_size=2); "
        "use parallelism.static_graph=false, or trainer.micro_batch_size=null"
    )
    assert rank_rules.static_graph(config(*two, static, "trainer.micro_batch_size=4")) == []
    assert rank_rules.static_graph(config(*two, static)) == []
    assert rank_rules.static_graph(config(*two, "trainer.micro_batch_size=2")) == []


def test_muon_has_no_adapters() -> None:
    (told,) = rules.adapter(config("device=cpu", "adapter=lora", "optimizer=muon"))
    assert told.startswith("adapter=lora: muon makes updates of full rank")
    assert told.endswith("use optimizer=adamw")


def test_shards_move_to_the_host_from_a_gpu_only() -> None:
    offload = config("device=cpu", "parallelism=fsdp", "parallelism.offload=true")
    (line,) = rank_rules.sharded(offload)
    assert line == "parallelism.offload=true moves shards from a GPU to the host; use device=cuda, or offload=false"
    assert rank_rules.sharded(with_device(offload, "cuda")) == []


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["model=efficientnet", "data=digits"], "is for language models, not model=efficientnet"),
        (["compression=distill"], "compression.distill compares whole logits with its teacher's"),
        (["compression=int8_qat"], ""),
        (["trainer.max_steps=0"], ""),
    ],
)
def test_a_loss_in_parts_is_for_language_models_and_their_own_loss(overrides: list[str], said: str) -> None:
    told = rules.loss_chunks(config("device=cpu", "memory.loss_chunks=4", *overrides))
    assert len(told) == bool(said)
    assert all(said in line and line.endswith("use memory.loss_chunks=1") for line in told)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["parallelism=fsdp", "parallelism.replicas=3", "parallelism.devices=4"], "use parallelism.replicas=2"),
        (["parallelism=fsdp_tp", "parallelism.tensor_parallel=3"], "use parallelism.tensor_parallel=2"),
        (["precision.stochastic_rounding=true"], "use precision=bf16-true"),
        (["parallelism=tp", "parallelism.devices=4", "trainer.batch_size=3"], ""),
    ],
)
def test_sizes_of_groups_divide_the_devices(overrides: list[str], said: str) -> None:
    told = rules.problems(config("device=cpu", *overrides))
    assert len(told) == bool(said)
    assert all(said in line for line in told)


@pytest.mark.parametrize("key", ["activation_offload", "optimizer_offload"])
def test_what_is_on_the_host_already_goes_to_disk_or_stays(plain: RunConfig, key: str) -> None:
    asked = config("device=cpu", f"memory.{key}=host")
    (line,) = rules.offload(asked)
    assert line == f"memory.{key}=host: tensors of device=cpu are in the host's memory; use memory.{key}=disk"
    assert rules.offload(with_device(asked, "cuda")) == []
    assert rules.offload(config("device=cpu", f"memory.{key}=disk")) == []
    assert rules.offload(config("device=cpu", f"memory.{key}=host", "trainer.max_steps=0")) == []


def test_shards_of_a_gpus_optimizer_state_are_put_away_by_fsdp() -> None:
    asked = config("device=cpu", "memory.optimizer_offload=disk", "parallelism=fsdp")
    assert rules.offload(asked) == []
    (line,) = rules.offload(with_device(asked, "cuda"))
    assert line.endswith("use memory.optimizer_offload=none, parallelism.offload=true")


def test_selective_checkpointing_holds_what_it_keeps() -> None:
    words = ("device=cpu", "memory.activation_checkpointing=selective")
    (line,) = rules.own_problems(config(*words, "memory.activation_offload=disk"))
    assert line.endswith("use memory.activation_checkpointing=full, or none")
    (line,) = rules.compiles(config(*words, "trainer.compile=true"))
    assert line.endswith("use memory.activation_checkpointing=full, or none")


def test_without_a_compiler_nothing_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = config("device=cpu", "trainer.compile=true")
    assert rules.compiles(asked) == []
    (line,) = rules.compiles(with_device(asked, "mps"))
    assert line == "trainer.compile=true makes kernels for device=cpu and cuda, not mps; use trainer.compile=false"
    monkeypatch.setenv("CXX", "no-such-compiler")
    (line,) = rules.compiles(asked)
    assert "there is no C++ compiler (no-such-compiler)" in line
    assert rules.compiles(config("device=cpu", "trainer.compile=true", "trainer.max_steps=0")) == []


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (
            ["precision.emulate=false"],
            "device=cpu has no float8 kernels (8.9 and later have); use precision=bf16-mixed",
        ),
        ([], ""),
        (["adapter=lora"], "adapter=lora freezes the layers that it speeds up; use precision=bf16-mixed"),
        (["parallelism=tp"], "parallelism=tp splits layers; use precision=bf16-mixed, or parallelism=fsdp"),
        (["parallelism=fsdp"], ""),
        (["compression=int8_qat"], "compression.int8_qat trains with rounding of its own"),
        (["compression=[distill,int8]"], ""),
    ],
)
def test_float8_wants_kernels_and_plain_whole_layers(overrides: list[str], said: str) -> None:
    words = ["device=cpu", "precision=fp8-mixed", "precision.emulate=true", *overrides]
    told = rules.float8(config(*words))
    assert len(told) == bool(said)
    assert all(said in line and line.startswith("precision=fp8-mixed") for line in told)


def test_without_torchao_the_extra_is_named_where_it_would_help(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rules, "find_spec", lambda name: None)
    asked = ["device=cpu", "precision=fp8-mixed"]
    (line,) = rules.problems(config(*asked, "precision.emulate=true"))
    assert line == "precision=fp8-mixed needs torchao: pip install 'leanfit[fp8]'; or use precision=bf16-mixed"
    (line,) = rules.problems(config(*asked))
    assert "has no float8 kernels" in line


def test_a_gpu_is_asked_whether_it_multiplies_float8(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = with_device(config("device=cpu", "precision=fp8-mixed"), "cuda")
    monkeypatch.setattr(rules, "capability", lambda: (8, 0))
    (line,) = rules.float8(asked)
    assert line.startswith("precision=fp8-mixed: a GPU of compute capability 8.0 has no float8 kernels")
    monkeypatch.setattr(rules, "capability", lambda: (9, 0))
    assert rules.float8(asked) == []
