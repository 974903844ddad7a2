"""Each precision trains a real transformer through Lightning: dtypes, learning, loss scaling, resuming."""

import itertools

import lightning.pytorch as lightning
import pytest
import torch
import yaml
from lightning.pytorch.plugins.precision import DoublePrecision
from pydantic import ValidationError
from pydantic.type_adapter import TypeAdapter
from torch import nn

from pipeline.app import main
from pipeline.composing import compose
from pipeline.data.base import DataSpec
from pipeline.errors import ConfigError
from pipeline.layers.experts import groups_multiply
from pipeline.layers.select import split_experts
from pipeline.models.byte_tokenizer import byte_tokenizer
from pipeline.precision import cpu_kernels
from pipeline.precision.full import Full
from pipeline.precision.mixed import Mixed
from pipeline.precision.plugins import TrueSixteen, convert_floating
from pipeline.registry import conf_root, lookup
from tests import tiny

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*treespec, LeafSpec"),
    pytest.mark.filterwarnings("ignore:.*your dataloader is not resumable"),  # every batch is the same one
]

CHOICES = ["32-true", "64-true", "16-true", "bf16-true", "16-mixed", "bf16-mixed"]


def choice(name, **changes):
    """The precision that `conf/precision/<name>.yaml` describes."""
    settings = yaml.safe_load((conf_root() / "precision" / f"{name}.yaml").read_text()) | changes
    return lookup("precision", settings["name"])(**settings)


def adamw(**settings):
    return lambda parameters: torch.optim.AdamW(parameters, **({"lr": 3e-3, "eps": 1e-4, "fused": True} | settings))


@pytest.fixture(params=["native", "emulated"])
def kernels(request, monkeypatch):
    """Both kinds of CPU on one: torch's own 16-bit kernels and ours."""
    native = request.param == "native"
    monkeypatch.setattr(cpu_kernels, "native", lambda dtype: native or dtype not in cpu_kernels.NARROW)
    return request.param


@pytest.mark.parametrize("name", CHOICES)
def test_label_is_the_name_of_the_choice(name):
    assert choice(name).label == name
    assert choice(name).problems() == []


@pytest.mark.parametrize("name", CHOICES)
def test_a_mixture_is_refused_in_a_dtype_in_which_its_experts_cannot_be_multiplied(name):
    model, precision = tiny.mixtral(), choice(name)
    told = precision.model_problems(model)
    try:
        precision.convert(model)(torch.arange(8).view(1, 8))
    except RuntimeError:
        assert told == [
            f"precision={name}: the experts of MixtralForCausalLM are multiplied by groups, which torch does not do in "
            "float64; use precision=32-true"
        ]
    else:
        assert told == []
    assert precision.model_problems(tiny.llama()) == []
    assert precision.model_problems(split_experts(tiny.mixtral())) == []


def test_such_a_mixture_ends_before_anything_runs(tmp_path, capsys):
    tiny.mixtral(vocab_size=256).save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    line = [
        "model=hf", f"model.pretrained={tmp_path}/model", "precision=64-true", "trainer=smoke", "device=cpu",
        "data.sequence_length=16", f"hydra.run.dir={tmp_path}/run",
    ]  # fmt: skip
    if groups_multiply(torch.float64):
        pytest.skip("this torch multiplies by groups in float64, or leaves it to transformers")
    assert main([*line, "compression=int8", "trainer.max_steps=0"]) == 2
    (told,) = (told for told in capsys.readouterr().err.splitlines() if told.startswith("error:"))
    assert "precision=64-true: the experts of MixtralForCausalLM" in told
    assert "(command line)" in told


@pytest.mark.parametrize(
    ("name", "dtype"),
    list(zip(CHOICES, ["float32", "float64", "float16", "bfloat16", "float32", "float32"], strict=True)),
)
def test_weights_gradients_and_states_have_the_dtype_that_was_asked_for(train, name, dtype):
    precision = choice(name)
    dtype = getattr(torch, dtype)
    module, trainer = train(2, precision.plugin("cpu"), adamw())
    assert precision.weight_dtype == dtype
    assert {weight.dtype for weight in module.parameters()} == {dtype}
    assert {weight.grad.dtype for weight in module.parameters()} == {dtype}
    moments = {state["exp_avg"].dtype for state in trainer.optimizers[0].state.values()}
    assert moments == {dtype}
    assert module.losses[0].dtype == (torch.float64 if name == "64-true" else torch.float32)
    assert {ids.dtype for ids in module.seen} == {torch.int64}
    assert torch.get_default_dtype() == torch.float32


