"""Groups, choices and strict decoding.

A choice is a YAML file `conf/<group>/<choice>.yaml`; its `name` says which module `pipeline/<package>/<name>.py`
decodes it to a frozen dataclass. The module is imported only when the choice is decoded.

Decoding is strict (pydantic, JSON mode): no string for a number, no number for a string, no key the class lacks. YAML
integers pass for floats, YAML lists for tuples. Every problem is found at once, each told in one line.
"""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, get_args, get_type_hints

from pydantic import TypeAdapter, ValidationError

from pipeline.errors import ConfigError, did_you_mean

T = TypeVar("T")
Said = Callable[[str], str]
"""Full key -> where its value was said: `command line`, or a file."""

PACKAGES = {
    "model": "models",
    "data": "data",
    "compression": "compression",
    "precision": "precision",
    "parallelism": "parallelism",
    "device": "device",
    "optimizer": "optimizers",
    "adapter": "adapters",
    "memory": "memory",
    "calibration": "calibration",
    "trainer": "trainer",
}
"""Config group -> subpackage (or module) of `pipeline` that holds its choices."""

STRICT = {"strict": True, "extra": "forbid", "allow_inf_nan": False}


class Absent:
    """A value that was left open: `???` in a YAML (`reported` False), or one whose problem was told already."""

    def __init__(self, reported: bool = False) -> None:
        self.reported = reported

    def __repr__(self) -> str:
        return "???"


_registered: dict[tuple[str, str], type] = {}


def register(group: str, name: str) -> Callable[[type[T]], type[T]]:
    """Class decorator: `name` in a YAML of `group` decodes to this frozen dataclass."""

    def add(cls: type[T]) -> type[T]:
        _registered[group, name] = cls
        return cls

    return add


def conf_root() -> Path:
    """The `conf` folder: the checkout's where there is one, else the installed package's."""
    package = Path(__file__).resolve().parent
    checkout = package.parent / "conf"
    return checkout if checkout.is_dir() else package / "conf"


def available(group: str) -> list[str]:
    """Choices of a group: the names of its YAML files."""
    return sorted(path.stem for path in (conf_root() / group).glob("*.yaml"))


