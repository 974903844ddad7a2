"""Recipes: whole runs to share. `recipe=NAME`, `recipe=/any/where/shared.yaml`, recipes upon recipes, and the lock.

A recipe is a YAML file that overrides groups (`defaults: - override /compression: [wanda, int8]`) and values. Hydra
reads it through `RecipeSource`, which merges it at the root of the config, resolves its parents (next to the file,
else in a recipes folder) and refuses what a shared file must not do: name code (`_target_`) or steer Hydra (`hydra:`).
`recipe.lock.yaml` of a run directory is an ordinary recipe that says everything.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import IO, Any
from urllib.parse import quote, unquote

import yaml
from hydra._internal.core_plugins.file_config_source import FileConfigSource
from hydra._internal.sources_registry import SourcesRegistry
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.object_type import ObjectType
from hydra.core.plugins import Plugins
from hydra.plugins.config_source import ConfigResult, ConfigSource
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import OmegaConf
from omegaconf._utils import get_omega_conf_dumper, get_yaml_loader
from omegaconf.errors import OmegaConfBaseException

from pipeline.errors import ConfigError, did_you_mean
from pipeline.registry import PACKAGES, conf_root, shown

GROUP = "recipe"
SUFFIXES = (".yaml", ".yml")
LOCK = "recipe.lock.yaml"


def folders() -> list[Path]:
    """Where recipes are looked up by name: the checkout's folder first, then the installed package's."""
    package = Path(__file__).resolve().parent
    return [folder for folder in (package.parent / "recipes", package / "recipes") if folder.is_dir()]


def token(path: Path) -> str:
    """A file's absolute path as a choice of the group: what Hydra's grammar knows otherwise is percent-encoded."""
    return quote(str(Path(os.path.expanduser(path)).absolute()), safe="/~._-")


def looks_like_path(name: str) -> bool:
    return name.endswith(SUFFIXES) or name.startswith(("/", "./", "../", "~"))


def find(name: str, beside: Path | None = None) -> Path | None:
    """The file behind a recipe's name or path: next to the recipe `beside`, as a path, or in a recipes folder.

    None if nowhere. A recipe is never its own parent: `beside` itself is passed over.
    """
    spelt = [name] if name.endswith(SUFFIXES) else [f"{name}.yaml", f"{name}.yml", *([name] if "/" in name else [])]
    roots = [beside.parent] if beside else []
    roots += [Path()] if looks_like_path(name) or "/" in name else []
    for root in [*roots, *folders()]:
        for candidate in spelt:
            file = root / os.path.expanduser(candidate)
            if os.path.isfile(file) and file.absolute() != beside:
                return file.absolute()
    return None


def listed() -> list[str]:
    """Every recipe's name, those in subfolders with their folder."""
    found = {
        path.relative_to(root).with_suffix("").as_posix()
        for root in folders()
        for path in root.rglob("*")
        if path.suffix in SUFFIXES
    }
    return sorted(found)


def label(path: Path) -> str:
    """A file as messages name it: `conf/model/gpt.yaml`, `recipes/int8.yaml`, a path below the working directory, or
    the whole path."""
    for root in (conf_root().parent, Path.cwd()):
        if path.is_relative_to(root):
            return path.relative_to(root).as_posix()
    return str(path)


def file_of(repository: Any, config_path: str) -> Path | None:
    """The file behind a path of Hydra's (`model/gpt`, `recipe/int8`); None where it is no file, as Hydra's own are."""
    for source in repository.get_sources():
        if source.is_config(config_path):
            if isinstance(source, RecipeSource):
                return source.file(config_path)
            return Path(source.path) / f"{config_path}.yaml" if source.scheme() == "file" else None
    return None


class FileSource(FileConfigSource):
    """Hydra's view of a folder of groups, its files read as recipes are."""

    def load_config(self, config_path: str) -> ConfigResult:
        file = Path(self.path) / self._normalize_file_name(config_path)
        with file.open(encoding="utf-8") as stream:
            header = ConfigSource._get_header_dict(stream.read(512))
            stream.seek(0)
            return ConfigResult(
                config=parsed(stream), path=f"{self.scheme()}://{self.path}", provider=self.provider, header=header
            )


