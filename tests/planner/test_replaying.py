"""A plan whose layers are decoded once says what one says that decodes each of them."""

from contextlib import nullcontext
from unittest import mock

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from pipeline.composing import compose
from pipeline.layers.schemes import quantize_layers
from pipeline.planner import evaluation, generation, training, transfers
from pipeline.planner.live import Live
from pipeline.planner.plan import plan
from pipeline.planner.replaying import replaying

GPT = [
    "job=plan",
    "model=gpt_nano",
    "trainer=smoke",
    "device=cpu",
    "plan.calibrate=false",
    "data.evaluation_tokens=4096",
]
CASES = {
    "QLoRA, whose backward pass decodes again": ["adapter=lora", "compression=nf4"],
    "lengths of rows, checkpointed": ["adapter=dora", "compression=nf4", "memory.activation_checkpointing=full"],
    "16 bits": ["adapter=lora", "compression=nf4", "precision=bf16-mixed"],
    "what a GPU's pool reserves": ["adapter=lora", "compression=nf4", "device=cuda", "device.memory=1GiB"],
    "3 bits": ["compression=int4", "compression.int4.bits=3", "compression.int4.symmetric=false"],
    "8 bits by a kernel": ["compression=int8"],
}


@pytest.mark.parametrize("case", CASES)
def test_a_plan_is_the_same_to_the_byte(case):
    config = compose([*GPT, *CASES[case]])
    data = config.data.open(config.model.tokenizer())
    found = plan(config, data)
    each = [
        mock.patch.object(module, "replaying", return_value=nullcontext())
        for module in (evaluation, generation, training, transfers)
    ]
    with each[0], each[1], each[2], each[3]:
        expected = plan(config, data)
    assert found.phases == expected.phases
    assert not found.open


class Counted(Live):
    operators = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.operators += 1
        return super().__torch_dispatch__(func, types, args, kwargs)


@pytest.mark.parametrize(
    ("scheme", "settings"),
    [("weight_only", {"bits": 4, "group_size": 8}), ("nf4", {"block_size": 16, "double_quant": True}), ("int8", {})],
)
def test_a_second_layer_of_the_shape_runs_no_operators_and_one_of_another_shape_does(scheme, settings):
    model = torch.nn.ModuleList([torch.nn.Linear(64, 32), torch.nn.Linear(64, 32), torch.nn.Linear(32, 64)])
    quantize_layers(model, ["0", "1", "2"], scheme, **settings)
    model[0].dequantized()  # tables that are made once
    with FakeTensorMode(allow_non_fake_inputs=True), Counted() as live, replaying(live):
        spent, events, weights = [], [], []
        for layer in model:
            before, start = live.operators, len(live.timeline.events)
            weights.append(layer.decoded_rows(0, layer.rows))
            spent.append(live.operators - before)
            events.append([(block.bytes, sign, operator) for block, sign, operator in live.timeline.events[start:]])
    assert spent[1] <= 1 < spent[0]
    assert spent[2] == spent[0]
    assert events[0] == events[1]
    assert [weight.shape for weight in weights] == [(32, 64), (32, 64), (64, 32)]
    assert weights[0].stride() == weights[1].stride()
    assert weights[0].dtype == weights[1].dtype == torch.float32
