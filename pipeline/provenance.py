"""Composition of a config, with a record of who said what: choices, stages in order, recipe files, sources of keys.

Hydra stops at the first mistake it meets, and misses those in YAML files. `Loader` lets unknown keys of the command
line through instead, so that strict decoding names every one of them, and `compose` turns whatever else Hydra,
OmegaConf or YAML raise into lines. Nothing here knows what the groups mean.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.config_repository import CachingConfigRepository
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.default_element import GroupDefault, ResultDefault
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, Override, OverrideType, Quote, QuotedString
from hydra.core.utils import setup_globals
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from pipeline.explain import explain
from pipeline.recipes import GROUP, RecipeSource, choice_problem, file_of, label
from pipeline.registry import Absent, shown

CHAIN = "compression"
TEXT = ("prompt", "prompt_file", "artifact")
"""Keys whose values are taken as typed, `???` too."""


class Loader(ConfigLoaderImpl):
    """Hydra's loader with three differences: choices may look like numbers (`precision=32`), keys that do not exist
    pass (decoding refuses them, all at once), and it remembers the defaults list it composed from."""

    defaults: Sequence[ResultDefault] = ()
    parsed: Sequence[Override] = ()
    used: Any = None
    """The repository of the last composition."""

    def _parse_overrides_and_create_caching_repo(
        self, config_name: str | None, overrides: list[str]
    ) -> tuple[list[Override], CachingConfigRepository]:
        parsed, repository = super()._parse_overrides_and_create_caching_repo(config_name, overrides)
        for source in repository.get_sources():
            if isinstance(source, RecipeSource):
                source.repository, source.problems = repository, []
        for override in parsed:
            if repository.group_exists(override.key_or_group) and not isinstance(override.value(), dict):
                override._value = _as_choices(override._value)
            elif override.type in (OverrideType.CHANGE, OverrideType.ADD) and not override.is_hydra_override():
                override.type = OverrideType.FORCE_ADD
        chosen = {
            override.key_or_group: str(_unquoted(override._value))
            for override in parsed
            if repository.group_exists(override.key_or_group) and not override.is_sweep_override()
        }
        for source in repository.get_sources():
            if isinstance(source, RecipeSource):
                source.chosen = chosen
        self.parsed, self.used = parsed, repository
        return parsed, repository

    def _compose_config_from_defaults_list(self, defaults: list[ResultDefault], repo: Any) -> DictConfig:
        self.defaults, self.used = defaults, repo
        return super()._compose_config_from_defaults_list(defaults=defaults, repo=repo)

    def recipe_problems(self) -> list[str]:
        sources = self.used.get_sources() if self.used else []
        return [told for source in sources if isinstance(source, RecipeSource) for told in source.problems]


def _as_choices(value: Any) -> Any:
    if isinstance(value, ChoiceSweep):
        value.list = [_as_choices(item) for item in value.list]
        return value
    if isinstance(value, list):
        return [_as_choices(item) for item in value]
    if isinstance(value, bool):
        return QuotedString(text=str(value).lower(), quote=Quote.single)
    if isinstance(value, int | float):
        return QuotedString(text=str(value), quote=Quote.single)
    return value


@dataclass
class Composition:
    """A composed config as plain containers, and how it came about. With `problems`, the rest may be incomplete."""

    values: dict[str, Any] = field(default_factory=dict)
    choices: dict[str, Any] = field(default_factory=dict)
    """group -> the choice of it; recipes by name or path."""
    stages: dict[str, str] = field(default_factory=dict)
    """Stage name -> choice of `compression`, in the order of the chain."""
    dropped: dict[str, str] = field(default_factory=dict)
    """Stages that a recipe puts in and the command line's, or another recipe's, own choice of `compression` leaves
    out."""
    chain_said: str | None = None
    """The command line's choice of `compression`, as typed; None where it makes none."""
    recipes: list[Path] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    complete: bool = True
    """False where composition itself failed, so that `values` cannot be judged."""
    loader: Loader | None = None

    def typed(self, key: str) -> bool:
        """Whether the command line says something about `key` or a key below it."""
        assert self.loader is not None
        parsed, repository = self.loader.parsed, self.loader.used
        return any(_covers(override, key, repository) or _below(override, key) for override in parsed)

    def said(self, key: str) -> str:
        """Where the value of a full key was said, else where its parent was: `command line`, or a file."""
        key = re.sub(r"\[\d+\].*", "", key)
        assert self.loader is not None
        if any(_covers(override, key, self.loader.used) for override in self.loader.parsed):
            return "command line"
        while True:
            for default in reversed(self.loader.defaults):
                if _says(self.loader.used, default, key):
                    file = file_of(self.loader.used, default.config_path or "")
                    return label(file) if file else ""
            if not key:
                return ""
            key = key.rpartition(".")[0]

    def leaves(self) -> list[str]:
        """Every full key of the config."""
        return list(_leaves(self.values))


