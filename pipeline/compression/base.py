"""The contract of a compression method. docs/add_a_method.md walks through it with `magnitude` as the example.

A method is a pure function first (`quantize_int8(model, ...) -> model`), a thin frozen dataclass second. The runner
knows no method by name: it reads what is declared here and calls the hooks in this order

    entering -> preflight, reshaped (model on meta)
    entering -> prepare -> [fit with callbacks and loss, if trains] -> finalize
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, Protocol

if TYPE_CHECKING:
    import torch
    from lightning.pytorch import Callback
    from torch import nn

    from pipeline.models.base import Architecture

Kind = Literal["quantization", "pruning", "distillation"]
TaskLoss = Callable[[dict[str, "torch.Tensor"]], "torch.Tensor"]
"""The task's loss of a batch; it runs the model's forward pass, which hooks may watch."""
StageLoss = Callable[["nn.Module", dict[str, "torch.Tensor"], TaskLoss], "torch.Tensor"]
"""(model, batch, the task's loss) -> the loss to train with."""


class Answer(NamedTuple):
    """What a teacher says of a batch: logits [B, ..., V], and outputs of the modules that were asked for.

    With `classes` [B, ..., k] the logits [B, ..., k] are those of these classes alone, the teacher's k largest.
    """

    logits: torch.Tensor
    seen: dict[str, Any]
    classes: torch.Tensor | None = None


class Teacher(Protocol):
    """The model that `method.teacher` names: frozen, in eval mode, loaded once for a link, owned by the runner.

    Where the method `records_teacher`, its logits alone, as they were recorded for the fit's batches.
    """

    @property
    def model(self) -> nn.Module:
        """The model itself; on the meta device in the preflight."""

    @property
    def architecture(self) -> Architecture: ...

    def __call__(self, batch: Mapping[str, torch.Tensor], observe: Sequence[str] = ()) -> Answer:
        """Logits and outputs of the modules named in `observe`, without gradients, on the batch's device."""


@dataclass(frozen=True)
class Context:
    """What the runner hands to a method, for one link. A method keeps the state of its training in its callbacks."""

    stage: str
    """The link's name in the chain (equal to the method's unless it is repeated under another)."""
    architecture: Architecture
    device: str
    steps: int
    """Optimizer steps of this link's own fit; 0 where it does not train."""
    seed: int
    calibration: Callable[[], Iterable[dict[str, torch.Tensor]]] | None = None
    """Batches of model inputs, disjoint from evaluation; set where `needs_calibration`."""
    teacher: Teacher | None = None
    """Set where `needs_teacher`: the method then has a field `teacher`."""
    open_model: Callable[[str], nn.Module] | None = None
    """The model that the method's field of this name names, trainable; on the meta device in the preflight."""
    first: bool = True
    """Whether no other link comes before this one."""
    kept: Callable[[str], float] = lambda name: 1.0
    """Of a layer's weights, the share that earlier links have kept, as they declare it: the preflight has no masks."""
    facts: dict[str, Any] = field(default_factory=dict)
    """What a method found on the way and wants told, as JSON: the runner adds it to the link's detail."""


@dataclass(frozen=True, kw_only=True)
class Method:
    """Settings of one link. Subclasses add their fields without defaults: YAML owns the values."""

    kind: ClassVar[Kind]
    needs_calibration: ClassVar[bool] = False
    needs_teacher: ClassVar[bool] = False
    trains: ClassVar[bool] = False
    cannot_follow: ClassVar[frozenset[str]] = frozenset()
    """Kinds or method names that must not stand before this one in a chain."""
    must_follow: ClassVar[frozenset[str]] = frozenset()
    holds_adapters: ClassVar[bool] = False
    """Whether stage 0 can train adapters beside layers that `finalize` has compressed already (QLoRA)."""
    chooses: ClassVar[bool] = False
    """Whether what the layers become depends on what is measured: a plan of what is left is less sure."""

    name: str

    @property
    def trains_in_shards(self) -> bool:
        """Whether its fit goes on weights that are whole only while their block computes (fsdp)."""
        return False

    @property
    def shrinks(self) -> bool:
        """What the receipt may demand: the artifact is smaller than before."""
        return True

    @property
    def records_teacher(self) -> bool:
        """Whether the fit reads its teacher's logits from disk: the method then has a field `top_k`."""
        return False

    def entering(self, model: nn.Module) -> nn.Module:
        """The model as the other hooks take it: the same function, in place, of layers that the method knows."""
        return model

    def preflight(self, model: nn.Module, context: Context) -> list[str]:
        """Problems that need the model's shapes (a group size that does not divide, a pattern that matches no layer).

        `model` is on the meta device. Each message names the key (`compression.<stage>.<key>`), value and fix.
        """
        return []

    def reshaped(self, model: nn.Module, context: Context) -> nn.Module:
        """The model of the preflight as it leaves this link, for those of later links; on meta where it is another.

        Only methods whose result has other shapes or layers say anything here; `model` itself stays as it is.

        Raises:
            ConfigError: these settings lead to no model; `preflight` told why.
        """
        return model

    def left(self, model: nn.Module, context: Context) -> nn.Module | None:
        """What `reshaped` gave, with quantized layers, for plans that do not run `finalize`; None where values decide.

        A copy on the meta device, where that is another than `model`.
        """
        return model

    def prepare(self, model: nn.Module, context: Context) -> nn.Module:
        """Before the link's own fit: masks, fake-quant, the student. Later hooks get a context of what it returns."""
        return model

    def callbacks(self, context: Context) -> list[Callback]:
        """Lightning callbacks for schedules; mutable state lives there and in their state_dict."""
        return []

    def loss(self, context: Context) -> StageLoss | None:
        """A loss instead of the task's in the link's fit, as distillation needs."""
        return None

    @abstractmethod
    def finalize(self, model: nn.Module, context: Context) -> nn.Module:
        """The compressed model. Raises on a NaN weight (naming the layer) and where there was no effect at all."""

    def memory(self, model: nn.Module, context: Context) -> dict[str, int] | None:
        """Bytes by kind at the peak of `prepare` and `finalize`, by formula; None where none is known for this model.

        `model` and the batches of `context.calibration` are on the meta device; nothing is run. For plans that do not
        run `finalize` on tensors without values.
        """
        return None

    def detail(self, model: nn.Module, context: Context) -> dict[str, Any]:
        """JSON facts for `stages[].detail` of result.json: layers touched, kernel, measured sparsity, ..."""
        return {}
