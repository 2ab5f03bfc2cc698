r"""Cuts the patches that a :class:`~fastast.tokens.PatchGrid` lists out of a stream of frames.

A patch is :math:`h \times w` bins of the frames after pooling along time by :math:`C`,

.. math::
    y_{t m} = \frac{1}{C} \sum_{c < C} x_{C t + c,\, m} \quad\text{or}\quad
    \max_{c < C} x_{C t + c,\, m}

(temporal compression by pooling: From Coarse to Fine, Feng et al., 2024, section 2.1). Only the
frames of listed patches are read: the table says where each begins, so that a pixel is one address
per pooled frame, whatever the shape, the overlap and the clip's length.

This is plain PyTorch on purpose. A compiler makes one kernel of the gather, the pooling, what comes
before it bin by bin (SpecAugment, noise, normalisation) and the cast after it; an operator of our
own would stand in the way (docs/decisions.md).
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastast.tokens.grid import PatchGeometry, PatchGrid


def patchify(frames: Tensor, grid: PatchGrid, geometry: PatchGeometry) -> Tensor:
    """Gathers the listed patches, each flattened frequency by time like a convolution's kernel.

    Where patches overlap, gradients of the frames are sums, which a GPU adds in any order unless
    ``torch.use_deterministic_algorithms`` asks it not to.

    Args:
        frames: ``[rows, num_mels]``, the frame stream before pooling, floating point.
        grid: which patches; prefix and dead rows yield zeros.
        geometry: patch size, stride and pooling.

    Returns:
        ``[grid.num_rows, patch_freq * patch_time]`` in the dtype of ``frames``.

    Raises:
        ValueError: ``frames`` does not have ``geometry.num_mels`` columns.
    """
    if frames.ndim != 2 or frames.shape[1] != geometry.num_mels:
        raise ValueError(
            f"frames must be [rows, {geometry.num_mels}] (num_mels), got {tuple(frames.shape)}"
        )
    (height, width), (step, _), num_mels = geometry.patch_size, geometry.stride, geometry.num_mels
    if frames.shape[0] < width:  # no clip has a patch
        return frames.new_zeros(grid.num_rows, height * width)
    # 32-bit addresses are faster, and half of the memory.
    index = torch.int32 if frames.numel() < 2**31 else torch.int64
    freq = torch.arange(height, dtype=index, device=frames.device)
    time = torch.arange(width, dtype=index, device=frames.device)
    begin = grid.first_frame.to(index) * num_mels + grid.freq * step  # [tokens]
    bins = frames.flatten()

    def tap(place: Tensor) -> Tensor:
        """The pixels of all patches, at ``place`` frames from their begin: ``[tokens, h * w]``."""
        offset = freq[:, None] + (place * num_mels)[..., None, :]  # [h, w] or [tokens, h, w]
        address = begin[:, None] + offset.flatten(-2)
        if geometry.time_pool > 1:  # taps that a clip does not have may lie past the end
            address.clamp_(max=frames.numel() - 1)
        return bins.index_select(0, address.flatten()).view(grid.num_rows, height * width)

    if geometry.time_pool == 1:
        patches = tap(time)
    else:
        patches = _pooled(tap, time, grid.time_pool, geometry).to(frames.dtype)
    is_patch = grid.segments.row_mask(grid.num_rows) & (grid.prefix_id < 0)
    return patches.masked_fill_(~is_patch[:, None], 0)


def _pooled(tap, time: Tensor, pool: Tensor, geometry: PatchGeometry) -> Tensor:
    """The mean or the largest of each token's ``pool`` taps, of at most ``geometry.time_pool``."""
    largest = geometry.time_pooling == "max"
    place = time * pool[:, None]  # [tokens, w]
    result = None
    for index in range(geometry.time_pool):
        pixels = tap(place + index)
        if not largest:
            pixels = pixels.to(torch.promote_types(pixels.dtype, torch.float32))
        if index:
            absent = (pool <= index)[:, None]
            pixels = pixels.masked_fill(absent, -torch.inf if largest else 0)
            pixels = torch.maximum(result, pixels) if largest else result + pixels
        result = pixels
    return result if largest else result / pool.clamp(min=1)[:, None]