def compose(loader: Loader, overrides: Sequence[str], config_name: str = "config") -> Composition:
    """Compose `overrides` (in Hydra's grammar) over the primary config. Never raises for a user's mistake."""
    setup_globals()
    found = Composition(loader=loader)
    kept = _parsable(loader, overrides, found)
    config = None
    while config is None:
        try:
            config = loader.load_configuration(config_name, kept, RunMode.RUN)
        except Exception as error:
            found.problems += [told for told in loader.recipe_problems() if told not in found.problems]
            message, culprit = explain(error, kept, loader.defaults, loader.used)
            found.problems.append(message)
            if culprit is None:
                found.complete = False
                return found
            kept.remove(culprit)
    found.problems += loader.recipe_problems()
    found.recipes = list(dict.fromkeys(_recipe_files(loader)))
    _record_choices(found, config)
    found.values = _plain(config, found.problems, found.said)
    for key in _left_open(loader):
        _reopen(found.values, key)
    return found


def _left_open(loader: Loader) -> Iterator[str]:
    """Full keys that a file declares mandatory (`???`) and nothing later says: OmegaConf keeps older values."""
    for number, default in enumerate(loader.defaults):
        if default.package == "hydra" or (default.package or "").startswith("hydra."):
            continue
        loaded = loader.used.load_config(default.config_path)
        for key in _missing_keys(loaded.config) if loaded else ():
            full = f"{default.package}.{key}" if default.package else key
            later = any(_says(loader.used, other, full) for other in loader.defaults[number + 1 :])
            if not later and not any(_covers(override, full, loader.used) for override in loader.parsed):
                yield full


def _missing_keys(node: Any, prefix: str = "") -> Iterator[str]:
    """Keys of a file where `???` stands; references are not followed, which may need the whole config."""
    if not isinstance(node, DictConfig) or node._is_none() or node._is_interpolation():
        return
    for name in node:
        child, full = node._get_node(name), f"{prefix}.{name!s}" if prefix else str(name)
        if full != "hydra" and child is not None:
            if child._is_missing():
                yield full
            else:
                yield from _missing_keys(child, full)


def _reopen(values: Any, key: str) -> None:
    *parents, name = key.split(".")
    for part in parents:
        values = values.get(part) if isinstance(values, dict) else None
    if isinstance(values, dict) and name in values:
        values[name] = Absent()


def _parsable(loader: Loader, overrides: Sequence[str], found: Composition) -> list[str]:
    """The overrides that Hydra will understand; the others are told."""
    parser = OverridesParser.create()
    kept = []
    for line in overrides:
        try:
            override = parser.parse_override(line)
        except (HydraException, ValueError, TypeError) as error:
            why = " ".join(str(error).split()) if "=" in line else "write KEY=VALUE"
            found.problems.append(f"'{line}' cannot be understood: {why} (command line)")
            continue
        told = _choice_told(loader, override)
        if told and (links := known_links(loader, line)) is not None:
            # The rest of the chain is judged all the same, and its settings are no settings of nothing.
            found.problems += [
                f"{choice_problem(CHAIN, unknown, loader.repository)} (command line)" for unknown in links[1]
            ]
            kept.append(links[0])
        elif told:
            found.problems.append(f"{told} (command line)")
        else:
            kept.append(line)
    return kept


