"""Cuts the patches that a :class:`~fastast.tokens.PatchGrid` lists out of a stream of frames."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastast.tokens.grid import PatchGeometry, PatchGrid


def patchify(frames: Tensor, grid: PatchGrid, geometry: PatchGeometry) -> Tensor:
    """Gathers the listed patches, each flattened frequency by time like a convolution's kernel.

    Args:
        frames: ``[rows, num_mels]``, the frame stream.
        grid: which patches; prefix and dead rows yield zeros.
        geometry: patch size and stride; each patch is pooled along time as it says.

    Returns:
        ``[grid.num_rows, patch_freq * patch_time]`` in the dtype of ``frames``.

    Raises:
        ValueError: ``frames`` does not have ``geometry.num_mels`` columns.
    """
    if frames.ndim != 2 or frames.shape[1] != geometry.num_mels:
        raise ValueError(
            f"frames must be [rows, {geometry.num_mels}] (num_mels), got {tuple(frames.shape)}"
        )
    height, step, width = geometry.patch_size[0], geometry.stride[0], geometry.patch_frames
    # A view of every patch that begins at any frame, [rows, f', height, width]; the gather below
    # is the only copy. Zero frames at the end keep the view legal for streams shorter than a
    # patch.
    frames = F.pad(frames, (0, 0, 0, width))
    patches = frames.unfold(1, height, step).unfold(0, width, 1)
    tokens = patches[grid.first_frame, grid.freq]
    if geometry.time_pool > 1:
        groups = tokens.unflatten(2, (-1, geometry.time_pool))
        tokens = groups.mean(3) if geometry.time_pooling == "average" else groups.amax(3)
    tokens = tokens.flatten(1)
    is_patch = grid.segments.row_mask(grid.num_rows) & (grid.prefix_id < 0)
    return torch.where(is_patch[:, None], tokens, 0)
