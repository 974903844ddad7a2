"""Mixed precision by layer: bits chosen so that the model's file keeps a budget of bytes at the least damage.

Each layer's damage at each number of bits is measured (layers/sensitivity.py), the bytes it would take are counted, and
a multiple-choice knapsack is solved exactly (layers/knapsack.py): the recipe of HAWQ (Dong et al., 2019,
arXiv:1905.03696; Yao et al., 2021, arXiv:2011.10680) with measured divergences in place of Hessian traces. The integers
are then found by GPTQ (layers/gptq.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from annotated_types import Ge, Gt, Le

from pipeline.compression.base import Context
from pipeline.compression.quantization import Bits, Quantizer
from pipeline.registry import register
from pipeline.sizes import Size, parse_size

if TYPE_CHECKING:
    from torch import Tensor, nn

    from pipeline.layers.quantize import Grid

ENOUGH = 16
"""Calibration samples that sensitivity is measured on where `samples` is null, or all where there are fewer."""


@register("compression", "mixed_bits")
@dataclass(frozen=True, kw_only=True)
class MixedBits(Quantizer):
    """`budget`: bytes of the finished model.safetensors, `2.5MB` or a number. Without one, `average_bits` of the
    integers, scales aside, over the quantized weights.

    `bits`: the numbers of bits a layer may get. `samples`: how many calibration samples the sensitivity is measured on.
    `rounding`: `gptq`, over the whole calibration set, or `nearest`; sensitivity is that of rounding to nearest.
    """

    needs_calibration: ClassVar[bool] = True
    chooses: ClassVar[bool] = True

    budget: Size | None
    average_bits: Annotated[float, Gt(0), Le(8)] | None
    bits: tuple[Bits, ...]
    group_size: Annotated[int, Ge(2)] | None
    symmetric: bool
    samples: Annotated[int, Ge(1)] | None
    rounding: Literal["nearest", "gptq"]

    def problems(self) -> list[str]:
        key = f"compression.{self.name}"
        if len(set(self.bits)) < 2:
            return [f"{key}.bits={list(self.bits)} leaves nothing to choose; give two of 2, 3, 4, 8 or more"]
        if self.budget is None:
            if self.average_bits is None:
                return [f"{key}: give budget (2.5MB say) or average_bits; neither is set"]
            if self.average_bits < min(self.bits):
                least = min(self.bits)
                return [f"{key}.average_bits={self.average_bits:g} is below the fewest bits of a layer, {least}"]
            return []
        try:
            parse_size(self.budget)
        except ValueError as error:
            return [f"{key}.budget={error}"]
        return []

    def grids(self) -> list[Grid]:
        from pipeline.layers.quantize import Grid

        return [Grid(bits, self.group_size, self.symmetric) for bits in sorted(set(self.bits))]

    def preflight(self, model: nn.Module, context: Context) -> list[str]:
        from pipeline.layers.select import group_problems

        key = f"compression.{context.stage}"
        problems = super().preflight(model, context)
        if problems:
            return problems
        layers = self.layers(model, context)
        if self.group_size is not None and (found := group_problems(model, layers, self.group_size, key)):
            return found
        if self.budget is None:
            return []
        sizes, fixed = self._sizes(model, layers, context.kept)
        least, most = (fixed + sum(size[k] for size in sizes.values()) for k in (0, -1))
        if parse_size(self.budget) < least:
            few, many = min(self.bits), max(self.bits)
            fewer = "allow fewer bits, " if few > 2 else ""
            more = "more " if any(context.kept(name) < 1 for name in layers) else ""
            return [
                f"{key}.budget={self.budget} cannot be met: with {few} bits in every layer the file takes {least:,} "
                f"bytes (with {many}: {most:,}); give more, {fewer}or prune {more}before"
            ]
        return []

    def memory(self, model: nn.Module, context: Context) -> dict[str, int] | None:
        """Whichever is more: logits, their logarithms and a divergence, or GPTQ."""
        from pipeline.layers.distillation import head_size
        from pipeline.layers.holding import calibrated, largest

        known, classes = (
            calibrated(model, context.architecture, context.calibration and context.calibration(), context.device),
            head_size(model),
        )
        if known is None or classes is None:
            return None
        measuring = {kind: size for kind, size in known.base.items() if kind != "hidden states"}
        assert context.calibration is not None
        samples = first_samples(context.calibration(), self.samples or ENOUGH)
        tokens = max(batch["input_ids"].numel() for batch in samples)
        moments = [{**measuring, "logits": 5 * 4 * tokens * classes}]
        if self.rounding == "gptq":
            gone = known.shrunk(self.layers(model, context), max(self.bits))
            moments += [known.running(known.hessians(), known.widened), known.solving(7, gone=gone)]
        return largest(moments)

    def finalize(self, model: nn.Module, context: Context) -> nn.Module:
        """Measure, choose, quantize. What was measured and chosen goes into the link's detail."""
        from pipeline.layers.gptq import round_with_gptq
        from pipeline.layers.knapsack import Option, allocate
        from pipeline.layers.quantize import quantize_rows
        from pipeline.layers.schemes import put, require_finite
        from pipeline.layers.sensitivity import sensitivities

        assert context.calibration is not None
        layers, grids = self.layers(model, context), self.grids()
        require_finite(model, layers, "mixed_bits")
        batches = first_samples(context.calibration(), self.samples or ENOUGH)
        measured = sensitivities(model, layers, grids, batches, context.device)
        weights = {name: model.get_submodule(name).get_parameter("weight").numel() for name in layers}
        if self.budget is None:
            sizes = {name: [weights[name] * grid.bits for grid in grids] for name in layers}
            room = int((self.average_bits or 0) * sum(weights.values()))
        else:
            sizes, fixed = self._sizes(model, layers)
            room = parse_size(self.budget) - fixed
        items = [
            [Option(size, measured[name][grid.bits]) for grid, size in zip(grids, sizes[name], strict=True)]
            for name in layers
        ]
        found = allocate(items, room)
        chosen = {name: grids[k] for name, k in zip(layers, found.chosen, strict=True)}
        bits = sum(weights[name] * grid.bits for name, grid in chosen.items())
        context.facts.update(
            sensitivity={name: {str(k): loss for k, loss in by_bits.items()} for name, by_bits in measured.items()},
            average_bits=bits / sum(weights.values()),
            predicted_divergence=found.loss,
            least_divergence=found.bound,
            exact=found.exact,
        )
        if self.rounding == "gptq":
            return round_with_gptq(
                model, chosen, context.calibration(), context.architecture, device=context.device, facts=context.facts
            )
        for name, grid in chosen.items():
            weight = model.get_submodule(name).get_parameter("weight")
            put(model, name, quantize_rows(weight.flatten(1), grid.of(weight)), "weight_only", **asdict(grid))
        return model

    def _sizes(
        self, model: nn.Module, layers: Sequence[str], share: Callable[[str], float] = lambda name: 1.0
    ) -> tuple[dict[str, list[int]], int]:
        """({layer: bytes at each number of bits, fewest first}, bytes of all else in the file, its header at most).

        `share`: of a layer's weights, how many a mask will keep that is not there yet.
        """
        from pipeline.layers.footprint import file_bytes, layer_bytes, model_tensors

        grids = self.grids()
        sizes = {name: [layer_bytes(model, name, grid, share(name)) for grid in grids] for name in layers}
        whole = file_bytes(model_tensors(model, dict.fromkeys(layers, grids[-1]), share))
        return sizes, whole - sum(size[-1] for size in sizes.values())


def first_samples(batches: Iterable[Mapping[str, Tensor]], samples: int) -> Iterator[dict[str, Tensor]]:
    """The first `samples` of the calibration set, in its batches; the last may be cut."""
    left = samples
    for batch in batches:
        if left <= 0:
            return
        taken = {name: tensor[:left] for name, tensor in batch.items()}
        left -= len(next(iter(taken.values())))
        yield taken
