"""Rows of a packed stream: which segment each is of, and what goes where when clips are rolled.

All shapes follow from the stream's alone, so that a compiled function serves every batch.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

NOWHERE = -(2**31)
"""A step that leads from any row to before the stream, see :func:`pick_rows`."""


def check_clip_ids(clip_ids: Tensor, clips: int) -> None:
    """Raises ValueError unless ``clip_ids`` is int64 ``[clips]``."""
    if clip_ids.dtype != torch.int64 or tuple(clip_ids.shape) != (clips,):
        raise ValueError(
            f"clip_ids must be torch.int64 of shape [{clips}], one per clip, got "
            f"{clip_ids.dtype} of shape {list(clip_ids.shape)}"
        )


def segment_of_rows(offsets: Tensor, num_rows: int) -> Tensor:
    """Segment of each row: int32 ``[num_rows]``; ``S`` on rows past the last segment.

    Args:
        offsets: integers ``[S + 1]``, where each segment begins; the first at 0.
        num_rows: of the stream.
    """
    lengths = torch.cat([offsets, offsets.new_full((1,), num_rows)]).diff()
    return torch.repeat_interleave(lengths.int(), output_size=num_rows)


def to_rows(values: Tensor, segment: Tensor, dead: float = 0) -> Tensor:
    """Each row's entry of ``values [S]``; ``dead`` past the last segment."""
    # `index_select` with 32-bit indices is the fastest of its kind on CPUs.
    return F.pad(values, (0, 1), value=dead).index_select(0, segment)


def alternate(first: Tensor, second: Tensor) -> Tensor:
    """``first[0], second[0], first[1], ...``: a table over the parts of :func:`split`."""
    return torch.stack([first, second], dim=1).flatten()


def split(offsets: Tensor, first: Tensor) -> Tensor:
    """Offsets ``[2 S + 1]`` of the segments cut in two, the first part of ``first [S]`` rows."""
    begin = offsets[:-1]
    return torch.cat([alternate(begin, begin + first), offsets[-1:]])


def pick_rows(stream: Tensor, step: Tensor) -> Tensor:
    """Row ``i + step[i]`` of the stream for each ``i`` (int32); zeros where that is negative."""
    if max(stream.shape[0], step.shape[0]) >= 2**31:
        raise ValueError(f"a stream must have fewer than 2**31 rows, got {stream.shape[0]}")
    source = torch.arange(1, step.shape[0] + 1, dtype=torch.int32, device=step.device)
    behind_zeros = torch.cat([stream.new_zeros(1, *stream.shape[1:]), stream])
    return behind_zeros.index_select(0, source.add_(step).clamp_(min=0))


def roll_segments(stream: Tensor, offsets: Tensor, shift: Tensor) -> Tensor:
    """Moves the rows of each segment towards its end, and those past it to its beginning.

    Args:
        stream: ``[rows, ...]``.
        offsets: integers ``[S + 1]``, where each segment begins; the first at 0.
        shift: how far, ``[S]``: at least 0 and less than the segment's length (0 if that is 0).

    Returns:
        The stream's shape and dtype; zeros past the last segment.
    """
    part = segment_of_rows(split(offsets, shift), stream.shape[0])
    step = alternate(offsets.diff() - shift, -shift).int()
    return pick_rows(stream, to_rows(step, part, dead=NOWHERE))
