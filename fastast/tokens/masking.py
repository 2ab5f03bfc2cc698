r"""Masks over the patches of a ragged batch, drawn on the device that uses them.

A mask is a bool per row of a :class:`~fastast.tokens.PatchGrid`, True where the patch is masked;
prefix and dead rows never are. It serves in two ways: as it is, for embeddings that are replaced
and losses on what is masked; or through :meth:`PatchGrid.visible`, which leaves the masked rows
out. *How many* patches of a clip are kept follows from its size, on the host (``num_kept``);
*which*, from (seed, epoch, clip) alone. So the visible stream's :class:`~fastast.Segments` are made
in the loader, no draw is ever waited for, and a clip is masked alike in whatever batch.

Each kind is a small object that knows both. With :math:`f \times t` patches in a clip,

* :class:`UnstructuredMask` keeps :math:`\lfloor f t (1 - p) \rfloor` patches, uniformly without
  replacement (Audio-MAE, Huang et al., 2022, section 3; MAE, He et al., 2022).
* :class:`StructuredMask` keeps :math:`\lfloor t (1 - p_t) \rfloor` columns and
  :math:`\lfloor f (1 - p_f) \rfloor` rows, and the patches in both (Audio-MAE, figure 2: "time",
  "frequency" and "time+frequency").
* :class:`ClusteredMask` masks :math:`\lfloor f t\, p \rfloor` patches in square clusters (SSAST,
  Gong et al., 2022, algorithm 1).

No loop runs over clips, patches or clusters.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from fastast.random import below, purpose_key, random_bits
from fastast.tokens.cover import cover_rank
from fastast.tokens.grid import PatchGeometry, PatchGrid, kept_patches

_UNSTRUCTURED = purpose_key("token drop")
_TIME = purpose_key("mask time")
_FREQUENCY = purpose_key("mask frequency")
_CLUSTERS = purpose_key("mask clusters")


class Mask(Protocol):
    """A way to mask the patches of a clip."""

    def num_kept(self, freq_patches: int, time_patches: int | np.ndarray) -> int | np.ndarray:
        """Patches that a clip keeps."""
        ...

    def most_times(self, freq_patches: int, kept: int, clips: int) -> int:
        """Bound on the patches along time, masked ones included, that so many clips have together
        if they keep so many patches together."""
        ...

    def __call__(
        self,
        grid: PatchGrid,
        geometry: PatchGeometry,
        clip_ids: Tensor,
        *,
        seed: int,
        epoch: int | Tensor,
    ) -> Tensor:
        """Which rows are masked.

        Args:
            grid: all patches of each clip.
            geometry: of the grid.
            clip_ids: int64 ``[S]``, stable identifiers of the clips; where several views of a clip
                are masked, of the views.
            seed: of the run.
            epoch: of the training.

        Returns:
            bool ``[grid.num_rows]``; False on prefix and dead rows.

        Raises:
            ValueError: ``clip_ids`` of another length or dtype.
        """
        ...


@dataclass(frozen=True)
class UnstructuredMask:
    """Masks patches one by one.

    Args:
        ratio: share of the patches that is masked, in [0, 1). Audio-MAE pre-trains with 0.8: of
            512 patches 102 are kept. At least one always is.
    """

    ratio: float

    def __post_init__(self) -> None:
        _check_ratio("ratio", self.ratio)

    def num_kept(self, freq_patches: int, time_patches: int | np.ndarray) -> int | np.ndarray:
        """``floor(patches * (1 - ratio))``, at least one."""
        return kept_patches(freq_patches * time_patches, self.ratio)

    def most_times(self, freq_patches: int, kept: int, clips: int) -> int:
        """See :class:`Mask`. A clip keeps more than ``patches * (1 - ratio) - 1``."""
        return math.ceil((kept + clips) / (1 - self.ratio)) // freq_patches

    def __call__(
        self,
        grid: PatchGrid,
        geometry: PatchGeometry,
        clip_ids: Tensor,
        *,
        seed: int,
        epoch: int | Tensor,
    ) -> Tensor:
        """See :class:`Mask`."""
        clips = _Clips(grid, geometry, clip_ids)
        bits = random_bits(seed, epoch, clip_ids, _UNSTRUCTURED, clips.freq * clips.max_width)
        kept = _smallest(bits, clips.freq * clips.width, self.ratio)
        return clips.masked(~kept, grid.freq * grid.clip_width + grid.time)


@dataclass(frozen=True)
class StructuredMask:
    """Masks whole columns (all patches of a time) and whole rows (all of a frequency).

    Args:
        time_ratio: share of the columns that is masked, in [0, 1); 0 masks frequencies alone.
        freq_ratio: share of the rows; 0 masks times alone. Audio-MAE fine-tunes with 0.3 and 0.3:
            of 64 x 8 patches 44 x 5 are kept. (Its scripts say 0.2 and 0.2: 51 x 6.) At least one
            column and one row always are.
    """

    time_ratio: float = 0.0
    freq_ratio: float = 0.0

    def __post_init__(self) -> None:
        _check_ratio("time_ratio", self.time_ratio)
        _check_ratio("freq_ratio", self.freq_ratio)

    def num_kept(self, freq_patches: int, time_patches: int | np.ndarray) -> int | np.ndarray:
        """Kept rows times kept columns."""
        rows = kept_patches(freq_patches, self.freq_ratio)
        return rows * kept_patches(time_patches, self.time_ratio)

    def most_times(self, freq_patches: int, kept: int, clips: int) -> int:
        """See :class:`Mask`. A clip keeps more than ``times * (1 - time_ratio) - 1`` columns."""
        columns = kept // kept_patches(freq_patches, self.freq_ratio)
        return math.ceil((columns + clips) / (1 - self.time_ratio))

    def __call__(
        self,
        grid: PatchGrid,
        geometry: PatchGeometry,
        clip_ids: Tensor,
        *,
        seed: int,
        epoch: int | Tensor,
    ) -> Tensor:
        """See :class:`Mask`."""
        clips = _Clips(grid, geometry, clip_ids)
        times = random_bits(seed, epoch, clip_ids, _TIME, clips.max_width)
        freqs = random_bits(seed, epoch, clip_ids, _FREQUENCY, clips.freq)
        in_time = _smallest(times, clips.width, self.time_ratio)
        in_freq = _smallest(freqs, torch.full_like(clips.width, clips.freq), self.freq_ratio)
        return clips.masked(~in_time, grid.time) | clips.masked(~in_freq, grid.freq)


@dataclass(frozen=True)
class ClusteredMask:
    """Masks squares of patches, one after the other, until enough are masked.

    The paper draws the side of a clip's squares uniformly from 3, 4 and 5, and a square's centre
    uniformly from the patches; squares end at the clip's edges. Of the last square, only what is
    needed is masked. Its published code differs: the draw is a square's first corner, columns past
    the end go on in the next row, patch 0 is never masked, and of all that was covered, the last
    patches in order are left unmasked, which are those of the highest frequencies.

    Args:
        ratio: share of the patches that is masked, in [0, 1): ``floor(patches * ratio)``. SSAST:
            400 / 512. At least one patch always is kept.
        sizes: smallest and largest side of the squares.
        as_code: do as the published code does.
    """

    ratio: float = 400 / 512
    sizes: tuple[int, int] = (3, 5)
    as_code: bool = False

    def __post_init__(self) -> None:
        _check_ratio("ratio", self.ratio)
        if not 1 <= self.sizes[0] <= self.sizes[1]:
            raise ValueError(f"sizes must be a positive range, got {self.sizes}")

    def num_kept(self, freq_patches: int, time_patches: int | np.ndarray) -> int | np.ndarray:
        """Patches less ``floor(patches * ratio)``."""
        patches = np.asarray(freq_patches * time_patches)
        masked = np.floor(patches * self.ratio).astype(np.int64)
        masked = np.minimum(masked, np.maximum(patches - 1, 0))
        kept = patches - masked
        return int(kept) if kept.ndim == 0 else kept

    def most_times(self, freq_patches: int, kept: int, clips: int) -> int:
        """See :class:`Mask`. A clip keeps ``patches * (1 - ratio)`` at least."""
        return math.ceil(kept / (1 - self.ratio)) // freq_patches

    def __call__(
        self,
        grid: PatchGrid,
        geometry: PatchGeometry,
        clip_ids: Tensor,
        *,
        seed: int,
        epoch: int | Tensor,
    ) -> Tensor:
        """See :class:`Mask`."""
        clips = _Clips(grid, geometry, clip_ids)
        width, most = clips.width, clips.freq * clips.max_width
        patches = clips.freq * width
        bits = random_bits(seed, epoch, clip_ids, _CLUSTERS, 1 + self._num_clusters(most))
        side = self.sizes[0] + below(bits[:, :1], self.sizes[1] - self.sizes[0] + 1)
        start = below(bits[:, 1:], patches[:, None])
        freq, time = start // width.clamp(min=1)[:, None], start % width.clamp(min=1)[:, None]
        size = (clips.freq, clips.max_width)
        width = width[:, None]
        if self.as_code:
            corner = (freq, freq + side), (time, width.minimum(time + side))
            rank, last = cover_rank(*corner, size)
            rest = (torch.zeros_like(time), width.minimum(time + side - width))
            rank = torch.maximum(rank, cover_rank((freq + 1, freq + 1 + side), rest, size)[0])
            rank[:, 0, 0] = 0
        else:
            freq, time = freq - (side - 1) // 2, time - (side - 1) // 2
            square = (freq, freq + side), (time, width.minimum(time + side))
            rank, last = cover_rank(*square, size)
        # In the order of their covers, and within a cover in the order of the patches. What is
        # never covered comes last; what is no patch of the clip, never.
        turn = last - rank.flatten(1).long()
        place = torch.arange(most, device=turn.device)
        valid = place % clips.max_width < width
        order = torch.where(valid, turn * most + place, torch.iinfo(torch.int64).max)
        masked = (patches.double() * self.ratio).long().minimum((patches - 1).clamp(min=0))
        ranked = order.sort(1).values
        if self.as_code:
            # It stops when *more* than enough are covered.
            final = ranked.gather(1, masked[:, None].clamp(max=most - 1)) // most
            covered = (turn <= final) & valid
            chosen = covered & (covered.cumsum(1) <= masked[:, None])
        else:
            final = ranked.gather(1, (masked - 1).clamp(min=0)[:, None])
            chosen = (order <= final) & (masked[:, None] > 0)
        return clips.masked(chosen, grid.freq * clips.max_width + grid.time)

    def _num_clusters(self, patches: int) -> int:
        """Clusters to draw: more than twice as many of the smallest as cover the share on average,
        if each patch is missed by each with the same probability."""
        covering = -math.log1p(-self.ratio) * patches / self.sizes[0] ** 2
        return 8 + math.ceil(2.5 * covering)


def kept_lists(
    mask: Mask,
    geometry: PatchGeometry,
    time_patches: Sequence[int] | np.ndarray,
    clip_ids: Sequence[int] | np.ndarray,
    *,
    seed: int,
    epoch: int,
) -> list[np.ndarray]:
    """What a mask leaves of clips, as the ``keep`` of :meth:`PatchGeometry.grid`: for dropping
    tokens in the loader.

    Args:
        mask: which patches are dropped.
        geometry: of the patches.
        time_patches: of each clip, along time.
        clip_ids: of the clips.
        seed, epoch: the other keys of the draws.

    Returns:
        For each clip, the sorted indices of its patches that are kept.
    """
    # Only places matter here, so any frames with such patches will do.
    plain = PatchGeometry(geometry.num_mels, geometry.patch_size, geometry.stride)
    width = np.asarray(time_patches, np.int64)
    frames = np.where(width > 0, (width - 1) * plain.stride[1] + plain.patch_size[1], 0)
    grid = plain.grid(frames)
    ids = torch.from_numpy(np.asarray(clip_ids, np.int64))
    kept = ~mask(grid, plain, ids, seed=seed, epoch=epoch).numpy()
    offsets = grid.segments.host_offsets.tolist()
    return [kept[a:b].nonzero()[0] for a, b in zip(offsets[:-1], offsets[1:], strict=True)]


def _check_ratio(name: str, ratio: float) -> None:
    if not 0 <= ratio < 1:
        raise ValueError(f"{name} must lie in [0, 1), got {ratio}")


class _Clips:
    """The clips behind a grid: ``[S, ...]`` tables of their patches, and the way back to rows."""

    def __init__(self, grid: PatchGrid, geometry: PatchGeometry, clip_ids: Tensor) -> None:
        segments = grid.segments
        if clip_ids.dtype != torch.int64 or clip_ids.shape != (segments.num_segments,):
            raise ValueError(
                f"clip_ids must be torch.int64 of shape [{segments.num_segments}], one per clip, "
                f"got {clip_ids.dtype} of shape {list(clip_ids.shape)}"
            )
        self.freq = geometry.freq_patches
        self.max_width = max(1, segments.max_length // self.freq)
        # Every row of a clip but its prefix knows the clip's width; the last one is a patch.
        last = (segments.offsets[1:] - 1).clamp(min=0)
        widths = torch.cat([grid.clip_width, grid.clip_width.new_zeros(1)])
        self.width = torch.where(segments.lengths > 0, widths[last], 0).long()
        self.clip = segments.row_ids(grid.num_rows).clamp(max=max(segments.num_segments - 1, 0))
        self.is_patch = segments.row_mask(grid.num_rows) & (grid.prefix_id < 0)

    def masked(self, table: Tensor, place: Tensor) -> Tensor:
        """Each row's entry of ``table [S, places]``; False where the row is no patch."""
        return table[self.clip, torch.where(self.is_patch, place, 0)] & self.is_patch


def _smallest(bits: Tensor, size: Tensor, drop: float) -> Tensor:
    """Which of the first ``size [S]`` numbers of ``bits [S, N]`` are kept: the smallest, as many as
    :func:`kept_patches` says."""
    exists = torch.arange(bits.shape[1], device=bits.device) < size[:, None]
    bits = torch.where(exists, bits, torch.iinfo(torch.int64).max)
    kept = (size.double() * (1 - drop)).long().clamp(min=1).minimum(size)
    limit = bits.sort(1).values.gather(1, (kept - 1).clamp(min=0)[:, None])
    return (bits <= limit) & exists
