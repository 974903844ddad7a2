"""From a command line to the config of a run: Hydra composes it, it is decoded strictly, every rule is asked.

All problems are told at once, each with the place where it was said, before any directory is made or torch is imported.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import hydra

from pipeline import arguments, environment, provenance, recipes, rules
from pipeline.errors import ConfigError
from pipeline.registry import conf_root
from pipeline.resuming import finished_run
from pipeline.schema import RunConfig, decode_run

VERSION_BASE = "1.3"
"""Of Hydra's defaults."""


def loader(conf: Path | None = None, extra: Path | None = None) -> provenance.Loader:
    """A loader over a conf folder (default: the package's own) and a further one, or those that a rank was handed."""
    handed = [Path(folder) if (folder := os.environ.get(name)) else None for name in environment.FOLDERS]
    conf, extra = conf or handed[0], extra or handed[1]
    hydra.version.setbase(VERSION_BASE)
    recipes.register_source()
    return provenance.Loader(provenance.search_path(conf or conf_root(), extra))


def compose(overrides: Sequence[str] = (), sweep: bool = False, quiet: bool = True) -> RunConfig:
    """The RunConfig that a command line of these overrides stands for, checked by every rule. For use from Python.

    Raises:
        ConfigError: every problem, one line each.
    """
    args = arguments.parse(overrides)
    return check(args.overrides, loader(), sweep, quiet)


def check(
    overrides: Sequence[str],
    source: provenance.Loader,
    sweep: bool = False,
    quiet: bool = True,
    config_name: str = "config",
) -> RunConfig:
    """Compose overrides in Hydra's grammar, decode, apply the rules. Prints what was dropped unless quiet.

    Raises:
        ConfigError: every problem, one line each.
    """
    return checked(overrides, source, sweep, quiet, config_name)[0]


def checked(
    overrides: Sequence[str], source: provenance.Loader, sweep: bool, quiet: bool, config_name: str
) -> tuple[RunConfig, provenance.Composition]:
    """As `check`, beside what was composed."""
    try:
        composed = provenance.compose(source, overrides, config_name)
        return decoded(composed, overrides, sweep, quiet), composed
    except ConfigError as error:
        raise ConfigError([*error.problems, *_further(error.problems, overrides, source, config_name, sweep)]) from None


def _further(
    problems: Sequence[str], overrides: Sequence[str], source: provenance.Loader, config_name: str, sweep: bool
) -> list[str]:
    """What the rules say about the rest, once the overrides that could not be understood are left out.

    The rules need a decoded config. What they say of a group that lost an override is not passed on, but for a path
    where nothing is: it is judged with a value that nobody asked for.
    """
    wrong = [line for line in overrides if any(_blames(told, line) for told in problems)]
    if not wrong or any(not told.endswith("(command line)") for told in problems):
        return []
    known = {line: links for line in wrong if (links := provenance.known_links(source, line)) is not None}
    lost = {line.lstrip("+~").partition("=")[0].partition(".")[0] for line in wrong if line not in known}
    kept = [known[line][0] if line in known else line for line in overrides if line not in wrong or line in known]
    unsure = [*lost, *(choice for _, unknown in known.values() for choice in unknown)]
    try:
        decoded(provenance.compose(source, kept, config_name), kept, sweep, quiet=True)
    except ConfigError as error:
        further = [told for told in error.problems if told not in problems]
        # Of the links of a chain that lacks some, what follows from those that are there.
        further = [told for told in further if not known or not re.search("must follow|prunes nothing that", told)]
        return [
            told
            for told in further
            if not any(re.search(rf"\b{re.escape(word)}\b", told) for word in unsure) or _is_missing_place(told, kept)
        ]
    return []


def _is_missing_place(told: str, overrides: Sequence[str]) -> bool:
    """Whether a problem is that there is nothing at a path that the command line gives, whatever else it says."""
    return bool(re.search(": no such file|does not exist;", told)) and any(_blames(told, line) for line in overrides)


def _blames(told: str, override: str) -> bool:
    key, _, value = override.lstrip("+~").partition("=")
    inside = (f"{key}.",) if value.startswith("{") else ()  # what is said in a choice's place says no key below it
    return told.startswith((f"{key}=", f"{key}:", f"{key}[", f"{key} ", override, f"'{override}'", *inside))


def decoded(composed: provenance.Composition, overrides: Sequence[str], sweep: bool, quiet: bool) -> RunConfig:
    """What was composed, of `overrides`, as a config that keeps every rule. Raises as `check` does."""
    notes: list[str] = []
    config = decode_run(composed, arguments.recorded(overrides), notes.append, sweep)
    problems = [placed(told, composed) for told in rules.problems(config)]
    if config.resume:
        problems += finished_run(config, Path(os.path.expanduser(composed.values["resume"])).absolute())
    if problems:
        raise ConfigError(problems)
    if not quiet:
        for note in (*notes, *rules.left_aside(config)):
            print(note, file=sys.stderr)
    return config


def placed(told: str, composed: provenance.Composition) -> str:
    """A problem's line with the place where its key was said."""
    key = re.match(r"[a-z_]+(\.\w+)*", told)
    place = composed.said(key[0]) if key and key[0].partition(".")[0] in composed.values else ""
    return f"{told} ({place})" if place and not told.endswith(f"({place})") else told
