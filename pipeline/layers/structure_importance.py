"""How much heads, feed-forward units, hidden dimensions, channels, blocks matter: by activations, weights, gradients.

Activations, over the calibration set, after Minitron (Muralidharan et al., 2024, arXiv:2407.14679), which averages a
head's or unit's activation. Here what counts is what it adds to the residual stream: the root mean square norm over
tokens of its activation times its output weights, so that a large activation which is then ignored does not count.
Hidden dimensions: mean absolute output of all norms (Minitron). Blocks: 1 - cosine similarity of a block's input and
output (block influence of ShortGPT, Men et al., 2024, arXiv:2403.03853).

Weights: the L2 norm of all weights that would go with the unit, coupled over layers as in DepGraph (Fang et al., 2023,
arXiv:2301.12900) and LLM-Pruner (Ma et al., 2023, arXiv:2305.11627).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.errors import LeanfitError
from pipeline.layers.blockwise import hidden_of, model_inputs
from pipeline.layers.quantize import is_finite, wide
from pipeline.layers.sliced_loss import cross_entropy
from pipeline.layers.structure import Axis, Cuts, Kept, head_units, parameters_of
from pipeline.models.base import Architecture, Block

Batch = Mapping[str, Tensor]
Key = tuple[str, int | None]
"""(kind, place of the block): whose scores these are."""


@dataclass(frozen=True)
class Importance:
    """Scores, higher for what matters more, float64 on the CPU. `blocks` [blocks]; per block `heads` [units], `ffn`
    [units], `channels` [channels], empty where there are none; `hidden` [hidden size], None without norms."""

    blocks: Tensor
    heads: tuple[Tensor, ...]
    ffn: tuple[Tensor, ...]
    channels: tuple[Tensor, ...]
    hidden: Tensor | None

    def keep(
        self, heads: int | None, ffn: int | None, hidden: int | None, channels: Mapping[int, int] | None = None
    ) -> Kept:
        """The most important units: so many of each kind (None: not cut), in each block by itself.

        Raises:
            LeanfitError: hidden dimensions are to be chosen, but the model's norms follow no known layout.
        """
        if hidden and self.hidden is None:
            raise LeanfitError("structured: no norm of a known layout says which hidden dimensions matter")
        return Kept(
            heads=[top(scores, heads) for scores in self.heads] if heads else (),
            ffn=[top(scores, ffn) for scores in self.ffn] if ffn else (),
            hidden=top(self.hidden, hidden) if hidden and self.hidden is not None else None,
            channels={block: top(self.channels[block], number) for block, number in (channels or {}).items()},
        )


def top(scores: Tensor, number: int) -> Tensor:
    """Ascending indices of the `number` highest scores; of equals the first."""
    return torch.sort(scores, descending=True, stable=True).indices[:number].sort().values


class _Sums:
    """Running sums of what hooks see, by key."""

    def __init__(self) -> None:
        self.total: dict[str, Tensor] = {}
        self.count: dict[str, int] = {}

    def add(self, key: str, value: Tensor, count: int) -> None:
        value = value.double()
        self.total[key] = self.total[key] + value if key in self.total else value
        self.count[key] = self.count.get(key, 0) + count

    def mean(self, key: str) -> Tensor:
        return self.total[key] / self.count[key]


@torch.no_grad()
def activation_importance(
    model: nn.Module, architecture: Architecture, batches: Iterable[Batch], device: str
) -> Importance:
    """Scores by one pass of `batches` through `model`, in eval mode, on `device`.

    Raises:
        LeanfitError: no batches, or NaN in the activations of a block (it is named).
    """
    sums = _Sums()
    handles = [handle for block in architecture.blocks for handle in _watch(model, block, sums)]
    norms = [norm for block in architecture.blocks for norm in block.norms]
    norms += [architecture.final_norm] if architecture.final_norm else []
    norms = [name for name in norms if not isinstance(model.get_submodule(name), nn.modules.batchnorm._BatchNorm)]
    handles += [model.get_submodule(name).register_forward_hook(_absolute(sums, f"norm {name}")) for name in norms]
    _forward(model, batches, device, handles)
    if not sums.total:
        raise LeanfitError("structured: the calibration set is empty, so nothing can be said about importance")
    heads, ffn, channels, influence = [], [], [], []
    for block in architecture.blocks:
        influence.append(1 - sums.mean(f"cosine {block.name}"))
        heads.append(_head_scores(model, block, sums) if block.attention else torch.empty(0))
        ffn.append(_unit_scores(model, block.feed_forward.down, sums) if block.feed_forward else torch.empty(0))
        inner = block.inverted_bottleneck
        channels.append(_unit_scores(model, inner.project, sums) if inner else torch.empty(0))
    hidden = torch.stack([sums.mean(f"norm {name}") for name in norms]).sum(0) if norms else None
    return _checked(architecture, torch.stack(influence), heads, ffn, channels, hidden)


def _forward(
    model: nn.Module, batches: Iterable[Batch], device: str, handles: Sequence[torch.utils.hooks.RemovableHandle]
) -> None:
    """`batches` through `model` in eval mode; hooks are removed and the mode is restored whatever happens."""
    training = model.training
    model.eval().to(device)
    try:
        for batch in batches:
            model(**model_inputs(model, batch, device))
    finally:
        for handle in handles:
            handle.remove()
        model.train(training)


def _watch(model: nn.Module, block: Block, sums: _Sums) -> list[torch.utils.hooks.RemovableHandle]:
    """Hooks on one block: its influence, and what enters the layers that write to the residual stream."""
    module = model.get_submodule(block.name)
    handles = [module.register_forward_hook(_cosine(sums, f"cosine {block.name}"), with_kwargs=True)]
    if block.attention:
        name, units = block.attention.output, head_units(block.attention)
        handles.append(model.get_submodule(name).register_forward_pre_hook(_products(sums, name, units)))
    ends = [block.feed_forward.down] if block.feed_forward else []
    ends += [block.inverted_bottleneck.project] if block.inverted_bottleneck else []
    handles += [model.get_submodule(name).register_forward_pre_hook(_squares(sums, name)) for name in ends]
    return handles


def _cosine(sums: _Sums, key: str) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        before = args[0] if args else kwargs["hidden_states"]
        after = hidden_of(output)
        if before.shape != after.shape:  # a block that changes the resolution or the channels cannot be dropped
            sums.add(key, torch.zeros((), device=after.device), 1)
            return
        dim = 1 if before.ndim == 4 else -1
        similar = nn.functional.cosine_similarity(before.float(), after.float(), dim=dim)
        sums.add(key, similar.double().sum(), similar.numel())

    return hook


def _products(sums: _Sums, key: str, units: int) -> Callable[..., None]:
    """Second moments of each unit's activations, [units, size, size]."""

    def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
        x = args[0].detach().float().reshape(-1, units, args[0].shape[-1] // units)
        sums.add(key, torch.einsum("nud,nue->ude", x, x), len(x))

    return hook


def _squares(sums: _Sums, key: str) -> Callable[..., None]:
    """Second moment of each unit or channel; images are [B, C, H, W]."""

    def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
        x = args[0].detach().float()
        x = x.movedim(1, -1) if isinstance(module, nn.Conv2d) else x
        sums.add(key, x.reshape(-1, x.shape[-1]).square().sum(0), x.numel() // x.shape[-1])

    return hook


def _absolute(sums: _Sums, key: str) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        x = output.detach().float()
        sums.add(key, x.reshape(-1, x.shape[-1]).abs().sum(0), x.numel() // x.shape[-1])

    return hook


def _head_scores(model: nn.Module, block: Block, sums: _Sums) -> Tensor:
    """sqrt(E |W_u a_u|^2) = sqrt(trace(W_u E[a_u a_u'] W_u')) for each unit u of attention."""
    assert block.attention is not None
    moments = sums.mean(block.attention.output)  # [units, size, size]
    weight = model.get_submodule(block.attention.output).get_parameter("weight").detach().double()
    if weight.shape[1] != moments.shape[0] * moments.shape[1]:  # not [out, in]
        weight = weight.T
    units = weight.reshape(weight.shape[0], moments.shape[0], -1).movedim(1, 0)  # [units, hidden, size]
    squares: Tensor = torch.einsum("uhd,ude,uhe->u", units, moments, units)
    return squares.clamp(min=0).sqrt()


def _unit_scores(model: nn.Module, name: str, sums: _Sums) -> Tensor:
    """sqrt(E a^2) |w| for each input of the layer `name`, w being its column of output weights."""
    moments = sums.mean(name)
    weight = model.get_submodule(name).get_parameter("weight").detach().double().flatten(1)
    columns = weight if weight.shape[1] == len(moments) else weight.T
    norms: Tensor = columns.square().sum(0).sqrt()
    return moments.sqrt() * norms


@torch.no_grad()
def norm_gains(
    model: nn.Module, architecture: Architecture, batches: Iterable[Batch], device: str, hidden: Tensor
) -> dict[str, float]:
    """By what the scale of each norm is to be multiplied when only the dimensions `hidden` of the stream are left.

    A norm divides by the root mean square (LayerNorm: deviation) over dimensions. What is left has more of it, as the
    least important went, so all it gives out would shrink: the gain is the root of the mean power over `hidden` to that
    over all dimensions, on the calibration set. Norms whose scale is not a factor (Gemma's 1 + w) are left out.
    """
    sums = _Sums()
    names = [
        name
        for name in (*(norm for block in architecture.blocks for norm in block.norms), architecture.final_norm)
        if name and _scales(model.get_submodule(name))
    ]

    def power(x: Tensor, centred: bool) -> Tensor:
        return x.var(-1, correction=0) if centred else x.square().mean(-1)

    def watch(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            x, centred = args[0].detach().float(), isinstance(module, nn.LayerNorm)
            sums.add(f"all {name}", power(x, centred).sum(), 1)
            sums.add(f"left {name}", power(x[..., hidden.to(x.device)], centred).sum(), 1)

        return hook

    handles = [model.get_submodule(name).register_forward_pre_hook(watch(name)) for name in names]
    _forward(model, batches, device, handles)
    found = {name: float((sums.total[f"left {name}"] / sums.total[f"all {name}"]).sqrt()) for name in names}
    return {name: gain for name, gain in found.items() if 0 < gain < float("inf")}


def _scales(norm: nn.Module) -> bool:
    """Whether `norm` multiplies by its weight: with a weight of zeros it gives its bias, or zeros."""
    weight = getattr(norm, "weight", None)
    if not isinstance(weight, nn.Parameter):
        return False
    twin = copy.deepcopy(norm)
    twin.get_parameter("weight").zero_()
    given: Tensor = twin(torch.randn(1, len(weight), dtype=weight.dtype, device=weight.device))
    bias = getattr(norm, "bias", None)
    return torch.equal(given[0], torch.zeros_like(given[0]) if bias is None else bias)


@torch.no_grad()
def weight_importance(model: nn.Module, architecture: Architecture, cuts: Cuts) -> Importance:
    """Scores by the norms of the weights along the dimensions in `cuts`; other kinds are left empty.

    Raises:
        LeanfitError: NaN or infinity in the weights of a block (it is named).
    """
    squares: dict[Key, Tensor] = {}
    for name, parameter in model.named_parameters():
        if name in cuts:
            _add_along(squares, architecture, cuts[name], wide(parameter).square())

    def per_block(kind: str) -> list[Tensor]:
        return [squares.get((kind, index), torch.empty(0)).sqrt() for index in range(len(architecture.blocks))]

    inside = [parameters_of(model.get_submodule(block.name)) for block in architecture.blocks]
    blocks = [torch.stack([torch.linalg.vector_norm(wide(p)) for p in held]).double() for held in inside]
    hidden = squares.get(("hidden", None))
    return _checked(
        architecture, torch.stack([torch.linalg.vector_norm(norms) for norms in blocks]),
        per_block("heads"), per_block("ffn"), per_block("channels"),
        None if hidden is None else hidden.sqrt(),
    )  # fmt: skip


def _add_along(sums: dict[Key, Tensor], architecture: Architecture, axes: Mapping[int, Axis], values: Tensor) -> None:
    """To each unit's sum what of `values`, shaped as the tensor whose cut dimensions are `axes`, belongs to it."""
    for dim, axis in axes.items():
        others = [d for d in range(values.ndim) if d != dim]
        found = (values.sum(others) if others else values).double()
        kind = axis.kind
        if kind in ("query", "key_value"):
            assert axis.block is not None
            attention = architecture.blocks[axis.block].attention
            assert attention is not None
            kind, found = "heads", found.reshape(head_units(attention), -1).sum(1)
        if kind == "gate and up":
            kind, found = "ffn", found.reshape(2, -1).sum(0)
        key = (kind, axis.block)
        sums[key] = sums[key] + found if key in sums else found


def taylor_importance(
    model: nn.Module, architecture: Architecture, batches: Iterable[Batch], cuts: Cuts, device: str
) -> Importance:
    """Scores by gradients of `taylor_loss` on `batches`, in eval mode, on `device`; kinds that `cuts` lacks are empty.

    A batch's score is of that batch's gradient, so the size of batches has a (small) say. Memory: the activations of
    one batch, and a gradient at a time, which goes as soon as its weight has been scored. `requires_grad`, gradients
    and the mode are as they were afterwards.

    Raises:
        LeanfitError: no batches; NaN or infinity in a weight or in a block's scores (it is named); no gradients at all.
    """
    for name, parameter in model.named_parameters():
        if not is_finite(parameter):
            raise LeanfitError(f"structured: NaN or infinity in {name}: the training diverged")
    sums: dict[Key, Tensor] = {}
    owners = {
        f"{block.name}.{name}": index
        for index, block in enumerate(architecture.blocks)
        for name, _ in model.get_submodule(block.name).named_parameters()
    }
    within = _within_units(model)
    scored = {
        name: parameter
        for name, parameter in model.named_parameters()
        if name not in within and (name in cuts or name in owners)
    }

    def score(name: str) -> Callable[[Tensor], None]:
        @torch.no_grad()
        def hook(parameter: Tensor) -> None:
            assert parameter.grad is not None
            change = (wide(parameter) * wide(parameter.grad)).abs_()
            parameter.grad = None
            _add_along(sums, architecture, cuts.get(name, {}), change)
            if name in owners:
                key = ("blocks", owners[name])
                whole = change.sum().double()
                sums[key] = sums[key] + whole if key in sums else whole

        return hook

    training, seen = model.training, False
    model.eval().to(device)
    before = [(parameter, parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    for parameter, _, _ in before:
        parameter.grad = None
        parameter.requires_grad_(False)
    handles = [
        parameter.requires_grad_().register_post_accumulate_grad_hook(score(name))  # type: ignore[no-untyped-call]
        for name, parameter in scored.items()
    ]
    try:
        for batch in batches:
            seen = True
            with torch.enable_grad():
                taylor_loss(model, batch, device).backward()  # type: ignore[no-untyped-call]
    finally:
        for handle in handles:
            handle.remove()
        for parameter, required, gradient in before:
            parameter.requires_grad_(required)
            parameter.grad = gradient
        model.train(training)
    if not seen:
        raise LeanfitError("structured: the calibration set is empty, so nothing can be said about importance")
    if not any(found.any() for found in sums.values()):
        raise LeanfitError("structured: all gradients on the calibration set are zero; choose importance=activation")

    def per_block(kind: str) -> list[Tensor]:
        return [sums.get((kind, index), torch.empty(0)) for index in range(len(architecture.blocks))]

    zero = torch.zeros((), dtype=torch.float64, device=device)
    blocks = [sums.get(("blocks", index), zero) for index in range(len(architecture.blocks))]
    return _checked(
        architecture, torch.stack(blocks), per_block("heads"), per_block("ffn"), per_block("channels"),
        sums.get(("hidden", None)),
    )  # fmt: skip


def taylor_loss(model: nn.Module, batch: Batch, device: str) -> Tensor:
    """Cross-entropy in nats, summed over the batch, so that each prediction counts alike whatever the batch's size.

    Language models (logits [B, T, V]) predict their input's next tokens. Classifiers (logits [B, C]) predict `labels`
    of the batch, or where there are none, as in a calibration set, the class that they find likeliest themselves.
    """
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    logits = hidden_of(model(**model_inputs(model, inputs, device)))
    labels = batch.get("labels")
    if logits.ndim == 3 and "input_ids" in batch:
        labels = (batch["input_ids"] if labels is None else labels)[:, 1:].flatten()
        logits = logits[:, :-1].flatten(0, 1)
    elif labels is None:
        labels = logits.argmax(-1)
    return cross_entropy(logits, labels.to(logits.device), "sum")


def _within_units(model: nn.Module) -> set[str]:
    """Names of parameters that connect no unit with another: vectors, kernels of grouped (depthwise) convolutions."""
    found = {name for name, parameter in model.named_parameters() if parameter.ndim < 2}
    grouped = (name for name, module in model.named_modules() if isinstance(module, nn.Conv2d) and module.groups > 1)
    return found | {f"{name}.weight" for name in grouped}


def _checked(
    architecture: Architecture,
    blocks: Tensor,
    heads: Sequence[Tensor],
    ffn: Sequence[Tensor],
    channels: Sequence[Tensor],
    hidden: Tensor | None,
) -> Importance:
    for index, block in enumerate(architecture.blocks):
        scores = (blocks[index], heads[index], ffn[index], channels[index])
        if not all(torch.isfinite(score).all() for score in scores):
            raise LeanfitError(f"structured: NaN or infinity in {block.name}: the training diverged")
    if hidden is not None and not torch.isfinite(hidden).all():
        raise LeanfitError("structured: NaN or infinity in the residual stream: the training diverged")
    return Importance(
        blocks=blocks.cpu(),
        heads=tuple(scores.cpu() for scores in heads),
        ffn=tuple(scores.cpu() for scores in ffn),
        channels=tuple(scores.cpu() for scores in channels),
        hidden=None if hidden is None else hidden.cpu(),
    )
