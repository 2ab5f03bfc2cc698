"""Multi-head self-attention over a packed stream, with the parameter layout of a ViT."""

from __future__ import annotations

from torch import Tensor, nn

from fastast.ops import packed_attention_qkv
from fastast.segments import Segments


class PackedAttention(nn.Module):
    """Self-attention in which each row attends to the rows of its own segment.

    Parameters are named as in timm's ``Attention`` (``qkv``, ``proj``), so that published ViT
    and AST weights load as they are.

    Args:
        dim: of the rows; a multiple of ``num_heads``.
        num_heads: attention heads.
        scale: of the scores; default ``(dim / num_heads) ** -0.5``.

    Shape:
        ``[rows, dim] -> [rows, dim]``.

    Raises:
        ValueError: ``dim`` is not a multiple of ``num_heads``.
    """

    def __init__(self, dim: int, num_heads: int, *, scale: float | None = None) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"dim ({dim}) must be a multiple of num_heads ({num_heads})")
        self.num_heads = num_heads
        self.scale = scale
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, segments: Segments) -> Tensor:
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))
        return self.proj(packed_attention_qkv(qkv, segments, scale=self.scale).flatten(1))
