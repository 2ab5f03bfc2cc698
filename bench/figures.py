"""Attention over segment length on a GPU: how long each peer takes, in units of our time."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path

from bench.results import load

BENCHMARK = "ops/packed_attention"
CASE = re.compile(r"length (\d+), head dim (\d+), (forward(?:\+backward)?)$")
PASSES = ("forward", "forward+backward")

Curves = dict[tuple[str, int], dict[str, dict[int, float]]]
"""By pass and head dim, by contender, by length."""


def curves(rows: list[dict]) -> Curves:
    """Times over ours of every contender that was timed, at lengths all segments share."""
    found: Curves = {}
    for row in rows:
        match = CASE.match(row["case"])
        timed = row["benchmark"] == BENCHMARK and row["device"] != "cpu" and row["median_ms"]
        if match and timed:
            length, head_dim, which = match.groups()
            panel = found.setdefault((which, int(head_dim)), {})
            ratio = 1.0 if row["ours"] else 1 / row["ours_over_this"]["median_ms"]
            panel.setdefault(row["contender"], {})[int(length)] = ratio
    return found


def draw(folder: Path, to: Path) -> dict[str, list[Path]]:
    """Draws ``attention_<gpu>.png`` for every GPU with results; paths by benchmark.

    Without matplotlib, what was drawn before is kept.
    """
    paths = []
    for document in sorted(folder.glob("*/ops.json")):
        panels = curves(load(document)["rows"])
        path = to / f"attention_{document.parent.name.replace('-', '_')}.png"
        if panels and find_spec("matplotlib"):
            _plot(panels, path)
        if panels and path.exists():
            paths.append(path)
    return {BENCHMARK: paths} if paths else {}


def _plot(panels: Curves, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")  # files only; no display is needed
    import matplotlib.pyplot as plt

    dims = sorted({head_dim for _, head_dim in panels})
    names = sorted({name for panel in panels.values() for name in panel} - {"fastast"})
    colours = dict(zip(names, plt.get_cmap("tab10").colors, strict=False))
    figure, axes = plt.subplots(
        len(PASSES), len(dims), figsize=(4 * len(dims), 3.2 * len(PASSES)), squeeze=False
    )
    for i, which in enumerate(PASSES):
        for axis, head_dim in zip(axes[i], dims, strict=True):
            panel = panels.get((which, head_dim), {})
            for name in names:
                if points := sorted(panel.get(name, {}).items()):
                    axis.plot(
                        *zip(*points, strict=True), "o-", ms=3, color=colours[name], label=name
                    )
            axis.axhline(1, color="black", lw=1, label="fastast")
            axis.set_xscale("log", base=2)
            axis.set_yscale("log", base=2)
            axis.xaxis.set_major_formatter("{x:.0f}")
            axis.yaxis.set_major_formatter("{x:g}")
            axis.set_title(f"{which}, head dim {head_dim}", fontsize=9)
            axis.grid(alpha=0.3)
        axes[i, 0].set_ylabel("time / ours")
    for axis in axes[-1]:
        axis.set_xlabel("tokens of a segment")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=5, fontsize=8)
    figure.tight_layout(rect=(0, 0.08, 1, 1))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)
