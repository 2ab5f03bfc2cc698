"""Milliseconds and peak memory of one step, on a CPU or a GPU."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median

import torch


class CpuClock:
    """Wall time. The other contenders' steps, which come between, displace the caches."""

    seconds = float("inf")
    """That the repetitions of one contender may take, beyond which there are fewer of them."""

    def timer(self, step: Callable[[], None]) -> Callable[[], float]:
        """A function that runs the step and returns its milliseconds."""

        def milliseconds() -> float:
            begin = time.perf_counter()
            step()
            return 1e3 * (time.perf_counter() - begin)

        return milliseconds

    def peak_bytes(self, step: Callable[[], None]) -> int | None:
        """Not measured on a CPU."""
        return None


class CudaClock:
    """Time between two events on the GPU, with a cold L2 cache and all launches queued.

    Writing a buffer twice the cache's size evicts what the last step left there. Then the GPU
    sleeps while the host enqueues the step, for a short step takes longer to launch than to run:
    what is measured is the device's work, as in a training step whose host runs ahead. A step that
    waits for the device itself wakes up with nothing queued, and pays for its launches from there.
    """

    seconds = 0.08
    """That the repetitions of one contender may take, beyond which there are fewer of them."""

    def __init__(self, device: torch.device) -> None:
        size = 2 * torch.cuda.get_device_properties(device).L2_cache_size
        self.device = device
        self.buffer = torch.empty(max(size, 1 << 26), dtype=torch.int8, device=device)
        self.cycles_per_ms = self._cycles_per_ms()

    def timer(self, step: Callable[[], None]) -> Callable[[], float]:
        """A function that runs the step and returns its milliseconds.

        The step must have been warmed up: how long the host takes to enqueue it is measured here,
        and sizes the head start.
        """
        torch.cuda.synchronize(self.device)
        host = []
        for _ in range(3):
            begin = time.perf_counter()
            step()
            host.append(1e3 * (time.perf_counter() - begin))
            torch.cuda.synchronize(self.device)
        cycles = int(head_start(median(host)) * self.cycles_per_ms)

        def milliseconds() -> float:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self.buffer.zero_()
            torch.cuda._sleep(cycles)
            begin.record()
            step()
            end.record()
            end.synchronize()
            return begin.elapsed_time(end)

        return milliseconds

    def peak_bytes(self, step: Callable[[], None]) -> int | None:
        """Most that the allocator gave out during a step, less what was out before it."""
        torch.cuda.synchronize(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        step()
        torch.cuda.synchronize(self.device)
        return torch.cuda.max_memory_allocated(self.device) - before

    def _cycles_per_ms(self) -> float:
        """How fast :func:`torch.cuda._sleep` counts at most: an idle GPU's clock is yet to rise."""
        cycles, rates = 5_000_000, []
        for _ in range(8):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            torch.cuda._sleep(cycles)
            end.record()
            end.synchronize()
            rates.append(cycles / begin.elapsed_time(end))
        return max(rates)


def head_start(host_ms: float) -> float:
    """Milliseconds that the GPU sleeps while a step is enqueued that takes the host so long.

    Twice the host's time and a margin for a host that is disturbed; no more than 50 ms, which are
    reached by steps that wait for the device, and so gain nothing from it.
    """
    return min(1.0 + 2 * host_ms, 50.0)


def clock_for(device: torch.device) -> CpuClock | CudaClock:
    """The clock of a device."""
    return CudaClock(device) if device.type == "cuda" else CpuClock()
