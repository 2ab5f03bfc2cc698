"""Times the launches that the attention kernels could have, from which theirs were chosen.

    python -m bench.launches                      all head sizes and lengths, on this GPU
    python -m bench.launches --head-dim 64 --length 512

Each candidate takes the place of one launch of the configuration in use
(``kernels/packed_attention/configs.py``); the lengths are those of ``ops/packed_attention``, in
bfloat16, q, k and v parts of one projection's output. Compiled in several processes first, then
timed in one. ``<folder>/<gpu>/launches.json`` gets a row for each candidate: kernel, head size,
lengths, launch and the median of the forward or backward, or why it does not run.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median

import torch

from bench import ceilings, results
from bench.cases.lengths import segment_lengths
from bench.clock import CudaClock
from fastast import Segments
from fastast.kernels import packed_attention as kernels
from fastast.kernels.packed_attention.configs import Config, Launch, pick

DIM = 768
HEAD_DIMS = (24, 32, 64, 128)
REPS = 12

WHOLE = (Launch(64, 64, 4, 1), Launch(128, 128, 4, 1), Launch(128, 128, 8, 1, maxnreg=128))
TILES = tuple(
    Launch(rows, step, warps, stages, maxnreg)
    for rows, step, warps, stages, maxnreg in (
        (64, 32, 4, 2, None),
        (64, 32, 4, 3, None),
        (64, 32, 4, 4, None),
        (64, 64, 4, 2, None),
        (64, 64, 4, 2, 128),
        (64, 64, 4, 3, None),
        (64, 64, 4, 3, 128),
        (64, 128, 4, 2, None),
        (128, 32, 4, 3, None),
        (128, 64, 4, 2, None),
        (128, 32, 8, 3, 128),
        (128, 64, 8, 2, 128),
        (128, 64, 8, 3, 128),
        (128, 128, 8, 2, 128),
    )
)
WALKS = tuple(
    Launch(128, step, warps, stages, maxnreg)
    for step in (32, 64)
    for warps, stages, maxnreg in ((8, 1, 128), (8, 2, 128), (8, 2, None), (4, 2, None))
)
CANDIDATES = {
    "whole_forward": WHOLE,
    "whole_backward": (*WHOLE, *WALKS),
    "forward": TILES,
    "backward_queries": TILES,
    "backward_keys": TILES,
}
"""By the part of a configuration that they may become."""


def candidates(config: Config, longest: int) -> Iterator[tuple[str, Launch, Config]]:
    """The launches to time for segments up to a length: part, launch, whole configuration."""
    for part, launches in CANDIDATES.items():
        for launch in launches:
            if part.startswith("whole"):
                if pick((launch,), longest):
                    yield part, launch, replace(config, **{part: (launch,)})
            else:
                alone = {"whole_forward": (), "whole_backward": (), part: launch}
                yield part, launch, replace(config, **alone)


class Work:
    """Inputs of one head size and list of lengths, and what is timed on them."""

    def __init__(self, lengths: list[int], head_dim: int) -> None:
        generator = torch.Generator("cuda").manual_seed(0)
        shape = (sum(lengths), 3, DIM // head_dim, head_dim)
        options = {"device": "cuda", "dtype": torch.bfloat16, "generator": generator}
        self.qkv = torch.randn(shape, **options)
        self.grad = torch.randn(shape[:1] + shape[2:], **options)
        self.gradients = torch.empty_like(self.qkv)
        segments = Segments.from_lengths(lengths).to("cuda")
        self.table = (segments.offsets, segments.tiles, max(lengths), head_dim**-0.5)
        self.config = kernels.launches(self.grad)
        self.results = kernels.forward(*self.qkv.unbind(1), *self.table)

    def run(self, part: str, config: Config) -> None:
        """The forward or the backward, whichever the part belongs to."""
        inputs = self.qkv.unbind(1)
        if part in ("whole_forward", "forward"):
            kernels.forward(*inputs, *self.table, config)
        else:
            gradients = self.gradients.unbind(1)
            kernels.backward(gradients, self.grad, *inputs, *self.results, *self.table, config)


def _compile(job: tuple[list[int], int, int, int]) -> None:
    """Runs every ``of``-th candidate once, which leaves it in the compiler's cache on disk."""
    lengths, head_dim, first, of = job
    work = Work(lengths, head_dim)
    for part, _, config in list(candidates(work.config, max(lengths)))[first::of]:
        try:
            work.run(part, config)
        except Exception:  # told when it is timed
            continue


def measure(head_dim: int, name: str, lengths: list[int], clock: CudaClock) -> Iterator[dict]:
    """A row for each candidate."""
    work = Work(lengths, head_dim)
    for part, launch, config in candidates(work.config, max(lengths)):
        row = {"kernel": part, "head_dim": head_dim, "length": name, "launch": asdict(launch)}
        try:
            work.run(part, config)
            timer = clock.timer(lambda part=part, config=config: work.run(part, config))
            yield row | {"median_ms": median(timer() for _ in range(REPS))}
        except Exception as error:
            yield row | {"median_ms": None, "unavailable": f"{type(error).__name__}: {error}"[:200]}


def main(arguments: list[str] | None = None) -> None:
    """Compiles, times, writes; prints the best of each kernel."""
    parser = argparse.ArgumentParser(prog="python -m bench.launches", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--head-dim", type=int, nargs="+", default=HEAD_DIMS)
    parser.add_argument("--length", nargs="+", help="names such as 512 or mixed; default: all")
    parser.add_argument("--out", type=Path, default=results.RESULTS)
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        parser.error("torch finds no CUDA device")
    device = torch.device("cuda")
    lists = dict(segment_lengths(device))
    lists = {name: lists[name] for name in options.length or lists}

    workers = min(12, os.cpu_count())
    jobs = [
        (lengths, head_dim, first, workers)
        for head_dim in options.head_dim
        # One list for each set of kernels that a length can choose.
        for lengths in {min(64, max(x)): x for x in lists.values()}.values()
        for first in range(workers)
    ]
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        pool.map(_compile, jobs, chunksize=1)

    path = options.out / results.machine_folder("cuda") / "launches.json"
    document = {"run": results.current_run("cuda", ceilings.measure(device)), "rows": []}
    clock = CudaClock(device)
    for head_dim in options.head_dim:
        for name, lengths in lists.items():
            rows = list(measure(head_dim, name, lengths, clock))
            document["rows"] += rows
            results.write(path, document)
            for part in CANDIDATES:
                timed = [r for r in rows if r["kernel"] == part and r["median_ms"] is not None]
                if timed:
                    best = min(timed, key=lambda row: row["median_ms"])
                    print(head_dim, name, part, f"{best['median_ms']:.3f} ms", best["launch"])


if __name__ == "__main__":
    main()
