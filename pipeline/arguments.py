"""The command line before Hydra sees it: flags in any place, raw values, recipes by path, `resume=DIR`.

Hydra's grammar would split, trim or refuse what people put into prompts and paths. `parse` quotes such values so that
exactly the typed text arrives; `typed` undoes it for what is shown and recorded.
"""

from __future__ import annotations

import os
import re
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import unquote

from hydra._internal.utils import get_args_parser

from pipeline.errors import ConfigError, did_you_mean
from pipeline.recipes import GROUP, LOCK, SUFFIXES, escape_interpolation, find, locked_values, looks_like_path, token

RAW = ("prompt", "prompt_file", "artifact", "resume")
RESUMABLE = (
    "trainer.max_steps",
    "trainer.log_every",
    "trainer.checkpoint_every",
    "trainer.evaluate_every",
    "trainer.rank_timeout",
    "keep_stages",
    "plan.enforce",
    "plan.calibrate",
    "fit.on_oom",
)
"""What may change when a run is resumed: what lengthens or observes it. `gate.*` too."""
ELSEWHERE = ("parallelism", "device", "memory", "trainer.micro_batch_size")
"""And what says where it goes on, and with how much memory, but not what it computes; with all keys below."""

PATHS = (
    "data.path",
    "model.pretrained",
    "calibration.source",
    r"compression\.\w+\.teacher",
    "hydra.run.dir",
    "hydra.sweep.dir",
)
"""Keys that take a path, or several to sweep over: patterns."""

_RAW = re.compile(rf"(\+{{0,2}}(?:{'|'.join(RAW)})=)(.*)", re.DOTALL)
_RECIPE = re.compile(rf"(\+{{0,2}}{GROUP}=)(.*)", re.DOTALL)
_PATH = re.compile(rf"(\+{{0,2}}(?:{'|'.join(PATHS)})=)(.*)", re.DOTALL)
_NAME = re.compile(r"\w[\w./-]*")
# What Hydra reads as it is, and what is meant for its grammar: quotes, a list, a function such as choice(a,b), ${...}.
_PLAIN = re.compile(r"[A-Za-z0-9_/.:+@%*?-]*")
_GRAMMAR = re.compile(r"[\"'\[{].*|\w+\(.*|.*\$\{.*", re.DOTALL)


def parse(arguments: Sequence[str]) -> Namespace:
    """Hydra's flags, and `overrides` in Hydra's grammar. Flags may stand anywhere: `recipe=X -m precision=32,16-mixed`.

    Raises:
        ConfigError: an unknown flag, nothing to resume, an override a resumed run cannot take, text that is not UTF-8.
    """
    arguments = list(arguments)
    for number, argument in enumerate(arguments):
        if argument in ("-i", "--info") and "=" in "".join(arguments[number + 1 : number + 2]):
            arguments[number] = "--info=all"
    parser = get_args_parser()
    flags = sorted(flag for action in parser._actions for flag in action.option_strings)
    parser.error = lambda message: _refuse(message, flags)  # type: ignore[method-assign]
    args = parser.parse_intermixed_args(arguments)
    args.overrides = [quoted(override) for override in resumed(args.overrides, args)]
    return args


def rebuilt(args: Namespace) -> list[str]:
    """The arguments again, flags first, as argparse wants them."""
    flags = []
    for name, value in vars(args).items():
        flag = f"--{name.replace('_', '-')}"
        if name != "overrides" and value not in (None, False):
            flags += [flag] if value is True else [f"{flag}={value}"]
    return [*flags, "--", *args.overrides]


def _refuse(message: str, flags: Sequence[str]) -> NoReturn:
    unknown = re.search(r"unrecognized arguments: (\S+)", message)
    near = did_you_mean(unknown[1], flags) if unknown else ""
    raise ConfigError(f"{' '.join(message.split())}{near} (command line; --help lists what there is)")


def quoted(override: str) -> str:
    """One override as Hydra may see it: raw values and paths quoted, recipe paths encoded; every other one as it is."""
    try:
        override.encode()
    except UnicodeEncodeError:
        raise ConfigError(f"{override.partition('=')[0]}={override.partition('=')[2]!r} is not UTF-8 text") from None
    raw = _RAW.fullmatch(override)
    if raw:
        return raw[1] + quote(_bare(raw[2]) if "prompt=" not in raw[1] else raw[2])
    path = _PATH.fullmatch(override)
    if path:
        return path[1] + _path(path[2])
    recipe = _RECIPE.fullmatch(override)
    return recipe[1] + _recipe(recipe[2]) if recipe else override


def quote(text: str) -> str:
    """`text` in Hydra's double quotes, such that the composed value is `text` itself, character for character."""
    text = escape_interpolation(text)
    text = re.sub(r'(\\*)"', lambda match: match[1] * 2 + '\\"', text)
    return '"' + re.sub(r"\\+\Z", lambda match: match[0] * 2, text) + '"'


