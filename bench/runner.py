"""Checks a case's contenders, then measures them in turn.

Repetitions are interleaved (A, B, C, C, A, B, ...), so that what drifts, such as clocks,
temperature or a neighbour's load, drifts for all alike. Each turn has an order of its own, so that
none always follows the one that leaves the caches worst. The median and the 20th and 80th
percentiles are kept.

A peer that cannot do a case, or does something else, is recorded with the reason and not timed;
the others go on. Ours must do every case.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable

import numpy as np
import torch

from bench.clock import CpuClock, CudaClock
from bench.equality import DisagreementError, check
from bench.registry import Benchmark, Case, Contender, Work
from bench.results import ROOT

WARM_UP = 3
FEWEST_REPS = 5
REASON_CHARACTERS = 200
MEASURED = ("median_ms", "saved_bytes", "peak_bytes")
"""Of which the first that there is stands in the line about a case."""


class Standing:
    """What is known of a contender: its numbers, or why there are none.

    Attributes:
        error: largest relative error against the reference; ``None`` if not compared.
        unavailable: why it cannot do the case; ``None`` if it can.
        disagrees: in what it differs from the reference; ``None`` if in nothing.
        times: milliseconds of its repetitions.
        peak_bytes, saved_bytes: of a step.
    """

    def __init__(self, contender: Contender, ours: bool) -> None:
        self.contender, self.ours = contender, ours
        self.error: float | None = None
        self.unavailable: str | None = None
        self.disagrees: str | None = None
        self.times: list[float] = []
        self.peak_bytes: int | None = None
        self.saved_bytes: int | None = None

    @property
    def stands(self) -> bool:
        return self.unavailable is None and self.disagrees is None

    def attempt(self, work: Callable[[], None]) -> None:
        """Runs a part of the measurement, unless an earlier one has failed.

        Raises:
            Exception: whatever ``work`` raises, if the contender is ours.
        """
        if not self.stands:
            return
        try:
            work()
        except Exception as error:
            if self.ours:
                raise
            if isinstance(error, DisagreementError):
                self.disagrees = reason(error)
            else:
                self.unavailable = reason(error)
            if isinstance(error, torch.OutOfMemoryError):
                torch.cuda.empty_cache()


def reason(error: Exception) -> str:
    """An exception in one short line, without the place where the code lies."""
    lines = str(error).replace(str(ROOT), ".").splitlines()
    text = next((line.strip() for line in lines if line.strip()), type(error).__name__)
    return text if len(text) <= REASON_CHARACTERS else f"{text[: REASON_CHARACTERS - 3]}..."


def check_contenders(case: Case, work: Work) -> list[Standing]:
    """Compares each contender with the float64 reference, except those that say why not.

    Raises:
        DisagreementError: ours computes something else.
    """
    truth = work.expected(torch.float64)
    rounded = work.expected(case.dtype)

    def compare(standing: Standing) -> None:
        outputs = standing.contender.outputs()
        if standing.contender.unchecked is None:
            name = standing.contender.name
            standing.error = check(name, outputs, truth, rounded, case.dtype)

    standings = [Standing(each, ours=i == 0) for i, each in enumerate(work.contenders)]
    for standing in standings:
        standing.attempt(lambda standing=standing: compare(standing))
    return standings


def measure(
    bench: Benchmark, case: Case, clock: CpuClock | CudaClock, device: str, reps: int
) -> list[dict]:
    """One row per contender, see :mod:`bench.results`; what is not measured is ``None``.

    Raises:
        DisagreementError: our outputs differ from the reference's; nothing is timed then.
    """
    work = case.build()
    standings = check_contenders(case, work)
    plans: list[tuple[Standing, Callable[[], float], int]] = []
    for standing in standings:
        standing.attempt(lambda standing=standing: _prepare(standing, clock, reps, plans))
    for turn in range(reps):
        for standing, timer, count in random.Random(turn).sample(plans, len(plans)):
            # Fewer repetitions are spread over all turns.
            if (turn + 1) * count // reps > turn * count // reps:
                standing.attempt(lambda s=standing, timer=timer: s.times.append(timer()))
    rows = [_row(bench, case, standing, device) for standing in standings]
    for row in rows:
        row["ours_over_this"] = {
            what: rows[0][what] / row[what]
            for what in ("median_ms", "flops", "saved_bytes", "peak_bytes")
            if rows[0][what] is not None and row[what]
        }
    return rows


def _prepare(standing: Standing, clock: CpuClock | CudaClock, reps: int, plans: list) -> None:
    """Warms a contender up, measures its memory and plans how often it is timed."""
    contender = standing.contender
    if contender.saved_bytes:
        standing.saved_bytes = contender.saved_bytes()
    if contender.peak_bytes:
        standing.peak_bytes = contender.peak_bytes()
    if contender.step is None:
        return
    for _ in range(min(WARM_UP, reps)):
        contender.step()
    standing.peak_bytes = clock.peak_bytes(contender.step)
    timer = clock.timer(contender.step)
    count = reps
    if clock.seconds < float("inf"):
        begin = time.perf_counter()
        timer()
        affordable = int(clock.seconds / (time.perf_counter() - begin))
        count = min(reps, max(FEWEST_REPS, affordable))
    plans.append((standing, timer, count))


def _row(bench: Benchmark, case: Case, standing: Standing, device: str) -> dict:
    contender = standing.contender
    times = standing.times if standing.stands else []
    p20, median, p80 = np.percentile(times, (20, 50, 80)).tolist() if times else [None] * 3
    return {
        "benchmark": bench.name,
        "case": case.name,
        "contender": contender.name,
        "ours": standing.ours,
        "why": contender.why,
        "unchecked": contender.unchecked,
        "unavailable": standing.unavailable,
        "disagrees": standing.disagrees,
        "device": device,
        "dtype": str(case.dtype).removeprefix("torch."),
        "size": case.size,
        "shapes": case.shapes,
        "median_ms": median,
        "p20_ms": p20,
        "p80_ms": p80,
        "reps": len(times) or None,
        "tokens": contender.tokens,
        "flops": contender.flops,
        "bytes": contender.bytes,
        "saved_bytes": standing.saved_bytes,
        "peak_bytes": standing.peak_bytes,
        "error": standing.error,
    }


def progress(rows: list[dict]) -> str:
    """A line that says what a case gave: medians or bytes, and the factor to ours."""
    parts = []
    for row in rows:
        measured = [what for what in MEASURED if row[what] is not None]
        if row["unavailable"] or row["disagrees"]:
            parts.append(f"{row['contender']} {'WRONG' if row['disagrees'] else 'not available'}")
            continue
        if not measured:
            parts.append(row["contender"])
            continue
        what = measured[0]
        value = f"{row[what]:.3g} ms" if what == "median_ms" else f"{row[what] / 2**20:.0f} MiB"
        ratio = row["ours_over_this"].get(what)
        factor = f" ({1 / ratio:.2f}x)" if ratio and not row["ours"] else ""
        parts.append(f"{row['contender']} {value}{factor}")
    return " | ".join(parts)
