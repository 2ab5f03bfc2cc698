"""A linear classifier and nearest neighbours on frozen embeddings."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from fastast.cli import main
from fastast.train import fit
from fastast.train.probe import Labelled, linear_scores, neighbour_scores


def blobs(clips, classes=3, dim=5, seed=0):
    """Clips around a point for each class, and where those lie."""
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randint(classes, (clips,), generator=generator)
    centres = 2 * torch.randn(classes, dim, generator=torch.Generator().manual_seed(7))
    noise = torch.randn(clips, dim, generator=generator)
    return Labelled(centres[targets] + noise, targets, classes)


@pytest.mark.parametrize("penalty", [1e-3, 1e-1])
def test_linear_is_logistic_regression(penalty):
    train, test = blobs(200), blobs(50, seed=1)
    found = linear_scores(train, test.features, penalty).softmax(1)
    # scikit-learn's C weighs the summed loss against half the squared weights.
    expected = LogisticRegression(C=1 / (2 * penalty * len(train.targets)), tol=1e-8, max_iter=5000)
    expected.fit(train.features.double().numpy(), train.targets.numpy())
    probabilities = expected.predict_proba(test.features.double().numpy())
    np.testing.assert_allclose(found.numpy(), probabilities, atol=2e-3)


def test_linear_with_several_labels():
    train, test = blobs(300), blobs(60, seed=1)
    several = torch.nn.functional.one_hot(train.targets, 3).float()
    several[:, 0] = 1.0  # which all have
    scores = linear_scores(train._replace(targets=several), test.features, 1e-3)
    assert (scores[:, 0] > 0).all()
    assert ((scores[:, 2] > 0) == (test.targets == 2)).float().mean() > 0.85


def test_neighbours_by_hand():
    train = Labelled(
        torch.tensor([[1.0, 0.0], [0.8, 0.6], [-1.0, 0.0]]), torch.tensor([0, 1, 2]), 4
    )
    scores = neighbour_scores(train, torch.tensor([[2.0, 0.0], [-3.0, 0.1]]), 2)
    weights = torch.tensor([1.0, 0.8]).div(0.07).softmax(0)
    torch.testing.assert_close(scores[0], torch.tensor([*weights, 0.0, 0.0]))
    assert scores[1].argmax() == 2 and scores[1, 3] == 0
    one = neighbour_scores(train, torch.tensor([[0.8, 0.6]]), 1)
    assert one.tolist() == [[0, 1, 0, 0]]


@pytest.mark.parametrize("fixed", [False, True], ids=["elastic_ast", "ast"])
def test_the_command(recipe, tones, tmp_path, capsys, fixed):
    if fixed:
        recipe.model = replace(recipe.model, name="ast_tiny", max_time_patches=None, stride=(16, 8))
        recipe.frontend = replace(recipe.frontend, compression=[1.0], fixed_seconds=0.5)
    run = tmp_path / "run"
    fit(replace(recipe, train=replace(recipe.train, epochs=2)), run, quiet=True)
    assert main(["probe", str(run)]) == 0
    assert "accuracy on 8 test clips" in capsys.readouterr().out
    found = json.loads((run / "probe.json").read_text())
    for name in ("linear", "neighbours", "log-mel linear", "log-mel neighbours"):
        assert {"accuracy", "mAP", "chosen", "validation", "clips"} <= found[name].keys()
    assert found["log-mel linear"]["accuracy"] == 1  # tones of two pitches
    command = ["probe", str(run), "--kind", "folder", "--root", str(tones), "--labels", "0.5"]
    assert main(command) == 0
    assert json.loads((run / "probe.json").read_text())["labels"] == 0.5
    assert main(["probe", str(run), "--labels", "0"]) == 1
    assert "--labels must lie in (0, 1]" in capsys.readouterr().err


def test_of_a_model_without_labels(recipe, tones, tmp_path, capsys):
    recipe.model = replace(
        recipe.model, name="ssast_patch_tiny", max_time_patches=None, patch_size=(8, 8)
    )
    recipe.frontend = replace(recipe.frontend, compression=[1.0])
    recipe.data = replace(recipe.data, max_seconds=1.0)
    recipe.train = replace(recipe.train, method="ssast", max_steps=2)
    recipe.augment = replace(recipe.augment, gain_db=0.0, time_mask=0.0)
    fit(recipe, tmp_path / "run", quiet=True)
    assert main(["probe", str(tmp_path / "run")]) == 0
    assert "Wrote" in capsys.readouterr().out
