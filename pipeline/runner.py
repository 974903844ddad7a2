"""Runs one job of a decoded config in a run directory, and leaves result.json and the report whatever happens."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import yaml

from pipeline import checkpoints
from pipeline.artifact import receipt, store
from pipeline.chain import Stage
from pipeline.data.base import DataBundle
from pipeline.earlier_run import OF_WEIGHTS, lock_of, with_group
from pipeline.errors import ArtifactError, ConfigError, LeanfitError, ReceiptError, exhausted
from pipeline.fitting import checkpoint_directory
from pipeline.layers.pulse import pulse
from pipeline.memory.measure import measure_peak
from pipeline.nodes import Leader, leading
from pipeline.planner.exhaustion import explained, lighter, release
from pipeline.planner.fit_job import fit
from pipeline.planner.links import trace_artifact
from pipeline.planner.plan import TRACED, Plan, plan, remember
from pipeline.planner.search import Candidate
from pipeline.proof import prove
from pipeline.recipes import label, lock_text, locked_values
from pipeline.report.console import console, mode
from pipeline.report.markdown import write_report
from pipeline.report.plan_table import plan_report, plan_table
from pipeline.report.progress import Progress
from pipeline.report.result import new_result, write_result, write_text
from pipeline.report.table import closing_lines, closing_table
from pipeline.rules import LOOKING
from pipeline.schema import RunConfig, values_of
from pipeline.stage_input import data_problems
from pipeline.tasks import lookup
from pipeline.tasks.base import Task
from pipeline.versions import versions
from pipeline.walk import Run, begin, changing_stages, discard, evaluate, preflight, stages_of, walk

log = logging.getLogger(__name__)
Job = Callable[[RunConfig, Path, dict[str, Any]], None]


def run(config: RunConfig, run_dir: Path) -> dict[str, Any]:
    """Do `config.job` in `run_dir` and return what result.json says.

    Raises:
        ConfigError: found only with the model's shapes at hand (a group size that does not divide).
        ReceiptError: the receipt, a gate or `job=verify` was not met.
    """
    jobs: dict[str, Job] = {
        "run": train_and_compress,
        "plan": plan_run,
        "fit": fit_run,
        "compress": train_and_compress,
        "evaluate": evaluate_artifact,
        "verify": verify_artifact,
        "generate": generate_text,
    }
    result = new_result(config.job, list(config.overrides), dict(config.choices))
    note_choices(config, result)
    reason = config.device.reason()
    here = not config.device.problems(1)  # a plan may be for a machine that is not
    name = config.device.description() if here else None
    result["device"] = {"kind": config.device.kind(), "name": name, "reason": reason}
    for said in (reason, config.model.note() if config.artifact is None else None):
        if said is not None:
            log.info(said)
            if not config.sweep and config.job != "generate":  # whose output is the text alone
                console().print(said, soft_wrap=True, markup=False)
    started = time.perf_counter()
    try:
        jobs[config.job](config, run_dir, result)
        result["status"] = "ok"
    except ConfigError:
        # A run that never began leaves what an earlier one wrote as it is.
        raise
    except BaseException as error:
        result["status"] = "gate" if isinstance(error, ReceiptError) else "failed"
        # After Ctrl-C in a fit, traced ones too, Lightning exits with a code of its own.
        ended = isinstance(error, SystemExit) and isinstance(error.__context__, KeyboardInterrupt)
        kind = "KeyboardInterrupt" if ended else type(error).__name__
        result["error"] = {"type": kind, "message": kind if ended else str(error) or kind}
        raise
    finally:
        if result["status"] is not None:
            note_errors(result["memory"])
            result["seconds"] = time.perf_counter() - started
            settled = write_result(run_dir / "result.json", result)
            close(config, run_dir, settled)
    return settled


def note_choices(config: RunConfig, result: dict[str, Any]) -> None:
    """What runs, in the result."""
    ranks = config.parallelism
    used = ("single", 1, 1) if config.job in LOOKING else (ranks.name, ranks.devices, ranks.nodes)
    result["parallelism"] = dict(zip(("strategy", "devices", "nodes"), used, strict=True))
    result["precision"] = {"requested": str(config.choices["precision"]), "used": config.precision.label}


def note_errors(memory: dict[str, Any]) -> None:
    """Predicted / measured - 1 of each phase that has both, allocated and reserved."""
    kinds = (("predicted", "measured", "error"), ("reserved_predicted", "reserved", "reserved_error"))
    for predicted, measured, error in kinds:
        for phase, came in memory[measured].items():
            if came and memory[predicted][phase] is not None:
                memory[error][phase] = memory[predicted][phase] / came - 1


def close(config: RunConfig, run_dir: Path, result: dict[str, Any]) -> None:
    """The report, and the closing table where a person is watching a run that produced something."""
    if config.job == "generate" or result["status"] == "failed":
        return
    if config.job in ("run", "compress") or (config.job == "fit" and config.fit.run):
        write_report(run_dir, result)
    if not config.sweep:
        if result["quality"]["after"] is not None:
            console().print(closing_table(result))
        for line in closing_lines(result, run_dir):
            console().print(line, soft_wrap=True, markup=False)


def plan_run(config: RunConfig, run_dir: Path, result: dict[str, Any]) -> None:
    """`job=plan`: predicted peaks of `job=run` with this config, in plan.json and as a table."""
    tokenizer = config.model.tokenizer()
    data = config.data.open(tokenizer)
    preflight(config, data, tokenizer, run_dir, changing_stages(stages_of(config)))
    found = predicted(config, data, tokenizer, run_dir, result)
    write_text(run_dir / "report.md", plan_report(found, run_dir, config.overrides))
    if not config.sweep:
        console().print(plan_table(found))
        if said := found.verdict():
            console().print(said, soft_wrap=True, markup=False)


def fit_run(config: RunConfig, run_dir: Path, result: dict[str, Any]) -> None:
    """`job=fit`: the fastest config that fits in a budget, and with `fit.run` its run."""
    best = fit(config, run_dir, result)
    if config.fit.run:
        result["choices"] = new_result("fit", [], best.choices)["choices"]
        note_choices(best, result)
        train_and_compress(best, run_dir, result)


def predicted(
    config: RunConfig, data: DataBundle, tokenizer: Any, run_dir: Path, result: dict[str, Any], done: int = 0
) -> Plan:
    """The plan, in plan.json and in the result."""
    found = plan(config, data, tokenizer, done=done)
    found.write(run_dir / "plan.json")
    for name in result["memory"]["predicted"]:
        phase = found.phases.get(name)
        result["memory"]["predicted"][name] = phase.bytes if phase else None
        result["memory"]["reserved_predicted"][name] = phase.reserved if phase else None
    return found


def train_and_compress(config: RunConfig, run_dir: Path, result: dict[str, Any]) -> None:
    """`job=run` and `job=compress`: every stage of the run, with the other machines if there are any."""
    with leading(config, run_dir) as nodes:
        do_stages(config, run_dir, result, nodes)


def do_stages(config: RunConfig, run_dir: Path, result: dict[str, Any], nodes: Leader | None) -> None:
    """Every stage of the run, its artifact and the proof of it."""
    earlier: list[dict[str, Any]] = []
    tokenizer = None
    if config.job == "compress" and config.artifact is not None and checkpoints.exists(Path(config.artifact)):
        config = with_settings_of_run(config, Path(config.artifact), run_dir)
    elif config.job == "compress" and config.artifact is not None:
        earlier = store.read_manifest(Path(config.artifact))["chain"]
        tokenizer = store.load_tokenizer(Path(config.artifact))
        config = with_data_of(config, Path(config.artifact), run_dir)
    tokenizer = tokenizer or config.model.tokenizer()
    data = config.data.open(tokenizer)
    task = lookup.get(config.data.task)
    lock: dict[str, Any] = {
        "versions": versions(),
        "device": {key: result["device"][key] for key in ("kind", "name")},
        "data": data.fingerprint,
        "result": None,
    }
    warn_of_differences(config, lock)
    line = stages_of(config)
    steps = {stage.name: stage.fit.steps for stage in line if stage.fit}
    progress = Progress(steps, mode(console(), config.sweep), task.unit)
    locked = run_dir / "recipe.lock.yaml"
    run = Run(config, run_dir, task, data, tokenizer, earlier, progress, result, nodes=nodes)
    while True:
        done = begin(run, line)
        with progress:
            found = fitting_plan(run, done)
            # What else is in this directory is of another run, which the new lock would pass for this one.
            discard(run, changing_stages(line), done)
            write_text(locked, lock_text(values_of(run.config), config.choices, lock))
            next_one = attempt(run, line, done, found)
        if next_one is None:
            break
        result["memory"]["adapted"] += next_one.changes
        result["stages"].clear()
        resumable = checkpoints.exists(checkpoint_directory(run_dir, line[0]) / "last.ckpt")
        run = replace(run, config=replace(next_one.config, fit=config.fit, resume=resumable), begun=False, links=[])
    config = run.config
    lock["result"] = {key: result[key] for key in ("quality", "size", "speed")}
    write_text(locked, lock_text(values_of(config), config.choices, lock))


def fitting_plan(run: Run, done: int) -> Plan:
    """What the run will take, noted; `done`: stages that it is through with.

    Raises:
        ConfigError: it will not fit.
    """
    config = run.config
    with run.progress.phase("planning"):
        found = predicted(config, run.data, run.tokenizer, run.directory, run.result, done)
    run.planned = {name: phase.bytes for name, phase in found.phases.items()}
    if found.fits is False and config.plan.enforce:
        raise ConfigError(f"{found.verdict()}; job=fit searches what fits, plan.enforce=false runs it all the same")
    return found


def attempt(run: Run, line: Sequence[Stage], done: int, found: Plan) -> Candidate | None:
    """Every stage from the first that is not done; what to go on with where memory ran out and that is wanted.

    Raises:
        ConfigError: something that is found late before anything was done.
        LeanfitError: memory ran out.
    """
    config = run.config
    try:
        walk(run, line, done)
        prove(run, line)
    except ConfigError as error:
        if run.begun:
            raise LeanfitError("; ".join(error.problems)) from error
        raise
    except Exception as error:
        if not exhausted(error):
            raise
        log.error("out of memory", exc_info=error)
        said = str(error) or type(error).__name__
    else:
        if config.plan.calibrate:
            remember(config, found, run.result["memory"]["measured"])
        return None
    # Not within the handler: the error's traceback holds what the run held.
    release()
    next_one = lighter(config, found, run.doing, run.directory)
    told = explained(said, run.doing, found, next_one)
    if next_one is None:
        raise LeanfitError(told)
    if config.fit.on_oom == "stop":
        raise LeanfitError(f"{told}, and fit.on_oom=adapt goes on with that by itself")
    run.progress.say(f"{told}: goes on with that")
    return next_one


def with_data_of(config: RunConfig, artifact: Path, run_dir: Path) -> RunConfig:
    """The config with the data that the artifact was made with, unless the command line or a recipe chooses a group.

    Single values of the command line (`data.evaluation_tokens=...`) are laid over it.
    """
    keys = typed_keys(config, "data", run_dir)
    if keys is None:
        return config
    made_with = store.read_manifest(artifact).get("data")
    if not isinstance(made_with, dict):  # of another writer than a run, or altered
        raise ArtifactError(f"{artifact}: its manifest does not say what data it was made with; choose data=CHOICE")
    return with_group(config, "data", {**made_with, **keys}, artifact)


def with_settings_of_run(config: RunConfig, checkpoint: Path, run_dir: Path) -> RunConfig:
    """The config with the model, data and adapters of the run that wrote a checkpoint, which says nothing of shapes
    itself; as above, what is typed or a recipe says wins. Without that run's lock, the config as it is.
    """
    lock = lock_of(checkpoint)
    if lock is None:
        return config
    said, taken = locked_values(lock), []
    for group in OF_WEIGHTS:
        keys = typed_keys(config, group, run_dir)
        if keys is not None and isinstance(said.get(group), dict):
            config = with_group(config, group, {**said[group], **keys}, lock)
            taken.append(group + "".join(f", with {group}.{key} as given" for key in keys))
    if taken and not config.sweep:
        told = f"artifact={checkpoint}: settings of its run are taken from {label(lock)}: {'; '.join(taken)}"
        console().print(told, soft_wrap=True)
    return config


def typed_keys(config: RunConfig, group: str, run_dir: Path) -> dict[str, Any] | None:
    """Values of a group that the command line gives one by one; None where it, or a recipe, chooses the group."""
    typed = [re.fullmatch(rf"\+*{group}(?:\.(\w+))?=.*", line, re.DOTALL) for line in config.overrides]
    keys = [match[1] for match in typed if match]
    if None in keys or chosen_by_recipe(group, run_dir):
        return None
    return {key: getattr(getattr(config, group), key) for key in keys}


def chosen_by_recipe(group: str, run_dir: Path) -> bool:
    """Whether a recipe of this run, as copied into its directory, says anything of `group`."""
    for file in run_dir.glob(".hydra*/recipe.*"):
        content = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
        entries = [entry for entry in content.get("defaults") or [] if isinstance(entry, dict)]
        if group in content or any(f"override /{group}" in entry for entry in entries):
            return True
    return False


def warn_of_differences(config: RunConfig, now: dict[str, Any]) -> None:
    """One line for each thing that differs from the run that a lock file repeats.

    Raises:
        ConfigError: the data of a run that is resumed, whose order and windows its checkpoints count on.
    """
    if config.lock is None:
        return
    if config.resume and config.lock.get("data") not in (None, now["data"]):
        raise ConfigError(
            f"data={config.choices['data']}: what it reads has changed since the run that is resumed began; bring back "
            "what it was, or begin anew with recipe=DIR/recipe.lock.yaml"
        )
    then = config.lock.get("versions") or {}
    differing = [
        f"{name} {then.get(name)} then, {new} now" for name, new in now["versions"].items() if then.get(name) != new
    ]
    if config.lock.get("data") != now["data"]:
        differing.append("the data has another fingerprint")
    if config.lock.get("device") != now["device"]:
        differing.append(f"device {config.lock.get('device')} then, {now['device']} now")
    for difference in differing:
        console().print(f"warning: the locked run differs: {difference}", soft_wrap=True, markup=False)


def opened(config: RunConfig, run_dir: Path, result: dict[str, Any]) -> tuple[RunConfig, Run]:
    """What a job on a finished artifact needs."""
    assert config.artifact is not None
    artifact = Path(config.artifact)
    config = with_data_of(config, artifact, run_dir)
    tokenizer = store.load_tokenizer(artifact)
    data = config.data.open(tokenizer)
    if told := data_problems(config, store.blueprint(artifact), data):
        raise ConfigError(told)
    task = lookup.get(config.data.task)
    progress = Progress({}, mode(console(), config.sweep), task.unit)
    return config, Run(config, run_dir, task, data, tokenizer, [], progress, result)


def evaluate_artifact(config: RunConfig, run_dir: Path, result: dict[str, Any]) -> None:
    """`job=evaluate`: quality, size and speed of an artifact, beside what its manifest claims."""
    config, run = opened(config, run_dir, result)
    artifact = Path(str(config.artifact))
    manifest = store.read_manifest(artifact)
    with run.progress:
        model = store.load(artifact, device=run.device, sparse_kernels=True)
        with (
            run.progress.phase("evaluating"),
            measure_peak(run.device, [*model.parameters(), *model.buffers()]) as peak,
        ):
            quality = evaluate(run, model)
        with run.progress.phase("measuring speed"), config.precision.evaluation_context(run.device):
            speed = run.task.speed({"after": model}, run.data, run.device)["after"]
    same = manifest.get("data") == asdict(config.data) and manifest.get("fingerprint") == run.data.fingerprint
    claimed = (manifest["quality"] or {}) if same else {}  # measured on other data, it would be no `before`
    result["quality"].update(
        metric=quality.metric, direction=quality.direction, before=claimed.get("before"), after=quality.value,
        loss_before=claimed.get("loss_before"), loss_after=quality.loss,
        baseline=run.task.baseline(run.data), n=quality.n,
    )  # fmt: skip
    result["size"] = {**result["size"], **(manifest["size"] or {}), "bytes_after": store.tensor_bytes(artifact)}
    result["speed"].update(
        unit=speed.unit, after=speed.per_second, latency_after=speed.latency, batch_size=speed.batch_size
    )
    result["memory"]["measured"]["evaluate"] = peak.bytes
    result["memory"]["reserved"]["evaluate"] = peak.reserved
    describe_artifact(result, artifact)


def describe_artifact(result: dict[str, Any], artifact: Path) -> None:
    """`artifact` of result.json, but for what only a reload can tell."""
    manifest = store.read_manifest(artifact)
    result["artifact"].update(path=str(artifact), format=manifest["format"], files=store.files(artifact))


def verify_artifact(config: RunConfig, run_dir: Path, result: dict[str, Any]) -> None:
    """`job=verify`: checksums, a reload in a fresh process, the recorded outputs."""
    artifact = Path(str(config.artifact))
    proof = receipt.check(artifact)
    if proof.ok:
        describe_artifact(result, artifact)
    result["artifact"]["reload"] = {"ok": proof.ok, "max_abs_diff": proof.max_abs_diff}
    if not proof.ok:
        raise ReceiptError("; ".join(f"{artifact}: {problem}" for problem in proof.problems))


def generate_text(config: RunConfig, run_dir: Path, result: dict[str, Any]) -> None:
    """`job=generate`: the prompt and what the model makes of it, on standard output, and nothing else there."""
    artifact = Path(str(config.artifact))
    tokenizer = store.load_tokenizer(artifact)
    if tokenizer is None:
        raise ConfigError(
            f"artifact={artifact}: it holds no tokenizer, so it cannot generate text; choose a language model"
        )
    # A file's bytes as they are: `read_text` would turn the ends of lines into this system's.
    prompt = config.prompt if config.prompt is not None else Path(str(config.prompt_file)).read_bytes().decode("utf-8")
    task: Any = lookup.get("causal_lm")
    settings, device = config.generate, config.device.kind()
    words = len(tokenizer(prompt, verbose=False)["input_ids"])
    result["memory"]["predicted"]["generate"] = foreseen(config, artifact, task, max(1, words))
    model = store.load(artifact, device=device, sparse_kernels=True)
    model.register_forward_pre_hook(lambda *_: pulse())
    with (
        measure_peak(device, [*model.parameters(), *model.buffers()]) as peak,
        config.precision.evaluation_context(device),
        torch.inference_mode(),
    ):
        text = task.generate(
            model,
            tokenizer,
            prompt,
            max_new_tokens=settings.max_new_tokens,
            temperature=settings.temperature,
            seed=config.trainer.seed,
        )
    result["memory"]["measured"]["generate"] = peak.bytes
    result["memory"]["reserved"]["generate"] = peak.reserved
    result["memory"]["kind"] = "allocated"
    print(text)
    describe_artifact(result, artifact)


def foreseen(config: RunConfig, artifact: Path, task: Task, prompt: int) -> int | None:
    """Bytes that generation after a prompt of so many tokens is predicted to hold; None where it cannot be traced."""
    if config.device.kind() not in TRACED:
        return None
    try:
        return trace_artifact(config, artifact, task, prompt).bytes
    except ArtifactError:
        raise
    except Exception as error:  # whatever a model makes of tensors without values
        log.info("generation cannot be traced", exc_info=error)
        return None
