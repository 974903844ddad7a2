"""Muon (Jordan et al., 2024, kellerjordan.github.io/posts/muon): momentum whose matrix is made orthogonal at each step.

For the matrices between a model's embeddings and its head; AdamW takes those, vectors and convolutions. Updates have
AdamW's root mean square (Liu et al., 2025, arXiv:2502.16982), so one learning rate serves both. torch's own Muon and
AdamW do the steps. State: 4 bytes a parameter of a matrix, 8 of all else.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, cast

from annotated_types import Ge, Gt, Lt

from pipeline.optimizers.adamw import Beta
from pipeline.optimizers.base import Optimizer, decay_groups
from pipeline.registry import register

if TYPE_CHECKING:
    import torch
    from torch import nn


@register("optimizer", "muon")
@dataclass(frozen=True, kw_only=True)
class Muon(Optimizer):
    """`momentum`, `nesterov`, `ns_steps` (of the Newton-Schulz iteration) are Muon's; `betas`, `eps` AdamW's."""

    steps_apart: ClassVar[Literal["weights", "rows", "parts", "values"]] = "parts"

    momentum: Annotated[float, Ge(0), Lt(1)]
    nesterov: bool
    ns_steps: Annotated[int, Ge(1), Lt(100)]
    betas: tuple[Beta, Beta]
    eps: Annotated[float, Gt(0)]

    def shape_problems(self, model: nn.Module) -> list[str]:
        if hidden_matrices(model):
            return []
        return ["optimizer=muon: the model has no linear layers between embeddings and head; use optimizer=adamw"]

    def build(self, model: nn.Module, lr: float) -> torch.optim.Optimizer:
        import torch

        from pipeline.optimizers.sharded import Muon as Sharded
        from pipeline.optimizers.together import Together

        hidden = hidden_matrices(model)
        taken = {id(weight) for weight in hidden}
        rest = [weight for weight in model.parameters() if weight.requires_grad and id(weight) not in taken]
        optimizers: list[torch.optim.Optimizer] = [
            Sharded(
                hidden,
                lr=lr,
                weight_decay=self.weight_decay,
                momentum=self.momentum,
                nesterov=self.nesterov,
                ns_steps=self.ns_steps,
                adjust_lr_fn="match_rms_adamw",
            )
        ]
        if rest:
            groups = decay_groups(rest, self.weight_decay)
            optimizers.append(torch.optim.AdamW(groups, lr=lr, betas=self.betas, eps=self.eps, foreach=False))
        return Together(optimizers)


def hidden_matrices(model: nn.Module) -> list[nn.Parameter]:
    """Trained weights of linear layers that are neither an embedding's (also where it is tied) nor the head's."""
    from torch import nn

    outer = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding | nn.EmbeddingBag)}
    head = getattr(model, "get_output_embeddings", lambda: None)()
    last = [module for module in model.modules() if isinstance(module, nn.Linear)][-1:]
    outer |= {id(module.weight) for module in ([head] if head is not None else last)}
    found: dict[int, nn.Parameter] = {
        id(module.weight): cast(nn.Parameter, module.weight)
        for module in model.modules()
        if isinstance(module, nn.Linear) and module.weight.requires_grad and id(module.weight) not in outer
    }
    return list(found.values())
