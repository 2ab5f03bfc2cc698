"""Time resolutions to draw from, and lengths."""

from __future__ import annotations

from collections.abc import Iterable

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


def samples_in(seconds: float, sample_rate: int) -> int:
    """Whole samples that so many seconds hold.

    ``4.015 * 16000`` is a little below 64240 in floating point; a millionth of a sample is
    forgiven.
    """
    return int(round(seconds * sample_rate, 6))
