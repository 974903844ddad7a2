"""Task name -> task, imported when it is asked for: model and data choices name a task without importing torch."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, get_args

from pipeline.errors import ConfigError, did_you_mean
from pipeline.models.base import TaskName

if TYPE_CHECKING:
    from pipeline.tasks.base import Task

CLASSES: dict[TaskName, str] = {"causal_lm": "CausalLM", "image_classification": "ImageClassification"}
"""Task name, which is its module's, -> class."""


def get(name: TaskName) -> Task:
    """The task `name`. Raises ConfigError for a name that no task has."""
    if name not in CLASSES:
        raise ConfigError(f"task={name} is none of {', '.join(get_args(TaskName))}{did_you_mean(name, CLASSES)}")
    task: Task = getattr(importlib.import_module(f"pipeline.tasks.{name}"), CLASSES[name])()
    return task
