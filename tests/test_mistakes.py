"""Generated mistakes: every key of every YAML misspelt, dropped, or of a wrong type, in each place where one can make
it, and every pair of choices. Each ends in a clean RunConfig, or in a ConfigError that names the key.

Mistakes of one kind are made all at once where they do not hide each other: each must be told, on a line of its own.
"""

from __future__ import annotations

import copy
import itertools
import shutil
from dataclasses import fields, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline import app, provenance, registry, rules
from pipeline.arguments import parse
from pipeline.errors import ConfigError
from pipeline.provenance import Composition
from pipeline.schema import GROUPS, RunConfig, decode_run
from pipeline.usage import settings

CHOICES = [(group, choice) for group in registry.PACKAGES for choice in registry.available(group) if choice != "none"]
NEEDED = {"hf": ["model.pretrained=x"], "text": ["data.path=x"]}
WRONG: tuple[Any, ...] = ("wrong type", 1.5, True, None, [], ["x"], {"deep": 1}, {}, -1, 10**30, float("nan"))


@cache
def composition(group: str, choice: str) -> Composition:
    return provenance.compose(app.loader(), parse([f"{group}={choice}", *NEEDED.get(choice, [])]).overrides)


def outcome(composed: Composition) -> tuple[RunConfig | None, list[str]]:
    """Decoded and judged by the rules; any exception but a ConfigError is the test's failure."""
    try:
        config = decode_run(composed, [], lambda note: None)
        return config, rules.problems(config)
    except ConfigError as error:
        return None, error.problems


def prefix(group: str, choice: str) -> str:
    return f"compression.{choice}" if group == "compression" else group


def mutated(composed: Composition, path: str, change: Any) -> Composition:
    """A copy whose mapping at `path` went through `change`."""
    values = copy.deepcopy(composed.values)
    here = values
    for part in path.split(".") if path else []:
        here = here[part]
    change(here)
    return replace(composed, values=values)


def one_line_each(problems: list[str]) -> None:
    assert all(line and "\n" not in line and "Traceback" not in line for line in problems), problems
    assert len(set(problems)) == len(problems), problems


def keys(group: str, choice: str) -> list[str]:
    return list(settings(registry.conf_root() / group / f"{choice}.yaml"))


SINGLE = [(group, choice, key) for group, choice in CHOICES for key in keys(group, choice)]


@pytest.mark.parametrize(("group", "choice", "key"), SINGLE)
def test_a_misspelt_key(group: str, choice: str, key: str) -> None:
    path = prefix(group, choice)
    composed = mutated(composition(group, choice), path, lambda node: node.update({f"{key}x": node.pop(key)}))
    config, problems = outcome(composed)
    one_line_each(problems)
    assert config is None
    if key == "name":
        assert any(line.startswith((f"{path}.name is required", f"{path}: no such stage")) for line in problems)
    else:
        (misspelt,) = [line for line in problems if line.startswith(f"{path}.{key}x")]
        assert f"did you mean '{key}'?" in misspelt
        assert any(line.startswith(f"{path}.{key} is required") for line in problems)
        assert len(problems) == 2


@pytest.mark.parametrize(("group", "choice", "key"), SINGLE)
def test_a_dropped_key(group: str, choice: str, key: str) -> None:
    path = prefix(group, choice)
    config, problems = outcome(mutated(composition(group, choice), path, lambda node: node.pop(key)))
    one_line_each(problems)
    assert config is None
    assert len(problems) == 1
    assert problems[0].startswith((f"{path}.{key} is required", f"{path}: no such stage"))
    assert problems[0].endswith(")")


@pytest.mark.parametrize(("group", "choice", "key"), SINGLE)
def test_a_value_of_a_wrong_type(group: str, choice: str, key: str) -> None:
    """Of every wrong value either the key is named, or the value is one that the key may have."""
    path = prefix(group, choice)
    refused = 0
    for value in WRONG:

        def change(node: dict[str, Any], value: Any = value) -> None:
            node[key] = value

        config, problems = outcome(mutated(composition(group, choice), path, change))
        one_line_each(problems)
        assert config is not None or problems
        if config is None:
            assert all(line.startswith(f"{path}.{key}") for line in problems), problems
            refused += 1
    assert refused >= len(WRONG) - 4


@pytest.mark.parametrize(("group", "choice"), CHOICES)
@pytest.mark.parametrize("value", [5, "text", None, [], True])
def test_a_value_in_place_of_a_group(group: str, choice: str, value: Any) -> None:
    composed = composition(group, choice)
    values = copy.deepcopy(composed.values)
    if group == "compression":
        values[group][choice] = value
    else:
        values[group] = value
    config, problems = outcome(replace(composed, values=values))
    one_line_each(problems)
    assert config is None
    assert len(problems) == 1
    assert problems[0].startswith(f"{prefix(group, choice)}")


