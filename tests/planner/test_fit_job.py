"""job=fit from the outside: its choice keeps the budget when it really runs, its recipe is that choice, and what cannot
be met is one line."""

import json
import shlex
from functools import partial

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from pipeline import app
from pipeline.app import main
from pipeline.composing import compose
from pipeline.errors import ConfigError
from pipeline.fitting import fit
from pipeline.planner import fit_job, formula, speed
from pipeline.planner.fit_search import Search, strategy, way_out
from pipeline.planner.needs import Needs
from pipeline.planner.plan import plan
from pipeline.planner.search import Candidate, grown, plain
from pipeline.report.progress import Progress
from pipeline.report.result import read_result, schema_problems
from pipeline.stage_input import prepared
from pipeline.tasks import lookup
from pipeline.walk import stages_of

SMALL = [
    "model=gpt_nano", "trainer=smoke", "trainer.batch_size=4", "trainer.evaluate_every=0", "device=cpu",
    "plan.calibrate=false",
]  # fmt: skip
DDP = ["parallelism=ddp", "trainer.batch_size=128"]
FIT = [*SMALL, "job=fit", "fit.measure=0"]


def searched(directory, *words):
    config = compose([*FIT, *words])
    return Search(config, directory, Progress({}, "silent")).run()


def planned_bytes(*words):
    config = compose([*SMALL, *words])
    return max(phase.bytes for phase in plan(config, config.data.open(config.model.tokenizer())).phases.values())


def measured_peak(config, directory):
    data = config.data.open(config.model.tokenizer())
    line = stages_of(config)
    model, context = prepared(config, directory, data, None, line, line[0])
    return fit(config, line[0], model, lookup.get("causal_lm"), data, context.architecture, directory).peak_bytes


def test_the_choice_keeps_a_budget_that_the_typed_config_breaks_and_costs_the_least_time(tmp_path):
    budget = 3_000_000
    assert planned_bytes() > 2 * budget
    chosen = searched(tmp_path, f"budget={budget}")
    best = chosen.best
    assert measured_peak(best.candidate.config, tmp_path) <= budget
    assert best.phase.bytes == pytest.approx(planned_bytes(*best.candidate.changes), rel=0.01)
    assert [one.seconds for one in chosen.ranked] == sorted(one.seconds for one in chosen.ranked)
    faster = [one for one in chosen.looked.computed if one.seconds < best.seconds]
    assert faster
    assert not any(one.phase.bytes < 0.9 * budget for one in faster)


