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
import torch
from torch import Tensor, nn

from fastast.models import flops
from fastast.models.flops import Flops
from fastast.models.grid_vit import GridViT, check_source, take_over
from fastast.models.vit import PatchEmbed, Trunk, as_stream, init_vit_weights, register_sizes
from fastast.nn import AttentionPool, MeanPool
from fastast.segments import Spectrograms
from fastast.tokens import FactorisedPositions, PatchGeometry, PatchGrid, resize_positions


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

    def start_from(self, other: GridViT | ElasticAST) -> None:
        """Takes over what a pre-trained model has learnt; the last norm and classifier stay.

        Of a ViT, AST or SSAST these are patch embedding and trunk, and what can be made of the rest
        (section 3.2 names the weights; this is how the original's code uses them):

        - positions: the table without its class tokens is adapted to ``freq_patches`` by
          ``max_time_patches`` as AST does it (the middle of an axis that shrinks, bilinear where it
          grows). A row of ``time`` is its mean over frequency, one of ``freq`` its mean over time.
        - attention pooling: projections are the sum of those of all blocks over six times their
          number. (The code means to average, and counts the six tensors that a block has.) The
          pooled row is normalised, so a sixth mostly means that pooling begins close to the mean of
          a clip's tokens. The query stays as it is.

        Scores keep this model's scale: with the usual one, the blocks compute what they computed
        where they come from. The original scales nothing, so that its scores begin 8 times as large
        at heads of 64; ``attention_scale=1`` does so too.

        Args:
            other: with patches and a trunk of the same sizes. Of an ElasticAST, all is taken.

        Raises:
            ValueError: patches, trunk, tables or pooling of other sizes.
        """
        if isinstance(other, ElasticAST):
            if self.trunk.blocks[0].attn.scale != other.trunk.blocks[0].attn.scale:
                raise ValueError("the pre-trained model has another attention_scale: use its own")
            taken = {
                name: value
                for name, value in other.state_dict().items()
                if not name.startswith(("norm.", "head."))
            }
            return take_over(self, taken, new=("norm.", "head."))
        check_source(self, other)
        weights = {
            name: value
            for name, value in other.state_dict().items()
            if name.startswith(("patch_embed.", "trunk."))
        }
        grid = (self.geometry.freq_patches, self.positions.time.shape[0])
        patches = other.positions.table[other.geometry.prefix :].detach()
        table = resize_positions(patches, other.positions.grid, grid, shrink="cut")
        table = table.unflatten(0, grid)
        weights["positions.time"], weights["positions.freq"] = table.mean(0), table.mean(1)
        if isinstance(self.pool, AttentionPool):
            weights |= _pool_of_blocks(weights)
        take_over(self, weights, new=("norm.", "head.", "pool.query"))

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


def _pool_of_blocks(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The pooling attention's projections, of those of a trunk."""

    def sixth_of_the_mean(name: str) -> Tensor:
        of_blocks = [value for key, value in weights.items() if key.endswith(f".attn.{name}")]
        return torch.stack(of_blocks).mean(0) / 6

    pool = {f"pool.proj.{part}": sixth_of_the_mean(f"proj.{part}") for part in ("weight", "bias")}
    for part in ("weight", "bias"):
        found = zip("qkv", sixth_of_the_mean(f"qkv.{part}").chunk(3), strict=True)
        pool |= {f"pool.{name}.{part}": value for name, value in found}
    del pool["pool.k.bias"]  # it cancels, so there is none
    return pool


register_sizes("elastic_ast", ElasticAST)
