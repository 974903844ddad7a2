"""Distillation: who the student is, what it is trained with, what is refused before, and whole runs."""

import copy
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional
from transformers import (
    AutoModelForCausalLM,
    EfficientNetConfig,
    EfficientNetForImageClassification,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)

from pipeline.app import main
from pipeline.artifact import store
from pipeline.composing import compose
from pipeline.compression.base import Context
from pipeline.compression.distill import Distill, drop_layers
from pipeline.errors import ConfigError, LeanfitError
from pipeline.layers.schemes import quantize_layers
from pipeline.layers.sparsity import masked_layers
from pipeline.models.architecture import describe
from pipeline.report.result import read_result
from pipeline.tasks.causal_lm import CausalLM
from pipeline.teacher import FrozenTeacher, frozen, open_directory, vocabulary_problems

ROOT = Path(__file__).resolve().parents[2]
TINY = ["model=gpt_nano", "trainer=smoke", "trainer.max_steps=8", "data.evaluation_tokens=1024", "device=cpu"]


def distill(**changes):
    usual = {
        "teacher": "self", "layers": None, "student": None, "task_weight": 0.5, "logits_weight": 0.5,
        "hidden_weight": 0.0, "attention_weight": 0.0, "sequence_weight": 0.0, "temperature": 2.0, "top_k": None,
        "cache_logits": False, "prompt_tokens": 4, "decoding": "greedy", "steps": None, "lr": None,
    }  # fmt: skip
    return Distill(name="distill", **{**usual, **changes})


def opt(layers=4, vocabulary=64, width=32, seed=0):
    torch.manual_seed(seed)
    return OPTForCausalLM(
        OPTConfig(
            vocab_size=vocabulary, hidden_size=width, num_hidden_layers=layers, num_attention_heads=2, ffn_dim=64,
            max_position_embeddings=32, word_embed_proj_dim=width, dropout=0.0, init_std=0.2,
        )
    ).eval()  # fmt: skip


def llama(layers=2, vocabulary=64, width=48):
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary, hidden_size=width, intermediate_size=80, num_hidden_layers=layers,
            num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=False, initializer_range=0.2,
        )
    ).eval()  # fmt: skip


def efficientnet(classes=4):
    return EfficientNetForImageClassification(
        EfficientNetConfig(
            image_size=16, num_channels=1, width_coefficient=0.25, depth_coefficient=0.25, hidden_dim=320,
            in_channels=[32, 16], out_channels=[16, 24], kernel_sizes=[3, 3], strides=[1, 2], num_block_repeats=[1, 1],
            expand_ratios=[1, 6], depthwise_padding=[], num_labels=classes,
        )
    )  # fmt: skip


def context(model, teacher=None, first=True, student=None):
    kept = copy.deepcopy(model if teacher is None else teacher)
    return Context(
        stage="link", architecture=describe(model), device="cpu", steps=10, seed=0, first=first,
        teacher=FrozenTeacher(lambda: frozen(kept)), open_model=lambda key: student,
    )  # fmt: skip


def batch(rows=2, length=12):
    ids = torch.randint(0, 64, (rows, length), generator=torch.Generator().manual_seed(3))
    return {"input_ids": ids, "labels": ids}


def stage_loss(method, student, teacher, given):
    """The link's loss, and how many forward passes each model was run for."""
    counts = [0, 0]

    def counting(place):
        def count(*_):
            counts[place] += 1

        return count

    around = context(student, teacher)
    handles = [m.register_forward_hook(counting(i)) for i, m in enumerate((student, around.teacher.model))]
    loss = method.loss(around)(student, given, lambda b: CausalLM().loss(student, b))
    for handle in handles:
        handle.remove()
    return loss, counts