def test_the_job_leaves_its_ranking_a_plot_and_a_recipe_that_is_its_choice(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main([*FIT, "budget=3MB", "hydra.run.dir=found"]) == 0
    found = tmp_path / "found"
    result = read_result(found / "result.json")
    assert schema_problems(result) == []
    best = result["fit"]["ranking"][0]
    assert best["bytes"] == result["memory"]["predicted"][best["phase"]]
    assert (found / "pareto.png").read_bytes().startswith(b"\x89PNG")
    assert not (found / "checkpoints").exists()
    told = capsys.readouterr().out
    assert result["fit"]["command"] in told.replace("\n", " ")
    assert all(change in told for change in best["changes"])
    typed = compose(shlex.split(result["fit"]["command"])[2:])
    shared = compose([f"recipe={found / fit_job.RECIPE}"])
    assert typed.job == shared.job == "run"
    for group in ("model", "data", "trainer", "memory", "optimizer", "precision", "plan", "budget", "device"):
        assert getattr(typed, group) == getattr(shared, group)


def test_where_nothing_trains_there_is_a_choice_without_a_plot(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main([*FIT, "trainer.max_steps=0", "compression=int8", "budget=1GB", "hydra.run.dir=found"]) == 0
    assert not (tmp_path / "found" / "pareto.png").exists()


def test_what_is_to_be_typed_runs_the_choice_with_a_folder_of_choices_too(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my conf" / "model").mkdir(parents=True)
    (tmp_path / "my conf" / "model" / "mine.yaml").write_text("# Mine\ndefaults: [gpt_nano, _self_]\n")
    where = ["--config-dir=my conf", "model=mine", "trainer=smoke", "device=cpu"]
    assert main([*where, "job=fit", "fit.measure=0", "budget=1GB", "hydra.run.dir=what is found"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("  python run.py")]
    assert len(lines) == 2
    for line in lines:
        assert main([*shlex.split(line)[2:], "--cfg", "job"]) == 0


@pytest.mark.slow
def test_the_winner_runs_in_the_same_directory_within_the_budget(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    timed = [*SMALL, "job=fit", "fit.measure=2", "fit.run=true", "budget=4MB", "hydra.run.dir=won"]
    assert main(timed) == 0
    result = read_result(tmp_path / "won" / "result.json")
    assert schema_problems(result) == []
    assert result["train"]["steps"] == 8
    assert max(peak for peak in result["memory"]["measured"].values() if peak) <= 4_000_000
    assert result["fit"]["ranking"][0]["seconds_measured"] > 0
    assert (tmp_path / "won" / "artifact" / "manifest.json").is_file()
    assert main([f"resume={tmp_path / 'won'}", "trainer.max_steps=9"]) == 0


@pytest.mark.slow
def test_named_groups_find_room_where_there_is_none_otherwise(tmp_path):
    with pytest.raises(ConfigError) as caught:
        searched(tmp_path, "budget=2MB")
    (line,) = caught.value.problems
    assert line.startswith("budget=2MB: nothing fits. The nearest, ")
    assert "in the way is optimizer state, 999 kB. Give more, fit.free=[optimizer]" in line
    chosen = searched(tmp_path, "budget=2MB", "fit.free=[optimizer]")
    assert any(change.startswith("optimizer=") for change in chosen.best.candidate.changes)


@pytest.mark.slow
def test_the_largest_micro_batch_the_longest_sequences_and_the_largest_model(tmp_path):
    def micro(one):
        return one.candidate.config.trainer.micro_batch_size or 4

    found = searched(tmp_path, "budget=3MB", "fit.maximize=micro_batch")
    larger = [one for one in found.looked.computed if micro(one) > micro(found.best)]
    assert larger
    assert all(one.phase.bytes > 0.9 * found.budget for one in larger)
    long = searched(tmp_path, "budget=12MB", "fit.maximize=sequence", "trainer.micro_batch_size=4")
    length = long.best.candidate.config.data.sequence_length
    assert length % 64 == 0
    assert 64 < length < 1024
    grown = searched(tmp_path, "budget=30MB", "fit.maximize=parameters").best.candidate.config.model
    assert grown.heads > 2
    assert grown.width == 32 * grown.heads == 32 * grown.layers


def test_a_model_grows_by_what_ranks_and_groups_of_weights_divide(tmp_path):
    config = compose([*FIT, "budget=1GB", "model.heads=4", "compression=int4", "compression.int4.group_size=32"])
    search = Search(config, tmp_path, Progress({}, "silent"))
    assert search.unit(partial(grown, Candidate(plain(config)))) == 2  # heads of 16, groups of 32


@pytest.mark.parametrize(("budget", "length"), [(110, 100), (128, 128), (99, 64)])
def test_what_is_longest_is_no_shorter_than_what_was_typed_and_fits(budget, length, tmp_path, monkeypatch):
    monkeypatch.setattr(Search, "lean", lambda search, one, traced: one.config.data.sequence_length)
    config = compose([*FIT, f"budget={budget}", "fit.maximize=sequence", "data.sequence_length=100"])
    search = Search(config, tmp_path, Progress({}, "silent"))
    assert search.maximized(Candidate(plain(config))).config.data.sequence_length == length


@pytest.mark.parametrize("free", ["", "fit.free=[compression]"])
def test_the_largest_model_keeps_the_bound_of_its_file(free, tmp_path, monkeypatch):
    monkeypatch.setattr(Search, "lean", lambda search, one, traced: 0)
    monkeypatch.setattr(Needs, "artifact_bytes", lambda needs, config: config.model.heads * (1 if config.chain else 2))
    config = compose([*FIT, "budget=1GB", "fit.maximize=parameters", "fit.artifact=40B", *free.split()])
    search = Search(config, tmp_path, Progress({}, "silent"))
    assert search.maximized(Candidate(plain(config))).config.model.heads == (40 if free else 20)


FEW_LEVERS = ["memory.activation_checkpointing=none", "memory.loss_chunks=1", "trainer.batch_size=2"]


@pytest.mark.slow
def test_levers_of_a_link_that_alone_trains_are_searched(tmp_path):
    words = ["trainer.max_steps=0", "compression=int8_qat", "compression.int8_qat.steps=4", "budget=5MB"]
    chosen = searched(tmp_path, *words, *FEW_LEVERS, "memory.release_gradients=false")
    assert "trainer.micro_batch_size=1" in chosen.best.candidate.changes


def test_the_leanest_where_weights_take_most_is_that_which_adds_up_no_gradients(tmp_path):
    config = compose([*FIT, *FEW_LEVERS, "budget=1GB", "data.sequence_length=8", "trainer.grad_clip=null"])
    search = Search(config, tmp_path, Progress({}, "silent"))
    base = Candidate(plain(config))
    least = search.computed(search.leanest(base))[1].bytes
    assert least == min(search.computed(one)[1].bytes for one in search.levers(base))


def test_the_evaluation_during_training_keeps_the_budget_beside_what_training_keeps(tmp_path):
    words = ["budget=3MB", "trainer.batch_size=7"]
    without, beside = (searched(tmp_path, *words, f"trainer.evaluate_every={every}").best.candidate for every in (0, 4))
    assert beside.config.trainer.evaluation_batch_size == 2
    assert without.config.trainer.evaluation_batch_size > 2


def test_what_comes_out_keeps_its_bound(tmp_path):
    chosen = searched(tmp_path, "budget=1GB", "fit.inference=5MB")
    assert chosen.best.candidate.changes == ("trainer.evaluation_batch_size=8",)  # all else fits as typed


@pytest.mark.parametrize("chain", ["none", "int8"])
def test_generation_keeps_the_bound_of_inference_and_is_nothing_of_the_run(chain, tmp_path):
    words = [f"compression={chain}", "data.sequence_length=16", "trainer.evaluation_batch_size=1"]
    takes = plan(compose([*SMALL, *words, "job=plan"])).phases["generate"].bytes
    with pytest.raises(ConfigError, match="generation of 200 tokens takes"):
        searched(tmp_path, *words, "budget=1GB", f"fit.inference={takes - 1}")
    needs = Needs(compose([*FIT, *words, "budget=1GB", "fit.inference=1GB"]))
    run = plain(compose([*FIT, *words, "budget=1GB", "fit.inference=1GB"]))
    assert needs.others(run)["generate"].bytes == takes
    assert "generate" not in needs.phases(run, traced=False)


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["budget=6GB?"], "budget=6GB? is no size: give a number of bytes, or a size such as 2.5MB or 6GiB"),
        (["budget=0"], "budget=0 is not above zero"),
        (["budget=1GB", "fit.free=[optimzer]"], "fit.free[0]=optimzer must be one of memory, optimizer"),
        (["budget=1GB", "fit.free=[compression]"], "fit.free=[compression] chooses by bytes that come out, or as"),
        (["budget=1GB", "fit.artifact=small"], "fit.artifact=small is no size"),
        (["budget=1GB", "device.memory=1MB"], "budget=1GB is more than device.memory=1MB, "),
        (["budget=1GB", "fit.maximize=speed"], "fit.maximize=speed must be null or be one of micro_batch, sequence, "),
        (["budget=1GB", "fit.maximize=parameters", "model=efficientnet", "data=digits"], "fit.maximize=parameters: "),
        (["budget=1GB", "fit.maximize=sequence", "model=efficientnet", "data=digits"], "fit.maximize=sequence: "),
        (
            ["budget=1GB", "fit.run=true", "parallelism=ddp", "parallelism.devices=128", "trainer.batch_size=128"],
            "parallelism.devices=128: ",
        ),
    ],
)
def test_bad_input_is_one_line_without_torch_being_asked(words, line, capsys):
    assert main([*FIT, *words]) == 2
    (told,) = capsys.readouterr().err.splitlines()
    assert told.startswith(f"error: {line}")


@pytest.mark.parametrize("asked", ["budget=1GB", "fit.run=true", "fit.maximize=sequence", "fit.free=[precision]"])
def test_what_asks_for_a_search_goes_with_no_other_job(asked, capsys):
    assert main([*SMALL, asked]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {asked.partition('=')[0]}=")
    assert "goes with job=fit, not job=run" in line


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["budget=100kB"], "budget=100kB is below the weights alone, 499 kB; give more, fit.free=[precision]"),
        (["budget=1GB", "fit.inference=100kB"], "fit.inference=100kB: "),
        (["budget=1GB", "compression=int4", "compression.int4.group_size=48"], "compression.int4.group_size=48"),
    ],
)
def test_what_only_shapes_tell_is_one_line_too(words, line, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main([*FIT, *words]) == 2
    assert capsys.readouterr().err.splitlines()[0].startswith(f"error: {line}")


def test_of_many_that_break_the_bound_of_what_comes_out_the_nearest_is_told(tmp_path, monkeypatch):
    needed = {"sgd": 3, "muon": 2}
    monkeypatch.setattr(
        Search, "beyond_inference", lambda search, one: ("too much", needed.get(one.config.optimizer.name, 4))
    )
    words = ["trainer.evaluation_batch_size=1", "fit.free=[optimizer]"]
    with pytest.raises(ConfigError) as caught:
        searched(tmp_path, "budget=1GB", "fit.inference=1B", *words)
    assert caught.value.problems == ["fit.inference=1B: optimizer=muon: too much"]


def test_weights_are_no_bound_where_they_lie_in_files_or_are_held_compressed(tmp_path):
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=512, **sizes)).save_pretrained(tmp_path / "hub")
    compose([*FIT, "budget=1GB"]).model.tokenizer().save_pretrained(tmp_path / "hub")
    written = ["model=hf", f"model.pretrained={tmp_path / 'hub'}", "trainer.max_steps=0"]
    beside = ["adapter=lora", "compression=nf4", "device=cuda", "device.memory=80GB"]
    for words in (["budget=1kB", *written], ["budget=300kB", *beside]):
        config = compose([*FIT, *words])
        Search(config, tmp_path, Progress({}, "silent")).require_room(plain(config))


