"""Memory that some work takes at most, measured in a process of its own.

A process that has done other work holds memory that the next work finds free, so each measurement
begins a new one: ``python -m bench.peak MODULE:FUNCTION ARGUMENT ... [--warm]``. The function is
given the arguments and returns two callables, a little work of the same kind and the work itself.
With ``--warm`` the little one is done first, so that libraries and tables that are loaded once do
not count. Then the work is repeated, and what the process's resident memory grew by at its peak is
printed. Linux alone says that, and may be off by some hundred KiB.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median

from bench.results import ROOT

CALLS = 20
PROCESSES = 5


def growth(target: str, *arguments: str, warm: bool) -> int:
    """Bytes that the work takes, the median of some processes with one thread each.

    Args:
        target: ``module:function``, see above.
        arguments: of the function.
        warm: do a little of the work before.

    Raises:
        RuntimeError: the process failed.
    """
    command = [sys.executable, "-m", "bench.peak", target, *arguments, *["--warm"] * warm]
    found = []
    for _ in range(PROCESSES):
        done = subprocess.run(
            command,
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise RuntimeError(f"{' '.join(command[1:])}: {done.stderr.strip()[-500:]}")
        found.append(int(done.stdout.split()[-1]))
    return int(median(found))


def measure(little: Callable[[], object], work: Callable[[], object], warm: bool) -> int:
    """What this process grows by at its peak."""
    if warm:
        little()
    # What was freed before would serve the work without the process growing.
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak is what there is now
    before = _status("VmRSS")
    for _ in range(CALLS):
        work()
    return _status("VmHWM") - before


def _status(name: str) -> int:
    """A size in /proc/self/status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def main(arguments: list[str] | None = None) -> None:
    """Measures and prints a number of bytes."""
    parser = argparse.ArgumentParser(prog="python -m bench.peak", description=__doc__)
    parser.add_argument("target", help="module:function that makes the little and the whole work")
    parser.add_argument("arguments", nargs="*", help="of the function")
    parser.add_argument("--warm", action="store_true", help="do the little work before")
    options = parser.parse_args(arguments)
    module, function = options.target.split(":")
    works = getattr(importlib.import_module(module), function)(*options.arguments)
    print(measure(*works, options.warm))


if __name__ == "__main__":
    main()
