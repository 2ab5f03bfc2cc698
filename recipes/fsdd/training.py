"""What the experiments on spoken digits share: trained side by side, one thread each."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parents[1]
RESULTS = REPOSITORY / "bench" / "results" / "cpu"
FIGURES = REPOSITORY / "docs" / "figures"
SPEAKERS = ("george", "jackson", "lucas", "nicolas", "theo", "yweweler")


@dataclass(frozen=True)
class Experiment:
    """What is trained, the seed, and the speaker that is left out.

    Attributes:
        kind: a name for it.
        seed: of the run.
        leave_out: a speaker; without, the official split.
    """

    kind: str
    seed: int
    leave_out: str | None = None

    @property
    def name(self) -> str:
        """Of its run directory."""
        return "-".join(filter(None, (self.kind, self.leave_out, str(self.seed))))


def train(
    experiment: Experiment, recipe: Path, options: Sequence[str], root: Path, runs: Path
) -> None:
    """Trains one experiment in a process of its own, or finishes a run that was stopped.

    Args:
        experiment: names the run directory.
        recipe: its file.
        options: of ``fastast fit``, beside folder, seed and speaker.
        root: folder of the recordings.
        runs: folder of the run directories.
    """
    command = [sys.executable, "-m", "fastast.cli", "fit", str(recipe), *options]
    command += ["--resume", "--run-dir", str(runs / experiment.name)]
    command += ["--data.root", str(root), "--train.seed", str(experiment.seed)]
    if experiment.leave_out:
        command += ["--data.options.leave_out", experiment.leave_out]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with open(runs / f"{experiment.name}.log", "w") as log:
        subprocess.run(command, stdout=log, stderr=log, env=environment, check=True)
    print(f"trained {experiment.name}", flush=True)


def side_by_side(jobs: int, work, items: Sequence) -> None:
    """Calls ``work`` with each item, ``jobs`` at a time."""
    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(work, items))


def spread(values: np.ndarray, digits: int = 2) -> str:
    """Mean and standard deviation over runs, as text; nothing of nothing."""
    if not len(values):
        return ""
    deviation = f" ± {values.std(ddof=1):.{digits}f}" if len(values) > 1 else ""
    return f"{values.mean():.{digits}f}{deviation}"


def table(header: list[str], rows: list[list[str]]) -> str:
    """In Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
