"""The recipes that ship, and the demo, run."""

import json
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import yaml

from fastast.train import Recipe, build_method

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
FILES = sorted(RECIPES.rglob("*.yaml"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(RECIPES).as_posix())
def test_recipe_builds(path, tmp_path):
    from jsonargparse import ArgumentParser

    parser = ArgumentParser()
    parser.add_argument("--recipe", action="config")
    parser.add_class_arguments(Recipe)
    options = parser.instantiate(parser.parse_args(["--recipe", str(path)]))
    recipe = Recipe(**{part.name: options[part.name] for part in fields(Recipe)})
    given = yaml.safe_load(path.read_text())
    for part, settings in given.items():  # nothing in the file is lost
        for name, value in settings.items():
            assert recipe.to_dict()[part][name] == value
    recipe.frontend.mean, recipe.frontend.std = 0.0, 1.0
    assert sum(p.numel() for p in build_method(recipe, 3).parameters()) > 0


def test_demo_on_a_folder_of_ones_own(tones, tmp_path):
    command = [sys.executable, str(RECIPES / "demo" / "run.py"), "--data", str(tones)]
    command += ["--run-dir", str(tmp_path / "demo"), "--tokens", "300"]
    for _ in range(2):  # a second demo begins anew
        result = subprocess.run(command, capture_output=True, text=True, timeout=240)
        assert result.returncode == 0, result.stderr
    assert "frame shift 40 ms" in result.stdout
    assert (tmp_path / "demo" / "demo.png").read_bytes().startswith(b"\x89PNG")
    curves = json.loads((tmp_path / "demo" / "demo.json").read_text())
    assert [row["at"] for row in curves["AST, fixed at 1 s"]["lengths"]] == [0.5, 1.0]
