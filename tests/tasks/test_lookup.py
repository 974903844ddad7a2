"""Tasks are found by name, and looking does not import torch."""

import subprocess
import sys
from typing import get_args

import pytest

from pipeline.errors import ConfigError
from pipeline.models.base import TaskName
from pipeline.tasks import lookup


def test_every_task_name_has_a_class() -> None:
    assert set(lookup.CLASSES) == set(get_args(TaskName))
    assert lookup.get("causal_lm").name == "causal_lm"


def test_an_unknown_name_is_refused_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"task=causal_ml is none of .*did you mean 'causal_lm'"):
        lookup.get("causal_ml")  # type: ignore[arg-type]


def test_the_table_imports_no_torch() -> None:
    code = "import sys, pipeline.tasks.lookup; print('torch' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "False"
