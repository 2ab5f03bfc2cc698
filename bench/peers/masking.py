"""Masking and corruption as published: a loop over clips and blocks, on tensors.

The loops take the blocks and keys that ours drew, so that all contenders do the same work and
return the same masks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastast.tokens.gmml import Blocks


def corrupt_clip_by_clip(batch: Tensor, blocks: Blocks) -> tuple[Tensor, Tensor]:
    """GMML of ``[S, T, F]``: block after block until enough pixels are covered.

    Returns:
        The corrupted batch and its mask, bool.
    """
    times, freqs = (torch.stack(bounds, -1).cpu().tolist() for bounds in blocks[:2])
    needed, alien, partner = (x.tolist() for x in blocks[2:])
    corrupted, masks = batch.clone(), torch.zeros_like(batch, dtype=torch.bool)
    for clip, (out, mask) in enumerate(zip(corrupted, masks, strict=True)):
        place = 0
        while mask.sum() < needed[clip]:
            (a, b), (c, d) = times[clip][place], freqs[clip][place]
            out[a:b, c:d] = batch[partner[clip], a:b, c:d] if alien[clip] else 0
            mask[a:b, c:d] = True
            place += 1
    return corrupted, masks


def random_masking(keys: Tensor, kept: int) -> Tensor:
    """Which of ``keys [S, L]`` are masked: sorted twice, as the masked autoencoders' code does."""
    order = keys.argsort(1)
    restore = order.argsort(1)
    mask = torch.ones_like(keys, dtype=torch.bool)
    mask[:, :kept] = False
    return mask.gather(1, restore)
