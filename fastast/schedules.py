"""How a setting goes over a run."""

from __future__ import annotations

import math


def cosine(start: float, end: float, share: float) -> float:
    """Half a cosine from ``start`` at share 0 to ``end`` at share 1."""
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * share))
