"""The batch that whole models are compared on."""

from __future__ import annotations

import random

COMPRESSIONS = tuple(range(10, 41, 2))
"""Tenths of the compression factors C = 1.0, 1.2, ..., 4.0 (ElasticAST, section 3.4)."""

CLIPS = 12
"""Clips of a batch, as in all four papers' fine-tuning."""

SEED = 1
"""Of the draw. Of the batches of twelve, one where packing saves as much as it usually does: the
tests compare it with a thousand others."""


def mixed_resolution_frames(clips: int = CLIPS, seed: int = SEED) -> list[int]:
    """Frames of AudioSet's 10-s clips, each at a time resolution of its own.

    A clip has 1024 frames at C = 1; at C, ``int(1024 / C)``, floored to whole patches of 16.
    """
    draw = random.Random(seed)
    return [10240 // draw.choice(COMPRESSIONS) // 16 * 16 for _ in range(clips)]
