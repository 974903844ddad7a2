"""`model=hf`: a causal language model of the Hugging Face hub or of a local directory, with its own tokenizer.

One of our own artifacts is such a directory too, as long as its weights are dense floats.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, cast

from pipeline.errors import ConfigError
from pipeline.models.base import Model, TaskName
from pipeline.registry import register

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from pipeline.data.base import DataSpec

HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


@register("model", "hf")
@dataclass(frozen=True, kw_only=True)
class HuggingFace(Model):
    """`pretrained`: a directory that `AutoModelForCausalLM` opens, or a hub id such as `org/name`."""

    task: ClassVar[TaskName] = "causal_lm"

    pretrained: str

    @property
    def source(self) -> str:
        """What to hand to `from_pretrained`: the directory with `~` expanded where it is one, else the id."""
        local = Path(self.pretrained).expanduser()
        return str(local) if local.exists() else self.pretrained

    def problems(self) -> list[str]:
        said = f"model.pretrained={self.pretrained}"
        path = Path(self.pretrained).expanduser()
        if not self.pretrained:
            return ["model.pretrained is empty; give a directory with a config.json, or a hub id such as org/name"]
        if not path.exists():
            if HUB_ID.fullmatch(self.pretrained) and not self.pretrained.startswith("."):
                return []
            return [f"{said} does not exist; give a directory with a config.json, or a hub id such as org/name"]
        if not path.is_dir():
            return [f"{said} is a file; give the directory that holds its config.json"]
        if not (path / "config.json").is_file():
            return [f"{said} holds no config.json; give a directory that transformers' save_pretrained wrote"]
        try:
            config = json.loads((path / "config.json").read_text(encoding="utf-8"))
        except (ValueError, OSError) as error:
            return [f"{said} has a config.json that cannot be read: {error}"]
        if not isinstance(config, dict):
            return [f"{said} has a config.json that holds no mapping; save the model again"]
        return _config_problems(said, config)

    def build(self, spec: DataSpec) -> PreTrainedModel:
        """The pretrained model in float32 and train mode; under `torch.device("meta")` its shapes alone.

        Raises:
            ConfigError: it cannot be opened, is no causal language model, is quantized already, lacks weights, or has
                fewer positions or tokens than `spec` asks for.
        """
        import torch
        from safetensors import SafetensorError
        from transformers import AutoConfig, AutoModelForCausalLM

        said = f"model.pretrained={self.pretrained}"
        try:
            config = AutoConfig.from_pretrained(self.source, trust_remote_code=False)
        except (OSError, ValueError, KeyError) as error:
            raise ConfigError(f"{said} cannot be opened: {_first_line(error)}") from error
        if found := _config_problems(said, config.to_dict()) + _spec_problems(said, config, spec):
            raise ConfigError(found)
        auto: Any = AutoModelForCausalLM
        model: PreTrainedModel
        try:
            if torch.get_default_device().type == "meta":
                model = auto.from_config(config, dtype=torch.float32, trust_remote_code=False)
                return cast("PreTrainedModel", model.train())
            model, loading = auto.from_pretrained(
                self.source, config=config, dtype=torch.float32, trust_remote_code=False, output_loading_info=True
            )
        except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
            raise ConfigError(f"{said} cannot be opened: {_first_line(error)}") from error
        # transformers fills what a file lacks with random numbers and goes on.
        if absent := sorted(map(str, {*loading["missing_keys"], *loading["mismatched_keys"]})):
            raise ConfigError(
                f"{said} lacks {len(absent)} of the model's weights, such as {absent[0]}; it is incomplete"
            )
        return cast("PreTrainedModel", model.train())

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer beside the weights. Raises ConfigError where there is none."""
        from transformers import AutoTokenizer

        try:
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(self.source, trust_remote_code=False)
        except (OSError, ValueError, KeyError, ImportError) as error:
            raise ConfigError(
                f"model.pretrained={self.pretrained} has no tokenizer that can be opened: {_first_line(error)}"
            ) from error
        # Without a vocabulary file transformers makes up an empty tokenizer of the model's family.
        if len(tokenizer) <= len(tokenizer.all_special_ids):
            raise ConfigError(
                f"model.pretrained={self.pretrained} has no tokenizer that can be opened: no vocabulary file"
            )
        return tokenizer


def _config_problems(said: str, config: dict[str, Any]) -> list[str]:
    found = []
    kinds = config.get("architectures") or []
    if kinds and not any(kind.endswith(("ForCausalLM", "LMHeadModel")) for kind in kinds):
        found.append(
            f"{said} holds a {kinds[0]}, not a causal language model; choose one whose name ends in ForCausalLM"
        )
    quantization = config.get("quantization_config")
    if isinstance(quantization, dict) and quantization.get("format") == "leanfit":
        found.append(
            f"{said} is an artifact that is stored compactly and cannot be opened by transformers; "
            "use job=compress artifact=DIR instead"
        )
    elif quantization:
        found.append(
            f"{said} is quantized already and can be neither trained nor compressed further; "
            "give the float model it was made from"
        )
    return found


def _spec_problems(said: str, config: Any, spec: DataSpec) -> list[str]:
    found = []
    positions = getattr(config, "max_position_embeddings", None)
    if positions is not None and spec.sequence_length is not None and spec.sequence_length > positions:
        found.append(
            f"data.sequence_length={spec.sequence_length} is more than the {positions} positions of {said}; "
            f"give at most {positions}"
        )
    if spec.vocabulary is not None and spec.vocabulary > config.vocab_size:
        found.append(
            f"{said} has {config.vocab_size} tokens, its tokenizer {spec.vocabulary}; they do not belong together"
        )
    return found


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
