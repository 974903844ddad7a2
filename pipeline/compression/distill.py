"""Distillation: a smaller student learns to answer as a teacher does (Hinton et al., 2015, arXiv:1503.02531).

The student is the model with fewer layers (evenly spaced: DistilBERT, arXiv:1910.01108), the model as earlier links
left it, or another. Losses add up by weight: the task's own; logits at a temperature; hidden states; relations between
queries, keys and values of the last layer (MiniLM, arXiv:2002.10957, arXiv:2012.15828); and, for language models, the
task's loss on texts that the teacher goes on with (sequence level: Kim & Rush, 2016, arXiv:1606.07947).
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from annotated_types import Ge, Gt, Le

from pipeline.checkpoints import exists
from pipeline.compression.base import Context, Kind, Method, StageLoss, TaskLoss
from pipeline.errors import did_you_mean
from pipeline.registry import register, shown

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch
    from torch import nn

    from pipeline.layers.distillation import Observed
    from pipeline.models.base import Architecture

Weight = Annotated[float, Ge(0)]


def drop_layers(model: nn.Module, architecture: Architecture, kept: int) -> nn.Module:
    """`model` with `kept` of its layers, evenly spaced, in place; its config says so.

    Raises:
        LeanfitError: all layers are kept, or the model's layers cannot go (the message says why).
    """
    from pipeline.layers.depth import evenly_spaced, keep_blocks

    return keep_blocks(model, architecture, evenly_spaced(len(architecture.blocks), kept))


@register("compression", "distill")
@dataclass(frozen=True, kw_only=True)
class Distill(Method):
    """`teacher`, `layers`, `student`: who learns from whom; the rest says by which losses and for how long.

    `temperature`: far below its bounds logits overflow, far above them float32 tells no two logits apart.
    """

    kind: ClassVar[Kind] = "distillation"
    needs_teacher: ClassVar[bool] = True
    trains: ClassVar[bool] = True
    cannot_follow: ClassVar[frozenset[str]] = frozenset({"quantization"})

    teacher: str
    layers: Annotated[int, Ge(1)] | Literal["all"] | None
    student: str | None
    task_weight: Weight
    logits_weight: Weight
    hidden_weight: Weight
    attention_weight: Weight
    sequence_weight: Weight
    temperature: Annotated[float, Ge(0.01), Le(1000)]
    top_k: Annotated[int, Ge(1)] | None
    cache_logits: bool
    prompt_tokens: Annotated[int, Ge(1)]
    decoding: Literal["greedy", "sample"]
    steps: Annotated[int, Ge(1)] | None
    lr: Annotated[float, Gt(0)] | None

    @property
    def shrinks(self) -> bool:
        """Not where every layer stays: then earlier links say what is claimed."""
        return self.layers != "all"

    @property
    def records_teacher(self) -> bool:
        return self.cache_logits

    @property
    def trains_in_shards(self) -> bool:
        return True

    def problems(self) -> list[str]:
        """Settings that contradict each other, and places where there is no model. Imports no torch."""
        key = f"compression.{self.name}"
        found = []
        if not any((self.task_weight, *self._weights().values(), self.sequence_weight)):
            found.append(f"{key}: every loss has weight 0, so nothing is learned; choose {key}.logits_weight=0.5 say")
        if self.student is not None and self.layers is not None:
            found.append(
                f"{key}.student={self.student} and {key}.layers={self.layers} are two students; leave one of them null"
            )
        found += self._cache_problems(key)
        if self.teacher != "self":
            found += _place_problems(f"{key}.teacher", self.teacher, checkpoint=True)
        if self.student is not None:
            found += _place_problems(f"{key}.student", self.student, checkpoint=False)
        return found

    def _cache_problems(self, key: str) -> list[str]:
        """Losses that need more of the teacher than its recorded logits, or nothing of them."""
        if not self.cache_logits:
            return []
        weights = {name: getattr(self, name) for name in ("hidden_weight", "attention_weight", "sequence_weight")}
        if needing := [f"{key}.{name}={weight:g}" for name, weight in weights.items() if weight]:
            verb = "needs" if len(needing) == 1 else "need"
            return [
                f"{key}.cache_logits=true: {' and '.join(needing)} {verb} the teacher itself in every step; set "
                f"{'it' if len(needing) == 1 else 'them'} to 0, or cache_logits=false"
            ]
        if not self.logits_weight:
            return [f"{key}.cache_logits=true: {key}.logits_weight=0 uses no logits; give it a weight, or leave it out"]
        return []

    def preflight(self, model: nn.Module, context: Context) -> list[str]:
        assert context.teacher is not None
        from pipeline.layers.select import quantized_problems

        key = f"compression.{context.stage}"
        if told := quantized_problems(model, key):
            return told
        student, found = self._preview(model, context)
        found += self._no_effect(context)
        if student is not model:
            found += _mismatches(student, model, f"{key}.student={self.student}")
            if _size(student) >= _size(model):
                found.append(
                    f"{key}.student={self.student} has {_size(student)} parameters, the model {_size(model)}; "
                    "give a smaller one"
                )
        if self.teacher != "self":
            found += _mismatches(context.teacher.model, model, f"{key}.teacher={self.teacher}")
        return found or self._loss_problems(student, context)

    def _preview(self, model: nn.Module, context: Context) -> tuple[nn.Module, list[str]]:
        """The student's shapes (those of `model` where it only loses layers), and why layers cannot go."""
        from pipeline.layers.depth import depth_problem, evenly_spaced

        if self.student is not None:
            assert context.open_model is not None
            return context.open_model("student"), []
        key, total = f"compression.{context.stage}", len(context.architecture.blocks)
        kept = self._kept(total, context)
        if not self._drops(context):
            return model, []
        if 0 < total <= kept:
            said = "null" if self.layers is None else kept
            fewer = f"choose {total - 1} or fewer" if total > 1 else f"give {key}.student=DIR"
            return model, [
                f"{key}.layers={said}: of the model's {total} none would go; {fewer}, or layers=all with another "
                "teacher or after other links"
            ]
        if told := depth_problem(model, context.architecture, evenly_spaced(total, kept) if total else ()):
            return model, [f"{key}.layers: {told}; let distill follow another link, or give {key}.student=DIR"]
        return model, []

    def reshaped(self, model: nn.Module, context: Context) -> nn.Module:
        from pipeline.errors import ConfigError
        from pipeline.layers.depth import described, evenly_spaced

        student, problems = self._preview(model, context)
        if problems:
            raise ConfigError(problems)
        total = len(context.architecture.blocks)
        kept = self._kept(total, context)
        if not self._drops(context):
            return student
        return described(model, context.architecture, evenly_spaced(total, kept))

    def _no_effect(self, context: Context) -> list[str]:
        """A model is not distilled into itself, and no link is for nothing."""
        if self.student is not None and not context.first:
            return [
                f"compression.{context.stage}.student={self.student}: it would take the place of what the links before "
                "have made of the model, which would be for nothing; let distill come first, or set student=null"
            ]
        if self.layers != "all" or not context.first or self.teacher != "self":
            return []
        key = f"compression.{context.stage}"
        return [
            f"{key}.layers=all: the student would be its own teacher; choose fewer layers, another teacher, or let "
            "distill follow another link"
        ]

    def _loss_problems(self, student: nn.Module, context: Context) -> list[str]:
        """Losses that this pair of models does not have."""
        from pipeline.layers.distillation import has_relations, head_size

        assert context.teacher is not None
        key, teacher = f"compression.{context.stage}", context.teacher.model
        found = []
        if self.sequence_weight and _setting(student, "main_input_name", on_config=False) != "input_ids":
            found.append(
                f"{key}.sequence_weight={self.sequence_weight:g}: only language models go on with a text; set it to 0"
            )
        positions = _setting(student, "max_position_embeddings")
        if self.sequence_weight and positions is not None and self.prompt_tokens >= positions:
            found.append(f"{key}.prompt_tokens={self.prompt_tokens} leaves nothing of {positions} tokens; choose fewer")
        ours, theirs = _setting(student, "hidden_size"), _setting(teacher, "hidden_size")
        if self.hidden_weight and ours != theirs:
            found.append(
                f"{key}.hidden_weight={self.hidden_weight:g}: hidden states of width {ours} cannot be compared with "
                f"the teacher's {theirs}; use {key}.attention_weight, for which widths may differ"
            )
        outputs = head_size(teacher)
        if self.logits_weight and self.top_k is not None and outputs is not None and self.top_k > outputs:
            found.append(f"{key}.top_k={self.top_k}: the teacher has {outputs} logits; choose fewer, or null")
        if self.attention_weight:
            for who, one in (("student", student), ("teacher", teacher)):
                if not has_relations(one):
                    found.append(
                        f"{key}.attention_weight={self.attention_weight:g}: the {who}'s last layer has no separate "
                        "query, key and value projections; set it to 0"
                    )
        return found

    def _kept(self, total: int, context: Context) -> int:
        """How many of `total` layers the student keeps."""
        if isinstance(self.layers, int):
            return self.layers
        return (total + 1) // 2 if self._drops(context) else total

    def _drops(self, context: Context) -> bool:
        """Whether the student is the model with fewer layers."""
        return self.student is None and (isinstance(self.layers, int) or (self.layers is None and context.first))

    def prepare(self, model: nn.Module, context: Context) -> nn.Module:
        """The student."""
        if self.student is not None:
            assert context.open_model is not None
            return context.open_model("student")
        total = len(context.architecture.blocks)
        kept = self._kept(total, context)
        if kept == total:
            return model
        from pipeline.layers.depth import evenly_spaced

        context.facts["layers_kept"] = list(evenly_spaced(total, kept))
        return drop_layers(model, context.architecture, kept)

    def loss(self, context: Context) -> StageLoss:
        """The weighted sum; the student's forward pass that gives the task's loss is the one that is watched."""
        from pipeline.layers.distillation import combined, continued, observing

        teacher = context.teacher
        assert teacher is not None
        theirs = self._watched(teacher.architecture)
        ours = self._watched(context.architecture)

        def loss(model: nn.Module, batch: dict[str, torch.Tensor], task_loss: TaskLoss) -> torch.Tensor:
            with observing(model, ["", *ours]) as seen:
                # Even at weight 0: under ddp every parameter must have a gradient.
                total = self.task_weight * task_loss(batch)
            inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
            if any(self._weights().values()):
                answer = teacher(inputs, theirs)
                student = self._observed(seen[""].logits, seen, context.architecture)
                wanted = self._observed(answer.logits, answer.seen, teacher.architecture, answer.classes)
                mask = batch.get("attention_mask")
                total = total + combined(student, wanted, self._weights(), self.temperature, self.top_k, mask)
            if self.sequence_weight:
                rows = continued(teacher.model, inputs["input_ids"], self.prompt_tokens, self.decoding == "sample")
                labels = rows.clone()
                labels[:, : self.prompt_tokens] = -100
                total = total + self.sequence_weight * task_loss({"input_ids": rows, "labels": labels})
            return total

        return loss

    def _weights(self) -> dict[str, float]:
        return {"logits": self.logits_weight, "hidden": self.hidden_weight, "relations": self.attention_weight}

    def _watched(self, architecture: Architecture) -> list[str]:
        from pipeline.layers.distillation import relation_names

        blocks = [block.name for block in architecture.blocks] if self.hidden_weight else []
        return [*blocks, *(relation_names(architecture) if self.attention_weight else [])]

    def _observed(
        self,
        logits: torch.Tensor,
        seen: Mapping[str, Any],
        architecture: Architecture,
        classes: torch.Tensor | None = None,
    ) -> Observed:
        from pipeline.layers.distillation import Observed, relation_names

        attention = architecture.blocks[-1].attention if self.attention_weight else None
        heads = (attention.heads, attention.key_value_heads, attention.key_value_heads) if attention else ()
        names = relation_names(architecture) if self.attention_weight else []
        return Observed(
            logits=logits,
            hidden=[seen[block.name] for block in architecture.blocks] if self.hidden_weight else [],
            relations=[(seen[name], count) for name, count in zip(names, heads, strict=True)],
            classes=classes,
        )

    def memory(self, model: nn.Module, context: Context) -> dict[str, int] | None:
        """The model before it loses layers, or what is left of it."""
        from pipeline.layers.holding import held

        return {"weights": max(held(model), held(self.reshaped(model, context)))}

    def finalize(self, model: nn.Module, context: Context) -> nn.Module:
        from pipeline.errors import LeanfitError
        from pipeline.layers.quantize import is_finite

        for name, parameter in model.named_parameters():
            if parameter.is_floating_point() and not is_finite(parameter):
                raise LeanfitError(
                    f"{context.stage}: NaN or infinity in {name} after training; lower its learning rate"
                )
        return model

    def detail(self, model: nn.Module, context: Context) -> dict[str, Any]:
        assert context.teacher is not None
        model_itself = "the model with fewer layers" if self._drops(context) else "the model"
        return {
            "teacher": self.teacher,
            "student": self.student or model_itself,
            "layers": len(context.architecture.blocks),
            "teacher_layers": len(context.teacher.architecture.blocks),
            "losses": {
                name: weight
                for name, weight in {
                    "task": self.task_weight, "logits": self.logits_weight, "hidden": self.hidden_weight,
                    "attention": self.attention_weight, "sequence": self.sequence_weight,
                }.items()
                if weight
            },
            "temperature": self.temperature,
            "top_k": self.top_k or "all",
        }  # fmt: skip


