"""The command line before Hydra: raw values arrive exactly, recipes by path, flags anywhere, resume."""

from __future__ import annotations

from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from pipeline import app, arguments, recipes
from pipeline.errors import ConfigError

HOSTILE = [
    "def ",
    "def f(x, y=2):",
    "a,b",
    "k=v",
    "[1,2]",
    "{a: 1}",
    "'quoted'",
    '"quoted"',
    'it\'s "both"',
    "${oc.env:HOME}",
    "\\${x}",
    "\\\\${x}",
    "back\\slash\\",
    'tail\\"',
    "null",
    "true",
    "12",
    "ünï ☃ 漢",
    "two\nlines\tand a tab",
    "a backslash ends a line\\\n",
    " leading and trailing ",
    "# no comment",
    "@package: x",
    "~",
    "",
    "int(3)",
    "glob(*)",
]
TEXT = st.text(
    alphabet=st.one_of(
        st.sampled_from("\\${}\"' =,()[]@:ab\n\t#%~?"),
        st.characters(exclude_categories=["Cs"], exclude_characters="\0"),
    ),
    max_size=14,
)


def arrives(text: str) -> str:
    """What a config holds in the end, once Hydra has parsed, re-spelt (as a sweeper does) and parsed again."""
    parser = OverridesParser.create()
    (line,) = arguments.parse([f"prompt={text}"]).overrides
    again = f"prompt={parser.parse_override(line).get_value_element_as_str()}"
    value = parser.parse_override(again).value()
    config = OmegaConf.create({"prompt": None})
    OmegaConf.update(config, "prompt", value)
    found: str = config.prompt
    return found


@pytest.mark.parametrize("text", HOSTILE)
def test_a_prompt_arrives_as_typed(text: str) -> None:
    assert arrives(text) == text


@settings(max_examples=300, deadline=None)
@given(TEXT.filter(lambda text: text != "???"))  # which says in Hydra that a value must be given
def test_any_text_arrives_as_typed(text: str) -> None:
    assert arrives(text) == text


@settings(max_examples=300, deadline=None)
@given(TEXT)
def test_what_is_recorded_is_what_was_typed(text: str) -> None:
    assert arguments.typed(arguments.quoted(f"prompt={text}")) == f"prompt={text}"


@pytest.mark.parametrize("number", range(0, len(HOSTILE), 3))
def test_raw_values_reach_the_config(number: int) -> None:
    given_ = dict(zip(["prompt", "prompt_file", "artifact"], [*HOSTILE, "???", "${x}"][number:], strict=False))
    overrides = arguments.parse([f"{key}={text}" for key, text in given_.items()]).overrides
    composed = app.provenance.compose(app.loader(), overrides)
    assert composed.problems == []
    assert {key: composed.values[key] for key in given_} == given_


def test_other_overrides_are_left_alone() -> None:
    given_ = ["compression=[magnitude,int8]", "model.layers=2", "precision=32,16-mixed", "~optimizer.eps", "+a=b"]
    assert arguments.parse(given_).overrides == given_


def test_text_that_is_not_utf8_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"prompt=.* is not UTF-8 text"):
        arguments.parse(["prompt=\udcff"])


@pytest.mark.parametrize(
    "argv",
    [
        ["recipe=int8", "-m", "precision=32,16-mixed"],
        ["-m", "recipe=int8", "precision=32,16-mixed"],
        ["recipe=int8", "precision=32,16-mixed", "--multirun"],
    ],
)
def test_flags_may_stand_anywhere(argv: list[str]) -> None:
    args = arguments.parse(argv)
    assert args.multirun
    assert args.overrides == ["recipe=int8", "precision=32,16-mixed"]
    assert arguments.parse(arguments.rebuilt(args)) == args


def test_info_does_not_swallow_an_override() -> None:
    args = arguments.parse(["--info", "model=llama"])
    assert (args.info, args.overrides) == ("all", ["model=llama"])


def test_an_unknown_flag_names_the_one_that_was_meant() -> None:
    with pytest.raises(ConfigError, match=r"--multrun.*did you mean '--multirun'"):
        arguments.parse(["--multrun"])


