"""Dependencies go one way, and what answers a mistake on the command line stays light."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "pipeline"
FILES = sorted(ROOT.rglob("*.py"))
GROUPS = {
    "models", "data", "compression", "parallelism", "precision", "device", "optimizers", "memory", "calibration",
    "trainer", "adapters",
}  # fmt: skip
RANK = {
    "errors": 0, "sizes": 0, "environment": 0, "interrupts": 0, "heartbeat": 1, "preemption": 4, "last_step": 4,
    "versions": 0, "registry": 1, "checkpoints": 1,
    "groups": 2, "tasks": 2, "layers": 2,
    "artifact": 2, "report": 2, "recipes": 3, "explain": 4, "arguments": 4, "provenance": 5, "schema": 6, "chain": 3,
    "usage": 6, "asked": 7, "rank_rules": 8, "rules": 9, "resuming": 7, "fitting": 8, "teacher": 8, "nodes": 8,
    "earlier_run": 8, "launch": 9, "composing": 10,
    "stage_input": 9, "recording": 10,
    "walk": 11, "proof": 12, "planner": 12, "runner": 13, "app": 14, "worker": 15, "ray_driver": 16,
}  # fmt: skip
"""A module imports only what has a lower rank, or stands beside it in the same part."""
GROUP_PARTS = {"groups", "tasks", "layers", "artifact", "report", "planner"}
HYDRA = {f"pipeline.{part}" for part in ("app", "composing", "recipes", "provenance", "explain", "arguments")}
"""What composes a config; all else sees frozen dataclasses."""
SHARED = {"base", "quantization", "pruning"}
"""What methods of compression have in common: these are no methods."""
HEAVY = {"torch", "lightning", "transformers", "torchao", "torchdata", "torchmetrics", "matplotlib", "sklearn"}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def part_of(module: str) -> str:
    pieces = module.split(".")
    part = pieces[1] if len(pieces) > 1 else ""
    return "groups" if part in GROUPS else part


def imports(path: Path, *, only_at_import: bool = False) -> Iterator[str]:
    """Modules a file imports; with `only_at_import`, not those inside functions or under TYPE_CHECKING."""

    def walk(nodes: list[ast.stmt]) -> Iterator[ast.stmt]:
        for node in nodes:
            if only_at_import and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
                yield from walk(node.orelse)
                continue
            yield node
            for field in ("body", "orelse", "finalbody"):
                yield from walk(getattr(node, field, []))
            for handler in getattr(node, "handlers", []):
                yield from walk(handler.body)

    for node in walk(ast.parse(path.read_text(encoding="utf-8")).body):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names if node.module == "pipeline")


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_a_module_imports_only_what_stands_below_it(path: Path) -> None:
    own = module_name(path)
    if own == "pipeline":
        return
    for imported in imports(path):
        part = part_of(imported)
        if imported.startswith("pipeline.") and part in RANK:
            assert part == part_of(own) or RANK[part] < RANK[part_of(own)] or {part, part_of(own)} <= GROUP_PARTS


@pytest.mark.parametrize("path", [p for p in FILES if p.parent.name == "compression"], ids=module_name)
def test_a_method_imports_no_model_data_runner_or_other_method(path: Path) -> None:
    own = module_name(path)
    for imported in imports(path):
        pieces = imported.split(".")
        if pieces[0] != "pipeline" or imported == own:
            continue
        assert pieces[1] not in {"data", "tasks", "runner", "walk", "fitting", "artifact", "report"}, (
            f"{own}: {imported}"
        )
        assert pieces[:2] != ["pipeline", "models"], f"{own} imports {imported}"
        if pieces[1] == "compression":
            assert len(pieces) == 2 or pieces[2] in SHARED, f"{own} imports {imported}"


def test_only_what_composes_a_config_imports_hydra_or_omegaconf() -> None:
    users = {module_name(p) for p in FILES if any(i.split(".")[0] in ("omegaconf", "hydra") for i in imports(p))}
    assert users <= HYDRA | {"pipeline.report.sweep"}  # a Hydra callback, which reads from disk only


def test_only_one_module_builds_a_trainer() -> None:
    builders = {module_name(p) for p in FILES if "lightning.Trainer(" in p.read_text(encoding="utf-8")}
    assert builders == {"pipeline.fitting"}


def test_no_module_reaches_into_the_trainer() -> None:
    assert not [module_name(p) for p in FILES if "trainer._" in p.read_text(encoding="utf-8")]


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_choices_import_nothing_heavy_at_the_top(path: Path) -> None:
    source = path.read_text(encoding="utf-8")
    choice = "@register(" in source or module_name(path).split(".")[-1] in {"base", "schema", "chain", "rules", "app"}
    if choice and path.parent.name != "tasks":
        assert not {i.split(".")[0] for i in imports(path, only_at_import=True)} & HEAVY


def test_the_app_and_every_choice_load_without_torch() -> None:
    program = (
        "import sys, pipeline.app, pipeline.schema, pipeline.rules, pipeline.chain\n"
        "from pipeline.registry import PACKAGES, available, lookup\n"
        "import yaml, pipeline.registry as r\n"
        "for group in PACKAGES:\n"
        "    for choice in available(group):\n"
        "        name = (yaml.safe_load((r.conf_root() / group / f'{choice}.yaml').read_text()) or {}).get('name')\n"
        "        if name: lookup(group, name)\n"
        "print(sorted({'torch', 'lightning', 'transformers'} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