def test_first_in_a_chain_the_student_has_half_the_layers_of_the_trained_model():
    model = opt(4)
    blocks = list(model.model.decoder.layers)
    around = context(model)
    student = distill().prepare(model, around)
    assert list(student.model.decoder.layers) == [blocks[0], blocks[3]]
    assert around.facts == {"layers_kept": [0, 3]}
    assert len(around.teacher.architecture.blocks) == 4


def test_after_other_links_the_student_is_the_model_as_they_left_it():
    model = opt(4)
    assert distill().prepare(model, context(model, first=False)) is model
    assert len(model.model.decoder.layers) == 4
    fewer = distill(layers=3)
    assert len(fewer.prepare(model, context(model, first=False)).model.decoder.layers) == 3


def test_a_student_may_be_another_model():
    model, other = opt(4), opt(1)
    method = distill(student="elsewhere")
    assert method.prepare(model, context(model, student=other)) is other
    assert method.preflight(model, context(model, student=other)) == []


@pytest.mark.parametrize("model", [opt(4), llama(3)])
@pytest.mark.parametrize("method", [distill(), distill(layers=2), distill(layers="all"), distill(student="elsewhere")])
def test_later_links_are_checked_on_the_shapes_of_the_student(model, method):
    model = copy.deepcopy(model)
    around = context(model, first=True, student=opt(1))
    promised = method.reshaped(model, around)
    made = method.prepare(model, around)
    assert (promised is model) == (method.layers == "all")
    shapes = [{name: tensor.shape for name, tensor in one.state_dict().items()} for one in (promised, made)]
    assert shapes[0] == shapes[1]
    assert describe(promised) == describe(made)


def test_the_facts_say_who_learned_from_whom_and_how():
    model = opt()
    detail = distill(teacher="/a/teacher", temperature=3.0, top_k=8).detail(model, context(model, opt(6)))
    who = {"teacher": "/a/teacher", "student": "the model with fewer layers", "layers": 4, "teacher_layers": 6}
    assert detail == {**who, "losses": {"task": 0.5, "logits": 0.5}, "temperature": 3.0, "top_k": 8}
    assert distill(student="/a/student").detail(model, context(model))["student"] == "/a/student"
    after = distill().detail(model, context(model, first=False))
    assert (after["teacher"], after["student"], after["top_k"]) == ("self", "the model", "all")


def test_layers_are_dropped_without_the_framework_too():
    model = llama(3)
    assert drop_layers(model, describe(model), 2) is model
    assert len(model.model.layers) == model.config.num_hidden_layers == 2
    with pytest.raises(LeanfitError, match="no effect"):
        drop_layers(model, describe(model), 2)


def test_the_loss_is_the_tasks_and_the_teachers_by_weight_from_one_forward_pass_of_each():
    teacher, student, given = opt(4), opt(2, seed=1), batch()
    loss, counts = stage_loss(distill(task_weight=0.3, logits_weight=0.7), student, teacher, given)
    ids = given["input_ids"]
    with torch.no_grad():
        ours, theirs = student(input_ids=ids).logits, teacher(input_ids=ids).logits
    task = functional.cross_entropy(ours[:, :-1].reshape(-1, 64), ids[:, 1:].flatten())
    divergence = functional.kl_div(
        (ours / 2).log_softmax(-1).view(-1, 64), (theirs / 2).softmax(-1).view(-1, 64), reduction="batchmean"
    )
    torch.testing.assert_close(loss.detach(), 0.3 * task + 0.7 * 4 * divergence)
    assert counts == [1, 1]


