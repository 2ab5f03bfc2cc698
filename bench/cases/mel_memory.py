"""Memory that the log-mel frames of one clip take on a CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from bench import peak
from bench.cases import mel_filterbank
from bench.registry import Case, Settings, Work, benchmark

CASES = {"one clip of 10 s, from the first call on": False, "one clip of 10 s, warm": True}
"""And whether a short clip goes before."""


@benchmark(
    "memory/mel_filterbank",
    "What the resident memory of a process of its own, with one thread, grows by at its peak while "
    f"it computes the frames of one clip {peak.CALLS} times; warm: after a clip of 0.1 s, so "
    f"without what is loaded once. Medians of {peak.PROCESSES} processes each. The frames alone "
    "are 0.49 MiB.",
)
def cases(settings: Settings) -> Iterator[Case]:
    if settings.device.type == "cpu":
        for name, warm in CASES.items():
            batch = _batch(10.0)
            size = settings.timed_size
            yield Case(name, batch.out_dtype, size, batch.shapes, partial(_build, warm))


def _batch(seconds: float) -> mel_filterbank.Batch:
    return mel_filterbank.Batch([(int(seconds * mel_filterbank.SAMPLE_RATE), 10)], threads=1)


def _work(seconds: float) -> Work:
    return mel_filterbank.build(torch.device("cpu"), _batch(seconds), on_gpu=False)


def _build(warm: bool) -> Work:
    work = _work(10.0)
    target = f"{__name__}:steps"
    contenders = (
        replace(
            contender,
            step=None,
            flops=None,
            bytes=None,
            tokens=None,
            peak_bytes=partial(peak.growth, target, contender.name, warm=warm),
        )
        for contender in work.contenders
    )
    return replace(work, contenders=tuple(contenders))


def steps(name: str) -> list[Callable[[], Tensor]]:
    """A contender's work on a short clip and on the whole one, for :mod:`bench.peak`."""
    works = (_work(seconds).contenders for seconds in (0.1, 10.0))
    return [next(each.step for each in work if each.name == name) for work in works]
