"""What does not go together: RunConfig -> one line for each problem, naming key, value, what is allowed, and a fix.

Each rule is a small function of the whole config. Imports no torch: these are the mistakes told within a second.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

from pipeline import checkpoints, registry
from pipeline.asked import choice, trains
from pipeline.chain import link_fit, order_problems
from pipeline.compression.base import Method
from pipeline.compression.pruning import Pruner
from pipeline.device.cuda import capability
from pipeline.rank_rules import OF_RANKS
from pipeline.schema import GROUPS, RunConfig
from pipeline.sizes import parse_size
from pipeline.trainer.settings import missing_compiler

LOOKING = ("evaluate", "verify", "generate")
"""Jobs that look at an artifact and change nothing of it."""
ASIDE = ("parallelism", "optimizer", "adapter", "memory", "calibration", "gate")
"""What such jobs have no use for: they run on one device, train nothing, and judge by nothing but what is recorded."""
FLOAT8_FROM = (8, 9)
"""Compute capability of the first GPUs that multiply float8."""
FLOAT16_SMALLEST = 6.1e-5
"""Smallest normal float16: an epsilon below it is lost, and 0 / 0 is NaN."""


def problems(config: RunConfig) -> list[str]:
    """Every problem of a decoded config. What could not run cannot be planned, but for a device that is not here."""
    rules = RULES
    found = _fitting(config)
    if config.job == "plan" or (config.job == "fit" and not config.fit.run):
        rules = tuple(rule for rule in RULES if rule is not device)
    if config.job in ("plan", "fit"):
        config = replace(config, job="run")
    return [*found, *(told for rule in rules for told in rule(config))]


def _fitting(config: RunConfig) -> list[str]:
    """Sizes that are none, and keys of `job=fit` with another job or without what they choose by."""
    asked, found = config.fit, []
    sizes = {"budget": config.budget, "fit.artifact": asked.artifact, "fit.inference": asked.inference}
    given = {key: size for key, size in sizes.items() if size is not None}
    bytes_of: dict[str, int] = {}
    for key, size in given.items():
        try:
            bytes_of[key] = parse_size(size)
        except ValueError as error:
            found.append(f"{key}={error}")
    if config.job != "fit":
        given |= {f"fit.{key}": value for key in ("free", "maximize", "run") if (value := getattr(asked, key))}
        told = [f"{registry.shown(key, value)} goes with job=fit, not job={config.job}" for key, value in given.items()]
        return [*found, *told]
    bounds = asked.artifact or asked.inference or not config.trainer.max_steps
    if "compression" in asked.free and not (bounds or "adapter" in asked.free or config.adapter.trains):
        found.append(
            "fit.free=[compression] chooses by bytes that come out, or as the base of adapters: give fit.artifact or "
            "fit.inference, or fit.free=[adapter,compression]"
        )
    memory = config.device.memory
    if memory is not None and not config.device.memory_problems() and bytes_of.get("budget", 0) > parse_size(memory):
        found.append(f"budget={config.budget} is more than device.memory={memory}, which a run keeps within; give less")
    if asked.maximize == "sequence" and not hasattr(config.data, "sequence_length"):
        found.append(f"fit.maximize=sequence: data={choice(config, 'data')} has no sequences")
    if asked.maximize == "parameters" and not all(hasattr(config.model, key) for key in ("layers", "heads", "width")):
        found.append(
            f"fit.maximize=parameters: model={choice(config, 'model')} has no layers, heads and width to grow; "
            "choose model=gpt or model=llama"
        )
    return found


def own_problems(config: RunConfig) -> list[str]:
    """What each choice says about its own settings. A job that works on an artifact does not use the model's."""
    unused = {"run": set[str](), "compress": {"model"}, "evaluate": {"model"}}.get(config.job, {"model", "data"})
    parts = [getattr(config, group) for group in GROUPS if group not in unused and group != "device"]
    asked = [part.problems for part in [*parts, *config.chain.values()] if hasattr(part, "problems")]
    return [told for ask in asked for told in ask()]


