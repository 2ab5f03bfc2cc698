"""Time resolutions to draw from, and how many frames a clip has.

A clip of ``n`` samples has a frame wherever a whole window fits (Kaldi's ``snip_edges``)::

    frames = 0 if n < window else 1 + (n - window) // frame_shift
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

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


def frame_counts(
    num_samples: int | np.ndarray, window: int, frame_shift: int | np.ndarray
) -> int | np.ndarray:
    """Frames of clips of so many samples, with ``window`` and ``frame_shift`` in samples."""
    frames = 1 + (np.asarray(num_samples) - window) // frame_shift
    return np.where(np.asarray(num_samples) < window, 0, frames)[()]


def samples_for(frames: int, window: int, frame_shift: int | np.ndarray) -> int | np.ndarray:
    """The fewest samples that have so many frames (at least one)."""
    return (frames - 1) * frame_shift + window
