"""How the rows of a token stream share a loss that counts every clip alike."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from fastast.data import Batch


def clip_shares(batch: Batch) -> Tensor:
    """What each clip of a batch counts for: ``[segments]``; empty segments nothing."""
    return (batch.clip_ids >= 0) / batch.loss_denominator


def row_shares(batch: Batch, counts: Tensor) -> Tensor:
    """What each thing that is counted adds, so that those of a clip share its part of the loss.

    Args:
        batch: gives the clips and their parts.
        counts: bool or integers ``[batch.grid.num_rows]``, how many things there are in a row.

    Returns:
        ``[rows]``; zero where there are none.
    """
    grid = batch.grid
    offsets = grid.segments.offsets.long()
    up_to = F.pad(counts.cumsum(0), (1, 0))
    total = up_to[offsets[1:]] - up_to[offsets[:-1]]
    share = clip_shares(batch) / total.clamp(min=1)
    clip = grid.segments.row_ids(grid.num_rows).clamp(max=share.shape[0] - 1)
    return torch.where(counts > 0, share[clip], 0)
