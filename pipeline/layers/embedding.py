"""Weight-only forms of nn.Embedding and nn.EmbeddingBag: packed rows of 2 to 8 bits.

Only the rows that are looked up are unpacked and dequantized. Recommendation models are little but such tables (Guan et
al., 2019, arXiv:1911.02079). compressed-tensors packs them but cannot load them back, so `pipeline.load` opens these.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.layers.packing import unpack_unsigned
from pipeline.layers.quantize import dequantize_rows
from pipeline.layers.quantized import FloatLayer, QuantizedLayer, quantizes
from pipeline.layers.weight_only import WeightOnly


class Table(QuantizedLayer):
    """What the quantized forms of nn.Embedding share. What concerns training alone is dropped."""

    def take_geometry(self, layer: FloatLayer) -> None:
        self.num_embeddings, self.embedding_dim = self.weight_dims
        self.padding_idx = cast(nn.Embedding | nn.EmbeddingBag, layer).padding_idx

    @abstractmethod
    def lookup(self, ids: Tensor) -> Tensor:
        """int64 [N] -> rows [N, columns]; only these are dequantized."""

    def forward(self, ids: Tensor) -> Tensor:
        return self.lookup(ids.flatten()).view(*ids.shape, self.columns)


class Bags(Table):
    """What those of nn.EmbeddingBag share. Of a batch's rows, only the distinct ones are dequantized."""

    def take_geometry(self, layer: FloatLayer) -> None:
        super().take_geometry(layer)
        bags = cast(nn.EmbeddingBag, layer)
        self.mode, self.include_last_offset = bags.mode, bags.include_last_offset

    def forward(self, ids: Tensor, offsets: Tensor | None = None, per_sample_weights: Tensor | None = None) -> Tensor:
        distinct, places = torch.unique(ids, return_inverse=True)
        padding = None
        if self.padding_idx is not None:
            found = (distinct == self.padding_idx).nonzero()
            padding = int(found) if found.numel() else None
        return F.embedding_bag(
            places, self.lookup(distinct), offsets, mode=self.mode, per_sample_weights=per_sample_weights,
            include_last_offset=self.include_last_offset, padding_idx=padding,
        )  # fmt: skip


class _PackedRows(WeightOnly, Table):
    def __init__(self, layer: FloatLayer, **settings: Any) -> None:
        super().__init__(layer, **settings)
        self.take_geometry(layer)

    def lookup(self, ids: Tensor) -> Tensor:
        """int64 [N] -> rows [N, columns] in the scales' dtype."""
        unsigned = unpack_unsigned(self.weight_packed[ids], self.bits, self.columns)
        zeros = self.zero_points()
        return dequantize_rows(
            unsigned, self.weight_scale[ids], None if zeros is None else zeros[ids], offset=1 << (self.bits - 1)
        )


@quantizes("weight_only", nn.Embedding)
class WeightOnlyEmbedding(_PackedRows):
    """Rows of packed integers."""


@quantizes("weight_only", nn.EmbeddingBag)
class WeightOnlyEmbeddingBag(_PackedRows, Bags):
    """Sums, means or maxima of bags."""
