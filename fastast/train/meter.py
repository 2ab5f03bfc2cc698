"""Loss and speed of an epoch."""

from __future__ import annotations

import resource
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

import torch
from torch import Tensor

from fastast.data import Batch
from fastast.train.distributed import Ranks

T = TypeVar("T")


class Meter:
    """Losses, gradient norms and rates of an epoch, over all ranks.

    Losses stay on the device until :meth:`pull`, so that no step waits for it.

    Args:
        device: of the losses.
        ranks: that train together.

    Attributes:
        last_loss: of the last step that was pulled.
    """

    _COUNTERS = ("batches", "clips", "tokens", "rows", "audio_seconds", "left_out", "flops")

    def __init__(self, device: torch.device, ranks: Ranks) -> None:
        self.device, self.ranks = device, ranks
        self._started = time.perf_counter()
        self._elapsed_before = 0.0
        self._waited = 0.0
        self._counts = dict.fromkeys(self._COUNTERS, 0.0)
        self._on_device: list[Tensor] = []
        self._window: list[list[float]] = []
        self._sums = [0.0, 0.0]
        self._steps = 0
        self.last_loss = float("nan")

    def waits(self, batches: Iterable[T]) -> Iterator[T]:
        """Passes batches through and notes how long each was waited for."""
        batches = iter(batches)
        while True:
            begin = time.perf_counter()
            try:
                batch = next(batches)
            except StopIteration:
                return
            finally:
                self._waited += time.perf_counter() - begin
            yield batch

    def count(self, batch: Batch, flops: float = 0.0) -> None:
        """Notes what a batch holds, and the FLOPs of its part of a training step."""
        for name, value in (
            ("batches", 1),
            ("clips", batch.num_clips),
            ("tokens", batch.num_tokens),
            ("rows", batch.grid.num_rows),
            ("audio_seconds", batch.audio_seconds),
            ("left_out", len(batch.left_out)),
            ("flops", flops),
        ):
            self._counts[name] += value

    def add(self, loss: Tensor, norm: Tensor) -> None:
        """Notes this rank's loss of a step, and the norm of the gradient before clipping."""
        self._on_device.append(torch.stack([loss, norm.to(loss.dtype)]))

    def pull(self) -> list[tuple[float, float]]:
        """Loss and gradient norm of each step since the last call. Waits for the device."""
        if not self._on_device:
            return []
        pulled = self.ranks.sum(torch.stack(self._on_device).double()) / self.ranks.size
        self._on_device.clear()
        steps = pulled.tolist()
        self._window += steps
        self.last_loss = steps[-1][0]
        return [tuple(step) for step in steps]

    @property
    def has_window(self) -> bool:
        """Whether steps have been pulled since the last :meth:`window`."""
        return bool(self._window)

    def window(self) -> dict[str, float]:
        """Mean loss and gradient norm of the steps pulled since the last call."""
        self._steps += len(self._window)
        means = []
        for index in range(2):
            total = sum(step[index] for step in self._window)
            self._sums[index] += total
            means.append(total / len(self._window))
        self._window.clear()
        return dict(zip(("loss", "gradient_norm"), means, strict=True))

    def rates(self) -> dict[str, float]:
        """How fast the epoch has gone so far; this rank's counts stand for all."""
        elapsed = self._elapsed()
        counts = {name: value * self.ranks.size for name, value in self._counts.items()}
        return {
            "seconds": elapsed,
            "clips_per_s": counts["clips"] / elapsed,
            "tokens_per_s": counts["tokens"] / elapsed,
            "audio_hours_per_s": counts["audio_seconds"] / 3600 / elapsed,
            "padding": 1 - counts["tokens"] / max(counts["rows"], 1),
            "data_wait": self._waited / elapsed,
            "peak_memory_gib": self._peak_memory(),
        }

    def summary(self) -> dict[str, float | None]:
        """The epoch in numbers; its steps have been through :meth:`window`."""
        totals = self.totals()
        self._counts = {name: value / self.ranks.size for name, value in totals.items()}
        steps = max(self._steps, 1)
        return {
            "loss": self._sums[0] / steps,
            "gradient_norm": self._sums[1] / steps,
            "clips": round(totals["clips"]),
            "left_out": round(totals["left_out"]),
            "audio_hours": totals["audio_seconds"] / 3600,
            "flops": totals["flops"] or None,
        } | self.rates()

    def totals(self) -> dict[str, float]:
        """What all ranks have counted."""
        counted = torch.tensor(list(self._counts.values()), dtype=torch.float64)
        return dict(zip(self._COUNTERS, self.ranks.sum(counted).tolist(), strict=True))

    def state_dict(self) -> dict:
        """What a resumed run needs. All losses have been pulled; all ranks must ask."""
        return {
            "elapsed": self._elapsed(),
            "waited": self._waited,
            "counts": self.totals(),
            "window": [list(step) for step in self._window],
            "sums": list(self._sums),
            "steps": self._steps,
        }

    def load_state_dict(self, state: dict) -> None:
        """Goes on from there."""
        self._elapsed_before = state["elapsed"]
        self._waited = state["waited"]
        size = self.ranks.size
        self._counts = {name: value / size for name, value in state["counts"].items()}
        self._window = [list(step) for step in state["window"]]
        self._sums, self._steps = list(state["sums"]), state["steps"]

    def _elapsed(self) -> float:
        return self._elapsed_before + time.perf_counter() - self._started

    def _peak_memory(self) -> float:
        """Of the GPU if there is one, else of the process, in GiB."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 2**30
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
