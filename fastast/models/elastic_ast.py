"""ElasticAST: an audio spectrogram transformer for clips of any length and resolution.

Feng, Erol, Chung and Senocak, "ElasticAST: An Audio Spectrogram Transformer for All Length and
Resolutions", Interspeech 2024. The clips of a batch are packed into one stream; attention stays
within each clip (section 2.2, "Mask Self-Attention"); a learned query pools each clip ("Mask
Attention Pooling"); frequency and time have position tables of their own (section 3.2).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from torch import Tensor, nn

from fastast.models import flops
from fastast.models.flops import Flops
from fastast.models.vit import PatchEmbed, Trunk, as_stream, init_vit_weights, register_sizes
from fastast.nn import AttentionPool, MeanPool
from fastast.segments import Spectrograms
from fastast.tokens import FactorisedPositions, PatchGeometry, PatchGrid


class ElasticAST(nn.Module):
    """Classifier for spectrograms of any lengths.

    Args:
        num_classes: of the logits.
        num_mels: mel bins of the input.
        patch_size: ``(mel bins, frames)``; patches do not overlap.
        max_time_patches: columns of the time table; longer clips interpolate it.
        time_pool, time_pooling: of frames before patches are cut, see :class:`PatchGeometry`.
        dim, depth, num_heads, mlp_ratio: of the trunk.
        pool: ``"attention"`` (the paper's) or ``"mean"`` (its ablation).
        attention_scale: of all attention scores. Default: the usual ``head_dim ** -0.5``. The
            paper and its code have none, that is 1, which converted weights use.

    Raises:
        ValueError: an unknown ``pool``, or a ``dim`` that ``num_heads`` does not divide.
    """

    def __init__(
        self,
        num_classes: int,
        *,
        num_mels: int = 128,
        patch_size: tuple[int, int] = (16, 16),
        max_time_patches: int = 64,
        dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        time_pool: int = 1,
        time_pooling: Literal["average", "max"] = "average",
        pool: str = "attention",
        attention_scale: float | None = None,
    ) -> None:
        super().__init__()
        if pool not in ("attention", "mean"):
            raise ValueError(f"pool must be 'attention' or 'mean', got {pool!r}")
        self.geometry = PatchGeometry(num_mels, patch_size, None, 0, time_pool, time_pooling)
        self.patch_embed = PatchEmbed(self.geometry, dim)
        self.positions = FactorisedPositions(self.geometry.freq_patches, max_time_patches, dim)
        self.trunk = Trunk(dim, depth, num_heads, mlp_ratio=mlp_ratio, scale=attention_scale)
        self.pool = (
            AttentionPool(dim, num_heads, scale=attention_scale)
            if pool == "attention"
            else MeanPool()
        )
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.head = nn.Linear(dim, num_classes)
        self.apply(init_vit_weights)

    def forward_features(
        self, inputs: Spectrograms | Tensor, grid: PatchGrid | None = None
    ) -> tuple[Tensor, PatchGrid]:
        """Token features ``[rows, dim]`` after the trunk, and the list of what each row is."""
        frames, grid = as_stream(inputs, grid, self.geometry)
        tokens = self.patch_embed(frames, grid) + self.positions(grid)
        return self.trunk(tokens, grid.segments), grid

    def embed(self, inputs: Spectrograms | Tensor, grid: PatchGrid | None = None) -> Tensor:
        """What the linear classifier reads of each clip: ``[clips, dim]``, in input order.

        The pooled tokens after the last norm. Arguments as of :meth:`forward`.
        """
        features, grid = self.forward_features(inputs, grid)
        return self.norm(self.pool(features, grid.segments))

    def forward(self, inputs: Spectrograms | Tensor, grid: PatchGrid | None = None) -> Tensor:
        """Logits ``[clips, num_classes]`` in input order.

        Args:
            inputs: :class:`~fastast.Spectrograms`, or dense ``[clips, frames, num_mels]``.
            grid: the token list, from ``model.geometry.grid(...)``; made here if missing.
        """
        return self.head(self.embed(inputs, grid))

    def flops(self, tokens: Sequence[int] | np.ndarray) -> Flops:
        """Of clips of so many tokens each; see :mod:`fastast.models.flops`."""
        tokens = np.asarray(tokens, np.int64)
        total, clips = int(tokens.sum()), int((tokens > 0).sum())
        first = flops.embedding(self.patch_embed, total)
        trunk = flops.blocks(self.trunk, total, flops.pairs(tokens))
        pooling = 0
        if isinstance(self.pool, AttentionPool):
            pooling = flops.pool_folded(self.head.in_features, self.pool.num_heads, total, clips)
        head = flops.linear(clips, self.head.in_features, self.head.out_features)
        return Flops(first + trunk + pooling + head, first)


register_sizes("elastic_ast", ElasticAST)
