"""Models that a link brings in from outside of its chain: a teacher to learn from, a student to train.

A directory is one of our artifacts or one that transformers' `save_pretrained` wrote. Nothing is fetched from a hub,
and no code from a directory is run.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from pipeline.artifact import filling, store
from pipeline.compression.base import Answer
from pipeline.errors import ConfigError, LeanfitError
from pipeline.layers import stored
from pipeline.layers.blockwise import model_inputs
from pipeline.layers.distillation import observing
from pipeline.layers.logit_cache import LogitCache
from pipeline.models.architecture import describe
from pipeline.models.base import Architecture
from pipeline.models.gpt2 import rewritten
from pipeline.models.unfilled import on_meta


class FrozenTeacher:
    """A model in eval mode without gradients, opened when it is first looked at and moved to where its inputs are.

    `opened` gives it so, but for the preflight, which looks at shapes alone; `shapes` gives these without opening it.
    """

    def __init__(self, opened: Callable[[], nn.Module], shapes: Callable[[], nn.Module] | None = None) -> None:
        self._open, self._shapes = opened, shapes

    @functools.cached_property
    def model(self) -> nn.Module:
        return self._open()

    @functools.cached_property
    def architecture(self) -> Architecture:
        return describe(self.model)

    def shapes(self) -> nn.Module:
        """A model of this shape, on the meta device where it could be made without opening this one."""
        return self.model if self._shapes is None else self._shapes()

    def release(self) -> None:
        """Let go of the model. It is opened again when it is next looked at."""
        self.__dict__.pop("model", None)

    def __call__(self, batch: Mapping[str, Tensor], observe: Sequence[str] = ()) -> Answer:
        """Logits, and outputs of the named modules. Floating inputs are given in the weights' dtype."""
        device = next(iter(batch.values())).device
        model: Any = self.model
        if next(model.parameters()).device != device:
            model.to(device)
        with torch.no_grad(), observing(model, observe) as seen:
            return Answer(cast(Tensor, model(**model_inputs(model, dict(batch), device)).logits), seen)


class RecordedTeacher:
    """A teacher that is not there: its logits are read from disk."""

    def __init__(self, cache: LogitCache, architecture: Architecture) -> None:
        self.cache, self.architecture = cache, architecture

    @property
    def model(self) -> nn.Module:
        raise LeanfitError("the teacher is not held, its logits are read from disk; nothing else is known of it")

    def __call__(self, batch: Mapping[str, Tensor], observe: Sequence[str] = ()) -> Answer:
        """Raises LogitCacheError for a sample that was not recorded."""
        if observe:
            raise LeanfitError(f"{', '.join(observe)} of the teacher cannot be watched: its logits are read from disk")
        logits, classes = self.cache.read(batch)
        return Answer(logits, {}, classes)


def frozen(model: nn.Module) -> nn.Module:
    return model.eval().requires_grad_(False)


def open_directory(directory: Path, said: str, *, meta: bool, trainable: bool = False) -> nn.Module:
    """The model in `directory`, float32 where it is no artifact; with `meta` only its shapes.

    Raises:
        ConfigError: no model there, or one that cannot be opened (or, `trainable`, not be trained); `said` names the
            setting.
    """
    try:
        if (directory / "manifest.json").is_file():
            return _artifact(directory, said, meta, trainable)
        return _pretrained(directory, said, meta)
    except ConfigError:
        raise
    except Exception as error:  # whatever an altered file makes a library raise
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ConfigError(f"{said} cannot be opened: {first}") from error


def _artifact(directory: Path, said: str, meta: bool, trainable: bool) -> nn.Module:
    layers = store.read_manifest(directory)["layers"]
    if trainable and any(record["scheme"] != "float" for record in layers.values()):
        raise ConfigError(f"{said} is quantized and cannot be trained; give the float model it was made from")
    if not meta:
        return store.load(directory, trainable=trainable)
    store.check(directory)  # before anything is trained, not when the link begins
    return store.blueprint(directory)


def _pretrained(directory: Path, said: str, meta: bool) -> nn.Module:
    if not (directory / "config.json").is_file():
        raise ConfigError(f"{said} holds neither a manifest.json nor a config.json; give an artifact's directory, or "
                          "one that transformers' save_pretrained wrote")  # fmt: skip
    written = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    if written.get("quantization_config"):
        raise ConfigError(f"{said} is quantized by another program; give the float model it was made from")
    cls = filling.model_class((written.get("architectures") or [None])[0])
    if meta:
        for file in directory.glob("*.safetensors"):  # a file that was cut short shows so in its header
            stored.shapes(file)
        return rewritten(on_meta(cls, cls.config_class.from_pretrained(directory)))
    model, loading = cls.from_pretrained(
        directory, dtype=torch.float32, local_files_only=True, trust_remote_code=False, output_loading_info=True
    )
    # transformers fills what a file lacks with random numbers and goes on.
    if absent := sorted(map(str, {*loading["missing_keys"], *loading["mismatched_keys"]})):
        raise ConfigError(f"{said} lacks {len(absent)} of the model's weights, such as {absent[0]}; it is incomplete")
    return rewritten(model)


def vocabulary_problems(directory: Path, said: str, tokenizer: Any) -> list[str]:
    """A message where the directory's tokenizer numbers tokens otherwise than `tokenizer`; none where one lacks."""
    if tokenizer is None or not (directory / "tokenizer_config.json").is_file():
        return []
    try:
        other = store.load_tokenizer(directory)
    except Exception:  # a tokenizer of a kind that is not installed: the sizes are compared anyway
        return []
    if other is None or other.get_vocab() == tokenizer.get_vocab():
        return []
    return [f"{said} has another vocabulary than this run's tokenizer; give a model with the same one"]
