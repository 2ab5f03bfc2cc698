"""ElasticAST on a padded batch with fused attention: what one would write without the paper.

Every clip is padded to the longest, ``[B, T, F] -> [B, L, D]``; a key padding mask keeps the
padding out of attention and pooling. Nothing is explicit that PyTorch can fuse.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from bench.peers.attention import sdpa_attention
from bench.peers.elastic import Attention, clip_patches, embed, encode, pool
from fastast import ElasticAST


class Padded(nn.Module):
    """An ElasticAST's parameters, run on padded clips.

    Args:
        model: ours, with attention pooling.
        attention: how scores are computed.
    """

    def __init__(self, model: ElasticAST, attention: Attention = sdpa_attention) -> None:
        super().__init__()
        self.model, self.attention = model, attention

    def key_mask(self, frames: Sequence[int], device: torch.device | str = "cpu") -> Tensor | None:
        """bool ``[B, 1, 1, L]``, False on padding; ``None`` if all clips are equally long."""
        widths = torch.tensor([self.model.geometry.time_patches(count) for count in frames])
        if (widths == widths[0]).all():
            return None
        valid = torch.arange(int(widths.max())) < widths[:, None]
        return valid.repeat(1, self.model.geometry.freq_patches)[:, None, None].to(device)

    def forward(self, frames: Tensor, key_mask: Tensor | None) -> Tensor:
        """Logits ``[B, classes]``.

        Args:
            frames: ``[B, T, num_mels]``, anything finite after each clip's end.
            key_mask: see :meth:`key_mask`.
        """
        model = self.model
        patches = clip_patches(frames, model.geometry.patch_size)
        place = torch.arange(patches.shape[1], device=frames.device)
        width = patches.shape[1] // model.geometry.freq_patches
        x = embed(model, patches, place // width, place % width)
        x = encode(model, x, key_mask, self.attention)
        query = model.pool.query[None, None]
        pooled = pool(model.pool, x, query, key_mask, self.attention)
        return model.head(model.norm(pooled.squeeze(1)))
