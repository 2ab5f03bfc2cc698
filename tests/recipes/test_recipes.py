"""The recipes that ship, and the demo, run."""

import json
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
import yaml

from fastast.train import Recipe, RunDirectory, build_method, fit
from fastast.train.phases import adapt_state, phase_recipe
from fastast.train.recipe_file import read_recipe_file, settings_in

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
FILES = sorted(RECIPES.rglob("*.yaml"))


SETTINGS = [(path, setting) for path in FILES for setting in settings_in(path) or [None]]
every_recipe = pytest.mark.parametrize(
    "path, setting",
    SETTINGS,
    ids=[
        "-".join([path.relative_to(RECIPES).as_posix(), *filter(None, [s])]) for path, s in SETTINGS
    ],
)


def parsed(path, setting):
    """The recipe as the command line reads it."""
    from jsonargparse import ArgumentParser

    parser = ArgumentParser()
    parser.add_argument("--recipe", action="config")
    parser.add_class_arguments(Recipe)
    sections = yaml.safe_dump(read_recipe_file(path, setting), sort_keys=False)
    options = parser.instantiate(parser.parse_args(["--recipe", sections]))
    return Recipe(**{part.name: options[part.name] for part in fields(Recipe)})


@every_recipe
def test_recipe_builds(path, setting):
    recipe = parsed(path, setting)
    given = read_recipe_file(path, setting)
    phases = given.pop("phases", [])
    for part, settings in given.items():  # nothing in the file is lost
        for name, value in settings.items():
            assert recipe.to_dict()[part][name] == value
    for phase, settings in zip(recipe.to_dict()["phases"], phases, strict=True):
        assert phase == phase | settings
    recipe.frontend.mean, recipe.frontend.std = 0.0, 1.0
    with torch.device("meta"):
        methods = [
            build_method(phase_recipe(recipe, number), 3) for number in range(len(phases) or 1)
        ]
    state = {"model": methods[0].model.state_dict(), "optimizer": {"state": {}}}
    assert sum(value.numel() for value in state["model"].values()) > 0
    for number, method in enumerate(methods[1:], start=1):
        state |= adapt_state(state, recipe, number, 3)
        method.model.load_state_dict(state["model"], assign=True)


@every_recipe
def test_recipe_trains(path, setting, tones, tmp_path):
    """Two steps of each phase, of a small model on a few clips."""
    recipe = parsed(path, setting)
    family = recipe.model.name.rpartition("_")[0]
    recipe.data.kind, recipe.data.root, recipe.data.options = "folder", str(tones), {}
    recipe.data.validation, recipe.data.clips_per_epoch = 0.2, None
    small = {"dim": 16, "depth": 1, "num_heads": 1}
    if family == "hts_at":
        small = {"dim": 8, "depths": [1] * 4, "num_heads": [1] * 4}
    size = "small" if family == "asit" else "tiny"
    recipe.model = replace(recipe.model, name=f"{family}_{size}", init=None, **small)
    recipe.audio_mae = replace(
        recipe.audio_mae, decoder_dim=16, decoder_depth=2, decoder_heads=1, decoder_global=1
    )
    recipe.asit = replace(recipe.asit, hidden=16)
    recipe.train = replace(recipe.train, max_steps=2, max_tokens=None, batch_clips=2, device="cpu")
    fit(recipe, tmp_path, quiet=True)
    phases = RunDirectory(tmp_path).metrics("phase")
    assert [phase["steps"] for phase in phases] == [2] * (len(recipe.phases) or 1)


def test_demo_on_a_folder_of_ones_own(tones, tmp_path):
    command = [sys.executable, str(RECIPES / "demo" / "run.py"), "--data", str(tones)]
    command += ["--run-dir", str(tmp_path / "demo"), "--tokens", "300"]
    for _ in range(2):  # a second demo begins anew
        result = subprocess.run(command, capture_output=True, text=True, timeout=240)
        assert result.returncode == 0, result.stderr
    assert "frame shift 40 ms" in result.stdout
    for name in ("demo.png", "recording.png"):
        assert (tmp_path / "demo" / name).read_bytes().startswith(b"\x89PNG")
    curves = json.loads((tmp_path / "demo" / "demo.json").read_text())
    assert [row["at"] for row in curves["AST, fixed at 1 s"]["lengths"]] == [0.5, 1.0]
