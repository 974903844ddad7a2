"""What Hydra, OmegaConf or YAML raise while composing, told in one line that names the key, the file and the fix."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from hydra.core.default_element import ResultDefault
from hydra.errors import HydraException, MissingConfigException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from pipeline.errors import did_you_mean
from pipeline.recipes import file_of, label
from pipeline.registry import shown


def explain(
    error: Exception, overrides: Sequence[str], defaults: Sequence[ResultDefault], repository: Any
) -> tuple[str, str | None]:
    """What went wrong in a composition, in one line, and the override that is to blame (None: a file is)."""
    text = " ".join(str(error).split())
    merging = re.match(r"In '(.+?)': \w+ raised while composing", text)
    if merging:
        told = _misfit(defaults, repository, merging[1])
        if told:
            return told, None
    culprit = next((line for line in sorted(overrides, key=len, reverse=True) if line in str(error)), None)
    if isinstance(error, MissingConfigException):
        return _no_such_choice(error, text), None
    if isinstance(error, yaml.YAMLError):
        mark = getattr(error, "problem_mark", None)
        place = f"{label(Path(mark.name))}, line {mark.line + 1}" if mark else "a config file"
        return f"{place}: not valid YAML: {getattr(error, 'problem', None) or text!s}", None
    cause = error.__cause__
    if culprit and isinstance(cause, OmegaConfBaseException):
        key = culprit.lstrip("+~").partition("=")[0]
        options = [str(name) for name in cause.parent_node] if isinstance(cause.parent_node, DictConfig) else []
        near = did_you_mean(str(cause.key), options)
        why = " ".join((cause.msg or text).partition("full_key")[0].split())
        return f"{culprit}: {key}: {why}{near} (command line)", culprit
    if culprit:
        return f"{culprit}: {text} (command line)", culprit
    named = next((line for line in overrides if f"'{line.lstrip('+~').partition('=')[0]}'" in text), None)
    if isinstance(error, AssertionError) and not text:
        text = "a defaults list puts an 'override' entry before others; those entries come last"
    kind = "" if isinstance(error, HydraException | OmegaConfBaseException) else f"{type(error).__name__}: "
    detail = f": {' '.join(str(cause).split())}" if isinstance(cause, OmegaConfBaseException) else ""
    place = " (command line)" if named else ""
    return f"the config cannot be composed: {kind}{text or 'no reason given'}{detail}{place}", named


def _misfit(defaults: Sequence[ResultDefault], repository: Any, config_path: str) -> str:
    """Which key of a file cannot be merged: OmegaConf says that a mapping does not go over a list, not where."""
    numbers = [number for number, default in enumerate(defaults) if default.config_path == config_path]
    if not numbers:
        return ""
    default = defaults[numbers[0]]
    file = file_of(repository, config_path)
    place = f"({label(file) if file else config_path})"
    mine = repository.load_config(config_path).config
    node: Any = mine._get_node("hydra") if isinstance(mine, DictConfig) and "hydra" in mine else None
    if node is not None and not isinstance(node, DictConfig):
        return f"{shown('hydra', node._value())} must be a mapping {place}"
    for earlier in defaults[: numbers[0]]:
        theirs = repository.load_config(earlier.config_path).config
        for full, kind in _containers(mine, default.package or ""):
            other = dict(_containers(theirs, earlier.package or "")).get(full)
            if other not in (None, kind):
                return f"{full} must be a {other}, not a {kind} {place}"
    return ""


def _containers(node: Any, prefix: str) -> Iterator[tuple[str, str]]:
    """Full keys of mappings and lists inside a file, and which of the two each is."""
    if isinstance(node, DictConfig) and not (node._is_none() or node._is_missing() or node._is_interpolation()):
        yield prefix, "mapping"
        for name in node:
            child = node._get_node(name, validate_access=False)
            yield from _containers(child, f"{prefix}.{name!s}" if prefix else str(name))
    elif OmegaConf.is_list(node):
        yield prefix, "list"


def _no_such_choice(error: MissingConfigException, text: str) -> str:
    group, _, choice = (error.missing_cfg_file or "").rpartition("/")
    source = re.match(r"In '([^']+)'", text)
    place = f" (said in {source[1]})" if source else ""
    if not error.options:
        return f"{text.partition(' Config search path')[0]}"
    options = list(error.options)
    return f"{group}={choice}: no such choice; choose one of {', '.join(options)}{did_you_mean(choice, options)}{place}"
