"""Checks a case's contenders, then measures them in turn.

Repetitions are interleaved (A, B, C, A, B, C, ...), so that what drifts, such as clocks,
temperature or a neighbour's load, drifts for all alike. The median and the 20th and 80th
percentiles are kept.
"""

from __future__ import annotations

import numpy as np
import torch

from bench.clock import CpuClock, CudaClock
from bench.equality import check
from bench.registry import Benchmark, Case, Work

WARM_UP = 3


def check_contenders(case: Case, work: Work) -> dict[str, float]:
    """Each contender's error against the float64 reference.

    Raises:
        DisagreementError: one of them computes something else.
    """
    truth = work.expected(torch.float64)
    rounded = work.expected(case.dtype)
    return {
        contender.name: check(contender.name, contender.outputs(), truth, rounded, case.dtype)
        for contender in work.contenders
    }


def measure(
    bench: Benchmark, case: Case, clock: CpuClock | CudaClock, device: str, reps: int
) -> list[dict]:
    """One row per contender, see :mod:`bench.results`; what is not measured is ``None``.

    Raises:
        DisagreementError: a contender's outputs differ from the reference's; nothing is timed then.
    """
    work = case.build()
    errors = check_contenders(case, work)
    timed = [contender for contender in work.contenders if contender.step is not None]
    times: dict[str, list[float]] = {contender.name: [] for contender in timed}
    peaks: dict[str, int | None] = {}
    for contender in timed:
        for _ in range(min(WARM_UP, reps)):
            contender.step()
        peaks[contender.name] = clock.peak_bytes(contender.step)
    for _ in range(reps):
        for contender in timed:
            times[contender.name].append(clock.milliseconds(contender.step))

    rows = []
    for contender in work.contenders:
        spread = times.get(contender.name)
        p20, median, p80 = np.percentile(spread, (20, 50, 80)).tolist() if spread else [None] * 3
        rows.append(
            {
                "benchmark": bench.name,
                "case": case.name,
                "contender": contender.name,
                "ours": contender is work.contenders[0],
                "why": contender.why,
                "device": device,
                "dtype": str(case.dtype).removeprefix("torch."),
                "size": case.size,
                "shapes": case.shapes,
                "median_ms": median,
                "p20_ms": p20,
                "p80_ms": p80,
                "reps": len(spread) if spread else None,
                "tokens": contender.tokens,
                "flops": contender.flops,
                "bytes": contender.bytes,
                "saved_bytes": contender.saved_bytes() if contender.saved_bytes else None,
                "peak_bytes": peaks.get(contender.name),
                "error": errors[contender.name],
            }
        )
    for row in rows:
        row["ours_over_this"] = {
            what: rows[0][what] / row[what]
            for what in ("median_ms", "flops", "saved_bytes", "peak_bytes")
            if rows[0][what] is not None and row[what]
        }
    return rows


def progress(rows: list[dict]) -> str:
    """A line that says what a case gave: medians or bytes, and the factor to ours."""
    parts = []
    for row in rows:
        what = "median_ms" if row["median_ms"] is not None else "saved_bytes"
        if row[what] is None:
            parts.append(row["contender"])
            continue
        value = f"{row[what]:.3g} ms" if what == "median_ms" else f"{row[what] / 2**20:.0f} MiB"
        factor = "" if row["ours"] else f" ({1 / row['ours_over_this'][what]:.2f}x)"
        parts.append(f"{row['contender']} {value}{factor}")
    return " | ".join(parts)