class RecipeSource(ConfigSource):
    """Hydra's view of one recipes folder, and of every recipe given by path. Problems are collected, never raised."""

    repository: Any = None
    """Hydra's repository of this composition: which groups and choices exist."""
    chosen: Mapping[str, str] = MappingProxyType({})
    """group -> the command line's choice of it."""

    def __init__(self, provider: str, path: str) -> None:
        super().__init__(provider, path)
        self.problems: list[str] = []

    @staticmethod
    def scheme() -> str:
        return "recipes"

    def available(self) -> bool:
        return True

    def file(self, config_path: str) -> Path | None:
        """The file of `recipe/NAME`, or of `recipe//percent-encoded/path.yaml`; None where this source has none."""
        if not config_path.startswith(f"{GROUP}/"):
            return None
        name = config_path[len(GROUP) + 1 :]
        if name.startswith("/"):
            path = Path(unquote(name))
            return path if os.path.isfile(path) else None
        candidates = [Path(self.path) / f"{name}{suffix}" for suffix in ("", *SUFFIXES)]
        return next((path for path in candidates if os.path.isfile(path) and path.suffix in SUFFIXES), None)

    def is_group(self, config_path: str) -> bool:
        folder = self._folder(config_path)
        return config_path == "" or (folder is not None and os.path.isdir(folder))

    def is_config(self, config_path: str) -> bool:
        return self.file(config_path) is not None

    def list(self, config_path: str, results_filter: ObjectType | None) -> list[str]:
        if config_path == "":
            return [GROUP] if results_filter in (None, ObjectType.GROUP) else []
        folder = self._folder(config_path)
        found = []
        for path in sorted(folder.iterdir()) if folder and os.path.isdir(folder) else []:
            if path.is_dir() and results_filter in (None, ObjectType.GROUP):
                found.append(path.name)
            elif path.suffix in SUFFIXES and results_filter in (None, ObjectType.CONFIG):
                found.append(path.stem)
        return found

    def _folder(self, config_path: str) -> Path | None:
        if config_path == GROUP:
            return Path(self.path)
        if not config_path.startswith(f"{GROUP}/"):
            return None
        name = config_path[len(GROUP) + 1 :]
        return Path(unquote(name)) if name.startswith("/") else Path(self.path) / name

    def load_config(self, config_path: str) -> ConfigResult:
        file = self.file(config_path)
        assert file is not None, config_path
        body, found = read(file)
        if file.name == LOCK:
            _without_replaced(body, self.chosen)
        defaults, more = self._defaults(file, body.pop("defaults", None))
        self.problems += [f"{problem} ({label(file)})" for problem in [*found, *more]]
        config = OmegaConf.create({"defaults": defaults, **body} if defaults else body)
        return ConfigResult(
            provider=self.provider, path=f"recipes://{self.path}", config=config, header={"package": "_global_"}
        )

    def _defaults(self, file: Path, entries: Any) -> tuple[Sequence[Any], Sequence[str]]:
        """A recipe's defaults list for Hydra, without the entries that cannot stand, and why not."""
        if entries is None:
            return [], []
        if not isinstance(entries, list):
            return [], ["defaults must be a list, such as [override /compression: [magnitude, int8]]"]
        plain: list[Any] = []
        overrides: list[Any] = []
        problems: list[str] = []
        for entry in entries:
            if isinstance(entry, str):
                kept, told = self._parent(file, entry) if not _is_group_path(entry) else self._stage(entry, None)
            elif isinstance(entry, Mapping) and len(entry) == 1:
                key, value = next(iter(entry.items()))
                if str(key).startswith("override"):
                    kept, told = self._override(str(key), value)
                else:
                    kept, told = self._stage(str(key), value)
            else:
                kept, told = None, f"defaults: {entry!r} is neither a recipe's name nor 'override /GROUP: CHOICE'"
            if told:
                problems.append(told)
            elif isinstance(kept, Mapping) and next(iter(kept)).startswith("override"):
                overrides.append(kept)
            else:
                if overrides:
                    problems.append(f"defaults: '{entry}' must stand before the 'override' entries, which come last")
                plain.append(kept)
        return plain + overrides, problems

    def _parent(self, file: Path, name: str) -> tuple[Any, str]:
        if name == "_self_":
            return name, ""
        parent = find(name, beside=file)
        if parent is None and find(name, beside=file.parent / "another.yaml") == file:
            return None, f"defaults: '{name}' is this recipe itself; leave it out"
        if parent is None:
            return None, f"defaults: no recipe '{name}'; recipes: {', '.join(listed())}{did_you_mean(name, listed())}"
        if file in ancestors(parent):
            return None, f"defaults: '{name}' builds on this recipe itself"
        return f"/{GROUP}/{token(parent)}", ""

    def _override(self, key: str, value: Any) -> tuple[Any, str]:
        group = key.partition(" ")[2].strip()
        if not group.startswith("/"):
            return None, f"defaults: write 'override /{group or 'GROUP'}', with the slash"
        return self._group(key, group[1:], value)

    def _stage(self, key: str, value: Any) -> tuple[Any, str]:
        """`/compression/int4`, `/compression/magnitude@compression.p1`, `/compression@compression.p1: magnitude`."""
        path, _, package = key.strip("/").partition("@")
        group, choice = (path, value) if value is not None else (path.partition("/")[0], path.partition("/")[2])
        if group == "compression":
            if package and not re.fullmatch(r"compression\.\w+", package):
                return None, f"defaults: '{key}' must name a stage: '@compression.NAME'"
            if value is not None and not package:
                return None, f"defaults: write 'override /compression: {value}', or '/compression/CHOICE'"
            return self._group(key if value is not None else "", group, choice, key)
        if group == GROUP:
            return None, f"defaults: write '{choice or 'NAME'}' instead of '{key}'; a recipe is built on by its name"
        if group in PACKAGES:
            return None, f"defaults: write 'override /{group}: {choice or 'CHOICE'}' instead of '{key}'"
        groups = list(PACKAGES)
        return None, f"defaults: '{key}' is no group; groups: {', '.join(groups)}{did_you_mean(group, groups)}"

    def _group(self, key: str, group: str, value: Any, entry: str = "") -> tuple[Any, str]:
        if group not in PACKAGES:
            groups = list(PACKAGES)
            return None, f"defaults: '{group}' is no group; groups: {', '.join(groups)}{did_you_mean(group, groups)}"
        choices = [_as_choice(one) for one in value] if isinstance(value, list) else _as_choice(value)
        told = choice_problem(group, choices, self.repository)
        if told:
            return None, f"defaults: {told}"
        return ({key: choices} if key else entry), ""


