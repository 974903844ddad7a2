"""Which weights Muon takes, its update against the definition, and two optimizers that act as one."""

import pytest
import torch
from torch import nn

from pipeline.optimizers.muon import hidden_matrices
from tests.optimizers.test_optimizers import choice
from tests.tiny import efficientnet, llama, opt


@pytest.mark.parametrize(
    "model", [opt(), opt(tied=False), llama(tie_word_embeddings=False)], ids=["tied", "opt", "llama"]
)
def test_muon_takes_the_matrices_of_the_blocks_and_adamw_all_else(model):
    optimizer = choice("muon").build(model, 1e-3)
    muon, adamw = ([group for group in optimizer.param_groups if group["of"] == i] for i in (0, 1))
    names = {id(weight): name for name, weight in model.named_parameters()}
    taken = {names[id(weight)] for group in muon for weight in group["params"]}
    blocks = {n for n, w in model.named_parameters() if ".layers." in n and w.ndim == 2}
    assert taken == blocks
    rest = {names[id(weight)] for group in adamw for weight in group["params"]}
    assert taken | rest == set(names.values())
    assert not taken & rest


def test_a_frozen_matrix_is_left_alone():
    model = opt()
    frozen = model.model.decoder.layers[0].fc1.weight.requires_grad_(False)
    assert all(weight is not frozen for weight in hidden_matrices(model))


def test_a_model_without_hidden_linear_layers_is_told_so():
    (line,) = choice("muon").shape_problems(efficientnet())
    assert line.startswith("optimizer=muon: ")
    assert line.endswith("use optimizer=adamw")
    assert choice("muon").shape_problems(opt()) == []


def test_an_update_is_near_orthogonal_with_the_size_of_adamws():
    model = nn.Sequential(nn.Linear(24, 48, bias=False), nn.Linear(48, 4))
    before = model[0].weight.detach().clone()
    optimizer = choice("muon", weight_decay=0.0).build(model, 1.0)
    generator = torch.Generator().manual_seed(0)
    for weight in model.parameters():
        weight.grad = torch.randn(weight.shape, generator=generator)
    optimizer.step()
    update = before - model[0].weight.detach()
    values = torch.linalg.svdvals(update / (0.2 * 48**0.5))  # 0.2 sqrt(max dimension), Liu et al.
    assert values.min() > 0.6
    assert values.max() < 1.3


def test_state_dictionary_and_schedule_are_those_of_one_optimizer(tmp_path):
    def trained(model, optimizer, steps):
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
        for step in range(steps):
            for number, weight in enumerate(model.parameters()):
                weight.grad = torch.randn(weight.shape, generator=torch.Generator().manual_seed(100 * step + number))
            optimizer.step()
            scheduler.step()

    model = opt(tied=False)
    optimizer = choice("muon").build(model, 1e-2)
    trained(model, optimizer, 3)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([1e-2 / 4] * 3)
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    other = opt(tied=False)
    other.load_state_dict(model.state_dict())
    resumed = choice("muon").build(other, 1e-2)
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for one, steps in ((model, optimizer), (other, resumed)):
        for number, weight in enumerate(one.parameters()):
            weight.grad = torch.randn(weight.shape, generator=torch.Generator().manual_seed(number))
        steps.step()
    for first, second in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(first, second)
