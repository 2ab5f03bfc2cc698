"""Trains ElasticAST and a fixed-length AST on the same clips, and compares them.

Both see the same number of tokens. They are then evaluated at clip lengths and frame shifts from
one end of the range to the other, as in figures 4 and 5 of the ElasticAST paper. Run it with
``make demo``, or ``make demo DATA=folder`` for your own clips, one folder per class.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import yaml
from rich.console import Console
from rich.table import Table

from fastast.data import generate_sounds
from fastast.train import Recipe, evaluate_over, fit, load_data, load_model
from fastast.train.figures import plot_curves

HERE = Path(__file__).resolve().parent
MODELS = {"ElasticAST, native lengths": "elastic_ast", "AST, fixed at 2 s": "ast"}
LENGTHS = (0.5, 1.0, 2.0, 3.0, 4.0, 6.0)
COMPRESSION = (1.0, 1.4, 2.0, 2.6, 3.2, 4.0)

console = Console()


def main() -> None:
    """Generates or opens the data, trains both models, and shows the comparison."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", help="folder with a folder of clips per class")
    parser.add_argument("--run-dir", type=Path, default=Path("runs/demo"))
    parser.add_argument("--tokens", type=int, help="tokens that each model sees")
    options = parser.parse_args()

    started = time.perf_counter()
    root = options.data
    if root is None:
        root = options.run_dir / "sounds"
        if not root.exists():
            console.print("Generating sounds ...")
            generate_sounds(root, clips_per_class=80, test_clips_per_class=40, seed=0)
    curves = {}
    for title, name in MODELS.items():
        console.rule(title)
        recipe = read_recipe(HERE / f"{name}.yaml", root, options.tokens)
        run_dir = options.run_dir / name
        shutil.rmtree(run_dir, ignore_errors=True)  # the demo begins anew every time
        fit(recipe, run_dir)
        method, recipe, _ = load_model(run_dir)
        test = load_data(recipe.data, recipe.train.seed).test
        longest = max(test.lengths) / test.sample_rate
        lengths = [length for length in LENGTHS if length <= np.ceil(longest)]
        curves[title] = evaluate_over(
            method, recipe, test, lengths=lengths, compression=COMPRESSION
        )

    console.print(comparison(curves))
    figure = options.run_dir / "demo.png"
    plot_curves(curves, figure, frame_shift_ms=recipe.frontend.frame_shift_ms)
    (options.run_dir / "demo.json").write_text(json.dumps(curves, indent=1) + "\n")
    console.print(
        f"The figure is {figure}. Took {(time.perf_counter() - started) / 60:.1f} minutes.\n"
        f"Try: .venv/bin/fastast predict {options.run_dir / 'elastic_ast'} some.wav",
        highlight=False,
    )


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
        table.add_row(f"frame shift {10 * row['at']:g} ms", *cells)
    return table


if __name__ == "__main__":
    main()
