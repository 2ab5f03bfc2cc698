"""``python -m bench ops|e2e|memory|report``, see ``--help``."""

from __future__ import annotations

import argparse
import functools
import sys
import traceback
from pathlib import Path

import torch

from bench import cases, ceilings, report, results
from bench.clock import clock_for
from bench.registry import GROUPS, Settings, find
from bench.runner import measure, progress

SIZES = tuple(cases.TRUNK_SIZES)
DTYPES = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16")}


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description="Measures fastast beside its peers, on the same work, in the same run.",
    )
    parser.add_argument(
        "groups",
        nargs="+",
        choices=(*GROUPS, "report"),
        metavar="group",
        help="ops (single operations), e2e (training steps), memory (what is kept for the "
        "backward and what a process takes; needs no GPU), report (writes docs/benchmarks.md from "
        "the results)",
    )
    parser.add_argument("--case", default="*", help="only cases that this pattern matches")
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), help="default: cuda where there is one"
    )
    parser.add_argument("--dtype", choices=DTYPES, help="default: bfloat16 on a GPU, else float32")
    parser.add_argument("--size", choices=SIZES, help="default: base on a GPU, else tiny")
    parser.add_argument(
        "--reps",
        type=int,
        help="repetitions; default: 10 on a CPU, at most 30 on a GPU, where slow steps get fewer",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=results.RESULTS,
        help="folder of the results; default: %(default)s",
    )
    parser.add_argument(
        "--docs", type=Path, default=results.DOCS, help="page of the report; default: %(default)s"
    )
    parser.add_argument(
        "--missing", action="store_true", help="only cases that have no result of this commit"
    )
    parser.add_argument("--list", action="store_true", help="show the cases, measure nothing")
    options = parser.parse_args(arguments)
    options.device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no CUDA device")
    return options


def run_group(group: str, options: argparse.Namespace, device: torch.device) -> list[str]:
    """Measures a group, writing each case's rows as they come; returns the cases that failed."""
    dtype = DTYPES[options.dtype] if options.dtype else None
    todo = list(find(group, Settings(device, dtype, options.size), options.case))
    if options.list:
        for bench, case in todo:
            print(bench.name, case.name, f"[{case.size}, {str(case.dtype)[6:]}]")
        return []

    path = options.out / results.machine_folder(device.type) / f"{group}.json"
    run = results.current_run(device.type, machine_ceilings(device) if todo else None)
    done = results.measured_cases(path, run) if options.missing else set()
    reps = options.reps or (10 if device.type == "cpu" else 30)
    clock = clock_for(device)
    failed = []
    for index, (bench, case) in enumerate(todo, 1):
        label = f"[{index}/{len(todo)}] {bench.name} {case.name}"
        if (bench.name, case.name, str(case.dtype)[6:], case.size) in done:
            print(f"{label}: measured already", flush=True)
            continue
        try:
            rows = measure(bench, case, clock, device.type, reps)
        except Exception as error:
            traceback.print_exc()
            print(f"{label}: FAILED, {error}", flush=True)
            failed.append(f"{bench.name} {case.name}")
            continue
        results.merge(path, rows, run)
        print(f"{label}: {progress(rows)}", flush=True)
        for row in rows:
            if reason := row["disagrees"]:
                print(f"{label}: {reason}", flush=True)
                failed.append(f"{bench.name} {case.name}, {row['contender']}")
    return failed


@functools.cache
def machine_ceilings(device: torch.device) -> dict[str, float] | None:
    """Measured once per run; a CPU's are not."""
    return ceilings.measure(device) if device.type == "cuda" else None


def main(arguments: list[str] | None = None) -> int:
    """Runs what the arguments ask for; 1 if a case failed or a peer disagreed."""
    options = parse(arguments)
    device = torch.device(options.device)
    failed = []
    for group in options.groups:
        if group == "report":
            report.write(options.out, options.docs)
            print(f"wrote {options.docs}")
        else:
            failed += run_group(group, options, device)
    for name in failed:
        print(f"failed: {name}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
