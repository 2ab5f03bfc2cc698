"""Runs side by side: how far they came, how well they did, what it cost and what set them apart.

Everything is read from the run directories (:mod:`fastast.train.run`), so runs that are still
going, or were killed, can be compared with finished ones.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from os import PathLike
from pathlib import Path

import yaml

from fastast.train.curves import axes_of, curve_table, metric_of, write_curves
from fastast.train.metrics import headline
from fastast.train.run import RunDirectory

_NOTHING = "–"
_MEASURED = [f"validation_{name}" for name in ("accuracy", "mAP", "mAUC", "d_prime", "loss")]


@dataclass(frozen=True)
class RunRecord:
    """What a run directory says.

    Attributes:
        name: unique among the runs compared.
        settings: of the recipe, by full name such as ``"optim.lr"``.
        epochs: one record per epoch that is over.
        steps: records in between.
        final: record of the weights that were kept, where they are not the last epoch's.
        evaluation: what ``fastast evaluate`` wrote last, or None.
    """

    name: str
    settings: dict[str, object]
    epochs: list[dict]
    steps: list[dict]
    final: dict
    evaluation: dict | None

    @property
    def last_phase(self) -> list[dict]:
        """The epochs of the last phase, as far as it came; those before it do not count."""
        last = len(self.settings.get("phases") or [None]) - 1
        return [epoch for epoch in self.epochs if epoch.get("phase", 0) == last]

    def best_epoch(self, metric: str) -> dict | None:
        """The first epoch of the last phase with the highest value."""
        known = [epoch for epoch in self.last_phase if _is_number(epoch.get(metric))]
        return max(known, key=lambda epoch: epoch[metric], default=None)

    def first_better(self, metric: str, goal: float) -> dict | None:
        """The first epoch of the last phase that is better than ``goal``."""
        known = (epoch for epoch in self.last_phase if _is_number(epoch.get(metric)))
        return next((epoch for epoch in known if epoch[metric] > goal), None)

    def spent(self, key: str, until: dict) -> float:
        """What all epochs up to and with one have cost, ``"flops"`` or ``"seconds"``."""
        return sum(e.get(key) or 0 for e in self.epochs if e["epoch"] <= until["epoch"])


def read_runs(paths: Sequence[str | PathLike]) -> list[RunRecord]:
    """Reads run directories.

    Raises:
        ValueError: one is not a run directory, or is named twice.
    """
    folders = [Path(path) for path in paths]
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise ValueError("a run directory is named twice")
    names = [folder.resolve().name for folder in folders]
    if len(set(names)) < len(names):
        names = [str(folder) for folder in folders]
    return [_read_run(folder, name) for folder, name in zip(folders, names, strict=True)]


def _read_run(folder: Path, name: str) -> RunRecord:
    config = folder / "config.yaml"
    if not config.is_file():
        raise ValueError(f"{folder} is not a run directory: it has no config.yaml")
    epochs: dict[int, dict] = {}
    steps, final = [], {}
    for record in RunDirectory(folder).metrics():
        kind = record.get("kind", "epoch")
        if kind == "epoch":
            epochs[record["epoch"]] = record
        elif kind == "train":
            steps.append(record)
        elif kind == "final":
            final = record
    evaluation = folder / "evaluation.json"
    return RunRecord(
        name,
        _flatten(yaml.safe_load(config.read_text())),
        list(epochs.values()),
        steps,
        final,
        json.loads(evaluation.read_text()) if evaluation.is_file() else None,
    )


def _flatten(settings: dict) -> dict[str, object]:
    flat = {}
    for section, part in settings.items():
        if isinstance(part, dict):
            flat |= {f"{section}.{key}": value for key, value in part.items()}
        else:
            flat[section] = part
    return flat


def results_table(runs: Sequence[RunRecord]) -> list[list[str]]:
    """Rows of text, a column for each run; the first row names them.

    Of each validation measurement the last and the best, and that of the weights which were kept
    where those are an average; metrics in percent, and with them the number of clips they were
    measured on.
    """
    last = [run.epochs[-1] if run.epochs else {} for run in runs]
    latest = [
        max([{"step": 0}, *run.epochs[-1:], *run.steps[-1:]], key=lambda record: record["step"])
        for run in runs
    ]
    rows = [
        ["", *(run.name for run in runs)],
        ["epochs", *(f"{len(run.epochs)} of {_planned_epochs(run)}" for run in runs)],
        ["steps", *(f"{record['step']:,}" for record in latest)],
        ["tokens", *(_count(record.get("tokens")) for record in latest)],
        ["time", *(_time(run.epochs) for run in runs)],
        ["training FLOPs", *(_flops(run.epochs) for run in runs)],
        ["audio heard, h", *(_sum(run.epochs, "audio_hours") for run in runs)],
        ["peak memory, GiB", *(_peak(run.epochs) for run in runs)],
        ["training loss", *(_number("loss", record.get("loss")) for record in last)],
    ]
    for key in _MEASURED:
        label = key.replace("_", " ").replace("d prime", "d'")
        rows += [
            [f"{label}, last", *(_number(key, record.get(key)) for record in last)],
            [f"{label}, best (epoch)", *(_best(key, run.epochs) for run in runs)],
            [f"{label}, kept weights", *(_number(key, run.final.get(key)) for run in runs)],
        ]
    for key in ("validation_clips", "validation_left_out"):
        rows.append([key.replace("_", " "), *(_count(record.get(key)) for record in last)])
    rows.append(["evaluated", *(_evaluated(run.evaluation) for run in runs)])
    return [row for row in rows if set(row[1:]) != {_NOTHING}]


def settings_table(runs: Sequence[RunRecord]) -> list[list[str]]:
    """The settings that are not the same in all runs: rows of text, the first is the header."""
    names = dict.fromkeys(name for run in runs for name in run.settings)
    rows = [["setting", *(run.name for run in runs)]]
    for name in names:
        values = [_setting(run, name) for run in runs]
        if len(set(values)) > 1:
            rows.append([name, *values])
    return rows


def savings_table(runs: Sequence[RunRecord], *, converged: bool = False) -> list[list[str]]:
    """What runs save over the first, a row for each; the tables of From Coarse to Fine.

    The baseline counts up to its best epoch. The others count up to the first epoch of their last
    phase that is better, from the beginning of their first (section 3.3); or up to the best epoch
    of the last phase, if none is better or ``converged`` is set (table 3). FLOPs are those that the
    log has, time is that of training without validation.

    Returns:
        Rows of text, the first the header; none if there is nothing to compare.
    """
    metric = _headline(runs)
    name = metric.removeprefix("validation_")
    rows = [["", name, "delta", "FLOPs saved", "time saved", "epochs"]]
    reference = runs[0].best_epoch(metric)
    if len(runs) < 2 or reference is None:
        return []
    goal = reference[metric]
    cost = {key: runs[0].spent(key, reference) for key in ("flops", "seconds")}
    for run in runs:
        found = run.best_epoch(metric)
        if run is not runs[0] and not converged:
            found = run.first_better(metric, goal) or found
        if found is None:
            rows.append([run.name, *[_NOTHING] * 5])
            continue
        cells = [_NOTHING] * 3
        if run is not runs[0]:
            cells = [f"{100 * (found[metric] - goal):+.2f}"]
            for key in ("flops", "seconds"):
                mine = run.spent(key, found)
                cells.append(f"{1 - mine / cost[key]:.2%}" if mine and cost[key] else _NOTHING)
        epochs = sum(epoch["epoch"] <= found["epoch"] for epoch in run.epochs)
        rows.append([run.name, _number(metric, found[metric]), *cells, str(epochs)])
    return rows


def compute_curves(runs: Sequence[RunRecord]) -> dict[str, tuple[list, list]]:
    """The metric after each epoch over the FLOPs until then, of each run that has any."""
    metric, curves = _headline(runs), {}
    for run in runs:
        known = [epoch for epoch in run.epochs if _is_number(epoch.get(metric))]
        spent = [run.spent("flops", epoch) for epoch in known]
        if any(spent):
            curves[run.name] = (
                spent,
                [100 * epoch[metric] for epoch in known],
            )
    return curves


def learning_curves(runs: Sequence[RunRecord]) -> dict[str, dict[str, tuple[list, list]]]:
    """What :func:`~fastast.train.figures.plot_learning_curves` draws."""
    metric = _headline(runs)
    panels = {
        "training loss": {run.name: _curve(run.steps or run.epochs, "loss") for run in runs},
        "validation loss": {run.name: _curve(run.epochs, "validation_loss") for run in runs},
        f"validation {metric.removeprefix('validation_')} (%)": {
            run.name: _curve(run.epochs, metric, 100) for run in runs
        },
    }
    return {
        label: curves
        for label, curves in panels.items()
        if label == "training loss" or any(steps for steps, _ in curves.values())
    }


def write_report(runs: Sequence[RunRecord], folder: str | PathLike) -> Path:
    """Writes ``report.md`` and its figures; returns the path of the former.

    The figures are ``report.png``, where there are FLOPs to compare ``compute.png``, and where runs
    were evaluated over lengths and the like ``evaluation.png``, with all numbers in
    ``evaluation.csv``.
    """
    from fastast.train.figures import plot_curves, plot_learning_curves

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    plot_learning_curves(learning_curves(runs), folder / "report.png")
    settings = settings_table(runs)
    lines = ["# Runs", "", *_markdown(results_table(runs)), "", "![Learning curves](report.png)"]
    if savings := savings_table(runs):
        lines += ["", f"## What is saved over {runs[0].name}", ""]
        lines += ["At the first epoch of the last phase that is better, or else its best:", ""]
        lines += [*_markdown(savings), "", "At the best epoch of the last phase:", ""]
        lines += _markdown(savings_table(runs, converged=True))
    if curves := compute_curves(runs):
        panel = f"validation {_headline(runs).removeprefix('validation_')} (%)"
        plot_learning_curves({panel: curves}, folder / "compute.png", over="training FLOPs")
        lines += ["", "![Metric over compute](compute.png)"]
    models = evaluated_curves(runs)
    if axes := axes_of(models):
        plot_curves(models, folder / "evaluation.png")
        write_curves(models, folder / "evaluation.csv")
        lines += ["", f"## Evaluation: {metric_of(models)}"]
        for axis in axes:
            lines += ["", *_markdown(curve_table(models, axis))]
        lines += ["", "![Over lengths and resolutions](evaluation.png)"]
    if len(runs) > 1:
        lines += ["", "## Settings that differ", ""]
        lines += _markdown(settings) if len(settings) > 1 else ["None."]
    path = folder / "report.md"
    path.write_text("\n".join(lines) + "\n")
    return path


def evaluated_curves(runs: Sequence[RunRecord]) -> dict[str, dict]:
    """What ``fastast evaluate`` wrote last for each run that has been evaluated."""
    return {run.name: run.evaluation for run in runs if run.evaluation is not None}


def shared_folder(paths: Sequence[str | PathLike]) -> Path:
    """Where a report on these runs belongs: in the run if there is one, else above them all."""
    return Path(os.path.commonpath([os.path.abspath(path) for path in paths]))


def _headline(runs: Sequence[RunRecord]) -> str:
    keys = {key for run in runs for record in run.epochs for key in record}
    return "validation_" + headline({key.removeprefix("validation_") for key in keys})


def _curve(records: Sequence[dict], key: str, scale: float = 1.0) -> tuple[list, list]:
    known = [record for record in records if _is_number(record.get(key))]
    return [record["step"] for record in known], [scale * record[key] for record in known]


def _best(key: str, epochs: Sequence[dict]) -> str:
    known = [record for record in epochs if _is_number(record.get(key))]
    if not known:
        return _NOTHING
    pick = min if key.endswith("loss") else max
    best = pick(known, key=lambda record: record[key])
    return f"{_number(key, best[key])} ({best['epoch'] + 1})"


def _setting(run: RunRecord, name: str) -> str:
    if name not in run.settings:
        return _NOTHING
    value = run.settings[name]
    if name == "phases":  # what a phase does not say would fill the table
        value = [{k: v for k, v in phase.items() if v not in (None, False, {})} for phase in value]
    return json.dumps(value)


def _count(value: int | None) -> str:
    return _NOTHING if value is None else f"{value:,}"


def _time(epochs: Sequence[dict]) -> str:
    seconds = sum(record.get("seconds", 0) for record in epochs)
    return str(timedelta(seconds=round(seconds))) if seconds else _NOTHING


def _flops(epochs: Sequence[dict]) -> str:
    flops = sum(record.get("flops") or 0 for record in epochs)
    return f"{flops:.3g}" if flops else _NOTHING


def _sum(epochs: Sequence[dict], key: str) -> str:
    known = [record[key] for record in epochs if _is_number(record.get(key))]
    return f"{sum(known):,.2f}" if known else _NOTHING


def _peak(epochs: Sequence[dict]) -> str:
    known = [e["peak_memory_gib"] for e in epochs if _is_number(e.get("peak_memory_gib"))]
    return f"{max(known):.2f}" if known else _NOTHING


def _planned_epochs(run: RunRecord) -> str:
    """Of all phases."""
    default = run.settings.get("train.epochs")
    phases = run.settings.get("phases") or [{}]
    planned = [phase.get("epochs") or default for phase in phases]
    return _NOTHING if None in planned else str(sum(planned))


def _number(key: str, value: float | None) -> str:
    if not _is_number(value):
        return _NOTHING
    return f"{value:.4f}" if key.endswith(("loss", "d_prime")) else f"{value:.2%}"


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _evaluated(evaluation: dict | None) -> str:
    if evaluation is None:
        return _NOTHING
    whole = evaluation["whole"]
    metric = headline(whole)
    left_out = f", {whole['left_out']} left out" if whole.get("left_out") else ""
    return (
        f"{metric} {_number(metric, whole.get(metric))} "
        f"({evaluation['clips_of']}, {whole['clips']} clips{left_out})"
    )


def _markdown(rows: Sequence[Sequence[str]]) -> list[str]:
    header, *body = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    return [f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *body)]