ROOT = [
    key
    for key in yaml.safe_load((registry.conf_root() / "config.yaml").read_text())
    if key not in ("hydra", "defaults")
]


@pytest.mark.parametrize("key", ROOT)
def test_root_keys(key: str) -> None:
    base = composition("model", "gpt")
    config, problems = outcome(mutated(base, "", lambda node: node.pop(key)))
    one_line_each(problems)
    assert config is None
    assert all(line.startswith(key) and "is required" in line for line in problems), problems
    config, problems = outcome(mutated(base, "", lambda node: node.update({f"{key}x": node.pop(key)})))
    one_line_each(problems)
    assert any(line.startswith(f"{key}x") and f"did you mean '{key}'?" in line for line in problems), problems
    for value in WRONG:
        config, problems = outcome(mutated(base, "", lambda node, value=value: node.update({key: value})))
        one_line_each(problems)
        assert config is not None or all(line.startswith(key) for line in problems), (value, problems)


PAIRS = [pair for pair in itertools.combinations(CHOICES, 2) if pair[0][0] != pair[1][0]]


def test_every_pair_of_choices_is_a_run_or_a_told_mistake() -> None:
    assert len(PAIRS) > 300
    bases = {
        (group, choice): (composition(group, choice).values[group], composition(group, choice))
        for group, choice in CHOICES
    }
    runs = 0
    for first, second in PAIRS:
        composed = bases[first][1]
        values = {**copy.deepcopy(composed.values), second[0]: copy.deepcopy(bases[second][0])}
        choices = {**composed.choices, second[0]: second[1]}
        stages = {choice: choice for group, choice in (first, second) if group == "compression"}
        config, problems = outcome(replace(composed, values=values, choices=choices, stages=stages))
        one_line_each(problems)
        assert config is not None, (first, second, problems)
        runs += not problems
        for line in problems:
            assert any(word in line for pair in (first, second) for word in pair), (first, second, line)
    assert runs > len(PAIRS) / 3


@pytest.mark.parametrize(("group", "choice"), CHOICES)
def test_every_key_misspelt_on_the_command_line_at_once(group: str, choice: str) -> None:
    path = prefix(group, choice)
    wanted = [f"{path}.{key}x=1" for key in keys(group, choice)]
    found = provenance.compose(app.loader(), [f"{group}={choice}", *NEEDED.get(choice, []), *wanted])
    config, problems = outcome(found)
    one_line_each(problems)
    assert config is None
    for line in wanted:
        (told,) = [problem for problem in problems if problem.startswith(f"{line}: no such key")]
        assert told.endswith("(command line)")


@pytest.mark.parametrize(("group", "choice"), CHOICES)
def test_every_key_misspelt_or_of_a_wrong_type_in_a_recipe_at_once(group: str, choice: str, tmp_path: Path) -> None:
    given = settings(registry.conf_root() / group / f"{choice}.yaml")
    wrong = {key: "no list" if isinstance(given[key], list) else {"deep": {"er": 1}} for key in given if key != "name"}
    body: Any = {**wrong, **{f"{key}x": 1 for key in keys(group, choice)}}
    for part in reversed(prefix(group, choice).split(".")):
        body = {part: body}
    file = tmp_path / "mistaken.yaml"
    file.write_text(yaml.safe_dump({"defaults": [{f"override /{group}": choice}], **body}))
    config, problems = outcome(provenance.compose(app.loader(), parse([f"recipe={file}"]).overrides))
    one_line_each(problems)
    assert config is None
    path = prefix(group, choice)
    for key in keys(group, choice):
        told = [line for line in problems if line.startswith(f"{path}.{key}x=1: no such key")]
        assert len(told) == 1
        assert f"({file})" in told[0]
        if key != "name":
            assert any(
                line.startswith((f"{path}.{key}=", f"{path}.{key}.")) and f"({file})" in line for line in problems
            )


def test_a_mapping_over_a_list_names_the_key(tmp_path: Path) -> None:
    """Which Hydra cannot compose at all."""
    file = tmp_path / "mistaken.yaml"
    file.write_text("optimizer:\n  betas: {deep: 1}\n")
    config, problems = outcome(provenance.compose(app.loader(), parse([f"recipe={file}"]).overrides))
    assert config is None
    assert problems == [f"optimizer.betas must be a list, not a mapping ({file})"]


@pytest.fixture(scope="module")
def conf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    copied = tmp_path_factory.mktemp("copied") / "conf"
    shutil.copytree(registry.conf_root(), copied)
    return copied


def with_conf(conf: Path, *overrides: str) -> tuple[RunConfig | None, list[str]]:
    found = provenance.compose(app.loader(conf), parse(overrides).overrides)
    config, problems = outcome(found)
    one_line_each(problems)
    return config, problems