def test_a_model_that_cannot_be_built_on_meta_is_told(tmp_path, monkeypatch):
    config = compose([*FIT, "budget=1GB"])
    monkeypatch.setattr(
        type(config.model), "build", lambda self, spec: (_ for _ in ()).throw(NotImplementedError("no meta\nkernel"))
    )
    with pytest.raises(ConfigError, match=r"model=gpt_nano cannot be built on the meta device.*no meta kernel"):
        Search(config, tmp_path, Progress({}, "silent")).run()


@pytest.mark.parametrize(
    ("phase", "words", "way"),
    [
        ("train", [], "Give more, fit.free=[memory] or a shorter data.sequence_length"),
        ("train", ["model=efficientnet", "data=digits"], "Give more, fit.free=[memory] or a smaller model"),
        ("compress", ["compression=wanda"], "Give more, or fewer calibration.samples, or a smaller "),
        ("compress", ["compression=int8"], "Give more, fit.free=[memory] or a shorter data.sequence_length"),
        ("evaluate", [], "Give more, or a shorter data.sequence_length"),
        ("evaluate", ["trainer.evaluation_batch_size=1"], "Give more, or a shorter data.sequence_length"),
        ("validate", ["trainer.evaluation_batch_size=4"], "Give more, or a smaller trainer.evaluation_batch_size"),
    ],
)
def test_the_way_out_is_one_that_there_is(phase, words, way):
    assert way_out(phase, "activations", compose([*FIT, *words])).startswith(way)