def test_hidden_states_are_those_of_the_models_own_blocks():
    teacher, student, given = opt(4), opt(2, seed=1), batch()
    loss, counts = stage_loss(distill(task_weight=0.0, logits_weight=0.0, hidden_weight=1.0), student, teacher, given)
    with torch.no_grad():
        ours = student(input_ids=given["input_ids"], output_hidden_states=True).hidden_states
        theirs = teacher(input_ids=given["input_ids"], output_hidden_states=True).hidden_states
    # The last entry is given after the final norm; so only the one before is compared.
    first = ((ours[1] - theirs[2]) ** 2).sum() / (theirs[2] ** 2).sum()
    last = 2 * loss.detach() - first
    normed = student.model.decoder.final_layer_norm
    seen = {}
    handle = normed.register_forward_pre_hook(lambda m, args: seen.update(x=args[0]))
    student(input_ids=given["input_ids"])
    handle.remove()
    handle = teacher.model.decoder.final_layer_norm.register_forward_pre_hook(lambda m, args: seen.update(y=args[0]))
    teacher(input_ids=given["input_ids"])
    handle.remove()
    wanted = ((seen["x"] - seen["y"]) ** 2).sum() / (seen["y"] ** 2).sum()
    torch.testing.assert_close(last, wanted.detach())
    assert counts == [1, 1]


@pytest.mark.parametrize("build", [opt, llama])
def test_every_loss_together_is_zero_for_a_student_like_its_teacher_and_moves_any_other(build):
    weights = {"task_weight": 0.0, "logits_weight": 1.0, "hidden_weight": 1.0, "attention_weight": 1.0}
    teacher = build()
    same, other = copy.deepcopy(teacher), build()
    for parameter in other.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    loss, _ = stage_loss(distill(**weights), same, teacher, batch())
    assert loss.item() == pytest.approx(0, abs=1e-5)
    loss.backward()
    assert all(parameter.grad is not None for parameter in same.parameters())
    largest = max(parameter.grad.abs().max() for parameter in same.parameters())
    loss, _ = stage_loss(distill(**weights), other, teacher, batch())
    loss.backward()
    assert max(parameter.grad.abs().max() for parameter in other.parameters()) > 1e3 * largest
    assert all(parameter.grad is None for parameter in teacher.parameters())


