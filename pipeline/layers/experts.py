"""A mixture's experts as linear layers, so that what is known of linear layers is known of them.

transformers holds the experts of a block in one module, their matrices stacked into tensors [experts, ...], for
products by groups. Methods that look at a layer's inputs, or put another in its place, need layers: here each expert
gets two (its gate and up projection are one, as they lie there), and the mixture is the same sum. GPTQ and SparseGPT
then see of each expert the tokens that the router sends to it (Frantar & Alistarh, 2023, arXiv:2310.16795); one that
the calibration set never reaches is rounded to nearest, or pruned by magnitude.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from pipeline.layers.constants import constant
from pipeline.layers.offload import own_copy

DOWN = "down_proj"


class LinearExperts(nn.Module):
    """The mixture of `stacked`, a module that keeps to transformers' `use_experts_implementation`.

    Expert `e` is the submodule `e`, a dict of linear layers. `rules` is what is left of `stacked`: its activation.
    """

    def __init__(self, stacked: Any) -> None:
        super().__init__()
        self.first = "gate_up_proj" if getattr(stacked, "has_gate", True) else "up_proj"
        self.number: int = stacked.num_experts
        layers = {name: _unstacked(stacked, name) for name in (self.first, DOWN)}
        for expert in range(self.number):
            self.add_module(str(expert), nn.ModuleDict({name: made[expert] for name, made in layers.items()}))
        self.rules = stacked
        self.train(stacked.training)

    @property
    def up_begins(self) -> int | None:
        """Which output of an expert's first layer is the way up's first: those before it are the gate's. None where
        they lie in turn."""
        if self.first != "gate_up_proj":
            return 0
        layer = cast(nn.ModuleDict, self.get_submodule("0"))[self.first]
        return cast(nn.Linear, layer).out_features // 2 if getattr(self.rules, "is_concatenated", True) else None

    def passes_scales(self) -> bool:
        """Whether what multiplies the way up multiplies what an expert's second layer is given, by as much.

        Tried on what lies between, for real, so that a plan, which has no values, knows it too.
        """
        begins = self.up_begins
        if begins is None:
            return False
        with _disable_current_modes(), torch.no_grad():
            up = torch.linspace(-9, 7, 24, device="cpu").view(1, -1)
            gate = torch.linspace(5, -4, 24, device="cpu").view(1, -1)[:, : 24 if begins else 0]
            found, expected = self._between(torch.cat([gate, 4 * up], 1)), 4 * self._between(torch.cat([gate, up], 1))
            return torch.allclose(found, expected)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """`hidden_states` [tokens, width] through the experts `top_k_index` [tokens, k] of each token, added up with
        `top_k_weights` [tokens, k]."""
        order = top_k_index.reshape(-1).argsort(stable=True)
        rows = hidden_states[order // top_k_index.shape[-1]]
        mixed = self._mixed(rows, tokens_of(top_k_index, self.number))
        del rows
        mixed = mixed * top_k_weights.reshape(-1)[order].unsqueeze(-1)
        return mixed[order.argsort()].view(*top_k_index.shape, -1).sum(1).to(hidden_states.dtype)

    def _mixed(self, rows: Tensor, counts: list[int]) -> Tensor:
        """`rows` [choices, width], the first `counts[0]` of them expert 0's, and so on, each through its expert."""
        if torch.is_grad_enabled():
            # One without tokens has a gradient too, of zeros: ranks would wait for it. Not every layer takes no rows.
            some = (part if len(part) else rows.new_zeros(1, rows.shape[1]) for part in _parts(rows, counts))
            return torch.cat([self._expert(place, part)[: counts[place]] for place, part in enumerate(some)])
        outputs, share = torch.empty_like(rows), max(1, -(-len(rows) // self.number))
        # No more at once than if all had as many, so that what is held does not depend on where tokens go.
        for place, (part, output) in enumerate(zip(_parts(rows, counts), _parts(outputs, counts), strict=True)):
            for begin in range(0, len(part), share):
                output[begin : begin + share] = self._expert(place, part[begin : begin + share])
        return outputs

    def _expert(self, place: int, rows: Tensor) -> Tensor:
        expert, rules = cast(nn.ModuleDict, self.get_submodule(str(place))), cast(Any, self.rules)
        rows = expert[DOWN](self._between(expert[self.first](rows)))
        return cast(Tensor, rules.post_expert_norm(rows)) if getattr(rules, "has_post_expert_norm", False) else rows

    def _between(self, rows: Tensor) -> Tensor:
        rules = cast(Any, self.rules)
        return cast(Tensor, rules._apply_gate(rows) if self.first == "gate_up_proj" else rules.act_fn(rows))


class DenseExperts(LinearExperts):
    """The mixture of a module that is given a row for each expert and token, as Llama 4's: zeros where the token is not
    sent there, from which an expert makes zeros. Those rows are left out.

    `rows_per_token`: how many experts a token is sent to.
    """

    def __init__(self, stacked: Any, rows_per_token: int) -> None:
        stacked.is_transposed = True
        super().__init__(stacked)
        self.rows_per_token = rows_per_token

    def forward(self, hidden_states: Tensor) -> Tensor:  # type: ignore[override]
        """`hidden_states` [experts * tokens, width], the first expert's rows first: as many rows of outputs."""
        sent, counts = rows_of(hidden_states, self.number, self.rows_per_token)
        mixed = self._mixed(hidden_states[sent], counts)
        return torch.zeros_like(hidden_states).index_copy(0, sent, mixed)

    def _between(self, rows: Tensor) -> Tensor:
        gate, up = rows.chunk(2, -1)
        return cast(Tensor, up * cast(Any, self.rules).act_fn(gate))


def _parts(rows: Tensor, counts: list[int]) -> tuple[Tensor, ...]:
    return torch.split_with_sizes(rows, counts)


def tokens_of(chosen: Tensor, number: int) -> list[int]:
    """How many of the choices go to each of so many experts."""
    return cast(list[int], torch.bincount(chosen.reshape(-1), minlength=number).tolist())


def rows_of(hidden: Tensor, number: int, per_token: int) -> tuple[Tensor, list[int]]:
    """Which rows of `hidden` [experts * tokens, width] are not zeros, and how many of them each expert has; a token has
    `per_token` of them."""
    sent = hidden.any(-1)
    return sent.nonzero().squeeze(-1), cast(list[int], sent.view(number, -1).sum(1).tolist())


def is_dense(module: nn.Module) -> bool:
    """Whether `module` holds experts [experts, in, out] for `DenseExperts`."""
    first, second = (getattr(module, name, None) for name in ("gate_up_proj", DOWN))
    return (
        isinstance(first, nn.Parameter)
        and isinstance(second, nn.Parameter)
        and (first.ndim, second.ndim) == (3, 3)
        and first.shape[1:] == (second.shape[2], 2 * second.shape[1])
        and hasattr(module, "act_fn")
        and list(inspect.signature(module.forward).parameters) == ["hidden_states"]
    )


def stacked_experts(model: nn.Module) -> dict[str, nn.Module]:
    """Modules that hold experts in stacked tensors, by name, as far as they are of a known kind."""
    return {
        name: module
        for name, module in model.named_modules()
        if (hasattr(module, "_apply_gate") and getattr(getattr(module, DOWN, None), "ndim", None) == 3)
        or is_dense(module)
    }


def by_groups(model: nn.Module) -> bool:
    """Whether any experts of `model` are multiplied by torch's grouped product, transformers' usual way."""
    configs = (getattr(module, "config", None) for module in stacked_experts(model).values())
    return any(getattr(config, "_experts_implementation", None) == "grouped_mm" for config in configs)


@constant
def groups_multiply(dtype: torch.dtype) -> bool:
    """Whether products by groups are there in `dtype`: tried. A torch without any leaves them to transformers."""
    product = getattr(torch.nn.functional, "grouped_mm", None) or getattr(torch, "_grouped_mm", None)
    if product is None:
        return True
    one = torch.zeros(16, 16, dtype=dtype, device="cpu")
    try:
        product(one, one.unsqueeze(0), offs=torch.tensor([16], dtype=torch.int32, device="cpu"))
    except RuntimeError:
        return False
    return True


def linear_experts(model: nn.Module) -> list[str]:
    """Names of the mixtures whose experts are linear layers."""
    return [name for name, module in model.named_modules() if isinstance(module, LinearExperts)]


def routers(model: nn.Module) -> set[str]:
    """Names of the linear layers that choose among experts: beside a mixture, alone in their module or that module
    itself, with as many outputs as there are experts."""
    found = set()
    for name in linear_experts(model):
        outputs = cast(LinearExperts, model.get_submodule(name)).number
        parent = name.rpartition(".")[0]
        for child, module in model.get_submodule(parent).named_children():
            inside = module.named_modules(prefix=f"{parent}.{child}".lstrip("."))
            linears = {inner: layer for inner, layer in inside if isinstance(layer, nn.Linear)}
            found |= {inner for inner, layer in linears.items() if len(linears) == 1 and layer.out_features == outputs}
    return found


def gates(model: nn.Module, mixture: str) -> list[str]:
    """Names of what chooses among the experts of `mixture` by a matrix [experts, width] that is no linear layer's."""
    parent, experts = mixture.rpartition(".")[0], cast(LinearExperts, model.get_submodule(mixture))
    inside = model.get_submodule(parent).named_modules(prefix=parent)
    others = {name: module for name, module in inside if not f"{name}.".startswith(f"{mixture}.")}
    return [
        name
        for name, module in others.items()
        if not isinstance(module, nn.Linear)
        and isinstance(weight := getattr(module, "weight", None), nn.Parameter)
        and weight.ndim == 2
        and len(weight) == experts.number
    ]


def split(model: nn.Module, name: str) -> None:
    """Put experts as linear layers in the place of the mixture of this name."""
    parent, _, leaf = name.rpartition(".")
    around, stacked = cast(Any, model.get_submodule(parent)), model.get_submodule(name)
    setattr(around, leaf, DenseExperts(stacked, around.top_k) if is_dense(stacked) else LinearExperts(stacked))


def split_as_in(model: nn.Module, made: nn.Module) -> nn.Module:
    """`made`, a model of the same class, with its experts as those of `model` are."""
    names = linear_experts(model)
    return split_named(made, names) if names else made


def split_named(made: nn.Module, names: Iterable[str]) -> nn.Module:
    """`made` with the experts of the mixtures of these names, as far as it has them, as linear layers, in place."""
    wanted = set(names)
    for name in stacked_experts(made):
        if name in wanted:
            split(made, name)
    return made


def _unstacked(stacked: Any, name: str) -> list[nn.Linear]:
    """Layers of what `stacked` holds by this name [experts, out, in], or transposed; it holds it no more."""
    weights, biases = getattr(stacked, name), getattr(stacked, f"{name}_bias", None)
    made = []
    for expert in range(stacked.num_experts):
        weight = weights[expert].t() if getattr(stacked, "is_transposed", False) else weights[expert]
        with torch.device("meta"):
            layer = nn.Linear(weight.shape[1], weight.shape[0], bias=biases is not None)
        layer.weight = nn.Parameter(own_copy(weight), weights.requires_grad)
        if biases is not None:
            layer.bias = nn.Parameter(own_copy(biases[expert]), biases.requires_grad)
        made.append(layer)
    delattr(stacked, name)
    if biases is not None:
        delattr(stacked, f"{name}_bias")
    return made
