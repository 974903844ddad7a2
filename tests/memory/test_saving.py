"""Recomputed blocks give the losses and gradients of plain ones, and hold less; gradients are freed in time."""

import copy

import lightning.pytorch as lightning
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM

from pipeline.errors import ConfigError
from pipeline.layers.decoding import decode
from pipeline.memory.measure import measure_peak
from pipeline.memory.saving import ReleaseGradients, apply_activation_checkpointing
from pipeline.precision import cpu_kernels
from pipeline.precision.cpu_kernels import sixteen_bit_kernels

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*treespec, LeafSpec"),
]

MODES = ["full", "selective"]


def opt(dropout=0.0, layers=3, width=32, length=16):
    torch.manual_seed(0)
    return OPTForCausalLM(
        OPTConfig(
            vocab_size=64, hidden_size=width, word_embed_proj_dim=width, ffn_dim=4 * width, num_hidden_layers=layers,
            num_attention_heads=2, max_position_embeddings=length, activation_function="gelu", dropout=dropout,
            attention_dropout=dropout, pad_token_id=None, bos_token_id=None, eos_token_id=None,
        )
    )  # fmt: skip


def llama():
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=16, pad_token_id=None, bos_token_id=None, eos_token_id=None,
        )
    )  # fmt: skip


def blocks(model):
    return [name for name, _ in model.named_modules() if name.rpartition(".")[0].endswith("layers")]


def batch(rows=3, length=16):
    return torch.randint(0, 64, (rows, length), generator=torch.Generator().manual_seed(1))


def loss_of(model, ids, **settings):
    logits = model(input_ids=ids, **settings).logits.float()
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def losses_and_gradients(model, ids, context=None, **settings):
    torch.manual_seed(3)  # dropout
    if context is None:
        loss = loss_of(model, ids, **settings)
        loss.backward()
    else:
        with context():
            loss = loss_of(model, ids, **settings)
        with sixteen_bit_kernels():
            loss.backward()
    return [loss.detach(), *(weight.grad for weight in model.parameters())]


def assert_same(got, expected):
    for mine, theirs in zip(got, expected, strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("make", [opt, llama, lambda: opt(dropout=0.3)], ids=["opt", "llama", "opt with dropout"])
def test_losses_and_gradients_are_those_of_plain_blocks_bit_for_bit(make, mode):
    plain, model = make(), make()
    apply_activation_checkpointing(model, blocks(model), mode)
    assert_same(losses_and_gradients(model, batch()), losses_and_gradients(plain, batch()))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("native", [True, False], ids=["native", "emulated"])
def test_16_bit_autocast_recomputes_in_16_bits_and_gives_the_same(monkeypatch, mode, dtype, native):
    monkeypatch.setattr(cpu_kernels, "native", lambda kind: native or kind not in cpu_kernels.NARROW)

    def context():
        stack = torch.autocast("cpu", dtype)
        return stack if native else Both(stack)

    class Both:
        def __init__(self, inner):
            self.parts = [sixteen_bit_kernels(), inner]

        def __enter__(self):
            for part in self.parts:
                part.__enter__()

        def __exit__(self, *error):
            for part in reversed(self.parts):
                part.__exit__(*error)

    plain, model = opt(dropout=0.1), opt(dropout=0.1)
    apply_activation_checkpointing(model, blocks(model), mode)
    assert_same(losses_and_gradients(model, batch(), context), losses_and_gradients(plain, batch(), context))


def peak_of(mode):
    model = opt(layers=8, width=64, length=64)
    if mode != "none":
        apply_activation_checkpointing(model, blocks(model), mode)
    ids = batch(8, 64)
    losses_and_gradients(model, ids)
    with measure_peak("cpu", [*model.parameters(), *(weight.grad for weight in model.parameters()), ids]) as peak:
        loss_of(model, ids).backward()
    return peak.bytes


def test_full_holds_less_than_selective_and_selective_less_than_none():
    none, selective, full = (peak_of(mode) for mode in ("none", "selective", "full"))
    assert full < 0.8 * selective
    assert selective < 0.85 * none


@pytest.mark.parametrize("mode", MODES)
def test_names_of_modules_and_parameters_stay_and_removal_leaves_no_trace(mode):
    model = opt()
    names, modules = list(model.state_dict()), [name for name, _ in model.named_modules()]
    before = [set(vars(module)) for module in model.modules()]
    remove = apply_activation_checkpointing(model, blocks(model), mode)
    assert list(model.state_dict()) == names
    assert [name for name, _ in model.named_modules()] == modules
    remove()
    remove()
    assert [set(vars(module)) for module in model.modules()] == before


def count_runs(model):
    runs = []
    model.model.decoder.layers[0].fc1.register_forward_hook(lambda *_: runs.append(1))
    return runs


def test_applying_twice_recomputes_once_and_one_removal_is_enough():
    model = opt()
    runs = count_runs(model)
    apply_activation_checkpointing(model, blocks(model), "full")
    remove = apply_activation_checkpointing(model, blocks(model), "full")
    loss_of(model, batch()).backward()
    assert len(runs) == 2
    remove()
    loss_of(model, batch()).backward()
    assert len(runs) == 3


def test_the_last_mode_wins():
    model, plain = opt(), opt()
    apply_activation_checkpointing(model, blocks(model), "selective")
    apply_activation_checkpointing(model, blocks(model), "full")
    assert_same(losses_and_gradients(model, batch()), losses_and_gradients(plain, batch()))


def test_evaluation_is_not_computed_twice():
    model = opt()
    runs = count_runs(model)
    apply_activation_checkpointing(model, blocks(model), "full")
    with torch.no_grad():
        loss_of(model, batch())
    assert len(runs) == 1


def test_a_copy_of_the_model_runs_its_own_blocks():
    model = opt()
    remove = apply_activation_checkpointing(model, blocks(model), "full")
    twin = copy.deepcopy(model)
    remove()
    runs = count_runs(twin)
    with torch.no_grad():
        for weight in twin.parameters():
            weight.zero_()
    loss = loss_of(twin, batch())
    loss.backward()
    assert len(runs) == 2
    assert loss.item() == pytest.approx(torch.tensor(64.0).log().item())


def test_a_forward_that_was_replaced_on_the_block_is_kept():
    model = opt()
    block = model.model.decoder.layers[0]
    original = block.forward
    calls = []

    def replaced(*args, **kwargs):
        calls.append(1)
        return original(*args, **kwargs)

    block.forward = replaced
    remove = apply_activation_checkpointing(model, blocks(model), "full")
    loss_of(model, batch()).backward()
    assert len(calls) == 2
    remove()
    assert block.forward is replaced


def test_the_models_own_key_value_cache_does_not_disturb():
    plain, model = opt(), opt()
    apply_activation_checkpointing(model, blocks(model), "full")
    assert_same(
        losses_and_gradients(model, batch(), use_cache=True), losses_and_gradients(plain, batch(), use_cache=False)
    )


def test_a_filled_key_value_cache_is_refused():
    model = opt()
    with torch.no_grad():
        _, cache = decode(model, batch()[:, :4])
    apply_activation_checkpointing(model, blocks(model), "full")
    with pytest.raises(RuntimeError, match="filled key-value cache"):
        decode(model, batch()[:, 4:], cache)


class Convolutional(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.SiLU()) for _ in range(3)
        )

    def forward(self, data):
        for layer in self.layers:
            data = layer(data)
        return data


