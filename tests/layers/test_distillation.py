"""The losses against the formulas of their papers, written out entry by entry."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM

from pipeline.errors import LeanfitError
from pipeline.layers.distillation import (
    Observed,
    combined,
    continued,
    hidden_loss,
    logits_loss,
    observing,
    paired,
    relation_loss,
)

SIZES = st.tuples(st.integers(1, 4), st.integers(2, 9), st.integers(0, 2**31))


def random(*shape, seed=0, scale=1.0):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def softmax(row):
    exponentials = [math.exp(value - max(row)) for value in row]
    return [value / sum(exponentials) for value in exponentials]


def divergence(p, q):
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)


@given(SIZES, st.floats(0.5, 8.0))
@settings(deadline=None)
def test_logits_are_compared_by_divergence_at_a_temperature_squared(sizes, temperature):
    rows, vocabulary, seed = sizes
    student, teacher = random(rows, vocabulary, seed=seed, scale=3), random(rows, vocabulary, seed=seed + 1, scale=3)
    wanted = 0.0
    for ours, theirs in zip(student.tolist(), teacher.tolist(), strict=True):
        p = softmax([value / temperature for value in theirs])
        q = softmax([value / temperature for value in ours])
        wanted += temperature**2 * divergence(p, q) / rows
    assert float(logits_loss(student, teacher, temperature)) == pytest.approx(wanted, rel=1e-6, abs=1e-9)


@given(SIZES, st.integers(1, 12))
@settings(deadline=None)
def test_with_top_k_both_distributions_are_those_over_the_teachers_k(sizes, k):
    rows, vocabulary, seed = sizes
    student, teacher = random(rows, vocabulary, seed=seed), random(rows, vocabulary, seed=seed + 1)
    wanted = 0.0
    for ours, theirs in zip(student.tolist(), teacher.tolist(), strict=True):
        top = sorted(range(vocabulary), key=lambda place: -theirs[place])[:k]
        p, q = softmax([theirs[place] / 2 for place in top]), softmax([ours[place] / 2 for place in top])
        wanted += 4 * divergence(p, q) / rows
    assert float(logits_loss(student, teacher, 2.0, top_k=k)) == pytest.approx(wanted, rel=1e-6, abs=1e-9)
    # The same of a teacher that was cut to its k before, in any order, and shifted row by row.
    values, classes = teacher.topk(min(k, teacher.shape[-1]))
    values, classes = values.flip(-1) - 5 * values.amax(-1, keepdim=True), classes.flip(-1)
    for precision in (torch.float64, torch.float32):
        cut = logits_loss(student, values.to(precision), 2.0, top_k=k, classes=classes)
        assert float(cut) == pytest.approx(wanted, rel=1e-4, abs=1e-5)
        assert cut.dtype == torch.float64


def test_logits_of_images_and_of_tokens_are_both_rows():
    student, teacher = random(2, 3, 5), random(2, 3, 5, seed=1)
    flat = logits_loss(student.view(6, 5), teacher.view(6, 5), 2.0)
    torch.testing.assert_close(logits_loss(student, teacher, 2.0), flat)
    reference = torch.nn.KLDivLoss(reduction="batchmean", log_target=True)
    wanted = 4 * reference((student.view(6, 5) / 2).log_softmax(-1), (teacher.view(6, 5) / 2).log_softmax(-1))
    torch.testing.assert_close(flat, wanted)


def test_half_precision_logits_are_compared_in_float32():
    student, teacher = random(4, 7).to(torch.bfloat16), random(4, 7, seed=1).to(torch.bfloat16)
    loss = logits_loss(student, teacher, 2.0)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, logits_loss(student.float(), teacher.float(), 2.0))


def test_rows_that_are_masked_do_not_count():
    student, teacher = random(2, 4, 5), random(2, 4, 5, seed=1)
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]])
    kept = torch.cat([student[0, :3], student[1, :2]]), torch.cat([teacher[0, :3], teacher[1, :2]])
    torch.testing.assert_close(logits_loss(student, teacher, mask=mask), logits_loss(*kept))
    student[mask == 0] = 1e3
    torch.testing.assert_close(logits_loss(student, teacher, mask=mask), logits_loss(*kept))
    # Padding at the end of a row is as if the row were shorter.
    short = relation_loss([(student[:1, :3], 1)], [(teacher[:1, :3], 1)])
    torch.testing.assert_close(relation_loss([(student[:1], 1)], [(teacher[:1], 1)], mask[:1]), short)
    short = hidden_loss([student[:1, :3]], [teacher[:1, :3]])
    torch.testing.assert_close(hidden_loss([student[:1]], [teacher[:1]], mask[:1]), short)


@given(st.integers(1, 2), st.integers(1, 5), st.sampled_from([(2, 4, 6), (4, 2, 2), (3, 4, 5)]), st.integers(0, 2**31))
@settings(deadline=None)
def test_relations_are_minilms(batch, tokens, sizes, seed):
    """heads, width of a teacher's head, width of a student's."""
    heads, wide, narrow = sizes
    student, teacher = (
        random(batch, tokens, heads * narrow, seed=seed),
        random(batch, tokens, heads * wide, seed=seed + 1),
    )

    def relation(x, width, row, head, token):
        cut = x[row, :, head * width : (head + 1) * width].tolist()
        scores = [sum(a * b for a, b in zip(cut[token], other, strict=True)) / math.sqrt(width) for other in cut]
        return softmax(scores)

    wanted = 0.0
    for row in range(batch):
        for head in range(heads):
            for token in range(tokens):
                p = relation(teacher, wide, row, head, token)
                q = relation(student, narrow, row, head, token)
                wanted += divergence(p, q) / (batch * heads * tokens)
    got = relation_loss([(student, heads)], [(teacher, heads)])
    assert float(got) == pytest.approx(wanted, rel=1e-6, abs=1e-9)
    three = relation_loss([(student, heads)] * 3, [(teacher, heads)] * 3)
    torch.testing.assert_close(three, got)


def test_relations_need_neither_equal_widths_nor_equal_heads():
    student, teacher = random(2, 5, 6), random(2, 5, 16, seed=1)
    loss = relation_loss([(student, 3)], [(teacher, 4)])  # two relation heads: of 3 and of 8
    wanted = relation_loss([(student, 2)], [(teacher, 2)])
    torch.testing.assert_close(loss, wanted)


def test_hidden_states_are_compared_relative_to_the_teachers():
    student = [random(2, 3, 4, seed=place) for place in range(2)]
    teacher = [random(2, 3, 4, seed=10 + place, scale=10.0**place) for place in range(4)]
    wanted = [((s - t) ** 2).mean() / (t**2).mean() for s, t in zip(student, (teacher[1], teacher[3]), strict=True)]
    torch.testing.assert_close(hidden_loss(student, teacher), (wanted[0] + wanted[1]) / 2)
    with pytest.raises(LeanfitError, match=r"\[2, 3, 5\].*\[2, 3, 4\]"):
        hidden_loss([random(2, 3, 5)], teacher)


@given(st.integers(1, 40), st.integers(1, 40))
def test_the_last_block_is_paired_with_the_last_and_the_order_is_kept(student, teacher):
    places = [paired(place, student, teacher) for place in range(student)]
    assert places[-1] == teacher - 1
    assert places == sorted(places)
    assert places[0] >= 0
    if student == teacher:
        assert places == list(range(teacher))


def observed(seed, grad=False):
    parts = [random(2, 5, 8, seed=seed + place).float().requires_grad_(grad) for place in range(5)]
    return Observed(logits=parts[0], hidden=parts[1:2], relations=[(part, 2) for part in parts[2:]]), parts


def test_nothing_is_lost_and_nothing_learned_where_student_and_teacher_agree():
    weights = {"logits": 1.0, "hidden": 1.0, "relations": 1.0}
    student, parts = observed(0, grad=True)
    teacher, _ = observed(0)
    for top_k in (None, 3):
        loss = combined(student, teacher, weights, temperature=2.0, top_k=top_k)
        assert loss.item() == pytest.approx(0, abs=1e-6)
        for gradient in torch.autograd.grad(loss, parts):
            assert gradient.abs().max() < 1e-6
    other, _ = observed(50)
    for gradient in torch.autograd.grad(combined(student, other, weights), parts):
        assert gradient.abs().max() > 1e-4


def test_losses_add_up_by_weight_and_those_without_weight_are_not_computed():
    (student, _), (teacher, _) = observed(0), observed(50)
    parts = (
        logits_loss(student.logits, teacher.logits, 3.0, 4),
        hidden_loss(student.hidden, teacher.hidden),
        relation_loss(student.relations, teacher.relations),
    )
    weights = {"logits": 0.5, "hidden": 2.0, "relations": 0.25}
    total = combined(student, teacher, weights, 3.0, 4)
    torch.testing.assert_close(total, 0.5 * parts[0] + 2 * parts[1] + 0.25 * parts[2])
    only = combined(
        Observed(logits=student.logits), Observed(logits=teacher.logits), {"logits": 1.0, "hidden": 0.0}, 3.0, 4
    )
    torch.testing.assert_close(only, parts[0])
    with pytest.raises(ValueError, match="no loss"):
        combined(student, teacher, {"logits": 0.0})
    with pytest.raises(ValueError, match="not observed"):
        combined(Observed(), teacher, {"logits": 1.0})


def tiny(kind):
    torch.manual_seed(0)
    if kind == "opt":
        return OPTForCausalLM(
            OPTConfig(
                vocab_size=16, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, ffn_dim=16,
                max_position_embeddings=24, word_embed_proj_dim=16, init_std=1.0,
            )
        ).eval()  # fmt: skip
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=16, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
            initializer_range=1.0,
        )
    ).eval()  # fmt: skip


@pytest.mark.parametrize("kind", ["opt", "llama"])
def test_a_greedy_continuation_is_generates(kind):
    model = tiny(kind)
    model.generation_config.eos_token_id = None
    ids = torch.randint(0, 16, (3, 20))
    rows = continued(model, ids, 5, sample=False)
    assert torch.equal(rows[:, :5], ids[:, :5])
    wanted = model.generate(ids[:, :5], max_new_tokens=15, do_sample=False, attention_mask=torch.ones(3, 5))
    assert torch.equal(rows, wanted)


def test_a_drawn_continuation_follows_the_models_distribution():
    model = tiny("opt")
    ids = torch.randint(0, 16, (1, 3)).expand(4000, -1)
    torch.manual_seed(0)
    rows = continued(model, ids, 2, sample=True)
    shares = torch.bincount(rows[:, 2], minlength=16) / 4000
    with torch.no_grad():
        wanted = model(input_ids=ids[:1, :2]).logits[0, -1].softmax(-1)
    assert (shares - wanted).abs().max() < 0.03
    torch.manual_seed(0)
    assert torch.equal(continued(model, ids, 2, sample=True), rows)


def test_what_is_observed_is_what_the_modules_gave_and_the_hooks_are_gone():
    model = tiny("llama")
    ids = torch.randint(0, 16, (2, 6))
    with observing(model, ["", "model.layers.0", "model.layers.0.self_attn.v_proj"]) as seen:
        output = model(input_ids=ids)
    assert seen[""].logits is output.logits
    torch.testing.assert_close(model.lm_head(model.model.norm(seen["model.layers.0"])), output.logits)
    assert seen["model.layers.0.self_attn.v_proj"].shape == (2, 6, 16)
    assert not any(module._forward_hooks for module in model.modules())
    with pytest.raises(RuntimeError), observing(model, [""]):
        raise RuntimeError
    assert not model._forward_hooks