@pytest.mark.parametrize(("group", "choice"), CHOICES)
def test_every_key_of_a_yaml_misspelt_at_once(conf: Path, group: str, choice: str) -> None:
    """In a copy of the file itself. `name` is left: without it nothing says which keys there are."""
    file = conf / group / f"{choice}.yaml"
    before = file.read_text()
    content = yaml.safe_load(before)
    own = [key for key in content if key not in ("name", "defaults")]
    header = "".join(line + "\n" for line in before.splitlines() if line.startswith("# @"))
    try:
        file.write_text(
            header + yaml.safe_dump({f"{k}x" if k in own else k: v for k, v in content.items()}, sort_keys=False)
        )
        config, problems = with_conf(conf, f"{group}={choice}")
    finally:
        file.write_text(before)
    path = prefix(group, choice)
    assert (config is None) == bool(own)
    for key in own:
        (told,) = [line for line in problems if line.startswith((f"{path}.{key}x=", f"{path}.{key}x:"))]
        assert "no such key" in told
        assert f"({file})" in told


BROKEN = {
    "no mapping": "- a\n- b\n",
    "text": "just text\n",
    "unclosed": "a: [1\n",
    "tab": "a:\n\t- b\n",
    "twice": "name: x\nname: y\n",
    "empty": "",
    "defaults text": "defaults: gpt\n",
    "defaults number": "defaults: [5]\n",
    "defaults nosuch": "defaults: [nosuch, _self_]\n",
    "defaults twice self": "defaults: [_self_, _self_]\n",
    "defaults two keys": "defaults:\n  - {a: b, c: d}\n",
    "override first": "defaults:\n  - override /data: text\n  - /data: text\n",
    "header": "# @package\nname: x\n",
    "long header": "# @package a b c\nname: x\n",
    "interpolation": "name: ${nope}\n",
    "bad interpolation": "name: ${nope\n",
    "binary": "name: !!binary aGk=\n",
    "date": "name: 2020-01-01\n",
    "python": "name: !!python/object/apply:os.system [ls]\n",
    "number keys": "1: x\n2: y\n",
    "null key": "null: x\n",
    "circle": "defaults: [{CHOICE}, _self_]\n",
    "bytes": "\x00\x01",
}


@pytest.mark.parametrize("broken", BROKEN.values(), ids=BROKEN.keys())
@pytest.mark.parametrize(("group", "choice"), [("model", "gpt"), ("compression", "int8"), ("precision", "32")])
def test_a_broken_yaml(conf: Path, group: str, choice: str, broken: str) -> None:
    file = conf / group / f"{choice}.yaml"
    before = file.read_text()
    try:
        file.write_text(broken.replace("{CHOICE}", choice))
        config, problems = with_conf(conf, f"{group}={choice}")
    finally:
        file.write_text(before)
    assert config is None
    assert problems


@pytest.mark.parametrize("key", ["defaults", *ROOT, "hydra"])
def test_a_mistake_in_the_primary_config(conf: Path, key: str) -> None:
    file = conf / "config.yaml"
    before = file.read_text()
    content = yaml.safe_load(before)
    try:
        for changed in ({f"{k}x" if k == key else k: v for k, v in content.items()}, {**content, key: 5}):
            file.write_text(yaml.safe_dump(changed, sort_keys=False))
            config, problems = with_conf(conf)
            if key == "budget" and changed.get(key) == 5:  # bytes
                assert config is not None
                continue
            if key != "lock" or changed.get(key) != 5:
                assert config is None, (key, config)
            assert problems
            assert any(key in line for line in problems) or key == "defaults"
    finally:
        file.write_text(before)