class RecipePath(SearchPathPlugin):
    """Puts the recipes folders on Hydra's search path."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        for number, folder in enumerate(folders() or [Path("recipes")]):
            search_path.append(f"recipes{number or ''}", f"recipes://{folder}")


def register_source() -> None:
    """Make Hydra know recipes. Needed once a process; a second call changes nothing."""
    Plugins.instance().register(RecipeSource)
    Plugins.instance().register(RecipePath)
    SourcesRegistry.instance().types[FileSource.scheme()] = FileSource  # `register` keeps the one that is there


def choice_problem(group: str, value: Any, repository: Any) -> str:
    """Why `value` (a choice or a list of them) cannot be chosen for a group; '' where it can."""
    if isinstance(value, list):
        if group not in ("compression", GROUP):
            return f"{group}={_listed(value)}: {group} takes one choice, not a list"
        twice = sorted({str(one) for one in value if value.count(one) > 1})
        if twice and group == "compression":
            return (
                f"{group}={_listed(value)}: '{twice[0]}' stands there twice; to repeat a method, give each a name "
                f"of its own in a recipe's defaults: - /compression/{twice[0]}@compression.NAME"
            )
        if group == "compression" and "none" in value and len(value) > 1:
            return f"{group}={_listed(value)}: 'none' stands alone; leave it out of the list"
    for choice in value if isinstance(value, list) else [value]:
        known = isinstance(choice, str) and choice and repository.config_exists(f"{group}/{choice}")
        if not known:
            options = listed() if group == GROUP else repository.get_group_options(group)
            where = unquote(str(choice)) if group == GROUP else str(choice)
            if group == GROUP and looks_like_path(where):
                return f"recipe={where}: {'is a directory; give a file' if os.path.isdir(where) else 'no such file'}"
            longer = next((option for option in options if where and option.startswith(f"{where}-")), None)
            meant = f"; did you mean '{longer}'?" if longer else did_you_mean(where, options)
            return f"{group}={where}: no such choice; choose one of {', '.join(options)}{meant}"
    return ""


BASE_60 = re.compile(r"[-+]?[0-9][0-9_]*(?::[0-5]?[0-9])+(?:\.[0-9_]*)?$")
"""What YAML 1.1 takes for a number, in hours, minutes and seconds say: `2:4` for 124."""


@cache
def _yaml_loader() -> Any:
    """OmegaConf's, but for numbers of base 60: `2:4` is text, as it is on the command line and in YAML 1.2."""
    loader = get_yaml_loader()
    loader.yaml_implicit_resolvers = {
        first: [("tag:yaml.org,2002:str", BASE_60), *resolvers]
        for first, resolvers in loader.yaml_implicit_resolvers.items()
    }
    return loader