def test_a_machine_that_is_not_here_is_planned_for_and_not_timed(tmp_path):
    words = ["parallelism=ddp", "parallelism.devices=2", "device.memory=8MB", "fit.measure=3"]
    chosen = searched(tmp_path, *words)
    assert chosen.budget == 8_000_000
    assert chosen.rates.source == "assumed"
    assert all(one.measured is None for one in chosen.ranked)
    assert {one.candidate.config.parallelism.name for one in chosen.looked.computed} == {"ddp", "fsdp"}
    assert {one.phase.source for one in chosen.ranked if one.name == "train"} <= {"computed"}


@pytest.mark.slow
def test_strategies_are_timed_against_each_other_whatever_was_predicted_of_them(tmp_path):
    found = searched(tmp_path, "parallelism=ddp", "parallelism.devices=2", "budget=1GB", "fit.measure=2")
    timed = [one for one in found.ranked if one.measured is not None]
    assert len({strategy(one.candidate) for one in timed}) == 2
    assert [one.measured for one in timed] == sorted(one.measured for one in timed)
    assert found.ranked[:2] == timed


def test_what_offloaded_activations_take_to_move_is_found_once_for_levers_that_leave_them_as_they_are(
    tmp_path, monkeypatch
):
    config = compose(FIT)
    search = Search(config, tmp_path, Progress({}, "silent"))
    base = Candidate(plain(config))
    work = search.book(base.config).work(base.config, stages_of(base.config)[0])
    offloaded = base.with_values("memory", activation_offload="disk")
    alike = [
        offloaded,
        offloaded.with_values("memory", optimizer_offload="disk"),
        offloaded.with_values("memory", release_gradients=True),
    ]
    computed = []
    whole = formula.training
    monkeypatch.setattr(formula, "training", lambda *given: (computed.append(given), whole(*given))[1])
    rates = speed.rates_of("cpu", [], here=False)
    seconds = [search.seconds(one, work, rates) for one in alike]
    assert len(computed) == 1
    assert min(seconds) > search.seconds(base, work, rates)


def test_help_names_the_job_and_its_keys(capsys):
    assert app.main(["--help"]) == 0
    told = capsys.readouterr().out
    assert "fit.free=[]" in told
    assert "budget=null" in told
    assert "job=fit budget=6GiB" in told
    assert json.dumps(None) in told


def test_what_holds_least_is_not_looked_for_where_the_config_as_it_is_keeps_the_budget(tmp_path, monkeypatch):
    monkeypatch.setattr(Search, "leanest", lambda search, base, every=None: pytest.fail("every lever was computed"))
    search = Search(compose([*FIT, "budget=1GB", "fit.free=[optimizer]"]), tmp_path, Progress({}, "silent"))
    base = Candidate(plain(search.typed))
    assert search.evaluated(base) == base
    assert search.may_fit(search.rated(base, traced=False))
