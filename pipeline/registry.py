"""Groups, choices and strict decoding: the only file that imports omegaconf.

A choice is a YAML file `conf/<group>/<choice>.yaml`; its `name` says which module `pipeline/<package>/<name>.py`
decodes it to a frozen dataclass. The module is imported only when the choice is decoded.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")

PACKAGES = {
    "model": "models",
    "data": "data",
    "compression": "compression",
    "precision": "precision",
    "parallelism": "parallelism",
    "device": "device",
    "optimizer": "optimizers",
    "memory": "memory",
    "trainer": "trainer",
}
"""Config group -> subpackage (or module) of `pipeline` that holds its choices."""

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


def lookup(group: str, name: str) -> type[Any]:
    """The dataclass behind `name`, importing its module on demand."""
    if (group, name) not in _registered:
        importlib.import_module(f"pipeline.{PACKAGES[group]}.{name}")
    return _registered[group, name]
