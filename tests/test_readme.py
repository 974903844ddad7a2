"""README is short, its two set-up commands are what CI runs, and what it tells a newcomer to type is valid."""

import re
import shlex
from pathlib import Path

import pytest

from pipeline.arguments import parse
from pipeline.composing import check, loader

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
LINES = [shlex.split(line, comments=True) for block in BLOCKS for line in block.splitlines()]
TYPED = [words[2:] for words in LINES if words[:2] == ["python", "run.py"] and "--help" not in words]


def test_readme_is_short() -> None:
    assert len(README.splitlines()) < 80


def test_ci_finds_both_commands() -> None:
    lines = [line for block in BLOCKS for line in block.splitlines()]
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    for start in ("pip install -e . && python run.py", "pip install -e '.[test]' && pytest"):
        assert sum(line.startswith(start) for line in lines) == 1
        assert start in script


@pytest.mark.parametrize("words", [w for w in TYPED if not any("DIR" in x for x in w)], ids=" ".join)
def test_each_command_composes(words: list[str]) -> None:
    args = parse(words)
    jobs = [args.overrides]
    if args.multirun:
        jobs = [
            [
                line.split("=")[0] + "=" + value
                for line in args.overrides
                for value in [line.split("=")[1].split(",")[0]]
            ]
        ]
    for overrides in jobs:
        check(overrides, loader())


def test_each_file_it_links_to_is_there() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("http") or (ROOT / target).exists(), target
