"""Which patches of a ragged batch of spectrograms become tokens, and where they sit.

A clip of ``n`` frames is cut into ``f' x t'`` patches; its tokens are listed frequency-major
(token ``f * t' + t``), as in AST (Gong et al., 2021), after any prefix rows (``cls``, ``dist``).
:class:`PatchGrid` is that list for a whole batch, as a table. A token that is dropped or masked
is a row that is not in the table, so what is not there is never computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fastast.segments import Segments, TokenBudget


@dataclass(frozen=True)
class PatchGeometry:
    """How spectrograms are cut into patches. Pairs are ``(frequency, time)``.

    Args:
        num_mels: mel bins of the spectrogram.
        patch_size: of the patch, in mel bins and frames.
        stride: between patches; smaller than ``patch_size`` makes them overlap. Default: no
            overlap.
        prefix: rows before each clip's patches, for class tokens.
        time_pool: frames that are pooled into one before patches are cut, C in From Coarse to Fine
            (section 2.3); the most, where clips differ. ``patch_size`` and ``stride`` count pooled
            frames; frames left over at a clip's end are not used.
        time_pooling: ``"average"`` or ``"max"``.
    """

    num_mels: int = 128
    patch_size: tuple[int, int] = (16, 16)
    stride: tuple[int, int] | None = None
    prefix: int = 0
    time_pool: int = 1
    time_pooling: Literal["average", "max"] = "average"

    def __post_init__(self) -> None:
        object.__setattr__(self, "patch_size", tuple(self.patch_size))
        object.__setattr__(self, "stride", tuple(self.stride or self.patch_size))
        if min(self.patch_size + self.stride) < 1:
            raise ValueError(
                f"patch_size {self.patch_size} and stride {self.stride} must be positive"
            )
        if self.num_mels < self.patch_size[0]:
            raise ValueError(
                f"patch_size[0] ({self.patch_size[0]} mel bins) exceeds num_mels "
                f"({self.num_mels}): use a lower patch or more mel bins"
            )
        if self.time_pool < 1:
            raise ValueError(f"time_pool must be at least 1 frame, got {self.time_pool}")
        if self.time_pooling not in ("average", "max"):
            raise ValueError(f"time_pooling must be 'average' or 'max', got {self.time_pooling!r}")

    @property
    def patch_frames(self) -> int:
        """Frames that a patch covers, before they are pooled."""
        return self.patch_size[1] * self.time_pool

    @property
    def stride_frames(self) -> int:
        """Frames from one patch to the next, before they are pooled."""
        return self.stride[1] * self.time_pool

    def with_patch_size(self, patch_size: tuple[int, int]) -> PatchGeometry:
        """The same spectrograms cut into patches of another size, without overlap (FlexiAST)."""
        return replace(self, patch_size=patch_size, stride=None)

    @property
    def freq_patches(self) -> int:
        """Patches along frequency."""
        return (self.num_mels - self.patch_size[0]) // self.stride[0] + 1

    def time_patches(
        self, frames: int | np.ndarray, pool: np.ndarray | None = None
    ) -> int | np.ndarray:
        """Patches along time of a clip of so many frames; frames left over are not used.

        Args:
            frames: before pooling.
            pool: the clips' pooling, if it is not ``time_pool``.
        """
        pooled = np.asarray(frames) // (self.time_pool if pool is None else pool)
        patches = (pooled - self.patch_size[1]) // self.stride[1] + 1
        patches = np.maximum(patches, 0)
        return int(patches) if np.ndim(frames) == 0 else patches

    def num_tokens(self, frames: int | np.ndarray) -> int | np.ndarray:
        """Rows of the token stream that a clip takes; none if it is shorter than a patch."""
        patches = self.freq_patches * self.time_patches(frames)
        tokens = np.where(patches > 0, patches + self.prefix, 0)
        return int(tokens) if np.ndim(frames) == 0 else tokens

    def min_frames(self, pool: np.ndarray | None = None) -> int | np.ndarray:
        """Frames of the shortest clip that has a token; of each clip, if their pooling is given."""
        return self.patch_frames if pool is None else self.patch_size[1] * pool

    def grid(
        self,
        frames: Segments | Sequence[int],
        budget: TokenBudget | None = None,
        keep: Sequence[np.ndarray] | None = None,
        pool: Sequence[int] | np.ndarray | None = None,
    ) -> PatchGrid:
        """Lists the tokens of a batch. Runs on the host, in the loader.

        Args:
            frames: the frame stream, or the frames of each clip in order.
            budget: fixes the number of token rows and segments.
            keep: for each clip, the sorted indices of the patches that become tokens. Default:
                all.
            pool: for each clip, how many frames are pooled to one. Default: ``time_pool``.

        Raises:
            ValueError: the tokens do not fit the budget, ``keep`` names a patch that the clip does
                not have, or ``pool`` is not in ``1, ..., time_pool``.
        """
        if isinstance(frames, Segments):
            starts = frames.host_offsets.numpy().astype(np.int64)
        else:
            starts = np.concatenate([[0], np.cumsum(np.asarray(frames, np.int64))])
        lengths = np.diff(starts)
        pool = self._pool_of_clips(pool, len(lengths))
        width = self.time_patches(lengths, pool)
        full = self.freq_patches * width
        if keep is None:
            counts = full
            patch = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        else:
            if len(keep) > len(lengths):
                raise ValueError(f"keep has {len(keep)} entries for {len(lengths)} clips")
            keep = [np.asarray(kept, np.int64) for kept in keep]
            keep += [np.zeros(0, np.int64)] * (len(lengths) - len(keep))
            counts = np.array([len(kept) for kept in keep], np.int64)
            for clip, kept in enumerate(keep):
                outside = kept[(kept < 0) | (kept >= full[clip])]
                if len(outside):
                    raise ValueError(
                        f"keep[{clip}] names patch {outside[0]}; the clip has {full[clip]}"
                    )
                if (np.diff(kept) <= 0).any():
                    raise ValueError(f"keep[{clip}] must be sorted, without repeats")
            patch = np.concatenate(keep) if keep else np.zeros(0, np.int64)

        prefix = np.where(counts > 0, self.prefix, 0)
        segments = Segments.from_lengths(counts + prefix, budget)
        rows = budget.tokens if budget else int((counts + prefix).sum())

        # One row of the table per token. What does not apply to a prefix or dead row stays 0.
        table = np.zeros((6, rows), np.int32)
        first_frame, freq, time, clip_width, prefix_id, time_pool = table
        clip = np.repeat(np.arange(len(lengths)), counts)
        begin = segments.host_offsets.numpy()[: len(lengths)]
        row = np.arange(len(patch)) + np.repeat(
            begin + prefix - (np.cumsum(counts) - counts), counts
        )
        freq[row] = patch // width[clip]
        time[row] = patch % width[clip]
        time_pool[row] = pool[clip]
        first_frame[row] = starts[clip] + time[row] * self.stride[1] * time_pool[row]
        clip_width[row] = width[clip]
        prefix_id[:] = -1
        for index in range(self.prefix):
            prefix_id[begin[counts > 0] + index] = index
        return PatchGrid(segments, *(torch.from_numpy(column) for column in table), self)

    def _pool_of_clips(self, pool: Sequence[int] | np.ndarray | None, clips: int) -> np.ndarray:
        if pool is None:
            return np.full(clips, self.time_pool)
        pool = np.asarray(pool, np.int64)
        if len(pool) > clips:
            raise ValueError(f"pool has {len(pool)} entries for {clips} clips")
        if len(pool) and not 1 <= pool.min() <= pool.max() <= self.time_pool:
            raise ValueError(
                f"pool must lie in 1, ..., time_pool ({self.time_pool}), got {pool.min()} to "
                f"{pool.max()}"
            )
        return np.pad(pool, (0, clips - len(pool)), constant_values=self.time_pool)


@dataclass(frozen=True)
class PatchGrid:
    """The token list of a batch. Make one with :meth:`PatchGeometry.grid`.

    Attributes:
        segments: of the token stream, prefix rows included.
        first_frame: int32 ``[rows]``, row of the frame stream where the token's patch begins.
        freq: int32 ``[rows]``, the patch's place along frequency.
        time: int32 ``[rows]``, the patch's place along time.
        clip_width: int32 ``[rows]``, patches along time of the token's clip.
        prefix_id: int32 ``[rows]``, which prefix token the row holds; -1 on patches.
        time_pool: int32 ``[rows]``, frames that are pooled to one of the patch's.
        geometry: how the patches were cut. Traced code is compiled anew for each.
    """

    segments: Segments
    first_frame: Tensor
    freq: Tensor
    time: Tensor
    clip_width: Tensor
    prefix_id: Tensor
    time_pool: Tensor
    geometry: PatchGeometry

    @property
    def num_rows(self) -> int:
        """Rows of the token stream, dead ones included."""
        return self.freq.shape[0]

    def _tables(self) -> tuple[Tensor, ...]:
        return (
            self.first_frame,
            self.freq,
            self.time,
            self.clip_width,
            self.prefix_id,
            self.time_pool,
        )

    def visible(
        self, masked: Tensor, segments: Segments, num_rows: int
    ) -> tuple[PatchGrid, Tensor]:
        """The list without the rows that are masked, for encoding what is left. Waits for nothing.

        Args:
            masked: bool ``[self.num_rows]``, see :mod:`fastast.tokens.masking`.
            segments: of the tokens that are left, prefix rows included. How many those are is known
                beforehand (``mask.num_kept``), so they are made in the loader, where a budget can
                fix their size.
            num_rows: of the new list, dead rows included.

        Returns:
            The shorter list, and int64 ``[num_rows]``: each of its rows' row in this list, or
            ``self.num_rows`` on dead rows.
        """
        kept = self.segments.row_mask(self.num_rows) & ~masked
        # The row that is the n-th to be kept is the first that has n kept ones up to it.
        wanted = torch.arange(1, num_rows + 1, device=kept.device)
        rows = torch.searchsorted(kept.cumsum(0), wanted)
        # A dead row is listed as :meth:`PatchGeometry.grid` lists it.
        dead = dict.fromkeys(("first_frame", "freq", "time", "clip_width", "time_pool"), 0)
        dead["prefix_id"] = -1
        tables = {
            name: F.pad(getattr(self, name), (0, 1), value=value)[rows]
            for name, value in dead.items()
        }
        return PatchGrid(segments, **tables, geometry=self.geometry), rows

    def to(self, device: torch.device | str, non_blocking: bool = False) -> PatchGrid:
        """The same list on another device."""
        return PatchGrid(
            self.segments.to(device, non_blocking),
            *(table.to(device, non_blocking=non_blocking) for table in self._tables()),
            self.geometry,
        )

    def pin_memory(self) -> PatchGrid:
        """Page-locks the tables, so that :meth:`to` can overlap with computation."""
        return PatchGrid(
            self.segments.pin_memory(),
            *(table.pin_memory() for table in self._tables()),
            self.geometry,
        )


def kept_patches(num_patches: int | np.ndarray, drop: float) -> int | np.ndarray:
    """How many patches of a clip survive token dropping: ``int(num_patches * (1 - drop))``, and
    at least one."""
    kept = np.maximum((np.asarray(num_patches) * (1 - drop)).astype(np.int64), 1)
    kept = np.minimum(kept, num_patches)
    return int(kept) if np.ndim(num_patches) == 0 else kept
