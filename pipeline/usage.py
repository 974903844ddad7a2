"""`--help`: what there is to choose and to set, read from conf/ and recipes/, grouped, within 100 columns."""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from pipeline.recipes import find, listed
from pipeline.registry import PACKAGES, available, conf_root

WIDTH = 100
JOBS = {
    "run": "plan, train, compress, evaluate, save, report (default)",
    "plan": "predicted memory of this very config, phase by phase; nothing is trained",
    "fit": "the fastest config within a memory budget: budget=6GiB, fit.free=[optimizer,precision,...], fit.run=true",
    "compress": "compress an artifact made earlier: artifact=DIR compression=...",
    "evaluate": "quality of an artifact: artifact=DIR",
    "verify": "does an artifact keep what its manifest says: artifact=DIR",
    "generate": "text from an artifact: artifact=DIR prompt='def ' (or prompt_file=PATH)",
}
EXAMPLES = (
    ("", "train, evaluate, save, report with the defaults"),
    ("compression=int8 precision=16-mixed", "train in float16, then int8"),
    ("'compression=[magnitude,int8]'", "a chain, in that order"),
    ("-m compression=none,int8,int4 precision=32,bf16-mixed", "a sweep: every combination, one table"),
    ("recipe=prune_then_int8", "a recipe by name; recipe=/any/where/shared.yaml by path"),
    ("model=hf model.pretrained=DIR trainer.max_steps=0 compression=int4", "compress without training"),
    ("job=fit budget=6GiB fit.free=[precision] fit.run=true", "search for the fastest that fits, and run it"),
    ("job=evaluate artifact=outputs/DATE/TIME/artifact", "an artifact of an earlier run"),
    ("resume=outputs/DATE/TIME", "go on where a run stopped"),
)
FLAGS = (
    ("-m, --multirun", "sweep: run every combination of comma-separated values"),
    ("--cfg job [--resolve]", "print the composed config and stop"),
    ("--config-dir DIR", "a further folder of groups and choices"),
    ("--info, --hydra-help", "what Hydra found, Hydra's own flags"),
    ("-sc install=bash", 'tab completion: eval "$(python run.py -sc install=bash)" (zsh and fish alike)'),
)
_KEEP_TOP = ("keep_stages", "gate", "generate", "plan", "budget", "fit")


def usage() -> str:
    """The whole help text."""
    return "\n".join(_lines())


def first_comment(path: Path) -> str:
    """The first comment line of a YAML file that says what it is: no header for Hydra, no command; '' if none does."""
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("#") and not re.match(r"#\s*(@|python run\.py )", line):
            return line.lstrip("# ").rstrip()
        if line.strip() and not line.startswith("#"):
            break
    return ""


def defaults() -> dict[str, Any]:
    """group -> the choice that conf/config.yaml makes."""
    entries = yaml.safe_load((conf_root() / "config.yaml").read_text(encoding="utf-8"))["defaults"]
    return {group: choice for entry in entries if isinstance(entry, dict) for group, choice in entry.items()}


def settings(path: Path) -> dict[str, Any]:
    """A choice's own keys and values, those of the choices it builds on included."""
    content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    found: dict[str, Any] = {}
    for entry in content.pop("defaults", None) or []:
        if isinstance(entry, str) and entry != "_self_":
            found.update(settings(path.with_name(f"{entry}.yaml")))
    return {**found, **content}


def _lines() -> Iterator[str]:
    yield "leanfit: train, compress and deploy a model, from one line or one YAML file."
    yield ""
    yield "  python run.py [GROUP=CHOICE ...] [GROUP.KEY=VALUE ...] [recipe=NAME] [-m]      (or: leanfit ...)"
    yield ""
    yield "Examples"
    for arguments, what in EXAMPLES:
        yield f"  python run.py {arguments}".rstrip()
        yield f"      {what}"
    yield ""
    yield "Groups (GROUP=CHOICE; * is the default; compression takes one or a list)"
    chosen = defaults()
    for group in PACKAGES:
        yield f"  {group}"
        names = available(group)
        width = max(map(len, names))
        for name in sorted(names, key=lambda name: (name != str(chosen.get(group)), name)):
            mark = "*" if name == str(chosen.get(group)) else " "
            told = first_comment(conf_root() / group / f"{name}.yaml")
            yield from _wrapped(f"  {mark} {name.ljust(width)}  ", told)
    yield ""
    yield "Keys of the default choices (GROUP.KEY=VALUE; a link of a chain: compression.STAGE.KEY=VALUE)"
    for group in PACKAGES:
        values = settings(conf_root() / group / f"{chosen.get(group)}.yaml")
        pairs = [f"{key}={_typed(value)}" for key, value in values.items() if key != "name"]
        if pairs:
            yield from _wrapped(f"  {group}: ".ljust(15), "  ".join(pairs))
    for name in available("compression"):
        values = settings(conf_root() / "compression" / f"{name}.yaml")
        pairs = [f"{key}={_typed(value)}" for key, value in values.items() if key != "name"]
        if pairs:
            yield from _wrapped(f"  compression.{name}: ", "  ".join(pairs))
    yield from _wrapped("  others: ".ljust(15), "  ".join(settings_of_root()))
    yield ""
    yield "Jobs (job=NAME)"
    yield from (line for name, what in JOBS.items() for line in _wrapped(f"  {name.ljust(10)}", what))
    yield ""
    yield "Recipes (recipe=NAME or a path; recipes build on recipes; the command line wins)"
    names = listed()
    width = max(map(len, names), default=0)
    for name in names:
        file = find(name)
        yield from _wrapped(f"  {name.ljust(width)}  ", first_comment(file) if file else "")
    yield ""
    yield "Flags"
    yield from (line for flag, what in FLAGS for line in _wrapped(f"  {flag.ljust(24)}", what))
    yield ""
    yield "Exit codes: 0 done, 1 failed while running, 2 bad config, 3 a receipt or gate not met,"
    yield "            130 Ctrl-C, 143 SIGTERM; a sweep runs every job, then 1 if any failed."
    yield "A run leaves outputs/DATE/TIME/: report.md, result.json, artifact/, checkpoints/, run.log."


def settings_of_root() -> list[str]:
    """Keys of conf/config.yaml itself that change a run, as KEY=VALUE."""
    content = yaml.safe_load((conf_root() / "config.yaml").read_text(encoding="utf-8"))
    found = []
    for key in _KEEP_TOP:
        value = content[key]
        inner = {f"{key}.{name}": item for name, item in value.items()} if isinstance(value, dict) else {key: value}
        found += [f"{name}={_typed(item)}" for name, item in inner.items()]
    return found


def _typed(value: Any) -> str:
    if isinstance(value, list):
        return f"[{','.join(map(_typed, value))}]"
    if isinstance(value, float):
        return f"{value:g}"
    return value if isinstance(value, str) else json.dumps(value)


def _wrapped(head: str, text: str) -> list[str]:
    """`head` and `text`, continued under the text's own column."""
    indent = " " * min(len(head), 40)
    lines = textwrap.wrap(text, WIDTH - len(head), break_on_hyphens=False) or [""]
    rest = textwrap.wrap(" ".join(lines[1:]), WIDTH - len(indent), break_on_hyphens=False)
    return [f"{head}{lines[0]}".rstrip(), *(f"{indent}{line}" for line in rest)]
