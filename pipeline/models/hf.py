"""`model=hf`: a causal language model of the Hugging Face hub or of a local directory, with its own tokenizer.

One of our own artifacts is such a directory too, as long as its weights are dense floats. A GPT-2 becomes an OPT of the
same function (models/gpt2.py), since its own layers are of a kind that nothing compresses.
"""

from __future__ import annotations

import json
import os
import re
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, cast

from pipeline.errors import ConfigError
from pipeline.models.base import Model, TaskName
from pipeline.registry import register

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from pipeline.data.base import DataSpec

HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


@register("model", "hf")
@dataclass(frozen=True, kw_only=True)
class HuggingFace(Model):
    """`pretrained`: a directory that `AutoModelForCausalLM` opens, or a hub id such as `org/name`."""

    task: ClassVar[TaskName] = "causal_lm"

    pretrained: str

    @property
    def source(self) -> str:
        """What to hand to `from_pretrained`: the directory with `~` expanded where it is one, else the id."""
        local = os.path.expanduser(self.pretrained)
        return local if os.path.exists(local) else self.pretrained

    def problems(self) -> list[str]:
        said = f"model.pretrained={self.pretrained}"
        path = Path(os.path.expanduser(self.pretrained))
        if not self.pretrained:
            return ["model.pretrained is empty; give a directory with a config.json, or a hub id such as org/name"]
        if not os.path.exists(path):
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
        return _config_problems(said, config) + _file_problems(said, path)

    def build(self, spec: DataSpec) -> PreTrainedModel:
        """The pretrained model in float32 and train mode; under `torch.device("meta")` its shapes alone.

        Raises:
            ConfigError: it cannot be opened, is no causal language model, is quantized already, lacks weights, or has
                fewer positions or tokens than `spec` asks for.
        """
        import torch
        from transformers import AutoModelForCausalLM

        from pipeline.models.gpt2 import rewritten
        from pipeline.models.unfilled import one_by_one

        config = self._config(spec)
        auto: Any = AutoModelForCausalLM
        if torch.get_default_device().type == "meta":
            model = self._opened(lambda: (auto.from_config(config, dtype=torch.float32, trust_remote_code=False), {}))
        else:
            with one_by_one():
                model = self._opened(
                    lambda: auto.from_pretrained(
                        self.source,
                        config=config,
                        dtype=torch.float32,
                        trust_remote_code=False,
                        output_loading_info=True,
                    )
                )
        return cast("PreTrainedModel", rewritten(model).train())

    def note(self) -> str | None:
        if not self._becomes_opt():
            return None
        return f"model.pretrained={self.pretrained} is a GPT-2 and is run as OPT, the same function with linear layers"

    def _becomes_opt(self) -> bool:
        from transformers import AutoConfig

        from pipeline.models.gpt2 import can_be_opt

        try:
            config = AutoConfig.from_pretrained(self.source, trust_remote_code=False)
        except (OSError, ValueError, KeyError):  # `build` says what is wrong
            return False
        return can_be_opt(config)

    def weight_files(self) -> list[Path]:
        local = Path(self.source)
        return sorted({local / name for name in _weight_map(local).values()}) if local.is_dir() else []

    def assembled(self, spec: DataSpec, weights: dict[str, Tensor]) -> PreTrainedModel:
        import torch

        from pipeline.models.gpt2 import rewritten

        config = self._config(spec)
        return rewritten(self._opened(lambda: _assembled(config, weights, torch.float32)))

    def build_offloaded(self, spec: DataSpec, dtype: torch.dtype, directory: Path) -> PreTrainedModel:
        """The model of `build` with weights in `dtype`, each in a file of its own in `directory` (layers/offload.py).

        The checkpoint is mapped and copied tensor by tensor. One that is not local, or no safetensors, is opened in
        memory. Raises as `build` does.
        """
        from transformers import GenerationConfig

        from pipeline.layers import stored
        from pipeline.layers.offload import offload, offload_module, offload_parameter
        from pipeline.models.gpt2 import rewritten
        from pipeline.models.unfilled import registering

        files = self.weight_files()
        if not files:
            return self.build(spec)
        config = self._config(spec)

        def read() -> tuple[Any, dict[str, Any]]:
            weights = {name: tensor for file in files for name, tensor in stored.tensors(file).items()}
            for name, tensor in weights.items():
                if tensor.is_floating_point() and tensor.dtype != dtype:  # else as it lies there, until it is a weight
                    weights[name] = offload(tensor, directory, dtype)
            # What transformers puts together from several tensors goes there too.
            with registering(lambda _, __, parameter: offload_parameter(parameter, directory)):
                model, loading = _assembled(config, weights, dtype)
            if (Path(self.source) / "generation_config.json").is_file():
                model.generation_config = GenerationConfig.from_pretrained(self.source)
            return model, loading

        model = self._opened(read)
        for module in model.modules():  # buffers
            offload_module(module, directory)
        return cast("PreTrainedModel", rewritten(model).train())

    def _config(self, spec: DataSpec) -> Any:
        """The config of the checkpoint. Raises ConfigError as `build` does."""
        from transformers import AutoConfig

        said = f"model.pretrained={self.pretrained}"
        try:
            config = AutoConfig.from_pretrained(self.source, trust_remote_code=False)
        except (OSError, ValueError, KeyError) as error:
            raise ConfigError(f"{said} cannot be opened: {_first_line(error)}") from error
        if found := _config_problems(said, config.to_dict()) + spec_problems(said, config, spec):
            raise ConfigError(found)
        return config

    def _opened(self, read: Callable[[], tuple[Any, dict[str, Any]]]) -> PreTrainedModel:
        """The model that `read` gives beside transformers' loading info, errors in one line, no weight made up."""
        from safetensors import SafetensorError

        said = f"model.pretrained={self.pretrained}"
        try:
            model, loading = read()
        except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
            raise ConfigError(f"{said} cannot be opened: {_first_line(error)}") from error
        # transformers fills what a file lacks with random numbers and goes on.
        if absent := sorted(map(str, {*loading.get("missing_keys", ()), *loading.get("mismatched_keys", ())})):
            raise ConfigError(
                f"{said} lacks {len(absent)} of the model's weights, such as {absent[0]}; it is incomplete"
            )
        return cast("PreTrainedModel", model)

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


