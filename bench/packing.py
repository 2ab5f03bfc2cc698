"""What packing an epoch costs and what it wastes: ``python -m bench.packing``.

Lengths are drawn like those of two data sets and packed with every strategy, window and number of
ranks. Nothing is decoded or trained. Each row says

    padding          1 - tokens / (bins * budget), the bins of the last step included
    least_padding    the same if tokens filled bins like a liquid: the price of whole steps
    token_imbalance  most tokens of a step's ranks over their mean, less 1; mean of all full steps
    work_imbalance   the same of the FLOPs of ViT-B's blocks, where long clips cost more per token
    most_clips       clips of the fullest bin
    ns_per_clip      median time to pack one clip, on one thread
    us_per_bin       the same for a batch
"""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from bench import flops, report, results
from bench.batches import COMPRESSIONS
from fastast.data.packing import STRATEGIES, pack

BUDGET = 24_576
"""Tokens of a batch: 48 clips of 1024 frames."""

WINDOWS = (64, 1024, 16_384)
GROUPS = (1, 8)
DIM = 768
"""Width of ViT-B."""

CLIP_MARGIN = 1.25
"""Clips that a batch may hold over its mean, where they are limited: fixed shapes have a place for
each."""

EPOCH = 200_000
MANY_CLIPS, MANY_RANKS = 2_000_000, 512
"""AudioSet's clips, on as many ranks as anyone may use."""


def voxceleb_like(clips: int, seed: int = 0) -> np.ndarray:
    """Tokens of clips as long as VoxCeleb's, cut to 30 s: int64 ``[clips]``.

    4 s and a log-normal excess give VoxCeleb's least and mean, 4.0 and 8.2 s. With a spread of 1,
    cutting and padding to 1024 frames makes 31 % padding; the ElasticAST paper reports 31.1 %.
    """
    draw = np.random.default_rng(seed)
    seconds = np.minimum(4.0 + draw.lognormal(np.log(4.2) - 0.5, 1.0, clips), 30.0)
    frames = 1 + (np.rint(seconds * 16_000).astype(np.int64) - 400) // 160
    return frames // 16 * 8


def mixed_resolution(clips: int, seed: int = 0) -> np.ndarray:
    """Tokens of AudioSet's 10-s clips, each at a time resolution of its own: int64 ``[clips]``.

    Frames as in :func:`bench.batches.mixed_resolution_frames`.
    """
    compression = np.random.default_rng(seed).choice(COMPRESSIONS, clips)
    return 10_240 // compression // 16 * 8


LENGTHS = {"VoxCeleb": voxceleb_like, "AudioSet, mixed resolution": mixed_resolution}


def table(clips: int = EPOCH, many: int = MANY_CLIPS, reps: int = 5) -> Iterator[dict]:
    """Measures everything, row by row.

    Args:
        clips: of an epoch.
        many: clips of the epoch that is dealt to ``MANY_RANKS`` ranks.
        reps: packings of each row; the median counts.
    """
    for (name, lengths_of), group in itertools.product(LENGTHS.items(), GROUPS):
        lengths = lengths_of(clips)
        for strategy in STRATEGIES:
            for window in _windows(strategy):
                yield {"lengths": name} | measure(lengths, strategy, window, group, reps)
    for name, lengths_of in LENGTHS.items():
        lengths = lengths_of(clips)
        max_clips = int(CLIP_MARGIN * BUDGET / lengths.mean())
        for strategy in STRATEGIES:
            for window in _windows(strategy)[:2]:
                row = measure(lengths, strategy, window, GROUPS[-1], reps, max_clips)
                yield {"lengths": name} | row
    lengths = voxceleb_like(many)
    for strategy in STRATEGIES:
        for window in _windows(strategy)[:2]:
            row = measure(lengths, strategy, window, MANY_RANKS, reps)
            yield {"lengths": "VoxCeleb"} | row


def _windows(strategy: str) -> tuple[int | None, ...]:
    """Next-fit's result does not depend on the window."""
    return (None,) if strategy == "next_fit" else WINDOWS


def measure(
    lengths: np.ndarray,
    strategy: str,
    window: int | None,
    group: int,
    reps: int,
    max_clips: int | None = None,
) -> dict:
    """Packs one epoch ``reps`` times and says what came out."""
    # Without a limit, as many clips as the shortest ones could be.
    max_items = max_clips or BUDGET // int(lengths.min())
    options = {"strategy": strategy, "group": group} | ({"window": window} if window else {})
    seconds = []
    for _ in range(reps):
        start = time.perf_counter()
        bin_of = pack(lengths, BUDGET, max_items, **options)
        seconds.append(time.perf_counter() - start)
    bins = group * (int(bin_of.max()) // group + 1)
    tokens = int(lengths.sum())
    fewest_bins = group * math.ceil(tokens / (group * BUDGET))
    work = flops.linear(lengths, DIM, 12 * DIM) + flops.attention(lengths * lengths, DIM)
    nanoseconds = 1e9 * statistics.median(seconds)
    return {
        "clips": len(lengths),
        "ranks": group,
        "strategy": strategy,
        "window": window,
        "max_clips": max_clips,
        "bins": bins,
        "padding": 1 - tokens / (bins * BUDGET),
        "least_padding": 1 - tokens / (fewest_bins * BUDGET),
        "token_imbalance": imbalance(np.bincount(bin_of, lengths, bins), group),
        "work_imbalance": imbalance(np.bincount(bin_of, work, bins), group),
        "most_clips": int(np.bincount(bin_of).max()),
        "ns_per_clip": nanoseconds / len(lengths),
        "us_per_bin": nanoseconds / 1e3 / bins,
    }


def imbalance(amounts: np.ndarray, group: int) -> float:
    """How far the fullest bin of a step exceeds the mean, on average over all but the last step."""
    steps = amounts.reshape(-1, group)[:-1]
    return float((steps.max(1) / steps.mean(1) - 1).mean()) if len(steps) else 0.0


def main(arguments: list[str] | None = None) -> None:
    """Measures, prints the table and writes ``cpu/packing.json``."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.packing",
        description="Measures padding, balance and time of every packing strategy.",
    )
    parser.add_argument("--clips", type=int, default=EPOCH, help="default: %(default)s")
    parser.add_argument(
        "--many", type=int, default=MANY_CLIPS, help=f"on {MANY_RANKS} ranks; default: %(default)s"
    )
    parser.add_argument("--reps", type=int, default=5, help="default: %(default)s")
    parser.add_argument(
        "--out", type=Path, default=results.RESULTS, help="folder; default: %(default)s"
    )
    options = parser.parse_args(arguments)

    run = results.current_run("cpu")
    run["machine"]["threads"] = 1
    rows = []
    for row in table(options.clips, options.many, options.reps):
        rows.append(row)
        header = report.packing_table(rows)
        print("\n".join(header if len(rows) == 1 else header[-1:]), flush=True)
    path = options.out / "cpu" / "packing.json"
    results.write(path, {"schema": results.SCHEMA, "run": run, "rows": rows})
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