def unquote_raw(text: str) -> str:
    """The inverse of `quote`."""
    text = re.sub(r"(\\+)\Z", lambda match: match[1][: len(match[1]) // 2], text[1:-1])
    text = re.sub(r'(\\*)\\"', lambda match: match[1][: len(match[1]) // 2] + '"', text)
    return re.sub(r"(\\*)\\\$\{", lambda match: match[1][: len(match[1]) // 2] + "${", text)


def typed(override: str) -> str:
    """An override as the user typed it, from what `quoted` made of it. A recipe's path is the whole path."""
    raw = _RAW.fullmatch(override)
    if raw and raw[2].startswith('"'):
        return raw[1] + unquote_raw(raw[2])
    path = _PATH.fullmatch(override)
    # One path, not a sweep over several.
    if path and path[2].startswith('"') and quote(unquote_raw(path[2])) == path[2]:
        return path[1] + unquote_raw(path[2])
    recipe = _RECIPE.fullmatch(override)
    return recipe[1] + unquote(recipe[2].replace("'", "")) if recipe else override


def recorded(overrides: Sequence[str]) -> list[str]:
    """The command line as the user typed it, from the overrides that Hydra was given: without what `resumed` added."""
    lines = [typed(line) for line in overrides if not line.startswith(("hydra.", "hydra/"))]
    added = any(line.startswith("resume=") for line in lines)
    return [line for line in lines if not (added and line.startswith(f"{GROUP}="))]


def _bare(path: str) -> str:
    """A path without the quotes that Hydra's grammar would want around it, where nothing has that very name."""
    inside = re.fullmatch(r"(['\"])(.+)\1", path, re.DOTALL)
    quotes = inside is not None and not os.path.exists(path) and os.path.exists(os.path.expanduser(inside[2]))
    return inside[2] if inside and quotes else path


def _path(value: str) -> str:
    """A path as it is typed, a sweep over several; what is written in Hydra's grammar stays so unless it exists."""
    if os.path.exists(os.path.expanduser(value)):
        return quote(value) if value and not _PLAIN.fullmatch(value) else value
    if _GRAMMAR.fullmatch(value):
        return value
    return ",".join(part if _PLAIN.fullmatch(part) else quote(part) for part in value.split(","))


def _recipe(value: str) -> str:
    """A name, a path, `[a,b]`, or a sweep over plain names and existing files; whatever else is one path."""
    if value.startswith("[") and value.endswith("]"):
        return f"[{','.join(_one_recipe(part.strip()) for part in value[1:-1].split(',') if part.strip())}]"
    parts = value.split(",")
    if len(parts) > 1 and not os.path.isfile(os.path.expanduser(value)) and all(map(_plain_or_file, parts)):
        return ",".join(map(_one_recipe, parts))
    return _one_recipe(value)


def _plain_or_file(part: str) -> bool:
    return (bool(_NAME.fullmatch(part)) and not looks_like_path(part)) or os.path.isfile(os.path.expanduser(part))


def _one_recipe(value: str) -> str:
    if _NAME.fullmatch(value) and not value.endswith(SUFFIXES) and not _is_path(value):
        return f"'{value}'" if value[0].isdigit() else value
    if value in ("", "null"):
        return value
    file = find(value) if _is_path(value) or looks_like_path(value) else None
    return f"'{token(file or Path(value))}'"


def _is_path(value: str) -> bool:
    return "/" in value and find(value) is not None


def _elsewhere(key: str) -> bool:
    return any(key == group or key.startswith(f"{group}.") for group in ELSEWHERE)


def _is_said(key: str, lock: Path) -> bool:
    """Whether a key is that of a recipe, of a group, or of a value that the lock file of a run, which has all, says."""
    said: Any = {GROUP: None, **(locked_values(lock) if lock.is_file() else {})}
    for part in key.split("."):
        if not isinstance(said, dict) or part not in said:
            return False
        said = said[part]
    return True


def resumed(overrides: list[str], args: Namespace) -> list[str]:
    """`resume=DIR` as the overrides that continue DIR in place, from its lock. Without `resume`: as they are.

    Raises:
        ConfigError: no lock there, or overrides that would make it another run.
    """
    given = [override for override in overrides if override.startswith("resume=")]
    if not given:
        return overrides
    directory = Path(os.path.expanduser(_bare(given[-1].partition("=")[2]))).absolute()
    problems = []
    if not os.path.isfile(directory / LOCK):
        problems.append(f"{given[-1]}: nothing to resume: no {LOCK} in that directory (command line)")
    if len(given) > 1:
        problems.append(f"resume is given {len(given)} times; one run is resumed at a time (command line)")
    if args.multirun:
        problems.append("resume cannot be swept with -m; resume one run at a time (command line)")
    for override in [override for override in overrides if not override.startswith("resume=")]:
        key = override.partition("=")[0].lstrip("+")
        if key not in RESUMABLE and not key.startswith("gate.") and not _elsewhere(key):
            allowed = f"{', '.join(RESUMABLE)}, gate.*, {', '.join(ELSEWHERE)}"
            # A key that there is was meant, however near the name of another one is.
            near = "" if _is_said(key, directory / LOCK) else did_you_mean(key, [*RESUMABLE, *ELSEWHERE])
            problems.append(
                f"{override}: a resumed run takes only what lengthens or observes it, or says where it goes on: "
                f"{allowed}{near} (command line)"
            )
    if problems:
        raise ConfigError(problems)
    earlier = len(list(directory.glob(".hydra*")))
    return [
        f"{GROUP}={directory / LOCK}",
        *overrides,
        f"hydra.run.dir={quote(str(directory))}",
        f"hydra.output_subdir={'.hydra' if not earlier else f'.hydra-resumed-{earlier}'}",
    ]