def model_and_data(config: RunConfig) -> list[str]:
    """A model reads one kind of batch; a data choice gives one kind."""
    model, data = config.model, config.data
    if config.job != "run" or model.task == data.task:
        return []
    fitting = [name for name in registry.names("data") if registry.lookup("data", name).task == model.task]
    models = [name for name in registry.names("model") if registry.lookup("model", name).task == data.task]
    return [
        f"data={choice(config, 'data')} is for {_words(data.task)}, model={choice(config, 'model')} for "
        f"{_words(model.task)}; with this model choose data={' or '.join(fitting) or 'none there is'}, "
        f"with this data model={' or '.join(models) or 'none there is'}"
    ]


def device(config: RunConfig) -> list[str]:
    """Whether this machine has what was asked for."""
    return config.device.problems(config.parallelism.devices)


def batch_divides(config: RunConfig) -> list[str]:
    """The global batch is split evenly over devices, then into micro batches."""
    trainer, ranks = config.trainer, config.parallelism.data_ranks
    micro, batch = trainer.micro_batch_size or 1, trainer.batch_size
    unit = micro * ranks
    if batch % unit == 0:
        return []
    near = [str(number) for number in (batch // unit * unit, (batch // unit + 1) * unit) if number]
    share, rest = divmod(batch, ranks)
    if trainer.micro_batch_size and not rest:
        near.append(
            f"trainer.micro_batch_size={max(n for n in range(1, min(micro, share, 4096) + 1) if share % n == 0)}"
        )
    what = f"{ranks} device{'s' if ranks > 1 else ''}"
    what = f"trainer.micro_batch_size={micro} x {what} = {unit}" if trainer.micro_batch_size else what
    return [f"trainer.batch_size={batch} is not a multiple of {what}; choose {' or '.join(near)}"]


def device_memory(config: RunConfig) -> list[str]:
    """A size that is none."""
    return config.device.memory_problems()


def chain_order(config: RunConfig) -> list[str]:
    return order_problems(config.chain)


def pruning_grows(config: RunConfig) -> list[str]:
    """What is pruned stays so: a pruner that asks for no more than one before it would do nothing."""
    found: list[str] = []
    before: dict[str, Pruner] = {}
    for stage, method in (*_links_of_artifact(config), *config.chain.items()):
        if not isinstance(method, Pruner):
            # Other layers, whose share of zeros is not known yet; or quantized ones, whose pruning others refuse.
            if method.kind in ("pruning", "quantization") or getattr(method, "student", None):
                before.clear()
            continue
        if method.problems():
            continue
        had = next((name for name, earlier in before.items() if not method.adds_to(earlier)), None)
        if had is not None:
            asked = "sparsity" if method.pattern is None else "pattern"
            reached = {"sparsity": before[had].sparsity, "pattern": before[had].pattern}
            said = ", ".join(f"{key}={value}" for key, value in reached.items() if value is not None)
            found.append(
                f"compression.{stage}.{asked}={getattr(method, asked)} prunes nothing that '{had}' ({said}) has not "
                f"pruned; choose more than {before[had].target():g}, or leave one of them out"
            )
        before[stage] = method
    return found


def _links_of_artifact(config: RunConfig) -> list[tuple[str, Method]]:
    """The links that `job=compress artifact=DIR` starts from, where its manifest can be read: other checks tell."""
    if config.job != "compress" or not config.artifact:
        return []
    try:
        chain = json.loads((Path(config.artifact) / "manifest.json").read_text(encoding="utf-8"))["chain"]
        links = {
            f"{link['name']} of the artifact": registry.decode_choice(
                "compression", link["config"], "", lambda key: ""
            )[0]
            for link in chain
        }
    except (OSError, ValueError, LookupError, TypeError):
        return []
    return list(links.items()) if None not in links.values() else []


def samples_of_calibration(config: RunConfig) -> list[str]:
    """A link that looks at a part of the calibration set cannot look at more than there is."""
    held = config.calibration.samples
    asked = {stage: getattr(method, "samples", None) or 0 for stage, method in config.chain.items()}
    return [
        f"compression.{stage}.samples={samples} is more than calibration.samples={held}; choose {held} or fewer"
        for stage, samples in asked.items()
        if samples > held
    ]


def texts_to_go_on_with(config: RunConfig) -> list[str]:
    """A teacher that is to go on with texts needs room behind what it is given of them."""
    length = getattr(config.data, "sequence_length", None)
    asked = {
        stage: getattr(method, "prompt_tokens", 0)
        for stage, method in config.chain.items()
        if getattr(method, "sequence_weight", 0)
    }
    return [
        f"compression.{stage}.prompt_tokens={prompt} leaves nothing of data.sequence_length={length} to go on with; "
        "choose fewer"
        for stage, prompt in asked.items()
        if length is not None and prompt >= length
    ]


def ignore_patterns(config: RunConfig) -> list[str]:
    """`ignore` takes shell-style patterns: an empty one names nothing, and a regular expression something else."""
    found = []
    for stage, method in config.chain.items():
        key = f"compression.{stage}.ignore"
        for pattern in getattr(method, "ignore", ()):
            if not pattern.strip():
                found.append(f"{key}: an empty pattern names no module; leave it out, or write ignore=[] for none")
            elif pattern.startswith("re:"):
                meant = pattern.removeprefix("re:").strip("^$").replace("\\.", ".").replace(".*", "*")
                near = f"; did you mean '{meant}'?" if re.fullmatch(r"[\w.*]+", meant) else ""
                found.append(
                    f"{key}={pattern}: patterns are shell-style (fnmatch), not regular expressions: '*.fc1', 'lm_head' "
                    f"or '*.layers.[01].*'{near}"
                )
    return found


def precision_on_device(config: RunConfig) -> list[str]:
    """Apple GPUs have no float64."""
    if config.precision.dtype != "float64" or config.device.problems(1) or config.device.kind() != "mps":
        return []
    return [f"precision={choice(config, 'precision')}: mps has no float64; choose precision=32-true, or device=cpu"]


def float8(config: RunConfig) -> list[str]:
    """Float8 products need kernels, torchao where there are some, and plain linear layers that are whole."""
    said, fix = "precision=fp8-mixed", "use precision=bf16-mixed"
    if config.precision.name != "fp8" or not trains(config):
        return []
    found = []
    if not getattr(config.precision, "emulate", False) and not config.device.problems(1):
        kind, (major, minor) = config.device.kind(), capability()
        lacks = f"device={kind}" if kind != "cuda" else f"a GPU of compute capability {major}.{minor}"
        if kind != "cuda" or (major, minor) < FLOAT8_FROM:
            near = f"{fix}, or precision.emulate=true to see what it would give, slowly"
            found.append(f"{said}: {lacks} has no float8 kernels (8.9 and later have); {near}")
    if not found and find_spec("torchao") is None:
        found.append(f"{said} needs torchao: pip install 'leanfit[fp8]'; or {fix}")
    if config.adapter.trains:
        found.append(f"{said}: adapter={choice(config, 'adapter')} freezes the layers that it speeds up; {fix}")
    if config.parallelism.tensor_ranks > 1:
        found.append(f"{said}: parallelism={choice(config, 'parallelism')} splits layers; {fix}, or parallelism=fsdp")
    found += [
        f"{said}: compression.{stage} trains with rounding of its own; {fix}"
        for stage, method in config.chain.items()
        if method.kind == "quantization" and link_fit(method, config.trainer.max_steps, config.optimizer.lr)
    ]
    return found


def float16_epsilon(config: RunConfig) -> list[str]:
    """With float16 weights, an optimizer's epsilon below float16's range becomes 0 and the first update NaN."""
    epsilon = getattr(config.optimizer, "eps", None)
    pure = config.precision.dtype == "float16" and config.precision.name == "full"
    if not pure or epsilon is None or epsilon >= FLOAT16_SMALLEST or not trains(config):
        return []
    return [
        f"optimizer.eps={epsilon:g} is lost in float16 and gives NaN with precision={choice(config, 'precision')}; "
        "use optimizer.eps=1e-4, or precision=16-mixed"
    ]


def step_in_backward(config: RunConfig) -> list[str]:
    """What needs all gradients of a step at once does not go with stepping while they are computed."""
    if not config.memory.step_in_backward or not trains(config):
        return []
    said, trainer = "memory.step_in_backward=true", config.trainer
    ranks = config.parallelism.data_ranks
    micro = trainer.micro_batch_size or trainer.batch_size // ranks
    found = []
    if trainer.grad_clip is not None:
        found.append(f"{said}: trainer.grad_clip={trainer.grad_clip:g} needs all gradients; use trainer.grad_clip=null")
    if micro * ranks != trainer.batch_size:
        found.append(f"{said} cannot sum micro batches; use trainer.micro_batch_size=null, or a batch_size of {micro}")
    if config.precision.scales_loss:
        found.append(f"{said} cannot skip a step that overflowed, as 16-mixed must; use precision=bf16-mixed")
    if config.parallelism.distributed:
        found.append(f"{said}: gradients must be averaged over devices first; use parallelism=single")
    return found


def offload(config: RunConfig) -> list[str]:
    """A GPU's tensors move to its host; where they are there already, a disk is what is left."""
    found = []
    for key in ("activation_offload", "optimizer_offload"):
        where = getattr(config.memory, key)
        if where == "none" or config.device.problems(1) or not trains(config):
            continue
        kind = config.device.kind()
        if where == "host" and kind != "cuda":
            found.append(f"memory.{key}=host: tensors of device={kind} are in the host's memory; use memory.{key}=disk")
        elif key == "optimizer_offload" and config.parallelism.sharded and kind == "cuda":
            said = f"memory.{key}={where}: parallelism={choice(config, 'parallelism')} puts its shards away itself"
            own = "optimizer" if config.parallelism.name == "deepspeed" else "true"
            found.append(f"{said}; use memory.{key}=none, parallelism.offload={own}")
    return found


def compiles(config: RunConfig) -> list[str]:
    """Kernels are made for CPUs and NVIDIA GPUs, by the system's compiler."""
    if not config.trainer.compile or config.device.problems(1) or not trains(config):
        return []
    said, fix, found = "trainer.compile=true", "use trainer.compile=false", []
    kind = config.device.kind()
    if kind not in ("cpu", "cuda"):
        found.append(f"{said} makes kernels for device=cpu and cuda, not {kind}; {fix}")
    elif lacking := missing_compiler(kind):
        found.append(f"{said}: {lacking}, which kernels for device={kind} are made with; install it, or {fix}")
    if config.memory.activation_checkpointing == "selective":
        found.append(
            f"{said}: results within a compiled block cannot be kept one by one, as "
            "memory.activation_checkpointing=selective does; use memory.activation_checkpointing=full, or none"
        )
    return found


def loss_chunks(config: RunConfig) -> list[str]:
    """Only a language model's loss can be computed in parts, and a distillation loss wants whole logits."""
    said = f"memory.loss_chunks={config.memory.loss_chunks}"
    if config.memory.loss_chunks == 1 or not trains(config):
        return []
    if config.model.task != "causal_lm" and config.job == "run":
        return [f"{said} is for language models, not model={choice(config, 'model')}; use memory.loss_chunks=1"]
    return [
        f"{said}: compression.{stage} compares whole logits with its teacher's; use memory.loss_chunks=1"
        for stage, method in config.chain.items()
        if method.needs_teacher
    ]


def adapter(config: RunConfig) -> list[str]:
    """Adapters train in stage 0 and nowhere else."""
    said = f"adapter={choice(config, 'adapter')}"
    if not config.adapter.trains:
        return []
    if config.optimizer.name == "muon":
        return [f"{said}: muon makes updates of full rank, which its factors have not; use optimizer=adamw"]
    if config.job == "run" and config.trainer.max_steps == 0:
        return [f"{said}: trainer.max_steps=0 leaves nothing to train it; give steps, or adapter=none"]
    if config.job == "compress" and config.artifact is not None and not checkpoints.exists(Path(config.artifact)):
        return [f"{said} trains with job=run and is merged into the artifact already; use adapter=none"]
    return []


def artifact(config: RunConfig) -> list[str]:
    """Every job but `run` works on an artifact made earlier."""
    job, given = config.job, config.artifact
    if job == "run":
        return [f"artifact={given} goes with job=compress, evaluate, verify or generate alone"] if given else []
    if not given:
        return [f"job={job} needs artifact=DIR, the artifact directory of an earlier run (outputs/.../artifact)"]
    path = Path(given)
    if job == "compress" and checkpoints.exists(path):
        return [] if path.suffix == ".ckpt" else [f"artifact={given}: a file must be a checkpoint of a run (.ckpt)"]
    if not os.path.isdir(path):
        return [f"artifact={given}: {'is a file, not a directory' if os.path.exists(path) else 'no such directory'}"]
    if not (path / "manifest.json").is_file():
        inner, last = path / "artifact", path / "last.ckpt"
        meant = f"; did you mean artifact={inner}?" if (inner / "manifest.json").is_file() else ""
        if job == "compress" and last.is_file():
            meant = f"; did you mean artifact={last}?"
        elif (path / "config.json").is_file():
            meant = f"; a Hugging Face directory goes into model=hf model.pretrained={given} trainer.max_steps=0"
        return [f"artifact={given}: no manifest.json there, so it is no artifact{meant}"]
    return []


def artifact_as_it_is(config: RunConfig) -> list[str]:
    """What only looks at an artifact takes its compression and precision: others, if typed, would not run."""
    if config.job not in LOOKING:
        return []
    changes = {"compression": bool(config.chain), "precision": config.choices.get("precision") not in ("32", "32-true")}
    return [
        f"{line} would change nothing: job={config.job} takes the artifact as it is; leave it out"
        for group, asked in changes.items()
        if asked
        for line in _typed_about(config, group)
    ]


def left_aside(config: RunConfig) -> list[str]:
    """What was typed and has no part in the run, but contradicts nothing that is wanted of it: to be told."""
    groups = ASIDE if config.job in LOOKING else ()
    told = [f"{line} has no part in job={config.job}" for group in groups for line in _typed_about(config, group)]
    if config.artifact is None or checkpoints.exists(Path(config.artifact)):
        return told
    brought = [
        f"{line} has no part in this: the artifact brings its own model" for line in _typed_about(config, "model")
    ]
    return [*brought, *told]


def _typed_about(config: RunConfig, group: str) -> list[str]:
    said = re.compile(rf"\+*{group}[.=]")
    return [line for line in config.overrides if said.match(line)]


def something_to_compress(config: RunConfig) -> list[str]:
    if config.job != "compress" or config.chain:
        return []
    methods = ", ".join(name for name in registry.available("compression") if name != "none")
    return [f"job=compress needs a method: compression=CHOICE, one or a list of {methods}"]


def prompts(config: RunConfig) -> list[str]:
    """`generate` takes one prompt, other jobs none."""
    given = [key for key in ("prompt", "prompt_file") if getattr(config, key) is not None]
    if config.job != "generate":
        return [f"{key} goes with job=generate alone" for key in given]
    if len(given) != 1:
        return ["job=generate needs one prompt: prompt=TEXT or prompt_file=PATH" + (", not both" if given else "")]
    if config.prompt == "":
        return ["prompt is empty; give at least one character"]
    return [] if config.prompt_file is None else _prompt_file(config.prompt_file)


def _prompt_file(given: str) -> list[str]:
    if not os.path.isfile(given):
        return [f"prompt_file={given}: {'is no file' if os.path.exists(given) else 'no such file'}"]
    try:
        text = Path(given).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        return [f"prompt_file={given}: is not UTF-8 text (byte {error.start}); save it as UTF-8"]
    except OSError as error:
        return [f"prompt_file={given}: cannot be read: {error.strerror}"]
    return [] if text else [f"prompt_file={given}: is empty; give at least one character"]


RULES: tuple[Callable[[RunConfig], list[str]], ...] = (
    own_problems,
    model_and_data,
    device,
    device_memory,
    batch_divides,
    chain_order,
    pruning_grows,
    samples_of_calibration,
    texts_to_go_on_with,
    ignore_patterns,
    precision_on_device,
    float8,
    float16_epsilon,
    step_in_backward,
    offload,
    compiles,
    *OF_RANKS,
    loss_chunks,
    adapter,
    artifact,
    artifact_as_it_is,
    something_to_compress,
    prompts,
)


def _words(task: str) -> str:
    return {"causal_lm": "language modelling"}.get(task, task.replace("_", " "))
