"""Memory that single operations take on a CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import torch

from bench import peak
from bench.registry import Case, Settings, Work, benchmark, find

CASES = (
    "ops/distillation global, 64 x 8192, forward+backward",
    "ops/corruption paper, 64 x 592",
    "ops/corruption aligned, 64 x 592",
    "ops/info_nce 12 clips, forward+backward",
    "ops/packed_attention length 16, head dim 64, forward+backward",
    "ops/window_attention HTS-AT stage 1, forward",
    "ops/window_attention HTS-AT stage 4, forward",
)
SKIPPED = "compiled"
"""A contender whose compiler would count."""


@benchmark(
    "memory/operations",
    "What the resident memory of a process of its own, with one thread, grows by at its peak while "
    f"it does the work {peak.CALLS} times, after it has done it once: results, gradients and what "
    f"is needed in between, without the inputs. Medians of {peak.PROCESSES} processes each.",
)
def cases(settings: Settings) -> Iterator[Case]:
    if settings.device.type == "cpu":
        for name in CASES:
            case = _case(name, settings)
            yield replace(case, name=name.removeprefix("ops/"), build=partial(_build, name, case))


def _case(name: str, settings: Settings) -> Case:
    """A case of single operations."""
    bench = name.split()[0]
    return next(
        case for found, case in find("ops", settings, bench) if f"{found.name} {case.name}" == name
    )


def _build(name: str, case: Case) -> Work:
    work = case.build()
    contenders = (
        replace(
            contender,
            step=None,
            saved_bytes=None,
            flops=None,
            bytes=None,
            tokens=None,
            peak_bytes=partial(peak.growth, f"{__name__}:steps", name, contender.name, warm=True),
        )
        for contender in work.contenders
        if contender.name != SKIPPED
    )
    return replace(work, contenders=tuple(contenders))


def steps(name: str, contender: str) -> list[Callable[[], None]]:
    """A contender's work, twice, for :mod:`bench.peak`."""
    from bench import cases  # registers them  # noqa: F401

    work = _case(name, Settings(torch.device("cpu"))).build()
    step = next(each.step for each in work.contenders if each.name == contender)
    return [step, step]