def names(group: str) -> list[str]:
    """What `name` may be in a YAML of a group: modules of its package that register a choice of that name."""
    folder = Path(__file__).resolve().parent / PACKAGES[group]
    pattern = re.compile(rf"@register\(\s*\"{group}\",\s*\"(\w+)\"")
    texts = (path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.py")))
    return sorted(
        {name for text in texts for name in pattern.findall(text)} | {n for g, n in _registered if g == group}
    )


def lookup(group: str, name: str) -> type[Any]:
    """The dataclass behind `name`, importing its module on demand.

    Raises:
        ConfigError: no module of that name, or one that cannot be imported.
    """
    if (group, name) not in _registered:
        module = f"pipeline.{PACKAGES[group]}.{name}"
        unknown = f"is not one of {', '.join(names(group))}{did_you_mean(name, names(group))}"
        if not name.isidentifier():
            raise ConfigError(unknown)
        try:
            importlib.import_module(module)
        except ModuleNotFoundError as error:
            if error.name != module:
                raise ConfigError(f"cannot be loaded: {error}") from error
            raise ConfigError(unknown) from None
        if (group, name) not in _registered:
            raise ConfigError(unknown)
    return _registered[group, name]


def decode(cls: type[T], values: Any, key: str, said: Said, leaves: Iterable[str] = ()) -> tuple[T | None, list[str]]:
    """`values` as an instance of a frozen dataclass, or None with every problem, one line each.

    `key` is the full path of `values` in the config ('' at the root). `leaves` are full keys elsewhere in the config,
    for suggestions.
    """
    if not isinstance(values, Mapping):
        return None, [f"{shown(key, values)} must be a mapping with {_listed(cls)}{_where(said, key)}"]
    present = {str(name): value for name, value in values.items() if not isinstance(value, Absent)}
    told = {str(name) for name, value in values.items() if isinstance(value, Absent) and value.reported}
    stray = [name for name, value in values.items() if isinstance(value, Absent) and name not in field_names(cls)]
    if stray:
        rest = {name: value for name, value in values.items() if name not in stray}
        strays = [f"{key}.{name}" if key else str(name) for name in stray]
        unknown = [unknown_key(one, Absent(), field_names(cls), said, leaves) for one in strays]
        return None, [*unknown, *decode(cls, rest, key, said, leaves)[1]]
    open_values = list(_open(present, key))
    if open_values:
        return None, [f"{full} is required{_where(said, full)}" for full in open_values]
    try:
        text = json.dumps(present)
    except TypeError as error:
        return None, [f"{key}: {error}{_where(said, key)}"]
    try:
        cached: Any = _adapter
        instance: T = cached(cls).validate_json(text)
        return instance, []
    except ValidationError as error:
        lines: list[str] = []
        musts: dict[str, tuple[Any, list[str]]] = {}
        for item in error.errors(include_url=False):
            path, value = _locate(item["loc"], present)
            full = f"{key}.{path}" if key and path else key or path
            if item["type"] == "unexpected_keyword_argument":
                lines.append(unknown_key(full, value, field_names(cls), said, leaves))
            elif item["type"] == "missing" and isinstance(item["loc"][-1], int):
                musts.setdefault(full, (value, []))[1].append(f"have at least {item['loc'][-1] + 1} items")
            elif item["type"] == "missing":
                if path not in told:
                    lines.append(f"{full} is required{_hint(full)}{_where(said, full)}")
            else:
                musts.setdefault(full, (value, []))[1].append(_must(item, value, said(full)))
        for full, (value, must) in musts.items():
            field = full.removeprefix(f"{key}.") if key else full
            must = ["be null", *must] if _takes_null(cls, field) else must
            lines.append(f"{shown(full, value)} must {' or '.join(dict.fromkeys(must))}{_where(said, full)}")
        return None, lines


def decode_choice(group: str, values: Any, key: str, said: Said, leaves: Iterable[str] = ()) -> tuple[Any, list[str]]:
    """What a choice of `group` says, as the dataclass its `name` stands for; or None with every problem."""
    if not isinstance(values, Mapping):
        return None, [f"{shown(key, values)} must be one of {', '.join(available(group))}{_where(said, key)}"]
    name = values.get("name", Absent())
    if isinstance(name, Absent):
        told = f"{key}.name is required: one of {', '.join(names(group))}{_where(said, key)}"
        return None, [] if name.reported else [told]
    if not isinstance(name, str):
        return None, [
            f"{shown(f'{key}.name', name)} must be one of {', '.join(names(group))}{_where(said, f'{key}.name')}"
        ]
    try:
        cls = lookup(group, name)
    except ConfigError as error:
        return None, [f"{shown(f'{key}.name', name)} {error}{_where(said, f'{key}.name')}"]
    return decode(cls, values, key, said, leaves)


def _open(value: Any, key: str) -> Iterator[str]:
    """Full keys inside a value where `???` stands."""
    if isinstance(value, Absent):
        yield key
    elif isinstance(value, Mapping):
        for name, item in value.items():
            yield from _open(item, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list):
        for number, item in enumerate(value):
            yield from _open(item, f"{key}[{number}]")


def shown(key: str, value: Any) -> str:
    """`key=value` as one would type it, on one line, cut where it is long."""
    if isinstance(value, Absent):
        return key
    if isinstance(value, str) and re.fullmatch(r"[^\s'\"\\{}\[\],=()]+", value):
        text = value
    else:
        text = json.dumps(value, default=str, ensure_ascii=False)
    return f"{key}={text if len(text) <= 80 else text[:77] + '...'}"


def field_names(cls: type[Any]) -> list[str]:
    return [field.name for field in fields(cls)]


@cache
def _adapter(cls: Any) -> Any:
    if "__pydantic_config__" not in vars(cls):
        cls.__pydantic_config__ = STRICT
    return TypeAdapter(cls)


def _listed(cls: type[Any]) -> str:
    return ", ".join(field_names(cls))


def _where(said: Said, key: str) -> str:
    place = said(key)
    return f" ({place})" if place else ""


def _locate(location: tuple[int | str, ...], values: Any) -> tuple[str, Any]:
    """The key path of a pydantic location and the value there. Tags of unions, which are no keys, are left out."""
    path, here = "", values
    for part in location:
        if isinstance(here, Mapping) and (part in here or not path):
            path, here = (f"{path}.{part}" if path else str(part)), here.get(part, Absent())
        elif isinstance(here, list) and isinstance(part, int) and part < len(here):
            path, here = f"{path}[{part}]", here[part]
    return path, here


_MUST = {
    "int_type": "be a whole number",
    "int_from_float": "be a whole number",
    "float_type": "be a number",
    "finite_number": "be a finite number",
    "bool_type": "be true or false",
    "string_type": "be text",
    "list_type": "be a list",
    "tuple_type": "be a list",
    "dict_type": "be a mapping",
    "none_required": "be null",
    "greater_than": "be greater than {gt}",
    "greater_than_equal": "be at least {ge}",
    "less_than": "be less than {lt}",
    "less_than_equal": "be at most {le}",
    "too_long": "have at most {max_length} items",
    "too_short": "have at least {min_length} items",
    "string_too_short": "have at least {min_length} characters",
    "multiple_of": "be a multiple of {multiple_of}",
    "size": "be {forms}",
}


def _takes_null(cls: type[Any], field: str) -> bool:
    """Whether null turns a field off, which pydantic does not tell; of one that is text, text was meant."""
    kinds = get_args(get_type_hints(cls)[field]) if field in field_names(cls) else ()
    return type(None) in kinds and str not in kinds


def _must(item: Any, value: Any, place: str) -> str:
    """What a value said at `place` must be, from pydantic's error."""
    kind, context = item["type"], item.get("ctx", {})
    if kind == "literal_error":
        allowed = re.findall(r"'([^']*)'|(-?\d+)", str(context["expected"]))
        options = [text or number for text, number in allowed]
        return f"be one of {', '.join(options)}{did_you_mean(str(value), options)}"
    if kind == "string_type" and isinstance(value, bool | int | float):
        in_a_shell = place in ("", "command line")
        how = f"quote it twice: \"'{json.dumps(value)}'\"" if in_a_shell else f'put it in quotes: "{json.dumps(value)}"'
        return f"be text; to mean the text, {how}"
    if kind in ("list_type", "tuple_type") and isinstance(value, bool | int | float | str):
        return f"be a list; did you mean [{value if isinstance(value, str) else json.dumps(value)}]?"
    if kind in _MUST:
        return _MUST[kind].format(**context)
    return f"satisfy: {item['msg']}"


def _hint(full: str) -> str:
    return f": give {full}=VALUE" if "." in full else ""


def unknown_key(full: str, value: Any, allowed: Iterable[str], said: Said, leaves: Iterable[str] = ()) -> str:
    """The line for a key that does not exist: what does, and what was meant (a sibling, or the same name elsewhere)."""
    parent, _, name = full.rpartition(".")
    elsewhere = [leaf for leaf in leaves if leaf.rpartition(".")[2] == name and leaf != full]
    meant = f"; did you mean '{elsewhere[0]}'?" if elsewhere else did_you_mean(name, allowed)
    known = ", ".join(allowed)
    owner = f"{parent} has" if parent else "there are"
    return f"{shown(full, value)}: no such key; {owner} {known}{meant}{_where(said, full)}"
