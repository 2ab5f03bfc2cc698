"""Spectrograms folded into images: chunks of time stacked along frequency (HTS-AT).

Chen et al., "HTS-AT: A Hierarchical Token-Semantic Audio Transformer for Sound Classification and
Detection", ICASSP 2022, section 2.1. A clip is cut into chunks of ``w`` frames, and the image has
one below the other, each with mel bins as rows and frames as columns::

    frames   0 ........ w ........ 2w ....... 3w              image   mel |  0 .. w   |
            |  chunk 0  |  chunk 1  |  chunk 2  |     ->              mel |  w .. 2w  |
                                                                      mel | 2w .. 3w  |

so that windows of a square patch grid hold as much frequency as time. HTS-AT's image has four
chunks of 256 frames by 64 mel bins, ten seconds; here each clip has as many chunks as it needs.
All images are as wide as a chunk, so a batch of them is one tall image, in which merging patches
two by two is a change of view, and only windows (:mod:`fastast.ops.window_grids`) must know where a
clip ends.

The last chunk is filled up with zeros, which HTS-AT's paper does; or the clip is stretched to fill
it by cubic interpolation, which its code does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fastast.ops.window_grids import WindowBudget, WindowGrids
from fastast.segments import Segments, TokenBudget
from fastast.tokens.grid import PatchGeometry

CUBIC = -0.75
"""The free parameter of cubic interpolation (Keys, 1981), as PyTorch has it."""


@dataclass(frozen=True)
class FoldGeometry(PatchGeometry):
    """How spectrograms are folded, cut into patches and merged, stage by stage.

    Pairs are ``(frequency, time)``. Patches do not overlap.

    Args:
        num_mels: mel bins of the spectrogram.
        patch_size: of the patch, in mel bins and frames.
        chunk_frames: frames of a chunk.
        windows: patches along the side of a window, for each stage; every stage but the first
            begins by merging patches two by two.
        stretch_to: chunks that clips are stretched to; longer ones are stretched to the next whole
            chunk. Default: 0, they are filled up with zeros instead.

    Raises:
        ValueError: patches that do not fill a chunk, or an odd number of them before a merging.
    """

    chunk_frames: int = 256
    windows: tuple[int, ...] = (8, 8, 8, 8)
    stretch_to: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.stride != self.patch_size or self.prefix or self.time_pool > 1:
            raise ValueError(
                "a folded spectrogram has patches that do not overlap, no prefix and no time_pool"
            )
        merged = 2 ** (len(self.windows) - 1)
        for name, size, patch in (
            ("num_mels", self.num_mels, self.patch_size[0]),
            ("chunk_frames", self.chunk_frames, self.patch_size[1]),
        ):
            if size % (patch * merged):
                raise ValueError(
                    f"{name} ({size}) must be a multiple of {patch * merged}: patches of {patch} "
                    f"merged over {len(self.windows)} stages"
                )

    @property
    def chunk_patches(self) -> tuple[int, int]:
        """Patches of a chunk, along frequency and time."""
        return self.freq_patches, self.chunk_frames // self.patch_size[1]

    def chunks(self, frames: int | np.ndarray) -> int | np.ndarray:
        """Chunks of a clip of so many frames."""
        frames = np.asarray(frames)
        filled = np.maximum(-(-frames // self.chunk_frames), self.stretch_to)
        chunks = np.where(frames > 0, filled, 0)
        return int(chunks) if chunks.ndim == 0 else chunks

    def time_patches(self, frames: int | np.ndarray, pool: None = None) -> int | np.ndarray:
        """Patches along time of a clip of so many frames, all of its chunks together."""
        return self.chunks(frames) * self.chunk_patches[1]

    def min_frames(self, pool: None = None) -> int:
        """Frames of the shortest clip that has a token."""
        return 1

    def stage_sizes(self, chunks: np.ndarray) -> list[np.ndarray]:
        """Height and width of patch grids of so many chunks, ``[clips, 2]``, for each stage."""
        height, width = self.chunk_patches
        return [
            np.stack([chunks * (height >> stage), (chunks > 0) * (width >> stage)], 1)
            for stage in range(len(self.windows))
        ]

    def grid(
        self,
        frames: Segments | Sequence[int],
        budget: TokenBudget | None = None,
        keep: Sequence[np.ndarray] | None = None,
        pool: None = None,
    ) -> FoldGrid:
        """Lays out the folded batch. Runs on the host, in the loader.

        Args:
            frames: the frame stream, or the frames of each clip in order.
            budget: fixes all sizes.
            keep: must be None: an image has all of its patches.
            pool: must be None: its frames are as they are.

        Raises:
            ValueError: the tokens do not fit the budget, patches are to be dropped, or frames to be
                pooled.
        """
        if keep is not None or pool is not None:
            raise ValueError(
                "a folded spectrogram keeps all of its frames and patches: drop no tokens, and "
                "pool nothing"
            )
        if isinstance(frames, Segments):
            starts = frames.host_offsets.numpy().astype(np.int64)
        else:
            starts = np.concatenate([[0], np.cumsum(np.asarray(frames, np.int64))])
        lengths = np.diff(starts)
        chunks = np.atleast_1d(self.chunks(lengths))
        height, width = self.chunk_patches
        segments = Segments.from_lengths(chunks * height * width, budget)
        count = budget.tokens // (height * width) if budget else int(chunks.sum())
        source, weight = self._taps(starts[:-1], lengths, chunks, count)
        rows = np.full(count * height * width, segments.num_segments, np.int32)
        used = int(segments.host_offsets[-1])
        rows[:used] = np.repeat(np.arange(len(lengths)), chunks * height * width)
        last = width >> (len(self.windows) - 1)
        return FoldGrid(
            segments,
            Segments.from_lengths(
                chunks * last,
                budget
                and TokenBudget(
                    max(count * last, 1),
                    budget.clips,
                    max(budget.max_length // (height * width) * last, 1),
                ),
            ),
            torch.from_numpy(rows),
            torch.from_numpy(source),
            None if weight is None else torch.from_numpy(weight),
            self._windows(chunks, budget, count),
            self,
        )

    def _taps(
        self, starts: np.ndarray, lengths: np.ndarray, chunks: np.ndarray, count: int
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """Which rows of the frame stream make each frame of the chunks, and with which weights.

        Returns:
            int32 ``[count * chunk_frames, taps]``, -1 for nothing; float32 of the same shape, or
            None where each frame is taken as it is.
        """
        filled = chunks * self.chunk_frames
        clip = np.repeat(np.arange(len(lengths)), filled)
        place = np.arange(len(clip)) - np.repeat(np.cumsum(filled) - filled, filled)
        taps = 4 if self.stretch_to else 1
        source = np.full((count * self.chunk_frames, taps), -1, np.int32)
        if not self.stretch_to:
            inside = place < lengths[clip]
            source[: len(clip), 0] = np.where(inside, starts[clip] + place, -1)
            return source, None
        # The first and last frames stay where they are ("aligned corners").
        spot = place * (lengths[clip] - 1) / np.maximum(filled[clip] - 1, 1)
        first = np.floor(spot).astype(np.int64)
        part = spot - first
        near = first[:, None] + np.arange(-1, 3)
        near = np.clip(near, 0, lengths[clip, None] - 1)
        source[: len(clip)] = starts[clip, None] + near
        weight = np.zeros(source.shape, np.float32)
        weight[: len(clip)] = _cubic(np.abs(part[:, None] - np.arange(-1, 3)))
        return source, weight

    def _windows(
        self, chunks: np.ndarray, budget: TokenBudget | None, count: int
    ) -> tuple[tuple[WindowGrids, WindowGrids], ...]:
        stages = []
        for stage, (window, sizes) in enumerate(
            zip(self.windows, self.stage_sizes(chunks), strict=True)
        ):
            limit = None
            if budget is not None:
                height, width = (size >> stage for size in self.chunk_patches)
                # A displaced window grid has a cell more along each axis, cut at the edge.
                cells = count * height // window + 2 * min(budget.clips, count)
                most = cells * (-(-width // window) + 1)
                limit = WindowBudget(max(count * height * width, 1), max(most, 1))
            stages.append(
                tuple(
                    WindowGrids.from_sizes(sizes, window, shift, limit)
                    for shift in (0, window // 2)
                )
            )
        return tuple(stages)


def _cubic(distance: np.ndarray) -> np.ndarray:
    """Weights of cubic interpolation at distances in [0, 2]."""
    d, a = distance, CUBIC
    near = ((a + 2) * d - (a + 3)) * d * d + 1
    far = a * (((d - 5) * d + 8) * d - 4)
    return np.where(d <= 1, near, far)


@dataclass(frozen=True)
class FoldGrid:
    """A batch of folded spectrograms. Make one with :meth:`FoldGeometry.grid`.

    Attributes:
        segments: of the stream of patches; within a clip they lie row by row of its image.
        columns: of the stream of columns of the last stage, in order of time: as many for each
            chunk as the last stage's grid is wide.
        clip: int32 ``[rows]``, the segment of each patch; their number on dead rows.
        source: int32 ``[frames, taps]``, rows of the frame stream that make each frame of the
            chunks; -1 for zeros.
        weight: float32 ``[frames, taps]``, their shares; None where there is one tap.
        windows: of each stage, as they are and displaced by half a window.
        geometry: that made it.
    """

    segments: Segments
    columns: Segments
    clip: Tensor
    source: Tensor
    weight: Tensor | None
    windows: tuple[tuple[WindowGrids, WindowGrids], ...]
    geometry: FoldGeometry

    @property
    def num_rows(self) -> int:
        """Rows of the stream of patches, dead ones included."""
        return self.clip.shape[0]

    def to(self, device: torch.device | str, non_blocking: bool = False) -> FoldGrid:
        """The same layout on another device."""
        return self._map(lambda x: x.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> FoldGrid:
        """Page-locks the tables, so that :meth:`to` can overlap with computation."""
        return self._map(lambda x: x.pin_memory())

    def _map(self, change: Callable[[Any], Any]) -> FoldGrid:
        weight = self.weight
        return replace(
            self,
            segments=change(self.segments),
            columns=change(self.columns),
            clip=change(self.clip),
            source=change(self.source),
            weight=None if weight is None else change(weight),
            windows=tuple(tuple(change(grids) for grids in stage) for stage in self.windows),
        )


def fold_frames(frames: Tensor, grid: FoldGrid) -> Tensor:
    """The frames of the chunks, end to end; zeros where a clip has none.

    Args:
        frames: ``[rows, num_mels]``, the frame stream. Rows that no clip has are never used.
        grid: of the batch.

    Returns:
        ``[chunks * chunk_frames, num_mels]`` in the dtype of ``frames``.
    """
    # F.embedding rather than indexing: its eager backward is deterministic on every device.
    taps = F.embedding(grid.source.clamp(min=0), frames)
    taps = torch.where((grid.source >= 0)[..., None], taps, 0)
    if grid.weight is None:
        return taps.squeeze(1)
    return (taps * grid.weight.to(taps.dtype)[..., None]).sum(1)


def fold_patches(frames: Tensor, grid: FoldGrid) -> Tensor:
    """The patches of the images, each flattened frequency by time like a convolution's kernel.

    Args:
        frames: ``[rows, num_mels]``, the frame stream.
        grid: of the batch.

    Returns:
        ``[grid.num_rows, patch_freq * patch_time]`` in the dtype of ``frames``.

    Raises:
        ValueError: ``frames`` does not have ``grid.geometry.num_mels`` columns.
    """
    geometry = grid.geometry
    if frames.ndim != 2 or frames.shape[1] != geometry.num_mels:
        raise ValueError(
            f"frames must be [rows, {geometry.num_mels}] (num_mels), got {tuple(frames.shape)}"
        )
    (height, width), (high, wide) = geometry.chunk_patches, geometry.patch_size
    chunks = fold_frames(frames, grid).view(-1, width, wide, height, high)
    return chunks.permute(0, 3, 1, 4, 2).reshape(-1, high * wide)