def parsed(text: str | IO[str]) -> Any:
    """The config that YAML text stands for, as `OmegaConf.load` gives it.

    Raises:
        YAMLError, OSError, OmegaConfBaseException: no YAML, or a bare number; what cannot stand in a config.
    """
    content = yaml.load(text, Loader=_yaml_loader())
    if not isinstance(content, list | dict | str | None):
        raise OSError(f"Invalid loaded object type: {type(content).__name__}")
    return OmegaConf.create({} if content is None else content)


def read(file: Path) -> tuple[dict[str, Any], list[str]]:
    """A recipe's content, without what it must not hold, and the problems found."""
    try:
        text = file.read_text(encoding="utf-8")
        config = parsed(text) if text.strip() else None
    except (yaml.YAMLError, OmegaConfBaseException, UnicodeDecodeError, OSError) as error:
        return {}, [f"not a readable YAML file: {' '.join(str(error).split())}"]
    if config is None or (not config and yaml.safe_load(text) is None):
        return {}, ["the file is empty; a recipe says at least one key"]
    body = OmegaConf.to_container(config, resolve=False) if OmegaConf.is_config(config) else None
    if not isinstance(body, dict):
        return {}, ["a recipe must be a mapping of keys to values"]
    problems = []
    package = re.search(r"^\s*#\s*@package\s+(\S+)", text, re.MULTILINE)
    if package and package[1] != "_global_":
        problems.append(f"'# @package {package[1]}': a recipe always stands at the root; leave the line out")
    for key in forbidden(body):
        why = "would run code" if key.endswith("_target_") else "steers the program, not the run"
        problems.append(f"{key} {why}, which a recipe must not do; leave it out")
    for group in [group for group in body if group in PACKAGES and _is_choice(body[group])]:
        choice = body.pop(group)
        entry = yaml.safe_dump({f"override /{group}": choice}, default_flow_style=None, width=1000).strip("{}\n")
        problems.append(f"{shown(group, choice)}: choose groups under defaults: - {entry}")
    return _without_forbidden(body), problems


def locked_values(lock: Path) -> dict[str, Any]:
    """What a lock file says, as `lock_text` was given it.

    Raises:
        ConfigError: it cannot be read.
    """
    try:
        content = OmegaConf.to_container(parsed(lock.read_text(encoding="utf-8")), resolve=True)
    except (yaml.YAMLError, OmegaConfBaseException, UnicodeDecodeError, OSError) as error:
        raise ConfigError(f"{lock}: not a readable lock file: {' '.join(str(error).split())}") from error
    return {str(key): value for key, value in content.items()} if isinstance(content, dict) else {}


def forbidden(values: Any, prefix: str = "") -> Iterator[str]:
    """Full keys named `hydra` or `_target_` (and `resume`, at the root), which no recipe may hold."""
    if isinstance(values, Mapping):
        for key, value in values.items():
            full = f"{prefix}.{key}" if prefix else str(key)
            if _is_forbidden(str(key), at_root=not prefix):
                yield full
            else:
                yield from forbidden(value, full)
    elif isinstance(values, list):
        for number, value in enumerate(values):
            yield from forbidden(value, f"{prefix}[{number}]")