def known_links(loader: Loader, line: str) -> tuple[str, list[str]] | None:
    """(the override with those links that there are, the others) of a chain with both kinds of them, else None."""
    try:
        override = OverridesParser.create().parse_override(line)
    except (HydraException, ValueError, TypeError):
        return None
    links = _unquoted(_as_choices(override._value)) if override.key_or_group == CHAIN else None
    if not isinstance(links, list) or not all(isinstance(link, str) for link in links):
        return None
    unknown = [link for link in links if not loader.repository.config_exists(f"{CHAIN}/{link}")]
    good = [link for link in links if link not in unknown]
    if not good or not unknown or len(set(links)) < len(links) or "none" in good:
        return None
    return f"{line.partition('=')[0]}=[{','.join(good)}]", unknown


def _choice_told(loader: Loader, override: Override) -> str:
    repository, key = loader.repository, override.key_or_group
    if override.is_sweep_override():
        values = override.input_line.partition("=")[2] if override.input_line else ""
        joined = f"; for a chain write {key}=[{values}]" if key == CHAIN else f"; for a list write {key}=[{values}]"
        return f"{key}={values}: several values need -m, which runs each{joined}"
    if not repository.group_exists(key) or override.is_delete() or isinstance(override.value(), dict):
        return ""
    value = _unquoted(_as_choices(override._value))
    if value is None and key == GROUP:
        return f"{key}=null: leave it out for no recipe"
    return choice_problem(key, value, repository) if value != [] else ""


def _unquoted(value: Any) -> Any:
    return (
        [Override._convert_value(one) for one in value] if isinstance(value, list) else Override._convert_value(value)
    )


def _recipe_files(loader: Loader) -> Iterator[Path]:
    for default in loader.defaults:
        if (default.config_path or "").startswith(f"{GROUP}/"):
            file = file_of(loader.used, default.config_path or "")
            if file:
                yield file


def _record_choices(found: Composition, config: DictConfig) -> None:
    """Fill `choices`, `stages`, `dropped` and `chain_said` from the defaults list."""
    loader = found.loader
    assert loader is not None
    primary = next((default.config_path for default in loader.defaults if default.primary), None)
    mine = [o for o in loader.parsed if o.key_or_group == CHAIN and not o.package and not isinstance(o.value(), dict)]
    found.chain_said = (mine[-1].input_line or CHAIN) if mine else None
    parents = {default.config_path: default.parent for default in loader.defaults}
    for default in loader.defaults:
        path, package = default.config_path or "", default.package or ""
        group, _, choice = path.partition("/")
        if group == CHAIN and package == CHAIN and choice != "none":
            file = file_of(loader.used, path)
            found.problems.append(f"{label(file) if file else path}: must begin with '# @package compression.{choice}'")
        if group != CHAIN or not package.startswith(f"{CHAIN}."):
            continue
        if (default.parent or "").startswith(f"{CHAIN}/") and not default.is_self:
            continue  # what a choice builds on is no stage of its own
        stage = package.partition(".")[2]
        owner = parents.get(path) if default.is_self else default.parent
        into, other = found.stages, found.dropped
        if found.chain_said and owner != primary:
            into, other = other, into
        if other.get(stage) == choice:  # chosen again on the command line: settings of the recipe's stage stay
            found.stages[stage] = found.dropped.pop(stage, choice)
            continue
        if stage in into or stage in other:
            earlier = (found.stages | found.dropped)[stage]
            found.problems.append(
                f"compression.{stage}: both '{earlier}' and '{choice}' stand under this name; "
                f"give each its own: - /compression/{choice}@compression.NAME"
            )
        into[stage] = choice
    # Of a recipe whose list gave way to another's: its settings may say a stage in full, as those of a lock do.
    found.dropped |= {link: link for link in _links_of_recipes(loader) if link not in found.stages | found.dropped}
    runtime = OmegaConf.to_container(config.hydra.runtime.choices)
    assert isinstance(runtime, dict)
    found.choices = {
        str(k): v for k, v in reversed(runtime.items()) if k not in (CHAIN, GROUP) and str(k).isidentifier()
    }
    found.choices[GROUP] = [label(file) for file in found.recipes] or None
    if isinstance(found.choices[GROUP], list) and len(found.choices[GROUP]) == 1:
        found.choices[GROUP] = found.choices[GROUP][0]


