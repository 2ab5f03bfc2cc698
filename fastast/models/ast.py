"""AST: the audio spectrogram transformer, a ViT with overlapping patches and a fixed input length.

Gong, Chung and Glass, "AST: Audio Spectrogram Transformer", Interspeech 2021. A class and a
distillation token (DeiT) precede each clip's patches; one table holds a learned position for each
row of the fixed grid; the mean of the two tokens is classified.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastast.models import flops
from fastast.models.flops import Flops
from fastast.models.vit import PatchEmbed, Trunk, as_stream, init_vit_weights, register_sizes
from fastast.segments import Spectrograms
from fastast.tokens import GridPositions, PatchGeometry, PatchGrid


class AST(nn.Module):
    """Classifier for spectrograms of one length.

    Other lengths are accepted: the position table is then laid over each clip's own grid, as
    resizing it bilinearly for that length would do. What a model trained at one length makes of
    another is a different matter (ElasticAST, figures 4 and 5).

    Args:
        num_classes: of the logits.
        input_frames: frames of the clips it is made for.
        num_mels: mel bins of the input.
        patch_size: ``(mel bins, frames)``.
        stride: between patches; AST's best is ``(10, 10)``, its fastest ``(16, 16)``.
        distilled: whether clips have a distillation token beside the class token (DeiT), and the
            mean of the two is classified.
        time_pool, time_pooling: of frames before patches are cut, see :class:`PatchGeometry`.
        dim, depth, num_heads, mlp_ratio: of the trunk.

    Raises:
        ValueError: ``input_frames`` shorter than a patch, or a ``dim`` that ``num_heads`` does
            not divide.
    """

    def __init__(
        self,
        num_classes: int,
        *,
        input_frames: int = 1024,
        num_mels: int = 128,
        patch_size: tuple[int, int] = (16, 16),
        stride: tuple[int, int] = (10, 10),
        distilled: bool = True,
        dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        time_pool: int = 1,
        time_pooling: Literal["average", "max"] = "average",
    ) -> None:
        super().__init__()
        self.geometry = PatchGeometry(
            num_mels, patch_size, stride, 1 + distilled, time_pool, time_pooling
        )
        self.input_frames = input_frames
        time_patches = self.geometry.time_patches(input_frames)
        if time_patches < 1:
            raise ValueError(
                f"input_frames ({input_frames}) is shorter than a patch "
                f"({self.geometry.patch_frames} frames)"
            )
        self.patch_embed = PatchEmbed(self.geometry, dim)
        self.prefix = nn.Parameter(torch.empty(self.geometry.prefix, dim))  # cls, dist
        self.positions = self._make_positions(time_patches, dim)
        self.trunk = Trunk(dim, depth, num_heads, mlp_ratio=mlp_ratio)
        self.norm = nn.LayerNorm(dim, eps=1e-5)  # unlike the trunk's 1e-6, as in the original
        self.head = nn.Linear(dim, num_classes)
        nn.init.trunc_normal_(self.prefix, std=0.02)
        self.apply(init_vit_weights)

    def _make_positions(self, time_patches: int, dim: int) -> nn.Module:
        geometry = self.geometry
        return GridPositions(geometry.prefix, geometry.freq_patches, time_patches, dim)

    def forward_features(
        self, inputs: Spectrograms | Tensor, grid: PatchGrid | None = None
    ) -> tuple[Tensor, PatchGrid]:
        """Token features ``[rows, dim]`` after the trunk, and the list of what each row is."""
        frames, grid = as_stream(inputs, grid, self.geometry)
        return self.trunk(self.tokens(frames, grid), grid.segments), grid

    def tokens(self, frames: Tensor, grid: PatchGrid) -> Tensor:
        """What the trunk reads of a stream of frames: class tokens and patches, with positions,
        ``[rows, dim]``."""
        patches = self.patch_embed(frames, grid)
        prefix = F.embedding(grid.prefix_id.clamp(min=0), self.prefix).to(patches.dtype)
        tokens = torch.where((grid.prefix_id >= 0)[:, None], prefix, patches)
        return tokens + self.positions(grid)

    def embed(self, inputs: Spectrograms | Tensor, grid: PatchGrid | None = None) -> Tensor:
        """What the linear classifier reads of each clip: ``[clips, dim]``, in input order.

        The mean of the class tokens after the last norm. Arguments as of :meth:`forward`.
        """
        features, grid = self.forward_features(inputs, grid)
        # Empty segments have no class tokens; any row serves, since their logits mean nothing.
        count = self.geometry.prefix
        if grid.num_rows < count:
            features = F.pad(features, (0, 0, 0, count))
        cls = grid.segments.offsets[:-1].clamp(max=features.shape[0] - count)
        tokens = [F.embedding(cls + index, features) for index in range(count)]
        return self.norm(torch.stack(tokens).mean(0))

    def forward(self, inputs: Spectrograms | Tensor, grid: PatchGrid | None = None) -> Tensor:
        """Logits ``[clips, num_classes]`` in input order.

        Args:
            inputs: :class:`~fastast.Spectrograms`, or dense ``[clips, frames, num_mels]``.
            grid: the token list, from ``model.geometry.grid(...)``; made here if missing.
        """
        return self.head(self.embed(inputs, grid))

    def flops(self, tokens: Sequence[int] | np.ndarray) -> Flops:
        """Of clips of so many tokens each, the two class tokens included; see
        :mod:`fastast.models.flops`."""
        tokens = np.asarray(tokens, np.int64)
        tokens = tokens[tokens > 0]
        total, clips = int(tokens.sum()), len(tokens)
        first = flops.embedding(self.patch_embed, total - self.geometry.prefix * clips)
        trunk = flops.blocks(self.trunk, total, flops.pairs(tokens))
        head = flops.linear(clips, self.head.in_features, self.head.out_features)
        return Flops(first + trunk + head, first)


register_sizes("ast", AST)