@pytest.mark.parametrize("name", CHOICES)
def test_loss_falls_and_follows_that_of_float32(train, name, kernels):
    module, _ = train(25, choice(name).plugin("cpu"), adamw(), gradient_clip_val=1.0)
    reference, _ = train(25, choice("32-true").plugin("cpu"), adamw(), gradient_clip_val=1.0)
    assert module.losses[-1] < 0.7 * module.losses[0]
    near = {"64-true": 1e-3, "16-mixed": 2e-2, "bf16-mixed": 6e-2, "16-true": 2e-1, "bf16-true": 2e-1, "32-true": 0}[
        name
    ]
    assert abs(module.losses[-1] - reference.losses[-1]) <= near


@pytest.mark.parametrize("name", CHOICES)
def test_a_resumed_run_ends_in_the_weights_of_an_uninterrupted_one(train, make_model, tmp_path, name):
    changes = {"growth_interval": 2} if name == "16-mixed" else {}  # so that the scale moves within these steps
    precision, last = choice(name, **changes), tmp_path / "last.ckpt"
    whole, trainer = train(6, precision.plugin("cpu"), adamw(), model=precision.convert(make_model()))
    _, first = train(3, precision.plugin("cpu"), adamw(), model=precision.convert(make_model()))
    first.save_checkpoint(last)
    empty = precision.convert(make_model())
    resumed, second = train(6, precision.plugin("cpu"), adamw(), model=empty, ckpt_path=last)
    assert len(resumed.losses) == 3
    for mine, theirs in zip(resumed.parameters(), whole.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    assert second.precision_plugin.state_dict() == trainer.precision_plugin.state_dict()


def test_the_loss_scale_is_in_the_checkpoint(train, tmp_path):
    precision = choice("16-mixed", initial_scale=128.0, growth_interval=2)
    _, trainer = train(5, precision.plugin("cpu"), adamw())
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    assert trainer.precision_plugin.scaler.get_scale() == 512.0
    _, again = train(5, precision.plugin("cpu"), adamw(), ckpt_path=tmp_path / "last.ckpt")
    assert again.precision_plugin.scaler.get_scale() == 512.0
    assert again.precision_plugin.scaler.state_dict()["_growth_tracker"] == 1


class Watch(lightning.Callback):
    """Loss scale and weights after each step."""

    def __init__(self):
        self.scales, self.weights = [], []

    def on_train_batch_end(self, trainer, module, *_):
        self.scales.append(trainer.precision_plugin.scaler.get_scale())
        self.weights.append(torch.cat([weight.detach().flatten().clone() for weight in module.parameters()]))


@pytest.mark.parametrize("optimizer", [adamw(), adamw(fused=False), lambda p: torch.optim.SGD(p, lr=0.1)])
def test_an_overflow_skips_the_step_halves_the_scale_and_training_recovers(train, make_model, kernels, optimizer):
    watch, model = Watch(), make_model()
    before = torch.cat([weight.detach().flatten().clone() for weight in model.parameters()])
    plugin = choice("16-mixed", initial_scale=2.0**24).plugin("cpu")
    module, _ = train(30, plugin, optimizer, model=model, callbacks=[watch], gradient_clip_val=1.0)
    assert watch.scales[0] == 2.0**23
    assert torch.equal(watch.weights[0], before)
    settled = watch.scales[-1]
    assert settled < 2.0**24
    assert watch.scales[-5:] == [settled] * 5
    assert not torch.equal(watch.weights[-1], before)
    assert watch.weights[-1].isfinite().all()
    assert module.losses[-1] < module.losses[0]
    moments = [before, *watch.weights]
    stood = sum(torch.equal(one, other) for one, other in itertools.pairwise(moments))
    assert plugin.scaler.skipped == stood > 0
    resumed = choice("16-mixed").plugin("cpu").scaler
    resumed.load_state_dict(plugin.scaler.state_dict())
    assert (resumed.skipped, resumed.get_scale()) == (stood, settled)


@pytest.mark.parametrize("fused", [True, False])
def test_clipping_acts_on_unscaled_gradients_whatever_the_optimizer(train, fused):
    norms = []

    class Norms(lightning.Callback):
        def on_before_optimizer_step(self, trainer, module, optimizer):
            norms.append(nn.utils.get_total_norm([weight.grad for weight in module.parameters()]))

    scaled, _ = train(
        4, choice("16-mixed").plugin("cpu"), adamw(fused=fused), gradient_clip_val=0.1, callbacks=[Norms()]
    )
    plain, _ = train(4, choice("32-true").plugin("cpu"), adamw(fused=fused), gradient_clip_val=0.1, callbacks=[Norms()])
    assert torch.allclose(torch.stack(norms[:4]), torch.stack(norms[4:]), rtol=0.05)
    for mine, theirs in zip(scaled.parameters(), plain.parameters(), strict=True):
        assert torch.allclose(mine, theirs, atol=3e-3)


def test_gradients_of_micro_batches_add_up_under_scaling(train):
    module, _ = train(3, choice("16-mixed").plugin("cpu"), adamw(), accumulate_grad_batches=1)
    halves, trainer = train(3, choice("16-mixed").plugin("cpu"), adamw(), accumulate_grad_batches=2)
    assert trainer.global_step == 3
    assert len(halves.losses) == 6
    for mine, theirs in zip(halves.parameters(), module.parameters(), strict=True):
        assert torch.allclose(mine, theirs, atol=3e-3)


@pytest.mark.parametrize("cached", [True, False])
def test_weight_cache_changes_no_result(train, make_model, cached):
    tied = make_model(tie_word_embeddings=True)
    module, _ = train(3, choice("16-mixed", cache_weights=cached).plugin("cpu"), adamw(), model=tied)
    reference, _ = train(3, choice("16-mixed").plugin("cpu"), adamw(), model=make_model(tie_word_embeddings=True))
    assert [float(x) for x in module.losses] == [float(x) for x in reference.losses]


def test_weight_cache_casts_a_weight_used_twice_once():
    weight = nn.Parameter(torch.randn(64, 64))
    data = torch.randn(4, 64, dtype=torch.float16)

    def casts(cached):
        context = choice("16-mixed", cache_weights=cached).plugin("cpu").forward_context()
        with context, torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], acc_events=True) as seen:
            nn.functional.linear(nn.functional.linear(data, weight), weight)
        return [event.key for event in seen.events()].count("aten::to")

    assert casts(True) < casts(False)


