"""Time resolutions to draw from, and how many samples a number of frames takes."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from fastast.ops.mel_plan import Padding

COMPRESSION_RATES = tuple(round(1 + 0.2 * step, 1) for step in range(16))
"""C in {1.0, 1.2, ..., 4.0}: ElasticAST's mixed-resolution training (section 3.4)."""


def mixed_frame_shifts(
    base_ms: float = 10.0, rates: Iterable[float] = COMPRESSION_RATES
) -> tuple[float, ...]:
    """Frame shifts in ms that shorten a spectrogram by the factors ``rates``.

    ``base_ms * C`` is rounded to a nanosecond. The bare product may lie a little below the number
    it stands for, and rounding down to whole samples
    (:func:`fastast.ops.mel_filterbank.hop_from_ms`) would make that a sample less per hop.
    """
    return tuple(round(base_ms * rate, 6) for rate in rates)


def samples_for(
    frames: int,
    window: int,
    frame_shift: int | np.ndarray,
    padding: Padding = Padding.NONE,
) -> int | np.ndarray:
    """The fewest samples that have so many frames (at least one); all else in samples.

    The inverse of :func:`fastast.ops.mel_filterbank.frame_counts`.
    """
    if padding == Padding.NONE:
        return (frames - 1) * frame_shift + window
    if padding == Padding.KALDI:
        return frames * frame_shift - frame_shift // 2
    return np.maximum((frames - 1) * frame_shift, 1)[()]