@pytest.mark.parametrize("mode", MODES)
def test_batch_statistics_are_counted_once(mode):
    plain, model = Convolutional(), Convolutional()
    apply_activation_checkpointing(model, [f"layers.{index}" for index in range(3)], mode)
    data = torch.randn(5, 4, 6, 6)
    for _ in range(2):
        for each in (plain, model):
            each.zero_grad()
            each(data).square().mean().backward()
    assert_same([w.grad for w in model.parameters()], [w.grad for w in plain.parameters()])
    assert_same(model.buffers(), plain.buffers())
    assert model.layers[0][1].momentum == 0.1


class Tuples(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.block = nn.Linear(4, 4)
        self.block.forward = lambda data, *, twice=False: (F.linear(data, self.block.weight), twice)


def test_blocks_may_take_keywords_and_return_tuples():
    module = Tuples()
    apply_activation_checkpointing(module, ["block"], "full")
    out, said = module.block(torch.ones(2, 4), twice=True)
    out.sum().backward()
    assert said is True
    assert torch.equal(module.block.weight.grad, torch.full((4, 4), 2.0))


def test_none_touches_nothing():
    model = opt()
    before = [set(vars(module)) for module in model.modules()]
    apply_activation_checkpointing(model, [], "none")()
    assert [set(vars(module)) for module in model.modules()] == before


def test_a_model_without_blocks_and_unknown_or_nested_blocks_are_errors():
    with pytest.raises(ConfigError, match=r"memory\.activation_checkpointing=full: this model has no repeated blocks"):
        apply_activation_checkpointing(nn.Linear(2, 2), [], "full")
    with pytest.raises(ValueError, match=r"no module 'layers\.7'"):
        apply_activation_checkpointing(Convolutional(), ["layers.0", "layers.7"], "full")
    with pytest.raises(ValueError, match=r"'layers\.0\.1' lies inside block 'layers\.0'"):
        apply_activation_checkpointing(Convolutional(), ["layers.0", "layers.0.1"], "full")


class Module(lightning.LightningModule):
    def __init__(self, watch):
        super().__init__()
        torch.manual_seed(0)
        self.model, self.watch = nn.Linear(4, 4), watch

    def training_step(self, data, index):
        self.watch.append(self.model.weight.grad is None)
        return self.model(data).square().mean()

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.1)


def fit(tmp_path, callbacks, accumulation, batches=6):
    torch.manual_seed(1)
    module = Module([])
    trainer = lightning.Trainer(
        accelerator="cpu", devices=1, max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=callbacks, accumulate_grad_batches=accumulation,
        default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(module, DataLoader(torch.randn(batches, 4), batch_size=1))
    return module


@pytest.mark.parametrize(
    ("accumulation", "free"),
    [
        (1, [True, True, True, True, True]),
        (2, [True, False, True, False, True]),  # the fifth batch ends the epoch, and steps alone
        (3, [True, False, False, True, False]),
    ],
)
def test_gradients_are_gone_before_the_next_forward_but_not_between_micro_batches(tmp_path, accumulation, free):
    released = fit(tmp_path, [ReleaseGradients()], accumulation, batches=5)
    kept = fit(tmp_path, [], accumulation, batches=5)
    assert released.watch == free
    assert kept.watch == [True] + [False] * 4
    assert released.model.weight.grad is None
    assert_same(released.model.parameters(), kept.model.parameters())


@pytest.mark.parametrize(
    ("accumulation", "free"), [(1, [True, True, False, False, False]), (2, [True, False, True, False, False])]
)
def test_gradients_may_be_let_go_of_after_the_first_step_alone(tmp_path, accumulation, free):
    assert fit(tmp_path, [ReleaseGradients(once=True)], accumulation, batches=5).watch == free