def _place_problems(key: str, value: str, *, checkpoint: bool) -> list[str]:
    """Why there is no model at `value`."""
    kinds = "self, an artifact, a checkpoint (.ckpt)" if checkpoint else "an artifact"
    kinds += " or a Hugging Face directory"
    if not os.path.exists(value):
        near = did_you_mean(value, ["self"]) if checkpoint else ""
        return [f"{shown(key, value)}: no such file or directory; give {kinds}{near}"]
    if exists(Path(value)):
        return [] if checkpoint and value.endswith(".ckpt") else [f"{shown(key, value)}: is a file; give {kinds}"]
    if any(os.path.isfile(os.path.join(value, name)) for name in ("manifest.json", "config.json")):
        return []
    inner = os.path.join(value, "artifact")
    meant = f"; did you mean {key}={inner}?" if os.path.isfile(os.path.join(inner, "manifest.json")) else ""
    return [f"{shown(key, value)}: holds neither a manifest.json nor a config.json; give {kinds}{meant}"]


def _mismatches(guest: nn.Module, model: nn.Module, said: str) -> list[str]:
    """Where a teacher's or student's inputs and outputs are not the model's."""
    from pipeline.layers.distillation import head_size

    ours, theirs = (_setting(one, "main_input_name", on_config=False) for one in (model, guest))
    if ours != theirs:
        return [f"{said} takes {theirs}, the model {ours}; give a model of the same kind"]
    found = []
    words = "tokens in its vocabulary" if ours == "input_ids" else "classes"
    if (mine := head_size(model)) != (other := head_size(guest)):
        found.append(f"{said} has {other} {words}, the model {mine}; give a model with as many")
    if (mine := _setting(model, "num_channels")) != (other := _setting(guest, "num_channels")):
        found.append(f"{said} takes images of {other} channels, the model {mine}; give a model with as many")
    return found


def _setting(model: nn.Module, name: str, on_config: bool = True) -> Any:
    return getattr(getattr(model, "config", None) if on_config else model, name, None)


def _size(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