def _assembled(config: Any, weights: dict[str, Tensor], dtype: torch.dtype) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The model of `config`, whose tensors are taken out of `weights`, beside transformers' loading info."""
    import torch
    from transformers import AutoModelForCausalLM

    from pipeline.models.unfilled import one_by_one

    auto: Any = AutoModelForCausalLM
    with torch.device("meta"):
        cls: Any = type(auto.from_config(config, trust_remote_code=False))
    with one_by_one():
        model, loading = cls.from_pretrained(
            None, config=config, dtype=dtype, state_dict=weights, output_loading_info=True
        )
    weights.clear()
    return model, loading


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
    # In eval mode the weights are others than in train mode, and those that are saved would be divided once more.
    if config.get("model_type") == "rwkv" and (every := config.get("rescale_every", 6)) > 0:
        found.append(
            f"{said} divides its weights in place as it runs (rescale_every={every}), so that they can be neither "
            'quantized nor saved; set "rescale_every": 0 in its config.json, which is the same but for the eps of norms'
        )
    return found


def _weight_map(directory: Path) -> dict[str, str]:
    """{tensor: file} of an index, {"": the one file} without; empty where the weights are no safetensors.

    Raises:
        ValueError: an index that names no files beside it.
    """
    if (directory / WEIGHTS).is_file():
        return {"": WEIGHTS}
    if not (directory / INDEX).is_file():
        return {}
    index = json.loads((directory / INDEX).read_text(encoding="utf-8"))
    files = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(files, dict) or not all(isinstance(f, str) and f == Path(f).name for f in files.values()):
        raise ValueError(f"{INDEX} holds no weight_map of files beside it")
    return files


def _file_problems(said: str, directory: Path) -> list[str]:
    """Shards that are missing or cut short, by their sizes and headers alone. Imports no torch."""
    try:
        files = sorted(set(_weight_map(directory).values()))
    except (ValueError, RecursionError, OSError) as error:
        return [f"{said} cannot be opened: {_first_line(error)}"]
    found = []
    for name in files:
        path = directory / name
        if not path.is_file():
            found.append(f"{said} is incomplete: {name} is missing; copy or download it again")
        elif (told := _safetensors_problem(path)) is not None:
            found.append(f"{said} cannot be opened: {name} {told}; copy or download it again")
    return found


def _safetensors_problem(path: Path) -> str | None:
    """What is wrong with the length of a safetensors file: eight bytes, a JSON header of that many, the tensors."""
    size = path.stat().st_size
    try:
        with path.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > size - 8:
                return f"is truncated: {size} bytes, and its header alone has {length}"
            header = json.loads(stream.read(length))
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        whole = 8 + length + max(ends, default=0)
    except (struct.error, ValueError, RecursionError, KeyError, TypeError, AttributeError, IndexError, OSError):
        return "is no safetensors file, or an altered one"
    return (
        None if size == whole else f"is {'truncated' if size < whole else 'altered'}: {size} bytes instead of {whole}"
    )


def spec_problems(said: str, config: Any, spec: DataSpec) -> list[str]:
    """What a model with this config, which `said` names, lacks for this data."""
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
