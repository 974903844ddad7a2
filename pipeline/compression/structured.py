"""Structured pruning: whole units go, what is left is a smaller dense model, trained for a while to recover.

What can go: feed-forward units, attention heads (with grouped queries: a key/value head and the queries it serves),
hidden dimensions, blocks; of an EfficientNet the channels inside its blocks. The same number goes from each block, as
configs state one number for all, but which ones is each block's own. By importance, one of

- `activation`, on the calibration set: how much a unit adds to the residual stream, how much norms give out in a
  hidden dimension (Minitron: Muralidharan et al., 2024, arXiv:2407.14679); how much a block turns its input (block
  influence of ShortGPT: Men et al., 2024, arXiv:2403.03853);
- `taylor`, on the calibration set too: how much the loss would change, to first order, without the weights that would
  go (Molchanov et al., 2019, arXiv:1906.10771). It takes a backward pass, and the memory for one of a batch; or
- `magnitude`: the norm of all weights that would go (DepGraph: Fang et al., 2023, arXiv:2301.12900; filters: Li et al.,
  2017, arXiv:1608.08710).

Where the hidden size shrinks and there is calibration data, the scale of each norm is corrected for the mean power of
the dimensions that are left. All scores are of the model as it came: one shot, then recovery, as LLM-Pruner does it (Ma
et al., 2023, arXiv:2305.11627). The result's config.json says its sizes, so plain transformers opens it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from annotated_types import Ge, Gt, Lt

from pipeline.compression.base import Context, Kind, Method
from pipeline.registry import register

if TYPE_CHECKING:
    import torch
    from lightning.pytorch import Callback
    from torch import nn

    from pipeline.models.base import Architecture


def prune_structured(
    model: nn.Module,
    architecture: Architecture,
    shares: Mapping[str, float | None],
    batches: Iterable[Mapping[str, torch.Tensor]] | None = None,
    *,
    importance: Literal["activation", "taylor", "magnitude"] | None = None,
    round_to: int = 1,
    ignore: Sequence[str] = (),
    device: str = "cpu",
) -> tuple[nn.Module, dict[str, Any]]:
    """(a smaller model of the same class, what was removed). Do not use `model` afterwards: it may have lost blocks.

    `shares`: how much to remove of `ffn`, `heads`, `hidden`, `depth`, `channels`, each from 0 up to but not 1. No more
    goes than that. `batches`: model inputs to measure importance with; classifiers' may have `labels`, which `taylor`
    then goes by. `importance`: by what units are chosen; None is `activation` with batches, `magnitude` without.
    `round_to`: the feed-forward and hidden sizes that are left are multiples of it. `ignore`: names or patterns of
    blocks that are not dropped and keep their channels. Weights keep their data types, ties, masks and `requires_grad`.

    Raises:
        ConfigError: nothing would be removed, or the model's config cannot say what would be left.
        LeanfitError: no batches where importance needs them, NaN or infinity (the block is named).
    """
    import torch

    from pipeline.errors import ConfigError, LeanfitError
    from pipeline.layers.depth import keep_blocks
    from pipeline.layers.structure import changed_config, filled, head_units, parameter_count, rebuild
    from pipeline.layers.structure_importance import (
        activation_importance,
        norm_gains,
        taylor_importance,
        top,
        weight_importance,
    )
    from pipeline.layers.structure_plan import plan

    protected = protected_blocks(architecture, ignore)
    made, problems = plan(model, architecture, shares, round_to, protected, "structured")
    if problems:
        raise ConfigError(problems)
    before = parameter_count(model)
    batches = None if batches is None else list(batches)
    importance = importance or ("magnitude" if batches is None else "activation")
    if importance == "magnitude":
        scored = weight_importance(model, architecture, made.cuts)
    elif batches is None:
        raise LeanfitError(f"structured: importance={importance} needs batches")
    elif importance == "taylor":
        scored = taylor_importance(model, architecture, batches, made.cuts, device)
    else:
        scored = activation_importance(model, architecture, batches, device)
    kept = scored.keep(made.heads, made.ffn, made.hidden, made.channels)
    record: dict[str, Any] = {"kept": {}}
    if made.blocks is not None:
        scores = scored.blocks.clone()
        scores[list(protected)] = float("inf")
        blocks = top(scores, made.blocks).tolist()
        model = keep_blocks(model, architecture, blocks)
        architecture = replace(architecture, blocks=architecture.blocks[: len(blocks)])
        kept = replace(
            kept,
            heads=[kept.heads[block] for block in blocks] if kept.heads else (),
            ffn=[kept.ffn[block] for block in blocks] if kept.ffn else (),
        )
        record["block_scores"] = scored.blocks.tolist()
        record["kept"]["blocks"] = blocks
    gains: dict[str, float] = {}
    if kept.hidden is not None and batches is not None:
        gains = norm_gains(model, architecture, batches, device, kept.hidden)
    if made.empty is not None and made.blocks is None:
        model = filled(made.empty, model, architecture, made.cuts, kept)
    elif made.changes:  # fewer blocks than were planned for
        model = rebuild(model, architecture, changed_config(model.config, made.changes), kept)
    for name, gain in gains.items():
        model.get_submodule(name).get_parameter("weight").data.mul_(gain)
    if kept.hidden is not None:
        record["kept"]["hidden"] = spans(kept.hidden.tolist())
    # Units are key/value heads where queries share them; told are the heads of queries, as `sizes` counts them.
    heads = []
    for units, block in zip(kept.heads, architecture.blocks, strict=bool(kept.heads)):
        each = block.attention.heads // head_units(block.attention) if block.attention else 1
        heads.append((units.unsqueeze(1) * each + torch.arange(each)).flatten())
    for kind, indices in (("heads", heads), ("ffn", kept.ffn)):
        if indices:
            record["kept"][kind] = [spans(units.tolist()) for units in indices]
    if kept.channels:
        record["kept"]["channels"] = {
            architecture.blocks[block].name: spans(units.tolist()) for block, units in kept.channels.items()
        }
    sizes = {kind: {"before": old, "after": new} for kind, (old, new) in made.sizes.items()}
    return model, {
        "importance": importance,
        "parameters_before": before,
        "parameters_after": parameter_count(model),
        "sizes": sizes,
        **record,
    }


def protected_blocks(architecture: Architecture, ignore: Sequence[str]) -> frozenset[int]:
    """Places of the blocks that `ignore` names."""
    from pipeline.layers.select import matches

    return frozenset(
        index
        for index, block in enumerate(architecture.blocks)
        if any(matches(block.name, pattern) for pattern in ignore)
    )


def spans(indices: Sequence[int]) -> str:
    """Ascending indices in short: [0, 1, 2, 5] is '0-2,5'."""
    parts: list[list[int]] = []
    for index in indices:
        if parts and index == parts[-1][1] + 1:
            parts[-1][1] = index
        else:
            parts.append([index, index])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in parts)


def _has_norms(architecture: Architecture) -> bool:
    return architecture.final_norm is not None or any(block.norms for block in architecture.blocks)


@register("compression", "structured")
@dataclass(frozen=True, kw_only=True)
class Structured(Method):
    """`ffn`, `heads`, `hidden`, `depth`, `channels`: shares to remove, 0 or null for none.

    `importance`: by what units are chosen. `round_to`: what the sizes left are multiples of. `steps`, `lr`: the
    recovery's; steps=0 prunes only. `ignore`: blocks that stay.
    """

    kind: ClassVar[Kind] = "pruning"
    trains: ClassVar[bool] = True
    needs_calibration: ClassVar[bool] = True
    cannot_follow: ClassVar[frozenset[str]] = frozenset({"quantization"})

    ffn: Annotated[float, Ge(0), Lt(1)] | None
    heads: Annotated[float, Ge(0), Lt(1)] | None
    hidden: Annotated[float, Ge(0), Lt(1)] | None
    depth: Annotated[float, Ge(0), Lt(1)] | None
    channels: Annotated[float, Ge(0), Lt(1)] | None
    importance: Literal["activation", "taylor", "magnitude"]
    round_to: Annotated[int, Ge(1)]
    steps: Annotated[int, Ge(0)] | None
    lr: Annotated[float, Gt(0)] | None
    ignore: tuple[str, ...]

    def shares(self) -> dict[str, float | None]:
        """What to remove, by kind."""
        return {
            "ffn": self.ffn,
            "heads": self.heads,
            "hidden": self.hidden,
            "depth": self.depth,
            "channels": self.channels,
        }

    @property
    def trains_in_shards(self) -> bool:
        return True

    def problems(self) -> list[str]:
        """Nothing to remove at all. Imports no torch."""
        if any(self.shares().values()):
            return []
        return [
            f"compression.{self.name}: ffn, heads, hidden, depth and channels are all 0 or null; set one, ffn=0.5 say"
        ]

    def preflight(self, model: nn.Module, context: Context) -> list[str]:
        from pipeline.layers.select import ignore_problems, quantized_problems
        from pipeline.layers.structure_plan import plan

        key = f"compression.{context.stage}"
        # Whether there are layers to cut the plan says: whole blocks can go whatever they are made of.
        problems = quantized_problems(model, key) or ignore_problems(model, self.ignore, key)
        if problems:
            return problems
        protected = protected_blocks(context.architecture, self.ignore)
        if self.ignore and not protected:
            return [f"{key}.ignore=[{','.join(self.ignore)}] names no block; it keeps whole blocks, '*.layers.0' say"]
        problems = plan(model, context.architecture, self.shares(), self.round_to, protected, key)[1]
        if not problems and self.hidden and self.importance == "activation" and not _has_norms(context.architecture):
            problems.append(
                f"{key}.importance=activation goes by norms, of which {type(model).__name__} has none of a known "
                "layout; choose magnitude or taylor"
            )
        return problems

    def reshaped(self, model: nn.Module, context: Context) -> nn.Module:
        from pipeline.errors import ConfigError
        from pipeline.layers.structure_plan import plan, planned

        protected = protected_blocks(context.architecture, self.ignore)
        key = f"compression.{context.stage}"
        made, problems = plan(model, context.architecture, self.shares(), self.round_to, protected, key)
        if problems:
            raise ConfigError(problems)
        return planned(model, context.architecture, made)

    def prepare(self, model: nn.Module, context: Context) -> nn.Module:
        """The smaller model: it follows from the model and the calibration set alone, so each rank has the same."""
        from pipeline.errors import LeanfitError

        batches = None
        if self.importance != "magnitude":
            if context.calibration is None:
                raise LeanfitError(f"{context.stage}: importance={self.importance} needs a calibration set")
            batches = context.calibration()
        made, record = prune_structured(
            model,
            context.architecture,
            self.shares(),
            batches,
            importance=self.importance,
            round_to=self.round_to,
            ignore=self.ignore,
            device=context.device,
        )
        context.facts.update(record)
        return made

    def callbacks(self, context: Context) -> list[Callback]:
        """Earlier pruning's masks are held through the recovery."""
        from pipeline.layers.masks import HoldMasks

        return [HoldMasks()]

    def memory(self, model: nn.Module, context: Context) -> dict[str, int] | None:
        """No formula is known for a backward pass that frees its gradients as it goes, nor for cutting."""
        return None

    def finalize(self, model: nn.Module, context: Context) -> nn.Module:
        from torch import nn

        from pipeline.layers.schemes import require_finite
        from pipeline.layers.sparsity import apply_masks

        layers = [name for name, module in model.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]
        require_finite(model, layers, self.name)
        apply_masks(model)
        return model
