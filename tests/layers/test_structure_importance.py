"""Importance by gradients, against the formula written out by hand for each kind of unit, one unit at a time."""

import copy

import pytest
import torch
from transformers import Phi3Config, Phi3ForCausalLM

from pipeline.errors import LeanfitError
from pipeline.layers.structure_importance import taylor_importance, taylor_loss
from pipeline.layers.structure_plan import plan
from pipeline.models.architecture import describe
from tests import tiny

IDS = torch.randint(0, 64, (3, 12), generator=torch.Generator().manual_seed(0))
TEXT = [{"input_ids": IDS}, {"input_ids": IDS.flip(1)[:2, :7]}]
IMAGES = [{"pixel_values": x} for x in torch.randn(3, 4, 1, 16, 16, generator=torch.Generator().manual_seed(1))]


def opt(**changes):
    return tiny.opt(**{"num_attention_heads": 4, "ffn_dim": 48, "dropout": 0.5, "init_std": 0.3, **changes}).train()


def llama():
    changes = {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.3, "attention_bias": True}
    return tiny.llama(**changes).train()


def efficientnet():
    return tiny.efficientnet(depth_coefficient=1.0, num_block_repeats=[1, 2])


def scored(model, batches, **shares):
    architecture = describe(model)
    made, problems = plan(model, architecture, shares, 1, frozenset(), "compression.link")
    assert problems == []
    return taylor_importance(model, architecture, batches, made.cuts, "cpu")


def gradients(model, batches, targets=None):
    """By batch {weight: |w * dL/dw|}, L written out by `log_softmax`: the next tokens, or `targets`."""
    twin = copy.deepcopy(model).eval()
    found = []
    for number, batch in enumerate(batches):
        twin.zero_grad()
        logits = twin(**{name: rows for name, rows in batch.items() if name != "labels"}).logits.log_softmax(-1)
        nats = 0
        for row in range(len(logits)):
            if "input_ids" in batch:
                for at, token in enumerate(batch["input_ids"][row, 1:]):
                    nats = nats - logits[row, at, token]
            else:
                nats = nats - logits[row, targets[number][row]]
        nats.backward()
        found.append({name: (p * p.grad).abs().detach() for name, p in twin.named_parameters() if p.grad is not None})
    return found


def test_a_feed_forward_unit_scores_what_its_weights_in_all_layers_change_the_loss_by():
    model = llama()
    (want, found) = (gradients(model, TEXT), scored(model, TEXT, ffn=0.5))
    for index in range(2):
        mlp = f"model.layers.{index}.mlp"
        for unit in range(48):
            by_hand = sum(
                g[f"{mlp}.up_proj.weight"][unit].sum()
                + g[f"{mlp}.gate_proj.weight"][unit].sum()
                + g[f"{mlp}.down_proj.weight"][:, unit].sum()
                for g in want
            )
            assert found.ffn[index][unit].item() == pytest.approx(by_hand.item(), rel=1e-4)


def test_a_unit_whose_gate_and_way_up_are_one_layer_scores_both():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = Phi3ForCausalLM(Phi3Config(vocab_size=64, pad_token_id=0, **sizes)).train()
    (want, found) = (gradients(model, TEXT), scored(model, TEXT, ffn=0.5))
    for index, scores in enumerate(found.ffn):
        mlp = f"model.layers.{index}.mlp"
        both = sum(g[f"{mlp}.gate_up_proj.weight"].sum(1).view(2, 48).sum(0) for g in want)
        by_hand = both + sum(g[f"{mlp}.down_proj.weight"].sum(0) for g in want)
        torch.testing.assert_close(scores.float(), by_hand, rtol=1e-4, atol=0)


def test_a_key_value_head_scores_with_the_queries_that_it_serves():
    model = llama()
    (want, found) = (gradients(model, TEXT), scored(model, TEXT, heads=0.5))
    for index in range(2):
        attention = f"model.layers.{index}.self_attn"
        for unit in range(2):
            queries, own = slice(16 * unit, 16 * unit + 16), slice(8 * unit, 8 * unit + 8)
            by_hand = sum(
                g[f"{attention}.q_proj.weight"][queries].sum()
                + g[f"{attention}.k_proj.weight"][own].sum()
                + g[f"{attention}.v_proj.weight"][own].sum()
                + g[f"{attention}.o_proj.weight"][:, queries].sum()
                for g in want
            )
            assert found.heads[index][unit].item() == pytest.approx(by_hand.item(), rel=1e-4)


def test_a_hidden_dimension_scores_over_the_whole_model_and_a_tied_table_once():
    model = opt(tie_word_embeddings=True)
    (want, found) = (gradients(model, TEXT), scored(model, TEXT, hidden=0.25))
    for unit in (0, 13, 31):
        by_hand = 0
        for g in want:
            for name, change in g.items():
                leaf = name.split(".")[-2]
                if name.endswith("bias") or "norm" in name:
                    continue
                if leaf in ("embed_tokens", "embed_positions", "fc1"):
                    by_hand += change[:, unit].sum().item()
                elif leaf == "fc2":
                    by_hand += change[unit].sum().item()
                else:  # OPT's heads shrink with the stream: of inputs and outputs only the stream's side counts
                    by_hand += (change[unit] if leaf == "out_proj" else change[:, unit]).sum().item()
        assert found.hidden[unit].item() == pytest.approx(by_hand, rel=1e-4)