def _without_replaced(lock: dict[str, Any], chosen: Mapping[str, str]) -> None:
    """Takes out of a lock, which says every value, those of a group for which `chosen` has another choice: they are no
    settings of that one."""
    for entry in lock.get("defaults", ()):
        for key, choice in entry.items() if isinstance(entry, Mapping) else ():
            group = str(key).rpartition("/")[2]
            if group != "compression" and chosen.get(group, str(choice)) != str(choice):
                lock.pop(group, None)


def _is_forbidden(key: str, at_root: bool) -> bool:
    return key in ("hydra", "_target_") or (at_root and key == "resume")


def _without_forbidden(values: Any, at_root: bool = True) -> Any:
    if isinstance(values, Mapping):
        kept = {key: value for key, value in values.items() if not _is_forbidden(str(key), at_root)}
        return {key: _without_forbidden(value, False) for key, value in kept.items()}
    if isinstance(values, list):
        return [_without_forbidden(value, False) for value in values]
    return values


def ancestors(file: Path, seen: frozenset[Path] = frozenset()) -> frozenset[Path]:
    """`file` and every recipe it builds on, directly or not."""
    if file in seen:
        return seen
    seen |= {file}
    defaults = read(file)[0].get("defaults")
    for entry in defaults if isinstance(defaults, list) else []:
        if isinstance(entry, str) and entry != "_self_" and not _is_group_path(entry):
            parent = find(entry, beside=file)
            seen = ancestors(parent, seen) if parent else seen
    return seen


def _is_choice(value: Any) -> bool:
    """Whether a value in a group's place is meant as its choice, or as a list of them."""
    many = value if isinstance(value, list) else [value]
    return bool(many) and all(isinstance(one, str | int | float) and one != "???" for one in many)


def _is_group_path(entry: str) -> bool:
    return entry.startswith("/") and not entry.endswith(SUFFIXES)


def _as_choice(value: Any) -> Any:
    """YAML reads `32` as a number; choices are names."""
    return str(value) if isinstance(value, int | float) and not isinstance(value, bool) else value


def _listed(values: Sequence[Any]) -> str:
    return f"[{','.join(map(str, values))}]"


def lock_text(config: Mapping[str, Any], choices: Mapping[str, Any], lock: Mapping[str, Any] | None) -> str:
    """A recipe that says everything: the choices as overrides, every value of `config`, and `lock` beside them.

    `config` is what `schema.composed` gives. `lock` holds facts (versions, device, data fingerprint, results); whatever
    JSON can say; None where nothing ran yet. Stages under names of their own are package entries, in order; `override`
    entries come last, as Hydra wants them.
    """
    chain = config.get("compression") or {}
    defaults: list[Any] = []
    if all(stage == method["name"] for stage, method in chain.items()):
        compression: Any = list(chain) or "none"
    else:
        compression = "none"
        defaults = [f"/compression/{method['name']}@compression.{stage}" for stage, method in chain.items()]
    overrides = {**choices, "compression": compression}
    defaults += [{f"override /{group}": overrides[group]} for group in PACKAGES if group in overrides]
    body = {key: value for key, value in config.items() if key not in ("lock", "resume") and value != {}}
    content = {"defaults": defaults, **_escaped(body), "lock": _escaped(lock)}
    text: str = yaml.dump(
        content, Dumper=get_omega_conf_dumper(), default_flow_style=False, sort_keys=False, allow_unicode=False
    )
    return f"# The whole of one run. To repeat it: recipe=THIS_FILE. To go on with it: resume=ITS_DIRECTORY\n{text}"


def _escaped(value: Any) -> Any:
    """Text that OmegaConf will read back as it is: `${` would start an interpolation."""
    if isinstance(value, Mapping):
        return {str(key): _escaped(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_escaped(item) for item in value]
    return escape_interpolation(value) if isinstance(value, str) else value


def escape_interpolation(text: str) -> str:
    """OmegaConf reads `\\${` as `${`, and backslashes before it double."""
    return re.sub(r"(\\*)\$\{", lambda match: match[1] * 2 + "\\${", text)
