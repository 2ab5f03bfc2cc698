"""Windows over the patch grids of a ragged batch, each described by four numbers.

The tokens of a clip are its patch grid of ``height x width``, row-major: token ``y * width + x``.
(Here rows are frequencies; in Audio-MAE's published code they are times.)
A window grid with cells of ``window x window`` patches, displaced by ``shift``, cuts it; cells that
reach past the clip's edge are clipped::

    height 6, width 10, window 4, shift (2, 2)

        x  0 1  2 3 4 5  6 7 8 9
    y 0,1  ┌──┐┌───────┐┌───────┐      9 windows of 2 x 2, 2 x 4, 4 x 2 and 4 x 4 patches; the
      2-5  │  ││       ││       │      one at y = 2, x = 6 begins at row 2 * 10 + 6 of the clip,
           └──┘└───────┘└───────┘      and its next row of patches lies 10 rows further on

Swin (Liu et al., 2021, section 3.2) reaches the same windows by rolling the grid and masking what
rolled over. Where the window divides the grid the two are equal; this one is defined for all sizes.

As in Swin's code, an axis that a single window covers is not displaced: cutting it would connect
nothing. That is decided for each clip, so that a clip's windows do not depend on its batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class WindowBudget:
    """The fixed sizes of windows over a packed stream.

    Args:
        tokens: rows of the stream, dead ones included.
        windows: number of windows, empty ones included.
    """

    tokens: int
    windows: int

    def __post_init__(self) -> None:
        for name in ("tokens", "windows"):
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")


@dataclass(frozen=True)
class WindowGrids:
    """The windows of a batch. Make one with :meth:`from_sizes`.

    Attributes:
        windows: int32 ``[num_windows + 1, 4]`` on the stream's device. Row ``(row, pitch, height,
            width)`` says: the window's patch ``(y, x)`` is row ``row + y * pitch + x`` of the
            stream. Every row that belongs to a clip is in exactly one window; windows of one shape
            are neighbours, the largest first. Surplus windows have no patches, and neither has the
            last, which begins where the clips end: from there on rows are dead.
        host_windows: the same on the CPU. CPU implementations read it; GPU ones never do.
        window: patches along the side of a whole window.
    """

    windows: Tensor
    host_windows: Tensor
    window: int

    @classmethod
    def from_sizes(
        cls,
        sizes: Sequence[tuple[int, int]] | np.ndarray,
        window: int,
        shift: int | tuple[int, int] = 0,
        budget: WindowBudget | None = None,
    ) -> WindowGrids:
        """Cuts the clips' patch grids into windows. Runs on the host, in the loader.

        Args:
            sizes: ``(height, width)`` of each clip's grid; a clip may be empty.
            window: patches along the side of a window.
            shift: by which the window grid is displaced along height and width, less than
                ``window``. One number for both. (Swin: ``window // 2`` in every second block;
                Audio-MAE's code, along time alone: ``(0, 2)``.)
            budget: pads the table (not the clips) to a fixed size.

        Raises:
            ValueError: sizes that are no pairs or negative, a window or shift out of range, or
                clips that do not fit the budget.
        """
        grids = np.asarray(sizes)
        if grids.size == 0:
            grids = np.zeros((0, 2), np.int64)
        if grids.ndim != 2 or grids.shape[1] != 2 or grids.dtype.kind not in "iu":
            raise ValueError(
                f"sizes must be (height, width) pairs of integers, got {grids.dtype} of shape "
                f"{grids.shape}"
            )
        grids = grids.astype(np.int64)
        if (grids < 0).any():
            raise ValueError(f"sizes must not be negative, got {grids.min()}")
        if window < 1:
            raise ValueError(f"window must be at least 1, got {window}")
        shifts = (shift, shift) if isinstance(shift, int) else tuple(shift)
        if len(shifts) != 2 or not all(0 <= s < window for s in shifts):
            raise ValueError(
                f"shift must be one or two numbers from 0 to {window - 1}, got {shift}"
            )

        lengths = grids.prod(1)
        used = int(lengths.sum())
        if used > np.iinfo(np.int32).max:
            raise ValueError(f"sizes add up to {used} rows; a stream holds fewer than 2**31")
        table = _windows_of(grids, lengths, window, shifts)
        count = len(table)
        if budget is not None:
            for name, needed, limit in (
                ("tokens", used, budget.tokens),
                ("windows", count, budget.windows),
            ):
                if needed > limit:
                    raise ValueError(
                        f"the batch needs {name}={needed} but the budget allows {limit}; "
                        f"raise WindowBudget.{name} or put fewer clips into a batch"
                    )
            count = budget.windows
        # At least one surplus window without a budget: a compiler specialises on sizes of 0 and 1.
        padded = np.zeros((max(count, 1) + 1, 4), np.int32)
        padded[: len(table)] = table
        padded[len(table) :, 0] = used
        host_windows = torch.from_numpy(padded)
        return cls(host_windows.clone(), host_windows, window)

    @property
    def num_windows(self) -> int:
        """Windows, the empty ones of a budget included."""
        return self.windows.shape[0] - 1

    @property
    def num_offsets(self) -> int:
        """Displacements between two patches of a window: entries of a bias table."""
        return (2 * self.window - 1) ** 2

    def to(self, device: torch.device | str, non_blocking: bool = False) -> WindowGrids:
        """The same windows on another device; ``host_windows`` stays on the CPU."""
        return WindowGrids(
            self.windows.to(device, non_blocking=non_blocking), self.host_windows, self.window
        )

    def pin_memory(self) -> WindowGrids:
        """Page-locks the device's table, so that :meth:`to` can overlap with computation."""
        return WindowGrids(self.windows.pin_memory(), self.host_windows, self.window)


def _windows_of(
    grids: np.ndarray, lengths: np.ndarray, window: int, shifts: tuple[int, int]
) -> np.ndarray:
    """The windows with patches, ``[count, 4]``, ordered by shape and then by place."""
    displaced = np.where(grids > window, shifts, 0)
    # Cells along each axis: one that ends at the displacement, where there is one, and the rest.
    leading = (displaced > 0).astype(np.int64)
    cells = leading + -(-(grids - displaced) // window)
    counts = np.where(lengths > 0, cells.prod(1), 0)
    clip = np.repeat(np.arange(len(grids)), counts)
    rank = np.arange(len(clip)) - np.repeat(np.cumsum(counts) - counts, counts)
    cell = np.stack([rank // cells[clip, 1], rank % cells[clip, 1]], 1)
    begin = displaced[clip] + (cell - leading[clip]) * window
    end = np.minimum(begin + window, grids[clip])
    begin = np.maximum(begin, 0)
    width = grids[clip, 1]
    first = (np.cumsum(lengths) - lengths)[clip] + begin[:, 0] * width + begin[:, 1]
    table = np.concatenate([first[:, None], width[:, None], end - begin], 1)
    return table[np.lexsort((-table[:, 3], -table[:, 2]))]
