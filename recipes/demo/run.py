"""Trains ElasticAST and a fixed-length AST on the same clips, and compares them.

Both see the same number of tokens. They are then evaluated at clip lengths and frame shifts from
one end of the range to the other, as in figures 4 and 5 of the ElasticAST paper. Run it with
``make demo``, or ``make demo DATA=folder`` for your own clips, one folder per class.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
import yaml
from rich.console import Console
from rich.table import Table

from fastast.data import generate_sounds, write_wav
from fastast.train import Recipe, evaluate_over, fit, load_data, load_model
from fastast.train.figures import plot_curves
from fastast.train.timeline import predict_timeline, write_timeline

HERE = Path(__file__).resolve().parent
MODELS = {"ElasticAST, native lengths": "elastic_ast", "AST, fixed at 1 s": "ast"}
LENGTHS = (0.5, 1.0, 2.0, 3.0, 4.0, 6.0)
COMPRESSION = (1.0, 1.4, 2.0, 2.6, 3.2, 4.0)
CLIPS_OF_RECORDING = 12

console = Console()


def main() -> None:
    """Generates or opens the data, trains both models, and shows the comparison."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", help="folder with a folder of clips per class")
    parser.add_argument("--run-dir", type=Path, default=Path("runs/demo"))
    parser.add_argument("--tokens", type=int, help="tokens that each model sees")
    options = parser.parse_args()

    started = time.perf_counter()
    options.run_dir.mkdir(parents=True, exist_ok=True)
    root = options.data
    if root is None:
        root = options.run_dir / "sounds"
        if not root.exists():
            console.print("Generating sounds ...")
            generate_sounds(root, clips_per_class=150, test_clips_per_class=40, seed=0)
    if (options.run_dir / "demo.json").exists():  # an earlier demo's; this one begins anew
        for name in MODELS.values():
            shutil.rmtree(options.run_dir / name, ignore_errors=True)
    (options.run_dir / "demo.json").write_text("{}\n")
    # The two models train side by side, each on one core: at this size a second thread makes a
    # step only about a seventh faster.
    with ProcessPoolExecutor(2, get_context("spawn")) as pool:
        runs = [
            pool.submit(train_and_evaluate, name, root, options.run_dir, options.tokens)
            for name in MODELS.values()
        ]
        curves = {title: run.result() for title, run in zip(MODELS, runs, strict=True)}

    console.print(comparison(curves))
    figure = options.run_dir / "demo.png"
    plot_curves(curves, figure)
    (options.run_dir / "demo.json").write_text(json.dumps(curves, indent=1) + "\n")
    draw_recording(options.run_dir)
    minutes = (time.perf_counter() - started) / 60
    console.print(
        f"Figures: {figure}, {figure.with_name('recording.png')}. Took {minutes:.1f} minutes.\n"
        f"Try: .venv/bin/fastast predict {options.run_dir / 'elastic_ast'} some.wav",
        highlight=False,
    )


def train_and_evaluate(
    name: str, root: str | Path, folder: Path, tokens: int | None
) -> dict[str, list[dict]]:
    """Trains one of the recipes and evaluates it at all lengths and frame shifts."""
    torch.set_num_threads(1)
    os.environ["TERM"] = "dumb"  # lines instead of two bars that overwrite each other
    recipe = read_recipe(HERE / f"{name}.yaml", root, tokens)
    fit(recipe, folder / name)
    method, recipe, _ = load_model(folder / name)
    test = load_data(recipe.data).test
    longest = max(test.lengths) / test.sample_rate
    lengths = [length for length in LENGTHS if length <= np.ceil(longest)]
    return evaluate_over(method, recipe, test, lengths=lengths, compression=COMPRESSION)


def draw_recording(folder: Path) -> None:
    """A test clip of each class, one after the other, and what ElasticAST hears when."""
    method, recipe, class_names = load_model(folder / "elastic_ast")
    test = load_data(recipe.data, ["test"]).test
    _, rows = np.unique(test.labels, return_index=True)
    clips = [test.waveform(row) for row in rows[:CLIPS_OF_RECORDING]]
    write_wav(folder / "recording.wav", torch.cat(clips), test.sample_rate)
    timeline = predict_timeline(
        method,
        recipe,
        folder / "recording.wav",
        "cpu",
        window=1.0,
        hop=0.25,
        class_names=class_names,
    )
    write_timeline(timeline, folder, "recording", threshold=0.5)


def read_recipe(path: Path, root: str | Path, tokens: int | None) -> Recipe:
    """A recipe of this folder, on the given data."""
    settings = yaml.safe_load(path.read_text())
    recipe = Recipe.from_dict(settings)
    recipe.data.root = str(root)
    if tokens:
        recipe.train = replace(recipe.train, max_tokens=tokens)
    return recipe


def comparison(curves: dict[str, dict[str, list[dict]]]) -> Table:
    """Accuracy of both models at every length and frame shift, as one table."""
    table = Table("evaluated at", *curves, title="Accuracy on clips that were not trained on")
    first = next(iter(curves.values()))
    for index, row in enumerate(first["lengths"]):
        cells = [f"{rows['lengths'][index]['accuracy']:.1%}" for rows in curves.values()]
        table.add_row(f"length up to {row['at']:g} s", *cells)
    table.add_section()
    for index, row in enumerate(first["compression"]):
        cells = [f"{rows['compression'][index]['accuracy']:.1%}" for rows in curves.values()]
        table.add_row(f"frame shift {row['frame_shift_ms']:g} ms", *cells)
    return table


if __name__ == "__main__":
    main()
