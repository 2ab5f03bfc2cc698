"""Figures of features, runs and evaluations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike
from typing import TYPE_CHECKING

import matplotlib
import numpy as np

matplotlib.use("Agg")  # files only; no display is needed

import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.colors import TwoSlopeNorm  # noqa: E402

from fastast.train.curves import AXES, Curves, axes_of, metric_of, place_of  # noqa: E402

if TYPE_CHECKING:
    from fastast.train.features import Features
    from fastast.train.metrics import ClassScore
    from fastast.train.reconstruct import Reconstruction
    from fastast.train.timeline import Timeline

_MOST_BARS = 60
_MOST_ROWS = 20


def plot_curves(models: Mapping[str, Curves], path: str | PathLike) -> None:
    """Accuracy over clip length, time resolution (ElasticAST, figures 4 and 5) and patch size.

    Of multi-label data, mAP. A star marks a model on clips as it was made for them: of native
    length, or its own fixed one (figure 4).

    Args:
        models: name to what :func:`~fastast.train.evaluate_over` returned for it; maybe with
            ``whole``, a row with ``seconds``, the length of the longest clip.
        path: of the image.
    """
    axes, metric = axes_of(models), metric_of(models)
    figure, panels = plt.subplots(
        1, len(axes), figsize=(5 * len(axes), 3.6), sharey=True, squeeze=False
    )
    for panel, axis in zip(panels[0], axes, strict=True):
        for name, curves in models.items():
            rows = curves.get(axis, ())
            at = [place_of(axis, row) for row in rows]
            (line,) = panel.plot(at, [_percent(row[metric]) for row in rows], "o-", label=name)
            whole = curves.get("whole", {})
            if axis == "lengths" and "seconds" in whole:
                color = line.get_color()
                panel.plot(whole["seconds"], _percent(whole[metric]), "*", ms=14, color=color)
        panel.set_xlabel(AXES[axis])
        panel.grid(alpha=0.3)
    panels[0, 0].set_ylabel(f"{metric} (%)")
    panels[0, 0].set_ylim(0, 102)
    panels[0, -1].legend()
    _save(figure, path)


def plot_per_class(classes: Sequence[tuple[str, ClassScore]], path: str | PathLike) -> None:
    """Average precision of each class as a bar, in the order given; classes without one last.

    Of more than 60 classes, the first and the last 30 that have one.

    Args:
        classes: name and score of each, best first.
        path: of the image.
    """
    shown = [(name, score) for name, score in classes if score.ap is not None]
    gap = []
    if len(shown) > _MOST_BARS:
        half = _MOST_BARS // 2
        gap = [half - 0.5]
        shown = shown[:half] + shown[-half:]
    figure, axis = plt.subplots(figsize=(7, 1 + 0.2 * max(len(shown), 4)))
    axis.barh(range(len(shown)), [100 * score.ap for _, score in shown])
    axis.set_yticks(
        range(len(shown)), [f"{name} ({score.positives})" for name, score in shown], fontsize=8
    )
    for place in gap:
        axis.axhline(place, color="black", linestyle=":")
    axis.set_ylim(len(shown) - 0.5, -0.5)
    axis.set_xlim(0, 100)
    axis.set_xlabel("average precision (%); clips of the class in brackets")
    axis.grid(axis="x", alpha=0.3)
    _save(figure, path)


def plot_features(features: Sequence[Features], path: str | PathLike) -> None:
    """Spectrograms below each other, each with its own time axis.

    Args:
        features: of one or more files.
        path: of the image.
    """
    rows = len(features)
    figure, axes = plt.subplots(rows, 1, figsize=(9, 0.6 + 2.2 * rows), squeeze=False)
    for axis, each in zip(axes[:, 0], features, strict=True):
        frames, mels = each.frames.shape
        seconds = frames * each.frame_shift_ms / 1000
        image = axis.imshow(
            each.frames.T,
            origin="lower",
            aspect="auto",
            interpolation="nearest",
            cmap="magma",
            extent=(0, seconds, 0, mels),
        )
        axis.set_title(each.path, fontsize=8, loc="left")
        axis.set_ylabel("mel bin")
        figure.colorbar(image, ax=axis, pad=0.01, label="log mel")
    axes[-1, 0].set_xlabel("time (s)")
    _save(figure, path, dpi=100)


def plot_reconstructions(
    features: Features, made: Sequence[Reconstruction], path: str | PathLike
) -> None:
    """What was there, what was left of it, and what was restored; a row for each kind of mask
    (Audio-MAE, figure 6).

    Args:
        features: of the file.
        made: of it.
        path: of the image.
    """
    frames, mels = features.frames.shape
    extent = (0, frames * features.frame_shift_ms / 1000, 0, mels)
    scale = {"vmin": float(features.frames.min()), "vmax": float(features.frames.max())}
    figure, axes = plt.subplots(
        len(made), 3, figsize=(12, 0.6 + 1.8 * len(made)), squeeze=False, sharex=True, sharey=True
    )
    for row, each in zip(axes, made, strict=True):
        panels = {
            "original": features.frames,
            f"{each.masking}: {100 * each.hidden.float().mean():.0f} % masked": each.masked,
            f"restored, mean squared error {each.error:.3f}": each.restored,
        }
        for axis, (title, image) in zip(row, panels.items(), strict=True):
            options = {"origin": "lower", "aspect": "auto", "interpolation": "nearest"}
            axis.imshow(np.asarray(image).T, cmap="magma", extent=extent, **options, **scale)
            axis.set_title(title, fontsize=8, loc="left")
        row[0].set_ylabel("mel bin")
    for axis in axes[-1]:
        axis.set_xlabel("time (s)")
    _save(figure, path, dpi=100)


def plot_timeline(timeline: Timeline, path: str | PathLike, threshold: float) -> None:
    """Probabilities over time, a row for each class: the twenty that are ever likeliest.

    Args:
        timeline: of a recording.
        path: of the image.
        threshold: from which on a class counts as heard; the colours change there.
    """
    peaks = timeline.probabilities.max(0)
    rows = sorted((-peaks).argsort(kind="stable")[:_MOST_ROWS].tolist())
    edges = timeline.edges
    unit, scale = ("min", 60) if edges[-1] > 180 else ("s", 1)
    figure, axis = plt.subplots(figsize=(10, 1.2 + 0.25 * max(len(rows), 4)))
    image = axis.pcolormesh(
        edges / scale,
        range(len(rows) + 1),
        timeline.probabilities.T[rows],
        cmap="RdYlBu_r",
        norm=TwoSlopeNorm(threshold, 0.0, 1.0),
        rasterized=True,
    )
    names = [timeline.class_names[row] for row in rows]
    axis.set_yticks([place + 0.5 for place in range(len(rows))], names, fontsize=8)
    axis.invert_yaxis()
    axis.set_xlabel(f"time ({unit})")
    axis.set_title(timeline.path, fontsize=8, loc="left")
    figure.colorbar(image, ax=axis, pad=0.01, label="probability")
    _save(figure, path)


def plot_learning_curves(
    panels: dict[str, dict[str, tuple[Sequence[float], Sequence[float]]]],
    path: str | PathLike,
    *,
    over: str = "step",
) -> None:
    """Measurements over optimiser steps, a panel for each kind and a line for each run.

    Args:
        panels: label of the panel to name of the run to steps and values.
        path: of the image.
        over: what there is in the place of steps.
    """
    figure, axes = plt.subplots(1, len(panels), figsize=(4.5 * len(panels), 3.6), squeeze=False)
    for axis, (label, runs) in zip(axes[0], panels.items(), strict=True):
        for name, (steps, values) in runs.items():
            axis.plot(steps, values, ".-", label=name)
        axis.set_xlabel(over)
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)
    axes[0, 0].legend(fontsize=8)
    _save(figure, path)


def _percent(share: float | None) -> float:
    return float("nan") if share is None else 100 * share


def _save(figure: plt.Figure, path: str | PathLike, dpi: int = 150) -> None:
    figure.tight_layout()
    figure.savefig(path, dpi=dpi)
    plt.close(figure)