def test_kernels_serve_forward_and_backward_and_are_gone_afterwards(train, monkeypatch):
    monkeypatch.setattr(cpu_kernels, "native", lambda dtype: dtype not in cpu_kernels.NARROW)
    calls = []

    def spied(kernel):
        def spy(original, *args, **kwargs):
            calls.append(torch.is_grad_enabled())
            return kernel(original, *args, **kwargs)

        return spy

    for operator, (kernel, deciding) in list(cpu_kernels.KERNELS.items()):
        monkeypatch.setitem(cpu_kernels.KERNELS, operator, (spied(kernel), deciding))
    for name in ("16-mixed", "16-true"):
        calls.clear()
        train(1, choice(name).plugin("cpu"), adamw())
        # Two blocks of six products and attention, and the head; the backward pass has two products for each.
        assert len(calls) >= 15 + 2 * 13
        assert not torch._C._dispatch_has_kernel_for_dispatch_key("aten::convolution", "CPU")


@pytest.mark.parametrize("name", ["16-true", "bf16-true"])
def test_evaluation_in_16_bits_uses_the_kernels_and_keeps_the_arithmetic(make_model, name, kernels):
    precision = choice(name)
    model = make_model().to(precision.weight_dtype).eval()
    ids = torch.arange(16).unsqueeze(0)
    with torch.no_grad():
        outside = model(input_ids=ids).logits
        with precision.evaluation_context("cpu"):
            inside = model(input_ids=ids).logits
    assert inside.dtype == outside.dtype == precision.weight_dtype
    assert torch.allclose(inside.float(), outside.float(), atol=0.02 if name == "16-true" else 0.15)


@pytest.mark.parametrize("name", ["32-true", "64-true", "16-mixed", "bf16-mixed"])
def test_evaluation_in_float32_and_float64_is_left_alone(name):
    with choice(name).evaluation_context("cpu"):
        assert not torch.is_autocast_enabled("cpu")
        assert not torch._C._dispatch_has_kernel_for_dispatch_key("aten::convolution", "CPU")


