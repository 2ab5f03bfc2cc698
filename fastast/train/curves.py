"""Evaluations over lengths, time resolutions and patch sizes, of several models side by side.

What :func:`~fastast.train.evaluate_over` returns is a model's curves: rows for each of
:data:`AXES`. With ``whole``, a row more for clips as the model was made for them.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from os import PathLike

from fastast.train.metrics import headline

Curves = Mapping[str, Sequence[Mapping]]

AXES = {
    "lengths": "clip length (s)",
    "compression": "frame shift (ms)",
    "time_pools": "frames pooled to one",
    "patch_sizes": "patch size (mel bins x frames)",
}
"""What is varied, and how it is called."""


def axes_of(models: Mapping[str, Curves]) -> list[str]:
    """The axes along which some model was evaluated."""
    return [axis for axis in AXES if any(curves.get(axis) for curves in models.values())]


def metric_of(models: Mapping[str, Curves]) -> str:
    """The metric that is drawn: accuracy, or mAP of multi-label data."""
    axis = axes_of(models)[0]
    return headline(next(row for curves in models.values() for row in curves.get(axis, ())))


def place_of(axis: str, row: Mapping) -> float | str:
    """Where a row lies on its axis, in the axis's unit."""
    if axis == "patch_sizes":
        return "{}x{}".format(*row["at"])
    return row["frame_shift_ms" if axis == "compression" else "at"]


def curve_table(models: Mapping[str, Curves], axis: str) -> list[list[str]]:
    """The metric of each model along an axis: rows of text, the first the header."""
    metric = metric_of(models)
    found = {
        name: {place_of(axis, row): row[metric] for row in curves.get(axis, ())}
        for name, curves in models.items()
    }
    places = dict.fromkeys(at for row in found.values() for at in row)
    if axis != "patch_sizes":
        places = sorted(places)
    table = [[AXES[axis], *found]]
    for at in places:
        values = [row.get(at) for row in found.values()]
        cells = ["–" if value is None else f"{value:.2%}" for value in values]
        table.append([at if isinstance(at, str) else f"{at:.5g}", *cells])
    return table


def write_curves(models: Mapping[str, Curves], path: str | PathLike) -> None:
    """Writes all rows of all models as CSV, unrounded; what is undefined is empty."""
    axes = axes_of(models)
    rows = [
        {"model": name, "axis": axis, "place": place_of(axis, row)} | dict(row)
        for name, curves in models.items()
        for axis in axes
        for row in curves.get(axis, ())
    ]
    for row in rows:
        del row["at"]
        row.pop("frame_shift_ms", None)
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(key for row in rows for key in row)))
        writer.writeheader()
        writer.writerows(rows)
