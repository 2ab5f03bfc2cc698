"""Geometry of a packed stream: where each clip begins, and nothing else.

A batch is one flat stream of rows (audio frames or tokens), clip after clip, without padding
between them::

    rows      0         5    7              14   16 = capacity
              |  clip 0 |c 1 |    clip 2    |dead|
    offsets  [0,        5,   7,             14]

:class:`Segments` holds the offsets, :class:`Spectrograms` a stream of mel frames with its
offsets, and :class:`TokenBudget` fixes the sizes so that one compiled or captured graph serves
every batch.

Two rules that everything above relies on:

*Tensors only.* What a traced function sees of a ``Segments`` is tensors plus one bound that
takes few values. Ragged batches of one budget then compile once; lengths held as Python integers
would compile anew for almost every batch.

*Capacity.* A stream may have more rows than its clips fill. Every operation writes zeros to those
dead rows, forward and backward, whatever its input holds there. Empty segments are legal
anywhere, and yield zeros.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

TILE_ROWS = 64
"""Rows of a tile in :attr:`Segments.tiles`: the unit of work of a tiled GPU kernel."""


@dataclass(frozen=True)
class TokenBudget:
    """The fixed sizes of a packed stream.

    Args:
        tokens: rows of the stream, dead ones included.
        clips: number of segments, empty ones included.
        max_length: rows of the longest segment that is admitted.
    """

    tokens: int
    clips: int
    max_length: int

    def __post_init__(self) -> None:
        for name in ("tokens", "clips", "max_length"):
            value = getattr(self, name)
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if self.max_length > self.tokens:
            raise ValueError(
                f"max_length ({self.max_length}) exceeds tokens ({self.tokens}): "
                "the longest clip would not fit; raise tokens or lower max_length"
            )


@dataclass(frozen=True)
class Segments:
    """Offsets of the clips in a packed stream. Make one with :meth:`from_lengths`.

    Attributes:
        offsets: int32 ``[S + 1]`` on the stream's device; clip ``i`` owns rows
            ``offsets[i]:offsets[i + 1]``.
        host_offsets: the same on the CPU. CPU implementations read it; GPU ones never do, so no
            layer waits for the device.
        tiles: int32 ``[T, 4]`` on the device, the work list of tiled kernels. Row
            ``(begin, end, first_key, last_key)`` says: write rows ``begin:end``, which attend to
            rows ``first_key:last_key``. Together the tiles cover every row of the stream exactly
            once; dead rows have no keys (so zeros are written), and surplus tiles have no rows.
        max_length: bound on the rows of a segment: the budget's, else the next power of two. It
            selects kernels, and takes few values so that it costs few recompilations.
    """

    offsets: Tensor
    host_offsets: Tensor
    tiles: Tensor
    max_length: int

    @classmethod
    def from_lengths(
        cls,
        lengths: Sequence[int] | np.ndarray | Tensor,
        budget: TokenBudget | None = None,
    ) -> Segments:
        """Lays clips of the given lengths end to end. Runs on the host, in the loader.

        Args:
            lengths: rows of each clip; zeros are legal.
            budget: pads the geometry (not the clips) to fixed sizes. Without one the stream has
                exactly ``sum(lengths)`` rows.

        Raises:
            ValueError: a negative length, or clips that do not fit the budget.
        """
        if isinstance(lengths, Tensor):
            lengths = lengths.cpu().numpy()
        lengths = np.asarray(lengths)
        if lengths.ndim != 1 or (lengths.size and not np.issubdtype(lengths.dtype, np.integer)):
            raise ValueError(
                f"lengths must be a flat list of integers, got {lengths.dtype} "
                f"of shape {lengths.shape}"
            )
        lengths = lengths.astype(np.int64)
        if (lengths < 0).any():
            raise ValueError(f"lengths must not be negative, got {lengths.min()}")
        total, longest = int(lengths.sum()), int(lengths.max(initial=0))
        if total > np.iinfo(np.int32).max:
            raise ValueError(f"lengths add up to {total} rows; a stream holds fewer than 2**31")

        if budget is None:
            capacity, max_length = total, max(16, 1 << (longest - 1).bit_length())
        else:
            for name, used, limit in (
                ("tokens", total, budget.tokens),
                ("clips", len(lengths), budget.clips),
                ("max_length", longest, budget.max_length),
            ):
                if used > limit:
                    raise ValueError(
                        f"the batch needs {name}={used} but the budget allows {limit}; "
                        f"raise TokenBudget.{name} or put fewer clips into a batch"
                    )
            capacity, max_length = budget.tokens, budget.max_length
            lengths = np.pad(lengths, (0, budget.clips - len(lengths)))

        offsets = np.zeros(len(lengths) + 1, np.int32)
        np.cumsum(lengths, out=offsets[1:])
        host_offsets = torch.from_numpy(offsets)
        # Clips that begin within a tile cost one tile more each: the most that a budget can need.
        # Without one, at least two: a compiler specialises on sizes of 0 and 1.
        num_tiles = 2 if budget is None else -(-capacity // TILE_ROWS) + len(lengths) + 1
        tiles = torch.from_numpy(_tile_table(offsets, capacity, num_tiles))
        return cls(host_offsets.clone(), host_offsets, tiles, max_length)

    @property
    def num_segments(self) -> int:
        """Segments, the empty ones of a budget included."""
        return self.offsets.shape[0] - 1

    @property
    def lengths(self) -> Tensor:
        """Rows of each segment: int32 ``[S]`` on the device."""
        return self.offsets.diff()

    def row_ids(self, num_rows: int) -> Tensor:
        """Segment of each of the stream's rows: int64 ``[num_rows]``; ``S`` on dead rows."""
        rows = torch.arange(num_rows, device=self.offsets.device, dtype=torch.int32)
        return torch.searchsorted(self.offsets, rows, right=True) - 1

    def row_mask(self, num_rows: int) -> Tensor:
        """True on the rows that belong to a clip: bool ``[num_rows]``."""
        rows = torch.arange(num_rows, device=self.offsets.device, dtype=torch.int32)
        return rows < self.offsets[-1]

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Segments:
        """The same geometry on another device; ``host_offsets`` stays on the CPU."""
        return Segments(
            self.offsets.to(device, non_blocking=non_blocking),
            self.host_offsets,
            self.tiles.to(device, non_blocking=non_blocking),
            self.max_length,
        )

    def pin_memory(self) -> Segments:
        """Page-locks the device tables, so that :meth:`to` can overlap with computation."""
        return Segments(
            self.offsets.pin_memory(), self.host_offsets, self.tiles.pin_memory(), self.max_length
        )


