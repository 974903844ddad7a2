"""ZeRO: optimizer state, gradients and weights in shards over the devices, by the DeepSpeed engine.

Rajbhandari et al., 2020 (arXiv:1910.02054): stage 1 shards the optimizer's state, stage 2 the gradients too, stage 3
the weights as well. The engine needs `pip install 'leanfit[deepspeed]'`; how it runs: `pipeline.parallelism.zero`.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from annotated_types import Ge

from pipeline.parallelism.base import Holding, backend
from pipeline.parallelism.launched import Launched
from pipeline.registry import register

if TYPE_CHECKING:
    from lightning.pytorch.strategies import Strategy


@register("parallelism", "deepspeed")
@dataclass(frozen=True, kw_only=True)
class DeepSpeed(Launched):
    """`offload`: `optimizer` keeps its state in the host's memory and steps there; `parameters`, with stage 3, the
    weights as well. `persistence_threshold`: with stage 3, weights of fewer elements are held whole on each device.
    """

    sharded: ClassVar[bool] = True

    stage: Literal[1, 2, 3]
    offload: Literal["optimizer", "parameters"] | None
    persistence_threshold: Annotated[int, Ge(0)]

    @property
    def holding(self) -> Holding:
        from pipeline.parallelism.zero import BUCKET_ELEMENTS

        return Holding(
            weights=self.ranks if self.stage == 3 else 1,
            gradients=self.ranks if self.stage > 1 else 1,
            state=self.ranks,
            on_host="nothing" if self.offload is None else "all" if self.offload == "parameters" else "state",
            bucket=BUCKET_ELEMENTS,
            master=True,
            whole_below=self.persistence_threshold,
        )

    @property
    def saves(self) -> Literal["engine"]:
        return "engine"

    def problems(self) -> list[str]:
        found = super().problems()
        if importlib.util.find_spec("deepspeed") is None:
            found.append(
                "parallelism=deepspeed needs DeepSpeed: pip install 'leanfit[deepspeed]', or use parallelism=fsdp"
            )
        if self.offload == "parameters" and self.stage != 3:
            found.append(
                f"parallelism.offload=parameters: stage {self.stage} holds whole weights on each device; "
                "use parallelism.stage=3, or parallelism.offload=optimizer"
            )
        return found

    def strategy(self, device: str) -> Strategy:
        """Raises ConfigError for a device between whose copies nothing can be sent."""
        from pipeline.parallelism.zero import ZeroStrategy

        return ZeroStrategy(
            self.stage,
            offload=self.offload,
            persistence_threshold=self.persistence_threshold,
            process_group_backend=backend(self.name, device),
        )
