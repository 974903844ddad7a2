"""Every YAML of conf/ and every recipe composes, decodes, and says what it is."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from pipeline import app, recipes, registry
from pipeline.arguments import parse
from pipeline.schema import GROUPS, RunConfig, decode_run, values_of
from pipeline.usage import defaults, first_comment

CHOICES = [(group, choice) for group in registry.PACKAGES for choice in registry.available(group)]
NEEDED = {"hf": ["model.pretrained=x"], "text": ["data.path=x"]}


def decoded(*overrides: str) -> RunConfig:
    return decode_run(app.provenance.compose(app.loader(), parse(overrides).overrides), overrides, lambda note: None)


@pytest.mark.parametrize(("group", "choice"), CHOICES)
def test_every_choice_composes_and_decodes(group: str, choice: str) -> None:
    config = decoded(f"{group}={choice}", *NEEDED.get(choice, []))
    if group == "compression":
        assert list(config.chain) == ([] if choice == "none" else [choice])
    else:
        assert config.choices[group] == choice


@pytest.mark.parametrize(("group", "choice"), CHOICES)
def test_every_yaml_says_in_a_comment_what_it_is(group: str, choice: str) -> None:
    assert first_comment(registry.conf_root() / group / f"{choice}.yaml")


def test_every_method_has_a_yaml_of_its_name_under_a_stage_of_its_name() -> None:
    """A lock names stages by their method: recipes.lock_text relies on it."""
    for name in registry.names("compression"):
        file = registry.conf_root() / "compression" / f"{name}.yaml"
        assert file.read_text().startswith(f"# @package compression.{name}\n")


def test_no_yaml_names_code() -> None:
    """Hydra composes, it never builds; its own callbacks, in the primary config, are the exception."""
    for file in [*registry.conf_root().rglob("*.yaml"), *(p for d in recipes.folders() for p in d.rglob("*.yaml"))]:
        content = yaml.safe_load(file.read_text()) or {}
        content.pop("hydra", None), content.pop("resume", None)
        assert list(recipes.forbidden(content)) == [], file


def test_every_group_has_a_default_that_is_a_choice() -> None:
    chosen = defaults()
    assert set(registry.PACKAGES) <= set(chosen)
    for group in registry.PACKAGES:
        assert chosen[group] in registry.available(group)
    assert set(GROUPS) | {"compression"} == set(registry.PACKAGES)


@pytest.mark.parametrize("name", recipes.listed())
def test_every_recipe_passes_every_rule(name: str) -> None:
    app.compose([f"recipe={name}"])


def test_composed_is_the_inverse_of_decoding() -> None:
    values = values_of(decoded("compression=[magnitude,int8]"))
    raw = app.provenance.compose(app.loader(), ["compression=[magnitude,int8]"]).values
    raw.pop("lock"), raw.pop("resume")
    listed = yaml.safe_load(yaml.safe_dump(raw))
    assert {key: _lists(value) for key, value in values.items()} == listed


def _lists(value: object) -> object:
    if isinstance(value, dict):
        return {key: _lists(item) for key, item in value.items()}
    return [_lists(item) for item in value] if isinstance(value, list | tuple) else value


def test_an_installed_package_finds_its_own_conf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "site" / "pipeline" / "conf").mkdir(parents=True)
    monkeypatch.setattr(registry, "__file__", str(tmp_path / "site" / "pipeline" / "registry.py"))
    assert registry.conf_root() == tmp_path / "site" / "pipeline" / "conf"
