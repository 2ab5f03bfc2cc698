"""Segment lengths that single operations are measured at."""

from __future__ import annotations

import random
from collections.abc import Iterator

import torch

CPU_LENGTHS = (16, 64, 128, 300, 512)
"""A window of HTS-AT's last stage to a 10-s clip, by way of lengths that fill no tile."""

GPU_LENGTHS = (16, 64, 100, 128, 200, 300, 512, 600, 1024, 1214)
"""The same and beyond, to AST's 10-s clip with overlapping patches."""

CPU_TOKENS, GPU_TOKENS = 4096, 32768


def segment_lengths(device: torch.device) -> Iterator[tuple[str, list[int]]]:
    """Named lists of lengths that add up to about the same number of tokens, and never to more."""
    on_cpu = device.type == "cpu"
    tokens, uniform = (CPU_TOKENS, CPU_LENGTHS) if on_cpu else (GPU_TOKENS, GPU_LENGTHS)
    for length in uniform:
        yield str(length), [length] * (tokens // length)
    draw = random.Random(0)
    mixed: list[int] = []
    while sum(mixed) < tokens - uniform[-1]:
        mixed.append(draw.randint(uniform[0], uniform[-1]))
    yield "mixed", mixed