def test_float64_trains_in_float64_arithmetic(train):
    module, _ = train(1, choice("64-true").plugin("cpu"), adamw())
    assert isinstance(choice("64-true").plugin("cpu"), DoublePrecision)
    loss = float(module.losses[0])
    assert loss != float(torch.tensor(loss).float())


class Rotary(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("saved", torch.ones(3))
        self.register_buffer("frequencies", torch.tensor([1 / 3]), persistent=False)
        self.register_buffer("counter", torch.tensor(7))


def test_constants_that_are_not_saved_keep_float32():
    module = TrueSixteen("bf16-true", "cpu").convert_module(Rotary())
    assert module.linear.weight.dtype == module.saved.dtype == torch.bfloat16
    assert module.frequencies.dtype == torch.float32
    assert module.frequencies.item() == torch.tensor(1 / 3).item()
    assert module.counter.dtype == torch.int64
    assert set(module.state_dict()) == {"linear.weight", "linear.bias", "saved", "counter"}


def test_converting_keeps_tied_weights_tied(make_model):
    model = convert_floating(make_model(tie_word_embeddings=True), torch.float16)
    assert model.lm_head.weight is model.model.decoder.embed_tokens.weight


def test_float_inputs_are_converted_and_integers_are_not():
    batch = {"pixel_values": torch.ones(2), "labels": torch.ones(2, dtype=torch.int64)}
    converted = choice("bf16-true").plugin("cpu").convert_input(batch)
    assert converted["pixel_values"].dtype == torch.bfloat16
    assert converted["labels"].dtype == torch.int64


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        ("16-mixed", {"initial_scale": None}, "precision.initial_scale=null"),
        ("16-mixed", {"growth_interval": None}, "precision.growth_interval=null"),
        ("bf16-mixed", {"initial_scale": 2.0}, "precision.initial_scale=2"),
        ("bf16-mixed", {"growth_interval": 5}, "precision.growth_interval=5"),
    ],
)
def test_scaling_that_does_not_fit_the_dtype_is_a_problem(name, changes, said):
    precision = choice(name, **changes)
    assert len(precision.problems()) == 1
    assert precision.problems()[0].startswith(said)
    with pytest.raises(ConfigError, match=said):
        precision.plugin("cpu")


def test_float64_on_an_apple_gpu_is_refused():
    with pytest.raises(ConfigError, match="use precision=32-true or device=cpu"):
        choice("64-true").plugin("mps")


@pytest.mark.parametrize(
    ("cls", "settings"),
    [
        (Full, {"name": "full", "dtype": "float8"}),
        (
            Mixed,
            {
                "name": "mixed",
                "dtype": "float32",
                "cache_weights": True,
                "initial_scale": None,
                "growth_interval": None,
            },
        ),
        (
            Mixed,
            {"name": "mixed", "dtype": "float16", "cache_weights": True, "initial_scale": 0.0, "growth_interval": 1},
        ),
        (
            Mixed,
            {"name": "mixed", "dtype": "float16", "cache_weights": True, "initial_scale": 1.0, "growth_interval": 0},
        ),
        (Mixed, {"name": "mixed", "dtype": "float16", "cache_weights": 1, "initial_scale": 1.0, "growth_interval": 1}),
    ],
)
def test_settings_of_wrong_type_or_range_do_not_decode(cls, settings):
    with pytest.raises(ValidationError):
        TypeAdapter(cls).validate_python(settings, strict=True)


@pytest.mark.parametrize("name", ["bf16-true", "16-true"])
def test_positions_are_counted_in_full_where_weights_have_16_bits(name):
    config = compose(["model=gpt_nano", "device=cpu", f"precision={name}", "optimizer.eps=1e-4"])
    model = config.model.build(DataSpec(vocabulary=256, sequence_length=600))
    config.precision.convert(model)
    seen = []

    def note(module, arguments, named, output):
        seen.append(named["position_ids"])

    model.model.decoder.embed_positions.register_forward_hook(note, with_kwargs=True)
    with config.precision.plugin("cpu").forward_context():
        model(input_ids=torch.zeros(1, 600, dtype=torch.long))
    assert torch.equal(seen[0][0], torch.arange(600))