@pytest.mark.parametrize("mode", ["full", "selective"])
def test_relations_reach_into_blocks_that_are_recomputed(mode):
    from pipeline.memory.saving import apply_activation_checkpointing

    method = distill(task_weight=0.1, hidden_weight=1.0, attention_weight=1.0)
    gradients = []
    for recomputed in (False, True):
        student = opt(2, seed=1).train()
        if recomputed:
            apply_activation_checkpointing(student, [block.name for block in describe(student).blocks], mode)
        loss, _ = stage_loss(method, student, opt(4), batch())
        loss.backward()
        gradients.append([parameter.grad for parameter in student.parameters()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


def test_a_sequence_is_learned_from_the_teachers_continuation_alone():
    teacher, student, given = opt(4), opt(2, seed=1), batch()
    method = distill(task_weight=0.0, logits_weight=0.0, sequence_weight=1.0, prompt_tokens=4)
    loss, _ = stage_loss(method, student, teacher, given)
    ids = given["input_ids"][:, :4]
    with torch.no_grad():
        for _ in range(8):
            ids = torch.cat([ids, teacher(input_ids=ids).logits[:, -1].argmax(-1, keepdim=True)], 1)
        logits = student(input_ids=ids).logits[:, 3:-1]
    wanted = functional.cross_entropy(logits.reshape(-1, 64), ids[:, 4:].flatten())
    torch.testing.assert_close(loss.detach(), wanted)


def refused(method, model, around):
    """What is told of a model whose weights are not there."""
    problems = method.preflight(copy.deepcopy(model).to("meta"), around)
    assert all(line.startswith("compression.link") and "\n" not in line and ";" in line for line in problems)
    return " | ".join(problems)


def test_settings_without_effect_are_refused():
    assert "every loss has weight 0" in distill(task_weight=0.0, logits_weight=0.0).problems()[0]
    assert "two students" in distill(layers=2, student=".").problems()[0]
    model = opt(4)
    assert "its own teacher" in refused(distill(layers="all"), model, context(model))
    assert refused(distill(layers="all"), model, context(model, first=False)) == ""
    assert refused(distill(layers="all", teacher="other"), model, context(model, opt(6))) == ""
    one = opt(1)
    assert "layers=null: of the model's 1 none would go" in refused(distill(), one, context(one))
    wasted = refused(distill(student="there"), model, context(model, student=opt(1), first=False))
    assert "it would take the place of what the links before have made" in wasted


@pytest.mark.parametrize("layers", [4, 5])
def test_layers_out_of_range_are_refused(layers):
    model = opt(4)
    assert f"layers={layers}: of the model's 4 none would go; choose 3 or fewer" in refused(
        distill(layers=layers), model, context(model)
    )


def test_a_teacher_or_student_of_another_kind_is_refused():
    model = opt(4)
    other = distill(teacher="there")
    assert "has 65 tokens in its vocabulary, the model 64" in refused(other, model, context(model, opt(4, 65)))
    assert "takes pixel_values, the model input_ids" in refused(other, model, context(model, efficientnet()))
    images = efficientnet()
    last = distill(teacher="there")
    assert "has 5 classes, the model 4" in refused(last, images, context(images, efficientnet(5), first=False))
    guest = distill(student="there")
    assert "give a smaller one" in refused(guest, model, context(model, student=opt(5)))
    assert "has 65 tokens" in refused(guest, model, context(model, student=opt(1, 65)))


def test_losses_that_a_pair_of_models_does_not_have_are_refused():
    model = opt(4)
    wide = context(model, opt(4, width=48))
    assert "hidden states of width 32 cannot be compared with the teacher's 48" in refused(
        distill(teacher="there", hidden_weight=1.0), model, wide
    )
    assert refused(distill(teacher="there", attention_weight=1.0), model, wide) == ""
    assert "top_k=65: the teacher has 64 logits" in refused(distill(top_k=65), model, context(model))
    assert "prompt_tokens=32 leaves nothing" in refused(
        distill(sequence_weight=1.0, prompt_tokens=32), model, context(model)
    )
    images = efficientnet()
    told = refused(distill(sequence_weight=1.0, attention_weight=1.0), images, context(images, first=False))
    assert "only language models" in told
    assert "the student's last layer has no separate query" in told


def test_a_classifier_cannot_lose_layers_but_can_be_a_student():
    images = efficientnet()
    told = refused(distill(), images, context(images))
    assert "does not count its 2 blocks" in told
    assert "let distill follow another link, or give compression.link.student=DIR" in told
    assert refused(distill(hidden_weight=1.0), images, context(images, first=False)) == ""


def test_places_without_a_model_are_told_at_once(tmp_path):
    (tmp_path / "run" / "artifact").mkdir(parents=True)
    (tmp_path / "run" / "artifact" / "manifest.json").write_text("{}")
    (tmp_path / "weights.bin").write_text("")
    (tmp_path / "last.ckpt").write_text("")
    told = {
        "nowhere": "no such file or directory; give self, an artifact, a checkpoint (.ckpt) or a Hugging Face dir",
        "run": "did you mean compression.distill.teacher=",
        "weights.bin": "is a file",
    }
    for name, words in told.items():
        (problem,) = distill(teacher=str(tmp_path / name)).problems()
        assert words in problem
    assert distill(teacher=str(tmp_path / "last.ckpt")).problems() == []
    assert "is a file" in distill(student=str(tmp_path / "last.ckpt")).problems()[0]
    assert distill(teacher="selff").problems()[0].endswith("did you mean 'self'?")
    assert "two lines" in distill(teacher="two lines\n").problems()[0]
    assert len(distill(teacher="two lines\n").problems()[0].splitlines()) == 1


def test_a_smaller_model_is_claimed_only_where_something_goes():
    assert distill().shrinks
    assert distill(layers=2).shrinks
    assert not distill(layers="all").shrinks


def test_a_weight_that_is_no_number_any_more_is_named():
    model = opt(2)
    model.model.decoder.layers[1].fc1.weight.data[0, 0] = float("nan")
    with pytest.raises(LeanfitError, match=r"layers\.1\.fc1\.weight"):
        distill().finalize(model, context(model))


@pytest.mark.parametrize("build", [opt, llama, efficientnet])
def test_a_hugging_face_directory_is_opened_whole_or_not_at_all(build, tmp_path):
    model = build().eval()
    model.save_pretrained(tmp_path)
    opened = open_directory(tmp_path, "k=v", meta=False).eval()
    given = (
        {"pixel_values": torch.randn(1, 1, 16, 16)} if build is efficientnet else {"input_ids": torch.arange(8)[None]}
    )
    torch.testing.assert_close(opened(**given).logits, model(**given).logits)
    shapes = open_directory(tmp_path, "k=v", meta=True)
    assert {p.device.type for p in shapes.parameters()} == {"meta"}
    data = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(data[: len(data) // 2])
    for meta in (False, True):  # the preflight sees it too, before anything is trained
        with pytest.raises(ConfigError, match="k=v cannot be opened"):
            open_directory(tmp_path, "k=v", meta=meta)
    (tmp_path / "config.json").write_text('{"architectures": ["os.system"]}')
    with pytest.raises(ConfigError, match="k=v cannot be opened"):
        open_directory(tmp_path, "k=v", meta=True)
    (tmp_path / "config.json").unlink()
    with pytest.raises(ConfigError, match="neither"):
        open_directory(tmp_path, "k=v", meta=True)


def test_a_damaged_artifact_is_told_from_its_shapes_alone(tmp_path):
    ids = {"input_ids": torch.arange(8)[None]}
    store.save(opt(2), tmp_path / "a", chain=[], probe=ids)
    assert open_directory(tmp_path / "a", "k=v", meta=True)
    path = tmp_path / "a" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ConfigError, match=r"k=v cannot be opened: .*truncated"):
        open_directory(tmp_path / "a", "k=v", meta=True)


def test_a_quantized_model_is_not_distilled():
    model = quantize_layers(opt(2), ["model.decoder.layers.0.fc1"], "int8")
    (told,) = distill(teacher="self").preflight(model, context(model))
    assert "the model is quantized already (int8, 1 layers)" in told


def test_weights_that_a_directory_lacks_are_not_made_up(tmp_path):
    from safetensors.torch import load_file, save_file

    opt(2).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.decoder.layers.1.fc1.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"lacks 1 of the model's weights.*layers\.1\.fc1"):
        open_directory(tmp_path, "k=v", meta=False)


def test_a_teacher_that_numbers_tokens_otherwise_is_refused(tmp_path):
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    def words(*known):
        model = WordLevel({word: number for number, word in enumerate(known)}, unk_token="a")
        return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(model))

    words("a", "b", "c").save_pretrained(tmp_path)
    assert vocabulary_problems(tmp_path, "k=v", words("a", "b", "c")) == []
    (told,) = vocabulary_problems(tmp_path, "k=v", words("a", "c", "b"))
    assert "another vocabulary" in told
    assert vocabulary_problems(tmp_path, "k=v", None) == []


def test_a_frozen_teacher_is_opened_once_and_gives_no_gradients():
    opened = []

    def build():
        opened.append(True)
        return frozen(opt(2))

    teacher = FrozenTeacher(build)
    assert not opened
    for _ in range(2):
        answer = teacher({"input_ids": batch()["input_ids"]}, ["model.decoder.layers.1"])
    assert len(opened) == 1
    assert not answer.logits.requires_grad
    assert answer.seen["model.decoder.layers.1"].shape == (2, 12, 32)
    assert not teacher.model.training


def leanfit(directory: Path, *overrides: str) -> dict:
    code = main([*TINY, *overrides, f"hydra.run.dir={directory}"])
    result = read_result(directory / "result.json")
    assert code == 0, result["error"]
    return result


@pytest.mark.slow
def test_a_half_deep_student_runs_alone_and_opens_in_plain_transformers(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    extra = ["hidden_weight=1", "attention_weight=1", "sequence_weight=0.1", "top_k=8"]
    result = leanfit(tmp_path / "run", "compression=distill", *(f"compression.distill.{e}" for e in extra))
    (stage,) = result["stages"]
    assert stage["detail"] == {
        "teacher": "self", "student": "the model with fewer layers", "temperature": 2.0, "top_k": 8,
        "layers": 1, "teacher_layers": 2, "layers_kept": [0],
        "losses": {"task": 0.5, "logits": 0.5, "hidden": 1.0, "attention": 1.0, "sequence": 0.1},
    }  # fmt: skip
    assert stage["train"]["steps"] == 2
    assert result["size"]["claim"] == "smaller"
    assert result["size"]["parameters_after"] < 0.65 * result["size"]["parameters_before"]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "artifact")
    assert model.config.num_hidden_layers == 1


@pytest.mark.slow
def test_a_pruned_student_keeps_its_zeros_and_every_rank_has_the_teacher(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    chain = ["compression=[magnitude,distill]", "compression.magnitude.steps=0"]
    alone = leanfit(tmp_path / "one", *chain, "keep_stages=true")
    assert [stage["detail"].get("layers") for stage in alone["stages"]] == [12, 2]
    model = store.load(tmp_path / "one" / "artifact", trainable=True)
    pruned = store.load(tmp_path / "one" / "stages" / "01-magnitude", trainable=True)
    moved = 0.0
    for (name, layer), (_, before) in zip(masked_layers(model), masked_layers(pruned), strict=True):
        assert (layer.weight[~before.weight_mask] == 0).all(), name
        moved += float((layer.weight - before.weight).detach().abs().sum())
    assert moved > 0
    two = leanfit(tmp_path / "two", *chain, "parallelism=ddp", "parallelism.devices=2")
    assert two["quality"]["after"] == pytest.approx(alone["quality"]["after"], rel=1e-3)


@pytest.mark.slow
def test_teachers_and_students_come_from_artifacts_directories_and_checkpoints(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    leanfit(tmp_path / "big", "model.layers=4", "trainer.max_steps=2", "keep_stages=true")
    OPTForCausalLM.from_pretrained(tmp_path / "big" / "artifact").save_pretrained(tmp_path / "plain")
    plain = OPTForCausalLM.from_pretrained(tmp_path / "plain")
    drop_layers(plain, describe(plain), 1).save_pretrained(tmp_path / "small")
    key = "compression.distill"
    for place in ("big/artifact", "plain"):
        directory = tmp_path / place.replace("/", "-")
        result = leanfit(directory / "run", "compression=distill", f"{key}.teacher={place}", f"{key}.layers=all")
        assert result["stages"][0]["detail"]["teacher_layers"] == 4
        assert result["stages"][0]["detail"]["layers"] == 2
        assert result["size"]["claim"] == "none"
    last = "big/checkpoints/last.ckpt"
    result = leanfit(
        tmp_path / "third", "model.layers=4", "compression=distill", f"{key}.teacher={last}", f"{key}.student=small"
    )
    assert result["stages"][0]["detail"]["layers"] == 1
    learned = leanfit(tmp_path / "other", "compression=distill", f"{key}.teacher={last}", f"{key}.layers=all")
    assert learned["stages"][0]["detail"]["teacher_layers"] == 4
    (tmp_path / "moved.ckpt").write_bytes((tmp_path / last).read_bytes())
    apart = f"{key}.teacher=moved.ckpt"
    assert main([*TINY, "compression=distill", apart, f"hydra.run.dir={tmp_path / 'no'}"]) == 2


@pytest.mark.slow
def test_a_pruned_classifier_is_distilled(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    images = ["model=efficientnet", "data=digits", "trainer.max_steps=4", "device=cpu", "trainer.batch_size=8"]
    chain = ["compression=[magnitude,distill]", "compression.magnitude.steps=0"]
    directory = tmp_path / "run"
    assert main([*images, *chain, f"hydra.run.dir={directory}"]) == 0
    assert read_result(directory / "result.json")["stages"][1]["train"]["steps"] == 1
    assert main([*images, "compression=distill", f"hydra.run.dir={tmp_path / 'no'}"]) == 2


@pytest.mark.slow
def test_a_run_from_recorded_logits_says_what_they_took_and_leaves_none_and_every_rank_reads_them(
    tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    chain = ["compression=[magnitude,distill]", "compression.magnitude.steps=0", "compression.distill.top_k=8"]
    cached = [*chain, "compression.distill.cache_logits=true", "compression.distill.steps=4"]
    plain = leanfit(tmp_path / "plain", *chain, "compression.distill.steps=4")
    one = leanfit(tmp_path / "one", *cached)
    facts = one["stages"][1]["detail"]["cached_logits"]
    assert facts["samples"] == 32
    assert facts["bytes"] == pytest.approx(32 * 128 * 8 * 3, rel=0.05)
    assert not facts["teacher_held"]
    assert "cached_logits" not in json.dumps(plain["stages"])
    assert one["quality"]["after"] == pytest.approx(plain["quality"]["after"], rel=1e-4)
    assert not (tmp_path / "one" / "stages").exists()
    assert not list((tmp_path / "one").rglob("*logits*"))
    two = leanfit(tmp_path / "two", *cached, "parallelism=ddp", "parallelism.devices=2", "keep_stages=true")
    assert two["quality"]["after"] == pytest.approx(one["quality"]["after"], rel=1e-3)
    kept = tmp_path / "two" / "stages" / "02-distill-logits"
    assert sum(path.stat().st_size for path in kept.iterdir()) == two["stages"][1]["detail"]["cached_logits"]["bytes"]


@pytest.mark.slow
def test_a_run_killed_while_it_reads_recorded_logits_resumes_to_the_same_bits(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = [*TINY, "trainer.max_steps=4", "trainer.checkpoint_every=3", "compression=distill",
                "compression.distill.cache_logits=true", "compression.distill.steps=60"]  # fmt: skip
    leanfit(tmp_path / "whole", *settings)
    broken = tmp_path / "broken"
    command = [sys.executable, str(ROOT / "run.py"), *settings, f"hydra.run.dir={broken}"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    last = broken / "checkpoints" / "01-distill" / "last.ckpt"
    deadline = time.monotonic() + 300
    while not last.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert (broken / "stages" / "01-distill-logits" / "cache.json").is_file()
    assert not (broken / "artifact").exists(), "the run was over before it could be killed"
    assert main([f"resume={broken}"]) == 0
    assert read_result(broken / "result.json")["stages"][0]["detail"]["cached_logits"]["found"]
    first, second = (load_file(tmp_path / name / "artifact" / "model.safetensors") for name in ("whole", "broken"))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.slow
def test_a_line_that_cannot_cache_logits_ends_with_two_before_training(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    key = "compression.distill"
    lines = [f"{key}.cache_logits=true", f"{key}.hidden_weight=1", f"hydra.run.dir={tmp_path / 'run'}"]
    assert main([*TINY, "compression=distill", *lines]) == 2
    assert f"{key}.hidden_weight=1 needs the teacher itself in every step" in capsys.readouterr().err
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_the_shipped_settings_are_those_of_the_interface():
    method = compose(["compression=distill"]).chain["distill"]
    assert (method.teacher, method.layers, method.student, method.steps, method.lr) == ("self", None, None, None, None)
    assert method.task_weight + method.logits_weight == 1
    assert not method.cache_logits
