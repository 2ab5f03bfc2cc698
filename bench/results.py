"""The one schema of measured numbers: ``<folder>/<machine>/<group>.json``.

A file holds ``rows`` and the ``runs`` they come from. A row says what was measured (``benchmark``,
``case``, ``contender``, ``device``, ``dtype``, ``size``, ``shapes``) and what came out::

    median_ms, p20_ms, p80_ms   of ``reps`` repetitions
    tokens, flops               that the contender computes, padding included (bench.flops)
    bytes                       of inputs, outputs and gradients, each once per pass
    saved_bytes                 kept for the backward (bench.memory)
    peak_bytes                  of the allocator during a step, on a GPU; of a process (bench.peak)
    error                       largest relative error against the float64 reference
    ours_over_this              our median, FLOPs and bytes over this contender's
    unchecked                   why it is not compared with the reference
    unavailable, disagrees      why a peer has no numbers: it cannot do the case, or does another

What was not measured is ``null``. A run says on what and from which code: machine, its load before
(processes that ran or waited for a core, on average over a minute), versions, a GPU's measured
ceilings (bench.ceilings), commit, whether the tree had uncommitted changes, and when. Measuring a
case again replaces it.
"""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import tempfile
from datetime import datetime, timezone
from pathlib import Path

SCHEMA = 1
ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"
DOCS = ROOT / "docs" / "benchmarks.md"
KEY = ("benchmark", "case", "device", "dtype", "size")
"""What identifies a case within a file; its contenders are measured, and replaced, together."""


def machine_folder(device: str) -> str:
    """The name results are filed under: the GPU's, such as ``nvidia-h200``, or ``cpu``."""
    if device == "cpu":
        return "cpu"
    import torch

    return slug(torch.cuda.get_device_name())


def slug(name: str) -> str:
    """A name as part of a path."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def current_run(device: str, ceilings: dict[str, float] | None = None) -> dict:
    """Machine, versions, commit and date of what is measured now.

    Args:
        device: type of what the work runs on.
        ceilings: of the GPU, from :func:`bench.ceilings.measure`.
    """
    import numpy
    import torch
    import triton

    cuda = device != "cpu"
    commit, dirty = commit_and_dirty()
    return {
        "machine": {
            "gpu": torch.cuda.get_device_name() if cuda else None,
            "gpu_memory": torch.cuda.get_device_properties(0).total_memory if cuda else None,
            "cpu": _cpu_name(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "load": round(os.getloadavg()[0], 1),
        },
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "triton": triton.__version__,
            "numpy": numpy.__version__,
            "cuda": torch.version.cuda if cuda else None,
        },
        "ceilings": ceilings,
        "commit": commit,
        "dirty": dirty,
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
    }


def commit_and_dirty() -> tuple[str | None, bool | None]:
    """The commit of the code, and whether the tree differs from it.

    Results and the page made of them do not count as differences, else a run's first result would
    taint the second. Without git the variable ``FASTAST_COMMIT`` may name the commit of a clean
    tree; ``(None, None)`` if nothing does.
    """
    outputs = [str(path.relative_to(ROOT)) for path in (RESULTS, DOCS)]
    try:
        commit = _git("rev-parse", "HEAD").strip()
        changes = _git("status", "--porcelain", "--", ".", *(f":!{path}" for path in outputs))
    except (OSError, subprocess.CalledProcessError):
        named = os.environ.get("FASTAST_COMMIT")
        return (named, False) if named else (None, None)
    return commit, bool(changes.strip())


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(ROOT), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def load(path: Path) -> dict:
    """A result file, or an empty one where there is none.

    Raises:
        ValueError: the file is of another schema.
    """
    if not path.exists():
        return {"schema": SCHEMA, "runs": {}, "rows": []}
    document = json.loads(path.read_text())
    if document.get("schema") != SCHEMA:
        raise ValueError(f"{path} has schema {document.get('schema')}; this code reads {SCHEMA}")
    return document


def key(row: dict) -> tuple[str, ...]:
    """The case that a row belongs to."""
    return tuple(row[name] for name in KEY)


def merge(path: Path, rows: list[dict], run: dict) -> None:
    """Adds a run's rows to a file, in place of all rows of the same cases. Other cases stay.

    The file is replaced in one step: a reader, or a run that is killed, never sees half of one.
    """
    document = load(path)
    run_id = f"{run['date']} {(run['commit'] or 'unknown')[:12]}"
    replaced = {key(row) for row in rows}
    kept = [row for row in document["rows"] if key(row) not in replaced]
    kept += [row | {"run": run_id} for row in rows]
    kept.sort(key=lambda row: (key(row), not row["ours"], row["contender"]))
    runs = document["runs"] | {run_id: run}
    used = sorted({row["run"] for row in kept})
    write(path, {"schema": SCHEMA, "runs": {name: runs[name] for name in used}, "rows": kept})


def write(path: Path, document: dict) -> None:
    """Writes JSON atomically, making the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w") as stream:
            json.dump(document, stream, indent=1, allow_nan=False)
            stream.write("\n")
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


def measured_cases(path: Path, run: dict) -> set[tuple[str, ...]]:
    """``(benchmark, case, dtype, size)`` of the rows that this run's clean commit has already."""
    if run["commit"] is None or run["dirty"]:
        return set()
    document = load(path)
    same = {
        name
        for name, other in document["runs"].items()
        if other["commit"] == run["commit"] and not other["dirty"]
    }
    return {
        (row["benchmark"], row["case"], row["dtype"], row["size"])
        for row in document["rows"]
        if row["run"] in same
    }
