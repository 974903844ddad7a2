"""`pipeline.memory.plan`: a plan from Python, of a config that is looked at first as `job=plan` looks at it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipeline.data.base import DataBundle
from pipeline.errors import ConfigError
from pipeline.planner.plan import Level, Plan, plan
from pipeline.schema import RunConfig
from pipeline.walk import changing_stages, preflight, stages_of

PLANNED = ("run", "compress", "plan")


def plan_checked(
    config: RunConfig, data: DataBundle | None = None, tokenizer: Any = None, level: Level | None = None
) -> Plan:
    """The plan of a run with this config; allocates no tensor of the model's size.

    Args:
        data: what `config.data` opens; None: it is opened.
        tokenizer: the run's, for links with a calibration text of their own; None: the model's.
        level: "formula" or "trace"; None: `config.plan.level`.

    Raises:
        ConfigError: another job's config, or what only the model's shapes tell, such as groups that do not divide.
    """
    if config.job not in PLANNED:
        raise ConfigError(f"job={config.job}: a plan is of job=run or job=compress; compose the config of one of them")
    tokenizer = tokenizer or config.model.tokenizer()
    data = data or config.data.open(tokenizer)
    preflight(config, data, tokenizer, Path(), changing_stages(stages_of(config)))
    return plan(config, data, tokenizer, level)