@pytest.mark.parametrize(
    "name", ["shared.yaml", "with space.yaml", "a,b.yaml", "k=v (1).yaml", "ü@:%${x}.yaml", 'it\'s "q".yaml', "[x].yml"]
)
def test_a_recipe_is_found_by_any_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    (tmp_path / "sub").mkdir()
    file = tmp_path / "sub" / name
    file.write_text("trainer:\n  max_steps: 3\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for spelt in (str(file), f"sub/{name}", f"./sub/{name}", f"~/sub/{name}"):
        (line,) = arguments.parse([f"recipe={spelt}"]).overrides
        composed = app.provenance.compose(app.loader(), [line])
        assert composed.problems == []
        assert composed.recipes == [file]
        assert composed.values["trainer"]["max_steps"] == 3
        assert arguments.typed(line) == f"recipe={file}"


def test_names_sweep_and_an_existing_file_with_a_comma_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "a,b.yaml"
    file.write_text("{}")
    other = tmp_path / "c.yaml"
    other.write_text("{}")
    assert arguments.quoted("recipe=int8,prune_then_int8") == "recipe=int8,prune_then_int8"
    assert arguments.quoted("recipe=a,b.yaml") == f"recipe='{recipes.token(file)}'"
    assert arguments.quoted("recipe=c.yaml,int8") == f"recipe='{other}',int8"
    assert arguments.quoted("recipe=[int8,c.yaml]") == f"recipe=[int8,'{other}']"


PATH_NAMES = [
    "k=v.txt",
    "in (1).txt",
    "a,b.txt",
    "ünï cöde.txt",
    "two  spaces.txt",
    'it\'s "both".txt',
    "[x]{y}.txt",
    "${x}.txt",
]
PATH_KEYS = {
    "data.path": ["data=text"],
    "model.pretrained": ["model=hf"],
    "compression.distill.teacher": ["compression=distill"],
}


@pytest.mark.parametrize("name", PATH_NAMES)
def test_a_path_is_taken_as_it_is_typed(tmp_path: Path, name: str) -> None:
    file = tmp_path / name
    file.write_text("text")
    for key, choices in PATH_KEYS.items():
        (*_, line) = arguments.parse([*choices, f"{key}={file}"]).overrides
        assert value_of(key, [*choices, line]) == str(file)
        assert arguments.typed(line) == f"{key}={file}"


@pytest.mark.parametrize("key", ["artifact", "prompt_file", "resume"])
def test_quotes_around_a_path_are_hydras_unless_that_is_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    def given(path: str) -> str:
        return arguments.typed(arguments.quoted(f"{key}={path}")).removeprefix(f"{key}=")

    monkeypatch.chdir(tmp_path)
    assert given("'a b'") == "'a b'"
    (tmp_path / "a b").mkdir()
    assert given("'a b'") == given('"a b"') == given("a b") == "a b"
    assert given("'a b\"") == "'a b\""
    (tmp_path / "'a b'").mkdir()
    assert given("'a b'") == "'a b'"


def test_paths_sweep_and_one_that_has_a_comma_does_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a,ü.txt").write_text("text")
    assert arguments.quoted("data.path=a,ü.txt") == 'data.path="a,ü.txt"'
    assert arguments.quoted("data.path=a.txt,ü.txt") == 'data.path=a.txt,"ü.txt"'
    assert arguments.typed('data.path="ä.txt","ü.txt"') == 'data.path="ä.txt","ü.txt"'
    for hydras in ("'a,b'", "${oc.env:HOME}/x", "choice(a,b)", "null"):
        assert arguments.quoted(f"data.path={hydras}") == f"data.path={hydras}"


@pytest.mark.parametrize("path", ["~nosuchuser/x", "/" + "x" * 300, "/nöwhere/k=v (1)"])
@pytest.mark.parametrize("key", ["recipe", "resume", *PATH_KEYS, "calibration.source"])
def test_a_path_that_is_nowhere_is_one_line(key: str, path: str) -> None:
    path += ".yaml" if key == "recipe" else ""
    with pytest.raises(ConfigError) as refused:
        app.compose([*PATH_KEYS.get(key, []), f"{key}={path}"])
    (line,) = refused.value.problems
    assert line.startswith(f"{key}=")
    assert "no such file" in line or "nothing to resume" in line or "does not exist" in line or "is neither" in line


def value_of(key: str, overrides: list[str]) -> object:
    composed = app.provenance.compose(app.loader(), overrides)
    assert composed.problems == []
    found: object = composed.values
    for part in key.split("."):
        assert isinstance(found, dict)
        found = found[part]
    return found


class TestResume:
    @pytest.fixture
    def run_dir(self, tmp_path: Path) -> Path:
        directory = tmp_path / "run, (a=b) 1"
        (directory / ".hydra").mkdir(parents=True)
        config = app.compose(["trainer.max_steps=40"])
        from pipeline.schema import values_of

        (directory / recipes.LOCK).write_text(recipes.lock_text(values_of(config), config.choices, {}))
        return directory

    def test_composes_the_lock_in_place(self, run_dir: Path) -> None:
        overrides = arguments.parse([f"resume={run_dir}"]).overrides
        config = app.check(overrides, app.loader())
        assert config.resume
        assert config.trainer.max_steps == 40
        cfg = app.loader().load_configuration("config", overrides, app.RunMode.RUN)
        assert cfg.hydra.run.dir == str(run_dir)

    @pytest.mark.parametrize("quote", ["", "'", '"'])
    def test_takes_a_path_in_quotes(self, run_dir: Path, quote: str) -> None:
        found = arguments.parse([f"resume={quote}{run_dir}{quote}"]).overrides
        assert f'hydra.run.dir="{run_dir}"' in found
        assert f'resume="{run_dir}"' in found

    def test_keeps_the_first_record_of_hydra(self, run_dir: Path) -> None:
        overrides = arguments.parse([f"resume={run_dir}"]).overrides
        assert "hydra.output_subdir=.hydra-resumed-1" in overrides
        (run_dir / ".hydra-resumed-1").mkdir()
        assert "hydra.output_subdir=.hydra-resumed-2" in arguments.parse([f"resume={run_dir}"]).overrides

    @pytest.mark.parametrize(
        "override",
        [
            "trainer.max_steps=80",
            "trainer.log_every=1",
            "trainer.checkpoint_every=2",
            "trainer.evaluate_every=2",
            "keep_stages=true",
            "gate.min_ratio=2",
            "gate.max_quality_drop=0.1",
        ],
    )
    def test_takes_what_lengthens_or_observes(self, run_dir: Path, override: str) -> None:
        config = app.compose([f"resume={run_dir}", override])
        key, _, value = override.partition("=")
        found: object = config
        for part in key.split("."):
            found = getattr(found, part)
        assert str(found).lower().removesuffix(".0") == value

    @pytest.mark.parametrize(
        "override",
        [
            "model=llama",
            "model.layers=2",
            "data.sequence_length=8",
            "compression=int8",
            "trainer.seed=1",
            "trainer.batch_size=32",
            "optimizer.lr=1",
            "recipe=int8",
            "job=evaluate",
            "hydra.run.dir=x",
            "~gate",
        ],
    )
    def test_refuses_what_makes_it_another_run(self, run_dir: Path, override: str) -> None:
        with pytest.raises(ConfigError) as caught:
            arguments.parse([override, f"resume={run_dir}"])
        assert len(caught.value.problems) == 1
        assert caught.value.problems[0].startswith(f"{override}: a resumed run takes only")

    @pytest.mark.parametrize("override", ["precision=bf16-mixed", "trainer.seed=1", "trainer.batch_size=4", "recipe=x"])
    def test_a_key_that_there_is_is_taken_for_no_other_one(self, run_dir: Path, override: str) -> None:
        with pytest.raises(ConfigError) as caught:
            arguments.parse([override, f"resume={run_dir}"])
        assert "did you mean" not in str(caught.value)

    def test_a_key_that_is_misspelt_is_told_what_was_meant(self, run_dir: Path) -> None:
        with pytest.raises(ConfigError, match=r"; did you mean 'trainer\.max_steps'\?"):
            arguments.parse(["trainer.max_step=9", f"resume={run_dir}"])

    @pytest.mark.parametrize(
        "override",
        [
            "parallelism=single",
            "parallelism.devices=4",
            "device=cpu",
            "memory.loss_chunks=2",
            "trainer.micro_batch_size=1",
        ],
    )
    def test_takes_what_says_where_it_goes_on(self, run_dir: Path, override: str) -> None:
        assert override in arguments.parse([override, f"resume={run_dir}"]).overrides

    @pytest.mark.parametrize("where", ["nowhere", ""])
    def test_nothing_to_resume(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
        monkeypatch.chdir(tmp_path)
        with pytest.raises(ConfigError, match="nothing to resume"):
            arguments.parse([f"resume={where}"])

    def test_every_problem_at_once(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError) as caught:
            arguments.parse(["-m", f"resume={tmp_path}", "model=llama", "optimizer.lr=1"])
        assert len(caught.value.problems) == 4