def _links_of_recipes(loader: Loader) -> Iterator[str]:
    """What each recipe's own list of the chain names, whichever of the lists counts."""
    for default in loader.defaults:
        path = default.config_path or ""
        loaded = loader.used.load_config(path) if path.startswith(f"{GROUP}/") else None
        for entry in (loaded.defaults_list or ()) if loaded else ():
            if isinstance(entry, GroupDefault) and entry.override and (entry.group or "").strip("/") == CHAIN:
                yield from map(str, entry.value if isinstance(entry.value, list) else [entry.value])


def _plain(config: DictConfig, problems: list[str], said: Any) -> dict[str, Any]:
    """The config (without Hydra's own part) as plain containers; `Absent` where `???` or a broken reference stands."""

    def walk(node: Any, key: str) -> Any:
        if isinstance(node, DictConfig):
            if node._is_none():
                return None
            return {name: item(node, name, f"{key}.{name!s}" if key else str(name)) for name in node}
        if OmegaConf.is_list(node):
            return None if node._is_none() else [item(node, n, f"{key}[{n}]") for n in range(len(node))]
        return node

    def item(node: Any, name: Any, key: str) -> Any:
        if OmegaConf.is_missing(node, name):
            return "???" if key in TEXT else Absent()
        try:
            return walk(node[name], key)
        except OmegaConfBaseException as error:
            raw = node._get_node(name)._value()
            place = said(key)
            why = " ".join(str(error).partition("full_key")[0].split())
            problems.append(f"{shown(key, raw)}: {why}{f' ({place})' if place else ''}")
            return Absent(reported=True)

    return {str(name): item(config, name, str(name)) for name in config if name != "hydra"}


def _covers(override: Override, key: str, repository: Any) -> bool:
    """Whether a command-line override says the value of `key`. A group's choice does not say the values inside."""
    mine, value = override.key_or_group, override.value()
    if override.package or override.is_hydra_override():
        return False
    if isinstance(value, dict):
        return any(leaf == key or leaf.startswith(f"{key}.") for leaf in _leaves(value, mine))
    return key == mine or (key.startswith(f"{mine}.") and not repository.group_exists(mine))


def _below(override: Override, key: str) -> bool:
    return override.key_or_group.startswith(f"{key}.") and not override.is_hydra_override()


def _says(repository: Any, default: ResultDefault, key: str) -> bool:
    package = default.package or ""
    if package and key != package and not key.startswith(f"{package}."):
        return False
    rest = key[len(package) :].lstrip(".") if package else key
    if not rest:
        return True
    loaded = repository.load_config(default.config_path)
    node = loaded.config if loaded else None
    for part in rest.split("."):
        inner = (
            None if not isinstance(node, DictConfig) or node._is_none() else node._get_node(part, validate_access=False)
        )
        if inner is None:
            return False
        node = inner
    return True


def _leaves(values: Mapping[Any, Any], prefix: str = "") -> Iterator[str]:
    for name, value in values.items():
        full = f"{prefix}.{name}" if prefix else str(name)
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, full)
        else:
            yield full


def search_path(conf: Path, extra: Path | None = None) -> ConfigSearchPath:
    """Hydra's search path over a `conf` folder, an additional folder (`--config-dir`), and the recipes."""
    from hydra._internal.utils import create_config_search_path
    from hydra.core.config_search_path import SearchPathQuery

    path = create_config_search_path(f"file://{conf}")
    if extra is not None:
        path.prepend("command-line", f"file://{extra.absolute()}", anchor=SearchPathQuery(provider="schema"))
    return path
