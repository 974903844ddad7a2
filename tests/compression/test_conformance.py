"""What holds for every method there is, and for every pair that may be chained: one short run of each.

A run that ends with 0 has decoded, prepared, trained, finalized, saved, loaded in a fresh process with equal outputs,
and come out smaller where it claims to. A new YAML in conf/compression is tested here without a change.
"""

from pathlib import Path

import pytest

import pipeline
from pipeline.app import compose, main
from pipeline.chain import order_problems
from pipeline.errors import ConfigError
from pipeline.registry import available
from pipeline.report.result import read_result, schema_problems

METHODS = [name for name in available("compression") if name != "none"]
PAIRS = [(first, second) for first in METHODS for second in METHODS if first != second]
TINY = ["model=gpt_nano", "trainer=smoke", "trainer.max_steps=8", "data.evaluation_tokens=1024", "device=cpu"]


def methods(*names: str):
    return {name: compose([f"compression={name}"]).chain[name] for name in names}


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_every_method_gives_its_receipt(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    directory = tmp_path / "run"
    code = main([*TINY, f"compression={name}", f"hydra.run.dir={directory}"])
    result = read_result(directory / "result.json")
    assert code == 0, result["error"]
    assert schema_problems(result) == []
    assert result["artifact"]["reload"] == {"ok": True, "max_abs_diff": 0.0}
    assert result["size"]["ratio"] > 1
    method = methods(name)[name]
    assert (result["stages"][0]["train"] is not None) == method.trains
    assert pipeline.load(directory / "artifact").training is False


@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_every_pair_runs_or_is_refused_before_anything_is_built(first: str, second: str) -> None:
    refused = order_problems(methods(first, second))
    if refused:
        with pytest.raises(ConfigError, match=f"'{second}' cannot follow '{first}'"):
            compose([f"compression=[{first},{second}]"])
    else:
        assert list(compose([f"compression=[{first},{second}]"]).chain) == [first, second]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("first", "second"), [pair for pair in PAIRS if pair[0] == "magnitude"], ids=lambda name: str(name)
)
def test_zeros_survive_whatever_may_follow_pruning(
    first: str, second: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    directory = tmp_path / "run"
    assert main([*TINY, f"compression=[{first},{second}]", f"hydra.run.dir={directory}"]) == 0
    result = read_result(directory / "result.json")
    size = result["size"]
    linear = 2 * 12 * 64 * 64  # weights of the linear layers of gpt_nano
    removed = size["parameters_before"] - size["parameters_after"]  # by what takes whole units, zeros among them
    assert size["parameters_after"] - size["nonzero_after"] + removed >= linear // 2
    alone, both = (stage["bytes_after"] for stage in result["stages"])
    assert both <= alone  # a distilled student is as large as it was
