"""The record that ``bench/gpu_run.sh`` keeps: which stages ran, on which commit, with what end.

``<folder>/<gpu>/gpu_run.json`` holds, for each stage, its last run: commit, status (``ok``,
``failed``, ``timed out``, ``nothing to do``), exit code, seconds, date and the end of its output.
Knows nothing of torch, since a stage may be there to find out that torch does not import.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path

from bench.results import RESULTS, ROOT, commit_and_dirty, slug, write

LOG_CHARACTERS = 4000
"""Of a stage's output that are kept, from its end; where the tree lies is left out of it."""

STATUS = {0: "ok", 5: "nothing to do", 124: "timed out", 137: "timed out"}
"""Of exit codes: pytest says 5 where no test was selected, ``timeout`` 124 or, killing, 137."""

FINISHED = ("ok", "nothing to do")


def record_path() -> Path:
    """Of this machine's GPU, in the folder that ``OUT`` names."""
    query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    try:
        names = subprocess.run(query, check=True, capture_output=True, text=True).stdout
        gpu = slug(names.splitlines()[0])
    except (OSError, subprocess.CalledProcessError, IndexError):
        gpu = "no-gpu"
    return Path(os.environ.get("OUT") or RESULTS) / gpu / "gpu_run.json"


def read(path: Path) -> dict:
    """The stages recorded so far, by name."""
    return json.loads(path.read_text()) if path.exists() else {}


def is_done(path: Path, stage: str) -> bool:
    """Whether the stage has succeeded for this commit; never on a tree with changes."""
    commit, dirty = commit_and_dirty()
    last = read(path).get(stage, {})
    same = last.get("commit") == commit and not last.get("dirty")
    return bool(commit) and not dirty and same and last.get("status") in FINISHED


def record(path: Path, stage: str, code: int, seconds: int, log: str) -> None:
    """Notes how a stage ended."""
    commit, dirty = commit_and_dirty()
    entry = {
        "commit": commit,
        "dirty": dirty,
        "status": STATUS.get(code, "failed"),
        "exit_code": code,
        "seconds": seconds,
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "log": log.replace(str(ROOT), ".")[-LOG_CHARACTERS:],
    }
    write(path, read(path) | {stage: entry})


def summary(path: Path) -> tuple[str, bool]:
    """A line per stage, and whether all have succeeded."""
    stages = read(path)
    lines = [
        f"{name:<8} {entry['status']:<14} {entry['seconds']:>4} s  "
        f"{(entry['commit'] or 'unknown')[:12]}{' + changes' if entry['dirty'] else ''}"
        for name, entry in stages.items()
    ]
    good = bool(stages) and all(entry["status"] in FINISHED for entry in stages.values())
    return "\n".join(lines), good


def main(arguments: list[str] | None = None) -> int:
    """``done STAGE``, ``record STAGE CODE SECONDS LOG``, ``summary`` or ``path``, of the record."""
    parser = argparse.ArgumentParser(prog="python -m bench.stages", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("done").add_argument("stage")
    recording = commands.add_parser("record")
    recording.add_argument("stage")
    recording.add_argument("code", type=int)
    recording.add_argument("seconds", type=int)
    recording.add_argument("log", type=Path)
    commands.add_parser("summary")
    commands.add_parser("path")
    options = parser.parse_args(arguments)

    path = record_path()
    if options.command == "done":
        return 0 if is_done(path, options.stage) else 1
    if options.command == "record":
        log = options.log.read_text(errors="replace")
        record(path, options.stage, options.code, options.seconds, log)
        return 0
    if options.command == "path":
        print(path)
        return 0
    text, good = summary(path)
    print(text)
    print(path)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