COMMAND_LINES = [
    "a b", "=1", "a=", "x", "model", "model=", "model=null", "model=[]", "model=[gpt]", "model={a: 1}", "model=5",
    "model=gpt,llama", "+model=llama", "++model=llama", "~model", "~model=llama", "~nosuch", "~model.layers",
    "model@x=gpt", "model@model=gpt", "compression=null", "compression=5", "compression=true",
    "compression={int8: 1}", "compression=[int8,none]", "compression=[[int8]]", "compression=[5]",
    "compression=[{a: 1}]", "compression.int8=1", "compression.nosuch.a=1", "+compression=int8",
    "compression@compression=int8", "compression.int8.ignore=[x", "compression=[int8", "optimizer.lr=a",
    "optimizer.lr=", "optimizer.lr.x.y=1", "optimizer.betas=[1,2,3]", "optimizer.betas=0.9", "optimizer.betas.0=1",
    "optimizer=adamww", "optimizer.=1", ".lr=1", "optimizer..lr=1", "gate=1", "gate.min_ratio=x",
    "gate={min_ratio: 1, nosuch: 2}", "generate=null", "job=runn", "job=null", "job=[run]", "keep_stages=maybe",
    "keep_stages=1", "lock=1", "resumee=x", "recipe=", "recipe=[]", "recipe=[nosuch]", "recipe=[int8,nosuch]",
    "recipe={a: 1}", "recipe=null", "recipe=../../etc/passwd", "hydra=1", "hydra.nosuch=1", "hydra.run=1",
    "hydra.run.dir=null", "hydra/launcher=nosuch", "hydra.mode=nosuch", "hydra.searchpath=5", "hydra.verbose=[1]",
    "trainer.seed=1e3", "trainer.seed=0x10", "trainer.max_steps=-1", "trainer.max_steps=1.0",
    "trainer.max_steps=10**3", "trainer.max_steps=${nope}", "trainer.max_steps=${trainer.seed",
    "trainer.max_steps=${oc.env:NOPE_NOT_SET}", "trainer.max_steps=???", "trainer.max_steps=choice(1,2)",
    "trainer.max_steps=range(1,3)", "trainer.max_steps=int(x)", "trainer.max_steps=glob(*)", "trainer.seed=[0]",
    "model.layers='4'", "model.layers=!!int 4", "model.layers:4", "model/layers=4", "MODEL=gpt", "Model.Layers=4",
    "modél=gpt", "model.läyers=4", "model.layers=4 ", " model=gpt", "model =gpt", "lr=1", "layers=4", "max_steps=1",
    "parallelism.devices=0", "parallelism=dpp", "precision=16", "precision=[32]", "device=gpu", "data=digit",
    "trainer=smok", "memory=lea",
]  # fmt: skip
FINE = {"model.layers=4 ", "recipe=[]", "hydra.verbose=[1]"}


@pytest.mark.parametrize("line", COMMAND_LINES)
def test_a_mistake_on_the_command_line(line: str) -> None:
    """None ends in anything but a ConfigError of single lines; what is fine after all is named in FINE."""
    if line in FINE:
        app.compose([line])
        return
    with pytest.raises(ConfigError) as caught:
        app.compose([line])
    one_line_each(caught.value.problems)
    key = line.strip().lstrip("+~").partition("=")[0].partition("@")[0].partition(":")[0].partition(".")[0]
    assert any(key in told for told in caught.value.problems), caught.value.problems


def test_all_mistakes_of_a_command_line_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        app.compose(
            [
                "compresion=int8",
                "compression=int9",
                "optimizer.lrr=1",
                "model.layers=a",
                "a b",
                "trainer.batch_size=7",
                "parallelism=ddp",
            ]
        )
    one_line_each(caught.value.problems)
    named = ["compresion", "compression=int9", "optimizer.lrr", "model.layers", "'a b'", "trainer.batch_size=7"]
    assert len(caught.value.problems) == len(named)
    for key in named:
        assert any(line.startswith(key) for line in caught.value.problems), key


@pytest.mark.parametrize(
    ("overrides", "starts"),
    [
        (
            ["compression=[nosuch,int8,magnitude]", "trainer.batch_size=7", "parallelism=ddp"],
            ["compression=nosuch: no such choice", "trainer.batch_size=7", "compression: 'magnitude' cannot follow"],
        ),
        (
            ["compression=[nosuch,int9,int4]", "compression.int4.group_size=a"],
            ["compression=nosuch: no such", "compression=int9: no such", "compression.int4.group_size=a must be"],
        ),
        (
            ["compression=distill", "compression.distill.teacher=/no/such", "compression.distill.temperature=-1"],
            ["compression.distill.teacher=/no/such: no such file", "compression.distill.temperature=-1 must be"],
        ),
        (
            ["compression=distill", "compression.distill.temperature=1e30"],
            ["compression.distill.temperature=1e+30 must"],
        ),
        (
            ["data=text", "data.path=/no/such", "data.sequence_length=a"],
            ["data.path=/no/such", "data.sequence_length=a must be"],
        ),
        # what the link that is not known would be, nobody can say
        (["compression=[magnitude,structurd,sparsegpt]"], ["compression=structurd: no such choice"]),
    ],
)
def test_a_wrong_link_hides_nothing_of_the_others(overrides: list[str], starts: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        app.compose(overrides)
    one_line_each(caught.value.problems)
    assert len(caught.value.problems) == len(starts), caught.value.problems
    for start in starts:
        assert any(line.startswith(start) for line in caught.value.problems), start


def test_no_field_of_a_config_is_without_a_test() -> None:
    """Every field of RunConfig is a group, a key of conf/config.yaml, or what the program itself fills in."""
    own = {"chain", "choices", "overrides", "sweep"}
    assert {field.name for field in fields(RunConfig)} == {*GROUPS, *ROOT, *own}
