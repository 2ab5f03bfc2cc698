"""Attention pooling of each segment to one row."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastast.ops import segment_pool
from fastast.segments import Segments


class AttentionPool(nn.Module):
    """Multi-head attention with one learned query per segment (ElasticAST, section 2.2).

    Keys and values are never computed: the query is taken through the key projection instead,
    and the value projection is applied to the pooled rows (see :mod:`fastast.ops.segment_pool`).
    A key bias would cancel in the softmax, so there is none.

    Args:
        dim: of the rows; a multiple of ``num_heads``.
        num_heads: attention heads.
        scale: of the scores; default ``(dim / num_heads) ** -0.5``.

    Shape:
        ``[rows, dim] -> [segments, dim]``. The row of an empty segment holds only biases and
        means nothing.

    Raises:
        ValueError: ``dim`` is not a multiple of ``num_heads``.
    """

    def __init__(self, dim: int, num_heads: int, *, scale: float | None = None) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"dim ({dim}) must be a multiple of num_heads ({num_heads})")
        self.num_heads = num_heads
        self.scale = (dim // num_heads) ** -0.5 if scale is None else scale
        self.query = nn.Parameter(torch.empty(dim))
        self.q = nn.Linear(dim, dim)
        self.k = nn.Linear(dim, dim, bias=False)
        self.v = nn.Linear(dim, dim)
        self.proj = nn.Linear(dim, dim)
        nn.init.normal_(self.query, std=0.02)

    def forward(self, x: Tensor, segments: Segments) -> Tensor:
        heads = self.num_heads
        # A few small products that everything hangs on: in full precision under autocast too.
        with torch.autocast(x.device.type, enabled=False):
            q = self.q(self.query).unflatten(0, (heads, -1))  # [heads, head_dim]
            k = self.k.weight.unflatten(0, (heads, -1))  # [heads, head_dim, dim]
            u = self.scale * torch.einsum("hc,hcd->hd", q, k)
        pooled = segment_pool(x, u, segments)  # [segments, heads, dim]
        v = self.v.weight.unflatten(0, (heads, -1)).to(pooled.dtype)
        out = torch.einsum("shd,hcd->shc", pooled, v).flatten(1) + self.v.bias
        return self.proj(out)


class MeanPool(nn.Module):
    """Mean of each segment's rows, the ablation of attention pooling. Zeros where empty.

    It is attention pooling with a query of zeros, and runs as that.

    Shape:
        ``[rows, dim] -> [segments, dim]``.
    """

    def forward(self, x: Tensor, segments: Segments) -> Tensor:
        return segment_pool(x, x.new_zeros(1, x.shape[1]), segments).squeeze(1)
