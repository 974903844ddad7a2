"""Distilling from logits on disk: the same fit as with the teacher at hand, but for float16, and no stale answers."""

import gc
import math
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import lightning.pytorch as lightning
import pytest
import torch

from pipeline import recording
from pipeline.artifact import store
from pipeline.chain import Stage
from pipeline.composing import compose
from pipeline.errors import ConfigError, LeanfitError
from pipeline.fitting import fit, fit_inputs
from pipeline.layers.logit_cache import ROWS, LogitCache
from pipeline.models.architecture import describe
from pipeline.recording import place, recorded, space_problems
from pipeline.schema import RunConfig
from pipeline.stage_input import FIRST, base_model, context_of, stage_input
from pipeline.tasks import lookup
from pipeline.teacher import FrozenTeacher, RecordedTeacher
from pipeline.walk import stages_of

TEXT = ["model=gpt_nano", "data=text", "data.path=corpus", "data.sequence_length=16", "data.evaluation_fraction=0.1"]
IMAGES = ["model=efficientnet", "data=digits", "data.image_size=8", "compression.distill.student=student"]
COMMON = ["trainer=smoke", "device=cpu", "compression=distill", "compression.distill.steps=6"]


@pytest.fixture(autouse=True)
def corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """About 36 windows to train on: six steps of eight samples see some of them twice."""
    monkeypatch.setenv("LEANFIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    Path("corpus").mkdir()
    for number in range(10):
        Path(f"corpus/{number}.txt").write_text(f"{number}: the {number + 3}rd line, and {number**3} more of it " * 2)


class Steps(lightning.Callback):
    """The loss of every micro batch; stops the fit dead before the optimizer step `dies`."""

    def __init__(self, dies: int | None) -> None:
        self.dies, self.losses = dies, []

    def on_train_batch_start(self, trainer, *_):
        if trainer.global_step == self.dies:
            raise LeanfitError("cut off")

    def on_train_batch_end(self, trainer, module, outputs, *_):
        self.losses.append(float(outputs["loss"]))


@dataclass
class Link:
    """A run as far as its first link: the trained model has its snapshot."""

    config: RunConfig
    directory: Path
    stage: Stage

    def __post_init__(self) -> None:
        self.data = self.config.data.open(self.config.model.tokenizer())
        self.task = lookup.get(self.config.data.task)
        self.said: list[str] = []

    def context(self):
        model = stage_input(self.config, self.directory, self.data, stages_of(self.config), self.stage)
        context = context_of(self.config, self.stage, model, self.data, None, self.directory)
        student = self.stage.method.prepare(model, context)
        return student, replace(context, architecture=describe(student))

    def record(self, context):
        return recorded(self.config, self.stage, self.directory, self.data, context, self.said.append)

    def train(self, record: bool = True, dies: int | None = None, resume: bool = False, teacher=None):
        """(losses, weights, context) of the link's fit."""
        student, context = self.context()
        if record:
            context = self.record(context)
        if teacher is not None:
            context = replace(context, teacher=teacher(context.teacher))
        steps = Steps(dies)
        fitted = fit(
            self.config, self.stage, student, self.task, self.data, context.architecture, self.directory,
            callbacks=[steps], loss=self.stage.method.loss(context), resume=resume,
        )  # fmt: skip
        assert fitted.train["steps"] == self.stage.fit.steps
        return steps.losses, student.state_dict(), context


def link(name: str, *overrides: str, seed: int = 0) -> Link:
    Path(name).mkdir(exist_ok=True)
    config = compose([*COMMON, "compression.distill.cache_logits=true", *overrides])
    made = Link(config, Path(name), stages_of(config)[1])
    if not (Path(name) / "stages" / FIRST).exists():
        torch.manual_seed(seed)
        model = base_model(replace(config, trainer=replace(config.trainer, seed=seed)), made.data)
        for parameter in model.parameters():  # answers that differ from those of a fresh model
            parameter.data.add_(0.1 * torch.randn_like(parameter))
        store.save(
            model.eval(), Path(name) / "stages" / FIRST, chain=[],
            tokenizer=config.model.tokenizer(), probe=probe(made),
        )  # fmt: skip
    return made


def probe(made: Link):
    """In the weights' dtype."""
    dtype = made.config.precision.weight_dtype
    return {k: v.to(dtype) if v.is_floating_point() else v for k, v in made.task.probe(made.data).items()}


def student_directory() -> None:
    """A smaller classifier than the model of IMAGES."""
    config = compose(["model=efficientnet", "data=digits", "data.image_size=8", "model.width_coefficient=0.5"])
    config.model.build(config.data.open(None).spec).save_pretrained("student")


def largest_move(chosen: Link) -> float:
    """The most by which rounding the teacher's logits to float16 can move the loss of the fit's first batch.

    By e = |logit - largest| x 2^-11 each. The slope of KL(t / T || s / T) in t_i is p_i (log p_i / q_i - KL) / T, which
    over all i adds up to at most 2 max |log p / q| / T; the loss has it times T^2 and the weight.
    """
    student, context = chosen.context()
    inputs = next(fit_inputs(chosen.config, chosen.stage, chosen.data))
    with torch.no_grad():
        logits, ours = context.teacher(inputs).logits.double(), student(**inputs).logits.double()
    e = float((logits.amax(-1, True) - logits).max()) * 2**-11
    apart = float(((logits / 2).log_softmax(-1) - (ours / 2).log_softmax(-1)).abs().max())
    return chosen.stage.method.logits_weight * 2**2 * e * 2 * apart / 2


@pytest.mark.parametrize("top_k", [pytest.param("null", marks=pytest.mark.slow), "5"])
def test_a_fit_from_disk_is_the_fit_with_the_teacher_but_for_float16(top_k):
    extra = [f"compression.distill.top_k={top_k}"]
    at_hand, weights, _ = link("a", *TEXT, *extra).train(record=False)
    from_disk, others, context = link("b", *TEXT, *extra).train()
    assert isinstance(context.teacher, RecordedTeacher)
    assert at_hand != from_disk
    allowed = largest_move(link("a", *TEXT))
    assert allowed < 0.01 * at_hand[0]
    assert all(abs(one - other) < allowed for one, other in zip(at_hand, from_disk, strict=True))
    # Roundings go both ways: they nearly cancel.
    assert from_disk == pytest.approx(at_hand, rel=1e-5)
    before = link("a", *TEXT).context()[0].state_dict()
    # AdamW takes whole steps where a gradient is all but nothing, and there rounding has its say.
    assert 0 < distance(weights, others) < 0.05 * distance(weights, before)


def distance(one, other) -> float:
    return math.sqrt(sum(float((one[name] - other[name]).square().sum()) for name in one))


def test_with_the_same_rounding_of_a_teacher_at_hand_it_is_the_same_fit_bit_for_bit():
    class Rounding:
        def __init__(self, teacher):
            self.teacher, self.architecture = teacher, teacher.architecture

        def __call__(self, batch, observe=()):
            answer = self.teacher(batch, observe)
            values, classes = answer.logits.topk(5, -1)
            return answer._replace(logits=(values - values[..., :1]).half().float(), classes=classes)

    extra = ["compression.distill.top_k=5"]
    at_hand, weights, _ = link("a", *TEXT, *extra).train(record=False, teacher=Rounding)
    from_disk, others, _ = link("b", *TEXT, *extra).train()
    assert at_hand == from_disk
    assert all(torch.equal(weights[name], others[name]) for name in weights)


ALL_PRECISIONS = ["64-true", "16-true", "bf16-true", "16-mixed", "bf16-mixed"]


@pytest.mark.parametrize(
    ("kind", "precision"),
    [("text", "bf16-mixed"), ("images", "bf16-true")]
    + [
        pytest.param(kind, precision, marks=pytest.mark.slow)
        for kind, spared in (("text", "bf16-mixed"), ("images", "bf16-true"))
        for precision in ALL_PRECISIONS
        if precision != spared
    ],
)
def test_every_precision_and_kind_of_data_finds_its_samples_again(precision, kind):
    if kind == "images":
        student_directory()
    steady = ["optimizer.eps=1e-4"] if precision == "16-true" else []
    chosen = link("a", *(TEXT if kind == "text" else IMAGES), f"precision={precision}", *steady)
    losses, _, context = chosen.train()
    assert all(map(math.isfinite, losses))
    samples = chosen.config.trainer.batch_size * 6
    assert len(context.teacher.cache) == (samples if kind == "images" else len(chosen.data.train))
    shape = context.teacher.cache._rows["logits"].shape[1:]
    assert shape == ((10,) if kind == "images" else (16, 256))


@pytest.mark.slow
def test_images_teach_from_disk_as_they_do_at_hand():
    student_directory()
    at_hand, _, _ = link("a", *IMAGES).train(record=False)
    from_disk, _, _ = link("b", *IMAGES).train()
    assert from_disk == pytest.approx(at_hand, rel=1e-4)


@pytest.mark.parametrize(
    "extra",
    [
        pytest.param([], marks=pytest.mark.slow),
        ["model.dropout=0.1", "trainer.micro_batch_size=2", "precision=bf16-mixed"],
    ],
)
def test_a_fit_cut_off_in_the_middle_goes_on_to_the_same_bits_without_opening_the_teacher(extra, monkeypatch):
    settings = [*TEXT, *extra, "trainer.checkpoint_every=2"]
    _, wanted, _ = link("whole", *settings).train()
    broken = link("broken", *settings)
    with pytest.raises(LeanfitError, match="cut off"):
        broken.train(dies=3)
    before = {path.name: path.read_bytes() for path in place(broken.directory, broken.stage).iterdir()}
    opened = []
    monkeypatch.setattr(FrozenTeacher, "__call__", lambda *a: pytest.fail("the teacher was run"))
    monkeypatch.setattr("pipeline.stage_input.frozen", lambda model: opened.append(model) or model)
    losses, got, context = broken.train(resume=True)
    assert opened == []
    assert context.facts["cached_logits"]["found"]
    assert not context.facts["cached_logits"]["teacher_held"]
    assert len(losses) < 6 * 8 // broken.config.trainer.batch_size * (4 if extra else 1)
    assert all(torch.equal(wanted[name], got[name]) for name in wanted)
    assert {path.name: path.read_bytes() for path in place(broken.directory, broken.stage).iterdir()} == before
    assert broken.stage.method.detail(None, context)["teacher_layers"] == 2


def test_the_teacher_is_let_go_and_the_detail_says_what_that_saved():
    chosen = link("a", *TEXT)
    _, context = chosen.context()
    context = chosen.record(context)
    gc.collect()
    alive = [one for one in gc.get_objects() if type(one) is FrozenTeacher]
    assert alive == []
    facts = context.facts["cached_logits"]
    held = {path.name: path.stat().st_size for path in place(chosen.directory, chosen.stage).iterdir()}
    assert facts["bytes"] == sum(held.values())
    weights = store.load(chosen.directory / "stages" / FIRST).parameters()
    assert facts["teacher_bytes"] == sum(parameter.nbytes for parameter in weights)
    assert (facts["found"], facts["teacher_held"]) == (False, False)
    assert facts["samples"] == len(chosen.data.train) < 48
    assert facts["seconds"] > 0
    with pytest.raises(LeanfitError, match="is not held"):
        _ = context.teacher.model
    with pytest.raises(LeanfitError, match="cannot be watched"):
        context.teacher({"input_ids": torch.zeros(1, 16, dtype=torch.int64)}, ["model.decoder.layers.0"])


def test_what_will_be_written_is_foretold():
    chosen = link("a", *TEXT)
    chosen.record(chosen.context()[1])
    (said,) = chosen.said
    count = len(chosen.data.train)
    size = f"{count * (16 * 256 * 2 + 12) / 1000:.0f} kB"
    assert said == f"distill: the teacher's logits are written to disk, up to {size}"
    held = (place(chosen.directory, chosen.stage) / ROWS).stat().st_size
    assert held == count * 16 * 256 * 2


OTHER_FITS = {
    "trainer.seed=1": "seed", "compression.distill.top_k=7": "top_k", "compression.distill.steps=7": "samples",
    "trainer.batch_size=4": "samples", "precision=bf16-mixed": "precision", "data.evaluation_fraction=0.2": "data",
}  # fmt: skip


def test_logits_recorded_for_another_fit_are_not_used():
    first = link("a", *TEXT)
    cache = first.record(first.context()[1]).teacher.cache
    about = recording.recorded_for(first.config, first.stage, first.directory, first.data)
    assert cache.about == about
    alike = link("a", *TEXT, "compression.distill.temperature=3", "compression.distill.lr=1", "trainer.log_every=1")
    assert recording.recorded_for(alike.config, alike.stage, alike.directory, alike.data) == about
    for change, named in OTHER_FITS.items():
        then = link("a", *TEXT, change)
        other = recording.recorded_for(then.config, then.stage, then.directory, then.data)
        assert [key for key in about if about[key] != other[key]] == [named]
    context = then.record(then.context()[1])
    assert then.said[0] == (
        "distill: the teacher's logits are recorded anew: those on disk were recorded for another data"
    )
    assert not context.facts["cached_logits"]["found"]
    assert context.teacher.cache.about == other


@pytest.mark.parametrize(
    "teacher", ["other/last.ckpt", *(pytest.param(t, marks=pytest.mark.slow) for t in ("self", "other"))]
)
def test_logits_of_a_teacher_that_was_changed_since_are_not_used(teacher):
    other = link("other-run", *TEXT, seed=1)
    shutil.copytree(other.directory / "stages" / FIRST, "other")
    model = store.load(Path("other"))
    torch.save({"state_dict": {f"model.{k}": v for k, v in model.state_dict().items()}}, "other/last.ckpt")
    chosen = link("a", *TEXT, f"compression.distill.teacher={teacher}")
    before = chosen.record(chosen.context()[1]).teacher
    changed = {"self": chosen.directory / "stages" / FIRST, "other": Path("other")}.get(teacher)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    if changed is None:
        torch.save({"state_dict": {f"model.{k}": v for k, v in model.state_dict().items()}}, teacher)
    else:
        shutil.rmtree(changed)
        store.save(model, changed, chain=[], probe=chosen.task.probe(chosen.data))
    inputs = next(fit_inputs(chosen.config, chosen.stage, chosen.data))
    old, _ = before.cache.read(inputs)
    context = chosen.record(chosen.context()[1])
    assert chosen.said[1].endswith("recorded for another teacher")
    new, _ = context.teacher.cache.read(inputs)
    assert not torch.equal(old, new)
    with torch.no_grad():
        wanted = model(**inputs).logits
    torch.testing.assert_close(new, wanted - wanted.amax(-1, True), atol=0.02, rtol=0)


def test_damaged_logits_are_recorded_anew_and_it_is_said():
    chosen = link("a", *TEXT)
    for damage in ("flip", "cut", "gone", "rubbish"):
        damaged_and_recorded(chosen, damage)


def damaged_and_recorded(chosen: Link, damage: str) -> None:
    first = chosen.record(chosen.context()[1]).teacher.cache
    inputs = next(fit_inputs(chosen.config, chosen.stage, chosen.data))
    wanted, _ = first.read(inputs)
    rows = place(chosen.directory, chosen.stage) / ROWS
    content = bytearray(rows.read_bytes())
    if damage == "gone":
        rows.unlink()
    elif damage == "flip":
        content[len(content) // 2] ^= 1
        rows.write_bytes(content)
    elif damage == "cut":
        rows.write_bytes(content[:-100])
    else:
        (rows.parent / "cache.json").write_text("{")
    chosen.said.clear()
    context = chosen.record(chosen.context()[1])
    assert chosen.said[0].startswith("distill: the teacher's logits are recorded anew: ")
    assert torch.equal(context.teacher.cache.read(inputs)[0], wanted)


def test_logits_damaged_during_the_fit_end_it():
    chosen = link("a", *TEXT)

    def damage(teacher):
        rows = place(chosen.directory, chosen.stage) / ROWS
        with rows.open("r+b") as file:
            file.write(b"\xff" * rows.stat().st_size)
        return teacher

    with pytest.raises(LeanfitError, match=r"rows\.bin were altered"):
        chosen.train(teacher=damage)


def test_data_that_gives_other_samples_each_time_is_told(monkeypatch):
    chosen = link("a", *TEXT)
    context = chosen.record(chosen.context()[1])
    original = type(chosen.data.train).__getitems__

    def noisy(self, indices):
        batch = original(self, indices)
        ids = batch["input_ids"] ^ 1
        return {"input_ids": ids, "labels": ids}

    monkeypatch.setattr(type(chosen.data.train), "__getitems__", noisy)
    with pytest.raises(LeanfitError, match="8 of a batch's 8 samples were not recorded"):
        chosen.train(record=False, teacher=lambda _: context.teacher)


def test_a_disk_too_small_is_told_before_training(monkeypatch):
    chosen = link("a", *TEXT, "compression.distill.top_k=20")
    context = context_of(chosen.config, chosen.stage, base_model(chosen.config, chosen.data))
    arguments = chosen.config, chosen.stage, chosen.directory, chosen.data, context
    assert space_problems(*arguments) == []
    count = len(chosen.data.train)
    monkeypatch.setattr(recording.shutil, "disk_usage", lambda _: SimpleNamespace(free=count * (16 * 9 * 3 + 12)))
    (told,) = space_problems(*arguments)
    assert "compression.distill.cache_logits=true takes up to" in told
    assert "choose compression.distill.top_k=9, or compression.distill.cache_logits=false" in told
    monkeypatch.setattr(recording.shutil, "disk_usage", lambda _: SimpleNamespace(free=10))
    (told,) = space_problems(*arguments)
    assert told.endswith("; choose compression.distill.cache_logits=false")
    chosen.record(chosen.context()[1])  # a run that is resumed has them already, or is past them
    assert space_problems(*arguments) == []
    recording.forget(chosen.directory, chosen.stage)
    assert len(space_problems(*arguments)) == 1
    (chosen.directory / "stages" / chosen.stage.directory).mkdir()
    assert space_problems(*arguments) == []


@pytest.mark.parametrize("weight", ["hidden_weight", "attention_weight", "sequence_weight"])
def test_losses_that_need_the_teacher_itself_are_refused(weight):
    key = "compression.distill"
    weights = [f"{key}.cache_logits=true", f"{key}.{weight}=1", f"{key}.hidden_weight=0.5", f"{key}.prompt_tokens=4"]
    with pytest.raises(ConfigError) as refused:
        compose([*COMMON, *TEXT, *weights])
    (problem,) = refused.value.problems
    assert f"{key}.hidden_weight=0.5" in problem
    assert f"{key}.{weight}=" in problem
    assert "\n" not in problem
    with pytest.raises(ConfigError, match="logits_weight=0 uses no logits"):
        compose([*COMMON, *TEXT, f"{key}.cache_logits=true", f"{key}.logits_weight=0"])


def test_a_rank_reads_what_was_recorded():
    chosen = link("a", *TEXT)
    _, context = chosen.context()
    recorded_for_all = chosen.record(context).teacher.cache
    rank = recording.reading(chosen.context()[1], LogitCache(place(chosen.directory, chosen.stage)))
    inputs = next(fit_inputs(chosen.config, chosen.stage, chosen.data))
    assert torch.equal(rank.teacher(inputs).logits, recorded_for_all.read(inputs)[0])
