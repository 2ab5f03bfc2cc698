"""``fastast fit``."""

from __future__ import annotations

import os
from dataclasses import fields
from pathlib import Path

from jsonargparse import SUPPRESS

from fastast.cli.options import parser_of
from fastast.train import Recipe, fit


def main(argv: list[str]) -> None:
    """Trains a model."""
    parser = parser_of("fit")
    parser.usage = "fastast fit RECIPE [options]"
    parser.add_argument("--recipe", action="config", help=SUPPRESS)
    parser.add_argument("--run-dir", type=str, help="default: runs/ and the recipe's name")
    parser.add_argument("--resume", action="store_true", help="go on with a stopped run")
    parser.add_class_arguments(Recipe)
    if argv and argv[0] not in ("-h", "--help"):
        recipe_file, *rest = argv
        if recipe_file.startswith("-"):
            raise ValueError(f"the recipe file comes first, then options; got {recipe_file}")
        if not Path(recipe_file).is_file():
            raise ValueError(f"there is no recipe file {recipe_file}")
        argv = ["--recipe", recipe_file, *rest]
    elif not argv:
        argv = ["--help"]
    options = parser.parse_args(argv)
    run_dir = options.run_dir or Path("runs") / Path(recipe_file).stem
    options = parser.instantiate(options)
    recipe = Recipe(**{part.name: options[part.name] for part in fields(Recipe)})
    fit(recipe, run_dir, resume=options.resume)
    if int(os.environ.get("RANK", 0)) == 0:
        print(f"The run is in {run_dir}; next: fastast evaluate {run_dir}")
