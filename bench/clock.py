"""Milliseconds and peak memory of one step, on a CPU or a GPU."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch


class CpuClock:
    """Wall time. The other contenders' steps, which come between, displace the caches."""

    def milliseconds(self, step: Callable[[], None]) -> float:
        begin = time.perf_counter()
        step()
        return 1e3 * (time.perf_counter() - begin)

    def peak_bytes(self, step: Callable[[], None]) -> int | None:
        """Not measured on a CPU."""
        return None


class CudaClock:
    """Time between two events on the GPU, with a cold L2 cache.

    Writing a buffer twice the cache's size evicts what the last step left there, and gives the
    host a head start, so that the launches of a short step are not what is measured.
    """

    def __init__(self, device: torch.device) -> None:
        size = 2 * torch.cuda.get_device_properties(device).L2_cache_size
        self.device = device
        self.buffer = torch.empty(max(size, 1 << 26), dtype=torch.int8, device=device)

    def milliseconds(self, step: Callable[[], None]) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.buffer.zero_()
        begin.record()
        step()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end)

    def peak_bytes(self, step: Callable[[], None]) -> int | None:
        """Most that the allocator gave out during a step, less what was out before it."""
        torch.cuda.synchronize(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        step()
        torch.cuda.synchronize(self.device)
        return torch.cuda.max_memory_allocated(self.device) - before


def clock_for(device: torch.device) -> CpuClock | CudaClock:
    """The clock of a device."""
    return CudaClock(device) if device.type == "cuda" else CpuClock()
