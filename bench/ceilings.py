"""What a GPU reaches at best: bytes copied and multiply-adds done per second, measured.

Datasheets promise more than any program gets. A kernel's rates are told as fractions of these,
measured in the same run on the same card.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from statistics import median

import torch

from bench.clock import CudaClock

COPY_BYTES = 4 << 30
"""Of each of the two buffers: far beyond any cache."""

MATMUL = 8192
"""Rows, columns and inner dimension of the bfloat16 product."""

REPS = 15


def measure(device: torch.device, size: int = COPY_BYTES, edge: int = MATMUL) -> dict[str, float]:
    """``copy_bytes_per_s``, read plus written, and ``matmul_flops_per_s`` of a GPU."""
    clock = CudaClock(device)

    def best(step: Callable[[], object]) -> float:
        for _ in range(3):
            step()
        timer = clock.timer(step)
        return 1e-3 * median(timer() for _ in range(REPS))

    # A smaller card, or one that is in use, copies what fits.
    size = min(size, torch.cuda.mem_get_info(device)[0] // 4)
    copying = best(_copy(size, device))
    multiplying = best(_product(edge, device))
    torch.cuda.empty_cache()
    return {
        "copy_bytes_per_s": 2 * size / copying,
        "matmul_flops_per_s": 2 * edge**3 / multiplying,
    }


def _copy(size: int, device: torch.device) -> Callable[[], object]:
    source, target = (torch.empty(size, dtype=torch.int8, device=device) for _ in range(2))
    return partial(target.copy_, source.random_(-128, 128))


def _product(edge: int, device: torch.device) -> Callable[[], object]:
    # Of random numbers: a product of zeros is faster than any of interest, for it takes less power.
    a, b = torch.randn(2, edge, edge, device=device, dtype=torch.bfloat16)
    return partial(torch.mm, a, b, out=torch.empty_like(a))
