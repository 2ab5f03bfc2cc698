"""Figures of runs and evaluations."""

from __future__ import annotations

from os import PathLike

import matplotlib

matplotlib.use("Agg")  # files only; no display is needed

import matplotlib.pyplot as plt  # noqa: E402


def plot_curves(
    models: dict[str, dict[str, list[dict]]], path: str | PathLike, frame_shift_ms: float
) -> None:
    """Accuracy over clip length and over time resolution, as in ElasticAST's figures 4 and 5.

    Args:
        models: name to what :func:`~fastast.train.evaluate_over` returned for it.
        path: of the image.
        frame_shift_ms: what the factors in ``compression`` are of.
    """
    panels = [
        (key, label)
        for key, label in (("lengths", "clip length (s)"), ("compression", "frame shift (ms)"))
        if any(rows[key] for rows in models.values())
    ]
    figure, axes = plt.subplots(
        1, len(panels), figsize=(5 * len(panels), 3.6), sharey=True, squeeze=False
    )
    for axis, (key, label) in zip(axes[0], panels, strict=True):
        for name, rows in models.items():
            at = [row["at"] for row in rows[key]]
            if key == "compression":
                at = [factor * frame_shift_ms for factor in at]
            axis.plot(at, [100 * row["accuracy"] for row in rows[key]], "o-", label=name)
        axis.set_xlabel(label)
        axis.grid(alpha=0.3)
    axes[0, 0].set_ylabel("accuracy (%)")
    axes[0, 0].set_ylim(0, 102)
    axes[0, -1].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)
