"""Recipe files that hold an experiment at several settings."""

import pytest

from fastast.cli import fit as command
from fastast.train.recipe_file import read_recipe_file, settings_in

FILE = """
model: {name: ast_base, depth: 3}
train: {epochs: 20}
phases: [{compression: 2}]
settings:
  baseline: {}
  coarse:
    train: {seed: 4}
    phases: [{compression: 4, epochs: 5}, {compression: 1, optim: {lr: 1.0e-4}}]
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "experiment.yaml"
    path.write_text(FILE)
    return path


def test_a_setting_changes_sections_key_by_key(file):
    assert settings_in(file) == ["baseline", "coarse"]
    plain, coarse = (read_recipe_file(file, name) for name in ("baseline", "coarse"))
    assert plain == {
        "model": {"name": "ast_base", "depth": 3},
        "train": {"epochs": 20},
        "phases": [{"compression": 2}],
    }
    assert coarse["train"] == {"epochs": 20, "seed": 4} and coarse["model"] == plain["model"]
    assert [phase["compression"] for phase in coarse["phases"]] == [4, 1]


def test_a_file_without_settings(tmp_path):
    path = tmp_path / "one.yaml"
    path.write_text("train: {epochs: 2}\n")
    assert settings_in(path) == [] and read_recipe_file(path) == {"train": {"epochs": 2}}
    with pytest.raises(ValueError, match="has no settings to choose from; leave out --setting"):
        read_recipe_file(path, "coarse")


def test_what_is_wrong_says_so(file, tmp_path):
    with pytest.raises(ValueError, match="several settings; name one of baseline, coarse"):
        read_recipe_file(file)
    with pytest.raises(ValueError, match="it has no setting 'fine' of baseline, coarse"):
        read_recipe_file(file, "fine")
    with pytest.raises(ValueError, match="there is no recipe file"):
        read_recipe_file(tmp_path / "nowhere.yaml")
    file.write_text("- a list")
    with pytest.raises(ValueError, match="is not a recipe: it has no sections"):
        read_recipe_file(file)
    file.write_text("{")
    with pytest.raises(ValueError, match="is not YAML"):
        read_recipe_file(file)


@pytest.mark.parametrize("option", [["--setting", "coarse"], ["--setting=coarse"]])
def test_the_command_line_takes_a_setting_and_what_overrides_it(file, monkeypatch, option):
    found = []
    monkeypatch.setattr(command, "fit", lambda *args, **kwargs: found.append(args))
    command.main([str(file), *option, "--train.epochs", "7"])
    (recipe, run_dir), *_ = found
    assert recipe.train.epochs == 7 and recipe.train.seed == 4 and recipe.model.depth == 3
    assert [phase.epochs for phase in recipe.phases] == [5, None]
    assert recipe.phases[1].optim == {"lr": 1e-4}
    assert run_dir.parts == ("runs", "experiment", "coarse")