def _tile_table(offsets: np.ndarray, capacity: int, num_tiles: int) -> np.ndarray:
    """The rows of :attr:`Segments.tiles`, padded with empty tiles to at least ``num_tiles``."""
    # The dead rows are one more segment, whose tiles attend to nothing.
    begins = np.append(offsets[:-1], offsets[-1]).astype(np.int64)
    ends = np.append(offsets[1:], capacity).astype(np.int64)
    counts = -(-(ends - begins) // TILE_ROWS)
    owner = np.repeat(np.arange(len(begins)), counts)
    rank = np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts)
    table = np.zeros((max(len(owner), num_tiles), 4), np.int32)
    used = table[: len(owner)]
    used[:, 0] = begins[owner] + rank * TILE_ROWS
    used[:, 1] = np.minimum(used[:, 0] + TILE_ROWS, ends[owner])
    alive = owner < len(begins) - 1
    used[:, 2] = np.where(alive, begins[owner], 0)
    used[:, 3] = np.where(alive, ends[owner], 0)
    return table


@dataclass(frozen=True)
class Spectrograms:
    """Mel spectrograms of any lengths in one stream.

    Attributes:
        frames: ``[rows, num_mels]``, the clips' frames end to end.
        segments: where each clip begins.
    """

    frames: Tensor
    segments: Segments

    @classmethod
    def from_list(cls, clips: Sequence[Tensor]) -> Spectrograms:
        """Packs spectrograms ``[T_i, num_mels]`` of one dtype and device.

        Raises:
            ValueError: no clips, or clips that differ in ``num_mels``.
        """
        if len(clips) == 0:
            raise ValueError("clips is empty: pass at least one [frames, num_mels] tensor")
        shapes = [tuple(clip.shape) for clip in clips]
        if any(len(shape) != 2 or shape[1] != shapes[0][1] for shape in shapes):
            raise ValueError(f"clips must be [frames, num_mels] with one num_mels, got {shapes}")
        segments = Segments.from_lengths([shape[0] for shape in shapes])
        return cls(torch.cat(list(clips)), segments.to(clips[0].device))

    @classmethod
    def from_dense(cls, batch: Tensor) -> Spectrograms:
        """The stream of a dense batch ``[B, T, num_mels]``: B segments of T frames each."""
        if batch.ndim != 3:
            raise ValueError(f"batch must be [clips, frames, num_mels], got {tuple(batch.shape)}")
        clips, length, _ = batch.shape
        segments = Segments.from_lengths([length] * clips)
        return cls(batch.flatten(0, 1), segments.to(batch.device))

    def unpack(self) -> list[Tensor]:
        """The clips again, as views ``[T_i, num_mels]``."""
        offsets = self.segments.host_offsets.tolist()
        return [self.frames[a:b] for a, b in zip(offsets[:-1], offsets[1:], strict=True)]

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Spectrograms:
        """The same spectrograms on another device."""
        return Spectrograms(
            self.frames.to(device, non_blocking=non_blocking),
            self.segments.to(device, non_blocking),
        )