def test_a_block_scores_by_all_its_matrices():
    model = opt()
    (want, found) = (gradients(model, TEXT), scored(model, TEXT, depth=0.5))
    for index in range(2):
        inside = f"model.decoder.layers.{index}."
        by_hand = sum(c.sum() for g in want for n, c in g.items() if n.startswith(inside) and c.ndim == 2)
        assert found.blocks[index].item() == pytest.approx(by_hand.item(), rel=1e-4)


@pytest.mark.parametrize("labelled", [False, True])
def test_a_channel_scores_where_it_meets_others_by_labels_or_by_what_the_model_itself_says(labelled):
    model = efficientnet()
    with torch.no_grad():
        own = [model(**batch).logits.argmax(-1) for batch in IMAGES]
    targets = [(classes + 1) % 4 for classes in own] if labelled else own
    batches = [{**b, "labels": t} for b, t in zip(IMAGES, targets, strict=True)] if labelled else IMAGES
    (want, found) = (gradients(model, IMAGES, targets), scored(model, batches, channels=0.5))
    block = "efficientnet.encoder.blocks.1"
    for channel in range(len(found.channels[1])):
        by_hand = sum(
            g[f"{block}.expansion.expand_conv.weight"][channel].sum()
            + g[f"{block}.squeeze_excite.reduce.weight"][:, channel].sum()
            + g[f"{block}.squeeze_excite.expand.weight"][channel].sum()
            + g[f"{block}.projection.project_conv.weight"][:, channel].sum()
            for g in want
        )
        assert found.channels[1][channel].item() == pytest.approx(by_hand.item(), rel=1e-3)


def test_the_score_foretells_how_the_loss_moves_when_a_unit_is_turned_down_a_little():
    # Where a unit's weights all pull the same way nothing cancels, and first order is the derivative of the loss.
    model = opt(dropout=0.0, num_hidden_layers=1).double().eval()
    layer = model.model.decoder.layers[0].fc2
    with torch.no_grad():
        layer.weight[1:] = 0
    found = scored(model, TEXT[:1], ffn=0.5).ffn[0]
    before = taylor_loss(model, TEXT[0], "cpu").item()
    up = gradients(model, TEXT[:1])[0]["model.decoder.layers.0.fc1.weight"].sum(1)
    for unit in range(0, 48, 7):
        turned = copy.deepcopy(model)
        with torch.no_grad():
            turned.model.decoder.layers[0].fc2.weight[:, unit] *= 1 - 1e-5
        moved = abs(taylor_loss(turned, TEXT[0], "cpu").item() - before) / 1e-5
        assert (found[unit] - up[unit]).item() == pytest.approx(moved, rel=1e-3, abs=1e-6)


def test_the_model_is_left_as_it_was():
    model = opt()
    model.model.decoder.layers[0].fc1.weight.requires_grad_(False)
    kept = torch.ones_like(model.model.decoder.layers[1].fc2.weight)
    model.model.decoder.layers[1].fc2.weight.grad = kept
    before = copy.deepcopy(model.state_dict())
    required = {name: p.requires_grad for name, p in model.named_parameters()}
    with torch.no_grad():
        found = scored(model, TEXT, ffn=0.5)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert {name: p.requires_grad for name, p in model.named_parameters()} == required
    assert [n for n, p in model.named_parameters() if p.grad is not None] == ["model.decoder.layers.1.fc2.weight"]
    assert model.model.decoder.layers[1].fc2.weight.grad is kept
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())
    assert model.training
    assert all(scores.any() for scores in found.ffn)


def test_an_error_leaves_the_model_as_it_was_too():
    model = opt()
    with pytest.raises(IndexError):
        scored(model, [TEXT[0], {"input_ids": torch.full((1, 4), 64)}], ffn=0.5)
    assert all(p.requires_grad and p.grad is None and not p._post_accumulate_grad_hooks for p in model.parameters())


def test_gradients_are_never_held_together():
    model = opt()
    held = []

    class Watched(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.aten.abs_.default:
                held.append(sum(p.grad is not None for p in model.parameters()))
            return func(*args, **(kwargs or {}))

    with Watched():
        scored(model, TEXT, ffn=0.5)
    assert sum(held) == 2 * 12  # batches, matrices of the blocks
    assert max(held) == 1


def test_masked_weights_count_nothing():
    model = opt()
    model.model.decoder.layers[0].fc2.weight.data[:, 5] = 0
    model.model.decoder.layers[0].fc1.weight.data[5] = 0
    assert scored(model, TEXT, ffn=0.5).ffn[0][5] == 0


def test_where_nothing_can_be_said_it_is_an_error():
    with pytest.raises(LeanfitError, match="calibration set is empty"):
        scored(opt(), [], ffn=0.5)
    silent = opt(tie_word_embeddings=False)
    silent.lm_head.weight.data.zero_()
    with pytest.raises(LeanfitError, match="all gradients on the calibration set are zero"):
        scored(silent, TEXT, ffn=0.5)
    broken = opt()
    broken.model.decoder.layers[1].fc2.weight.data[0, 0] = float("nan")
    with pytest.raises(LeanfitError, match=r"NaN or infinity in model\.decoder\.layers\.1\.fc2\.weight"):
        scored(broken, TEXT, ffn=0.5)
