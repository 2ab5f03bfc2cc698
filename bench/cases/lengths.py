"""Segment lengths that single operations are measured at."""

from __future__ import annotations

import random
from collections.abc import Iterator

import torch

UNIFORM = (16, 64, 128, 300, 512)
"""A window of HTS-AT's last stage to a 10-s clip, by way of lengths that fill no tile."""


def segment_lengths(device: torch.device) -> Iterator[tuple[str, list[int]]]:
    """Named lists of lengths that add up to about the same number of tokens."""
    tokens = 4096 if device.type == "cpu" else 32768
    for length in UNIFORM:
        yield str(length), [length] * (tokens // length)
    draw = random.Random(0)
    mixed: list[int] = []
    while sum(mixed) < tokens - 512:
        mixed.append(draw.randint(16, 512))
    yield "mixed", mixed
