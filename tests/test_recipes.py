"""Recipes: by name, path and list, upon recipes, chains in order, what they must not hold; and the lock."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline import app, recipes
from pipeline.errors import ConfigError
from pipeline.schema import RunConfig, values_of

Write = Callable[[str, str], Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def put(name: str, text: str) -> Path:
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
        return file

    return put


def problems(*overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        app.compose(overrides)
    return caught.value.problems


TWICE = """\
# prune twice, then quantize
defaults:
  - /compression/magnitude@compression.p1
  - /compression/magnitude@compression.p2
  - /compression/int4
  - override /compression: none
compression:
  p1: {sparsity: 0.25}
  p2: {sparsity: 0.75}
"""


def test_every_recipe_composes_and_decodes() -> None:
    for name in recipes.listed():
        app.compose([f"recipe={name}"])


def test_two_of_four_is_text_without_quotes_in_recipes_and_in_groups(write: Write) -> None:
    """YAML 1.1 reads a number of base 60 there."""
    body = "pattern: 2:4\nsparsity: null\n"
    recipe = write(
        "half.yaml",
        f"defaults: [override /compression: wanda]\ncompression: {{wanda: {{{body.replace(chr(10), ', ')}}}}}\n",
    )
    ours = write("conf/compression/half.yaml", f"# @package compression.half\ndefaults: [wanda@_here_, _self_]\n{body}")
    assert app.compose([f"recipe={recipe}"]).chain["wanda"].pattern == "2:4"  # type: ignore[attr-defined]
    source = app.loader(extra=ours.parent.parent)
    assert app.check(["compression=half"], source).chain["half"].pattern == "2:4"  # type: ignore[attr-defined]
    assert recipes.parsed("a: 1:30:00.5\nb: -1:30\nc: 130\nd: 1.5\ne: 1e-3\nf: ['12:60']") == {
        "a": "1:30:00.5", "b": "-1:30", "c": 130, "d": 1.5, "e": 1e-3, "f": ["12:60"],
    }  # fmt: skip


def test_a_number_in_the_place_of_text_is_told_how_to_be_text_where_it_was_said(write: Write) -> None:
    recipe = write("number.yaml", "defaults: [override /compression: wanda]\ncompression: {wanda: {pattern: 124}}\n")
    (told,) = problems(f"recipe={recipe}")
    assert told == f'compression.wanda.pattern=124 must be text; to mean the text, put it in quotes: "124" ({recipe})'
    (told,) = problems("compression=wanda", "compression.wanda.pattern=124")
    assert told.endswith("""quote it twice: "'124'" (command line)""")


@pytest.mark.parametrize("name", recipes.listed())
@pytest.mark.parametrize("chosen", ["none", "int8"])
def test_the_command_line_wins_over_every_recipe(name: str, chosen: str) -> None:
    assert list(app.compose([f"recipe={name}", f"compression={chosen}"]).chain) == [chosen] * (chosen != "none")


def test_every_recipe_says_in_its_first_line_what_it_is() -> None:
    from pipeline.usage import first_comment

    for name in recipes.listed():
        file = recipes.find(name)
        assert file is not None
        assert first_comment(file), name


def test_values_and_groups_of_a_recipe_win_over_the_defaults(write: Write) -> None:
    file = write(
        "r.yaml", "defaults:\n  - override /model: llama\n  - override /precision: 64-true\ntrainer: {seed: 7}\n"
    )
    config = app.compose([f"recipe={file}"])
    assert (config.model.name, config.precision.dtype, config.trainer.seed) == ("llama", "float64", 7)
    assert app.compose([f"recipe={file}", "trainer.seed=9", "model=gpt"]).trainer.seed == 9


def test_a_number_may_be_a_choice_in_a_recipe(write: Write) -> None:
    file = write("r.yaml", "defaults:\n  - override /precision: 32\n")
    assert app.compose([f"recipe={file}"]).choices["precision"] == "32"


def test_recipes_build_on_recipes_beside_them_by_name_and_by_path(write: Write) -> None:
    write("base.yaml", "trainer: {seed: 1, max_steps: 11}\n")
    write("sub/middle.yaml", "defaults: [../base]\ntrainer: {seed: 2}\n")
    top = write("top.yaml", "defaults:\n  - sub/middle\n  - int8\ntrainer: {seed: 3}\n")
    config = app.compose([f"recipe={top}"])
    assert (config.trainer.seed, config.trainer.max_steps, list(config.chain)) == (3, 11, ["int8"])


def test_the_child_overrides_the_groups_of_its_parent(write: Write) -> None:
    write("base.yaml", "defaults:\n  - override /compression: int4\n")
    child = write("child.yaml", "defaults:\n  - base\n  - override /compression: int8\n")
    assert list(app.compose([f"recipe={child}"]).chain) == ["int8"]


def test_the_childs_chain_is_authoritative_over_a_lock_that_it_builds_on(
    write: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    """A lock says each stage in full, its name too, as a recipe may that puts a stage in without a list."""
    locked = app.compose(["compression=[magnitude,distill]", "compression.magnitude.sparsity=0.25"])
    write("lock.yaml", recipes.lock_text(values_of(locked), locked.choices, None))
    child = write("child.yaml", "defaults:\n  - lock\n  - override /compression: magnitude\n")
    chain = app.compose([f"recipe={child}"], quiet=False).chain
    assert {stage: method.sparsity for stage, method in chain.items()} == {"magnitude": 0.25}
    assert "compression.distill" in capsys.readouterr().err
    inside = write("inside.yaml", "defaults: [lock]\ncompression:\n  last: {name: int8, ignore: []}\n")
    assert list(app.compose([f"recipe={inside}"]).chain) == ["magnitude", "distill", "last"]


def test_a_list_of_recipes_applies_them_in_order(write: Write) -> None:
    a = write("a.yaml", "trainer: {seed: 1, max_steps: 5}\n")
    b = write("b.yaml", "trainer: {seed: 2}\n")
    config = app.compose([f"recipe=[{a},{b}]"])
    assert (config.trainer.seed, config.trainer.max_steps) == (2, 5)
    assert app.compose([f"recipe=[{b},{a}]"]).trainer.seed == 1


def test_every_file_of_a_composition_is_listed(write: Write) -> None:
    base = write("base.yaml", "{}\n")
    top = write("top.yaml", "defaults: [base, int8]\n")
    found = app.provenance.compose(app.loader(), [f"recipe={top}"]).recipes
    assert set(found) == {base, top, recipes.find("int8")}


def test_a_method_repeated_under_names_of_its_own(write: Write) -> None:
    config = app.compose([f"recipe={write('twice.yaml', TWICE)}"])
    assert list(config.chain) == ["p1", "p2", "int4"]
    assert [method.name for method in config.chain.values()] == ["magnitude", "magnitude", "int4"]
    assert config.chain["p1"].sparsity == 0.25  # type: ignore[attr-defined]
    assert config.chain["p2"].sparsity == 0.75  # type: ignore[attr-defined]
    assert config.choices["compression"] == ["p1", "p2", "int4"]


def test_the_order_is_that_of_the_choices_not_of_earlier_settings(write: Write) -> None:
    write("base.yaml", "compression:\n  int4: {group_size: 32}\n")
    top = write(
        "top.yaml",
        "defaults:\n  - base\n  - /compression/magnitude@compression.p1\n  - /compression/int4\n"
        "  - override /compression: none\n",
    )
    config = app.compose([f"recipe={top}"])
    assert list(config.chain) == ["p1", "int4"]


def test_a_stage_of_a_recipe_is_set_from_the_command_line(write: Write) -> None:
    config = app.compose([f"recipe={write('twice.yaml', TWICE)}", "compression.p2.sparsity=0.5"])
    assert config.chain["p2"].sparsity == 0.5  # type: ignore[attr-defined]


def test_stages_are_dropped_with_a_line_each_where_the_command_line_chooses(
    write: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write("twice.yaml", TWICE)
    config = app.compose([f"recipe={file}", "compression=int8"], quiet=False)
    assert list(config.chain) == ["int8"]
    lines = capsys.readouterr().err.splitlines()
    assert [line.split()[1] for line in lines] == ["compression.p1", "compression.p2", "compression.int4"]
    assert all(line.startswith("note: ") and "since compression=int8 was chosen" in line for line in lines)


def test_settings_of_a_known_method_that_is_not_chosen_are_dropped_with_a_line(
    write: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write("r.yaml", "compression:\n  int4: {group_size: 32}\n")
    assert app.compose([f"recipe={file}"], quiet=False).chain == {}
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("note: compression.int4 (")


@pytest.mark.parametrize(
    ("body", "line"),
    [
        ("int5: {bits: 1}", "compression.int5: no such stage in compression=none"),
        ("int4: {groupsize: 32}", "compression.int4.groupsize=32: no such key"),
        ("int4: {group_size: big}", "compression.int4.group_size=big must be null or be a whole number"),
        ("int4: 5", "compression.int4=5 must be a mapping"),
    ],
)
def test_a_mistake_in_settings_that_would_be_dropped_is_told(write: Write, body: str, line: str) -> None:
    file = write("r.yaml", f"compression:\n  {body}\n")
    (told,) = problems(f"recipe={file}")
    assert told.startswith(line)
    assert str(file) in told


def test_settings_on_the_command_line_for_a_stage_that_is_not_chosen_are_refused() -> None:
    (told,) = problems("compression=none", "compression.int4.group_size=32")
    assert told.startswith("compression.int4: 'int4' is not in compression=none")
    (told,) = problems("compression=int8", "compression.int4.group_size=32")
    assert "or choose compression=int4 (" in told
    (told,) = problems("compression=int8", "compression.magnitude.sparsity=0.6")
    assert "or choose compression=[magnitude,int8] (" in told


def test_in_a_sweep_such_settings_serve_the_jobs_that_have_the_stage() -> None:
    overrides = ["compression=none", "compression.int4.group_size=32"]
    assert app.check(overrides, app.loader(), sweep=True).chain == {}


@pytest.mark.parametrize("value", ["[int8,int8]", "[magnitude,int8,magnitude]"])
def test_a_method_twice_in_a_list_is_refused_with_the_way_to_do_it(value: str) -> None:
    (told,) = problems(f"compression={value}")
    assert "stands there twice" in told
    assert "@compression.NAME" in told


def test_two_choices_under_one_stage_name_are_refused(write: Write) -> None:
    file = write(
        "r.yaml",
        "defaults:\n  - /compression/magnitude@compression.p1\n  - /compression/int8@compression.p1\n",
    )
    assert any("both 'magnitude' and 'int8' stand under this name" in told for told in problems(f"recipe={file}"))


@pytest.mark.parametrize("chosen", ["none", "[]"])
def test_no_compression(chosen: str) -> None:
    config = app.compose([f"compression={chosen}"])
    assert config.chain == {}
    assert config.choices["compression"] == "none"


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("hydra: {run: {dir: elsewhere}}", "hydra steers the program"),
        ("hydra:\n  callbacks: {x: {_target_: os.system}}", "hydra steers the program"),
        ("model: {_target_: os.system}", "model._target_ would run code"),
        ("compression: {int8: {ignore: [{_target_: x}]}}", "compression.int8.ignore[0]._target_ would run code"),
        ("model: {hydra: 1}", "model.hydra steers the program"),
        ("resume: /tmp", "resume steers the program"),
        ("defaults: [override /hydra/launcher: joblib]", "'hydra/launcher' is no group"),
        ("defaults: [/hydra/launcher/basic]", "'/hydra/launcher/basic' is no group"),
        ("defaults: [/compression/int8@hydra.x]", "must name a stage"),
        ("# @package hydra\nrun: {dir: x}", "always stands at the root"),
        ("defaults: [override /compresion: int8]", "'compresion' is no group"),
        ("defaults: [override /compression: int9]", "compression=int9: no such choice"),
        ("defaults: [override /compression: [int8, int8]]", "stands there twice"),
        ("defaults: [override /precision: [32, 16-mixed]]", "precision takes one choice"),
        ("defaults: [override /compression: null]", "compression=None: no such choice"),
        ("defaults: [override compression: int8]", "write 'override /compression'"),
        ("defaults: [/model: llama]", "write 'override /model: llama'"),
        ("defaults: [/recipe/int8]", "write 'int8' instead of '/recipe/int8'"),
        ("defaults: [/recipe: int8]", "write 'int8' instead of '/recipe'"),
        ("defaults: [nosuch]", "no recipe 'nosuch'"),
        ("defaults: [int]", "did you mean 'int8'?"),
        ("defaults: int8", "defaults must be a list"),
        ("defaults: [5]", "neither a recipe's name"),
        ("defaults: [[int8]]", "neither a recipe's name"),
        ("defaults: [r]", "'r' is this recipe itself"),
        ("defaults:\n  - override /compression: int8\n  - /compression/magnitude@compression.p1", "come last"),
        ("- a\n- b", "must be a mapping"),
        ("just text", "no such key"),
        ("a: [1", "not a readable YAML file"),
        ("a: 1\na: 2", "not a readable YAML file"),
        ("lr: 1", "did you mean 'optimizer.lr'?"),
        ("model:\n  layers: ${nope}", "Interpolation key 'nope' not found"),
        ("model:\n  layers: ???", "model.layers is required"),
        ("defaults: [r.yaml]", "'r.yaml' is this recipe itself"),
        ("", "the file is empty"),
        ("# only a comment", "the file is empty"),
        ("model: gpt_nano", "model=gpt_nano: choose groups under defaults: - override /model: gpt_nano"),
        ("compression: int8", "compression=int8: choose groups under defaults: - override /compression: int8"),
        ("compression: [magnitude, int8]", "under defaults: - override /compression: [magnitude, int8]"),
        ("model: 5", "model=5: choose groups under defaults"),
        ("model: null", "model=null must be one of"),
        ("compression: 5", "compression=5: choose groups under defaults"),
        ("compression: {a/../../x: {name: int8, ignore: []}}", "a stage's name is letters, digits, _ and -"),
    ],
)
def test_a_recipe_that_cannot_stand_is_refused_naming_the_file(write: Write, body: str, words: str) -> None:
    file = write("r.yaml", body)
    told = problems(f"recipe={file}")
    assert any(words in line for line in told), told
    assert any(str(file) in line for line in told), told


def test_every_problem_of_a_recipe_at_once(write: Write) -> None:
    file = write(
        "r.yaml",
        "defaults: [override /compression: int9, nosuch]\nhydra: {}\n"
        "model: {_target_: x, layer: 3}\ntrainer: {seed: a}\n",
    )
    assert len(problems(f"recipe={file}", "optimizer.lrr=1")) == 7


def test_recipes_that_build_on_each_other_in_a_circle_are_refused(write: Write) -> None:
    write("a.yaml", "defaults: [b]\n")
    write("b.yaml", "defaults: [c]\n")
    write("c.yaml", "defaults: [a]\n")
    told = problems(f"recipe={write('a.yaml', 'defaults: [b]')}")
    assert any("builds on this recipe itself" in line for line in told)


def test_an_unknown_recipe_is_told() -> None:
    (told,) = problems("recipe=int9")
    assert told.startswith("recipe=int9: no such choice; choose one of")
    assert "did you mean 'int8'?" in told
    (told,) = problems("recipe=/no/such/file.yaml")
    assert told == "recipe=/no/such/file.yaml: no such file (command line)"
    (told,) = problems("recipe=/tmp")
    assert told == "recipe=/tmp: is a directory; give a file (command line)"


def test_the_beginning_of_a_choice_is_taken_for_it() -> None:
    (told,) = problems("precision=16")
    assert told.endswith("; did you mean '16-mixed'? (command line)")


LOCKS = {
    "defaults": [],
    "chain": ["compression=[magnitude,int8]", "compression.magnitude.sparsity=0.25"],
    "none": ["recipe=prune_then_int8", "compression=none"],
    "numeric choice": ["precision=32", "optimizer=sgd", "trainer=smoke"],
    "preset": ["model=gpt_nano", "trainer.micro_batch_size=4", "gate.min_ratio=3.5"],
    "hostile prompt": ["prompt=a: ${x} \\${y} 'q' \"d\" #\t\u2028 é \x85 \\"],
    "text like a number": ["model=hf", "model.pretrained='1e3'"],
}


def decoded(overrides: list[str], source: Any = None) -> RunConfig:
    """Decoded without the rules, so that any job may be locked."""
    from pipeline.arguments import parse
    from pipeline.schema import decode_run

    lines = parse(overrides).overrides
    return decode_run(app.provenance.compose(source or app.loader(), lines), overrides, lambda note: None)


def same(first: RunConfig, second: RunConfig) -> None:
    assert values_of(first) == values_of(second)
    assert list(first.chain.items()) == list(second.chain.items())
    for field in ("model", "data", "precision", "parallelism", "device", "optimizer", "memory", "trainer"):
        assert getattr(first, field) == getattr(second, field)
        assert first.choices[field] == second.choices[field]
    assert first.choices["compression"] == second.choices["compression"]


@pytest.mark.parametrize("overrides", LOCKS.values(), ids=LOCKS.keys())
def test_a_lock_composes_to_the_same_run(tmp_path: Path, overrides: list[str]) -> None:
    first = decoded(overrides)
    lock = {"versions": {"torch": "2.13"}, "results": {"text": "${not} an interpolation", "n": 1}}
    file = tmp_path / recipes.LOCK
    file.write_text(recipes.lock_text(values_of(first), first.choices, lock), encoding="utf-8")
    second = decoded([f"recipe={file}"])
    same(first, second)
    assert second.lock == lock


def test_a_lock_of_repeated_methods_keeps_names_and_order(tmp_path: Path, write: Write) -> None:
    first = decoded([f"recipe={write('twice.yaml', TWICE)}"])
    file = tmp_path / recipes.LOCK
    file.write_text(recipes.lock_text(values_of(first), first.choices, {}), encoding="utf-8")
    same(first, decoded([f"recipe={file}"]))
    assert list(decoded([f"recipe={file}", "compression=none"]).chain) == []


def test_a_lock_of_a_lock_is_the_same(tmp_path: Path) -> None:
    first = decoded(["compression=[magnitude,int8]"])
    text = recipes.lock_text(values_of(first), first.choices, {"a": 1})
    file = tmp_path / recipes.LOCK
    file.write_text(text)
    second = decoded([f"recipe={file}"])
    assert recipes.lock_text(values_of(second), second.choices, {"a": 1}) == text


def test_another_choice_than_the_locks_brings_its_own_values(tmp_path: Path) -> None:
    first = decoded(["parallelism=fsdp", "parallelism.devices=4", "optimizer=sgd", "optimizer.lr=0.5"])
    file = tmp_path / recipes.LOCK
    file.write_text(recipes.lock_text(values_of(first), first.choices, {}), encoding="utf-8")
    other = decoded([f"recipe={file}", "parallelism=ddp"])
    assert (other.parallelism.name, other.parallelism.devices, other.optimizer.lr) == ("ddp", 2, 0.5)
    assert decoded([f"recipe={file}", "parallelism=fsdp"]).parallelism == first.parallelism


def test_a_lock_is_plain_yaml_with_overrides_last() -> None:
    config = app.compose(["compression=[magnitude,int8]"])
    before = copy.deepcopy(values_of(config))
    content = yaml.safe_load(recipes.lock_text(values_of(config), config.choices, {}))
    assert values_of(config) == before
    assert content["defaults"][-1] == {"override /trainer": "default"}
    assert {"override /compression": ["magnitude", "int8"]} in content["defaults"]
    assert json.dumps(content)
