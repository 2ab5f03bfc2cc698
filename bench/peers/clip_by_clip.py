"""ElasticAST one clip at a time, without packing, padding or masks: the reference."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from bench.peers.attention import explicit_attention
from bench.peers.padded import Padded
from fastast import ElasticAST


class ClipByClip(nn.Module):
    """An ElasticAST's parameters on each clip alone, with explicit attention.

    Args:
        model: ours, with attention pooling.
    """

    def __init__(self, model: ElasticAST) -> None:
        super().__init__()
        self.alone = Padded(model, explicit_attention)

    def forward(self, clips: Sequence[Tensor]) -> Tensor:
        """Logits ``[clips, classes]`` of spectrograms ``[T_i, num_mels]``."""
        return torch.cat([self.alone(clip[None], None) for clip in clips])
