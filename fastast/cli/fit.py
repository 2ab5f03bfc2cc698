"""``fastast fit``."""

from __future__ import annotations

import os
from argparse import ArgumentParser
from dataclasses import fields
from pathlib import Path

import yaml
from jsonargparse import SUPPRESS

from fastast.cli.options import parser_of
from fastast.train import Recipe, fit
from fastast.train.recipe_file import read_recipe_file


def main(argv: list[str]) -> None:
    """Trains a model."""
    parser = parser_of("fit")
    parser.usage = "fastast fit RECIPE [options]"
    parser.add_argument("--recipe", action="config", help=SUPPRESS)
    parser.add_argument("--setting", type=str, help="which, of a recipe that has several")
    parser.add_argument(
        "--run-dir", type=str, help="default: runs/, the recipe's name, and the setting's"
    )
    parser.add_argument("--resume", action="store_true", help="go on with a stopped run")
    parser.add_class_arguments(Recipe)
    if argv and argv[0] not in ("-h", "--help"):
        recipe_file, *rest = argv
        if recipe_file.startswith("-"):
            raise ValueError(f"the recipe file comes first, then options; got {recipe_file}")
        setting = setting_of(rest)
        # As text: a file name would be read by the parser, which knows of no settings.
        sections = yaml.safe_dump(read_recipe_file(recipe_file, setting), sort_keys=False)
        argv = ["--recipe", sections, *rest]
    elif not argv:
        argv = ["--help"]
    options = parser.parse_args(argv)
    run_dir = options.run_dir or Path("runs") / Path(recipe_file).stem / (options.setting or "")
    options = parser.instantiate(options)
    recipe = Recipe(**{part.name: options[part.name] for part in fields(Recipe)})
    fit(recipe, run_dir, resume=options.resume)
    if int(os.environ.get("RANK", 0)) == 0:
        print(f"The run is in {run_dir}; next: fastast evaluate {run_dir}")


def setting_of(argv: list[str]) -> str | None:
    """What ``--setting`` says; it must be known before the other options can be parsed."""
    parser = ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--setting")
    return parser.parse_known_args(argv)[0].setting
