"""A ViT over the patches of a fixed grid: what AST and SSAST have in common.

A class and a distillation token (DeiT) precede each clip's patches; one table holds a learned
position for each of these tokens.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastast.models.vit import PatchEmbed, Trunk, as_stream, init_vit_weights
from fastast.segments import Spectrograms
from fastast.tokens import GridPositions, PatchGeometry, PatchGrid


class GridViT(nn.Module):
    """Patch embedding, class tokens, positions and trunk. What follows is the subclass's.

    Args:
        input_frames: frames of the clips whose patches the table of positions has.
        num_mels: mel bins of the input.
        patch_size: ``(mel bins, frames)``.
        stride: between patches.
        dim, depth, num_heads, mlp_ratio: of the trunk.
        shorter: what shorter clips make of the table, see
            :class:`~fastast.tokens.GridPositions`.

    Raises:
        ValueError: ``input_frames`` shorter than a patch, or a ``dim`` that ``num_heads`` does
            not divide.
    """

    def __init__(
        self,
        *,
        input_frames: int,
        num_mels: int,
        patch_size: tuple[int, int],
        stride: tuple[int, int],
        dim: int,
        depth: int,
        num_heads: int,
        mlp_ratio: float,
        shorter: str,
    ) -> None:
        super().__init__()
        self.geometry = PatchGeometry(num_mels, patch_size, stride, prefix=2)
        self.input_frames = input_frames
        time_patches = self.geometry.time_patches(input_frames)
        if time_patches < 1:
            raise ValueError(
                f"input_frames ({input_frames}) is shorter than a patch ({patch_size[1]} frames)"
            )
        self.patch_embed = PatchEmbed(self.geometry, dim)
        self.prefix = nn.Parameter(torch.empty(2, dim))  # cls, dist
        self.positions = GridPositions(
            2, self.geometry.freq_patches, time_patches, dim, shorter=shorter
        )
        self.trunk = Trunk(dim, depth, num_heads, mlp_ratio=mlp_ratio)

    def init_weights(self) -> None:
        """Initialises all weights as ViT does; for the end of a subclass's ``__init__``."""
        nn.init.trunc_normal_(self.prefix, std=0.02)
        self.apply(init_vit_weights)

    def forward_features(
        self, inputs: Spectrograms | Tensor, grid: PatchGrid | None = None
    ) -> tuple[Tensor, PatchGrid]:
        """Token features ``[rows, dim]`` after the trunk, and the list of what each row is."""
        frames, grid = as_stream(inputs, grid, self.geometry)
        return self.encode(self.patch_embed(frames, grid), grid), grid

    def encode(self, patches: Tensor, grid: PatchGrid) -> Tensor:
        """Patch embeddings to token features, both ``[rows, dim]``."""
        prefix = F.embedding(grid.prefix_id.clamp(min=0), self.prefix).to(patches.dtype)
        tokens = torch.where((grid.prefix_id >= 0)[:, None], prefix, patches)
        return self.trunk(tokens + self.positions(grid), grid.segments)


def mean_of_class_tokens(features: Tensor, grid: PatchGrid) -> Tensor:
    """The mean of each clip's two class tokens: ``[rows, dim] -> [clips, dim]``."""
    # Empty segments have no class tokens; any row serves, since their logits mean nothing.
    if grid.num_rows < 2:
        features = F.pad(features, (0, 0, 0, 2))
    cls = grid.segments.offsets[:-1].clamp(max=features.shape[0] - 2)
    return (F.embedding(cls, features) + F.embedding(cls + 1, features)) / 2
