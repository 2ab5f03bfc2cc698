"""The tables of the experiments on spoken digits, by hand."""

import importlib
import sys
from pathlib import Path

import numpy as np
import pytest

FOLDER = Path(__file__).resolve().parents[2] / "recipes" / "fsdd"


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    yield importlib.import_module("coarse_to_fine")
    for name in ("coarse_to_fine", "training"):
        sys.modules.pop(name, None)


def run(kind, seed, test, validation, phase, flops, leave_out=None):
    return {
        "kind": kind,
        "seed": seed,
        "leave_out": leave_out,
        "test_accuracy": test,
        "phase": phase,
        "flops": flops,
        "seconds": [2 * cost for cost in flops],
        "validation_accuracy": validation,
    }


def test_savings_by_hand(script):
    """Pairs go by seed and speaker; an epoch of the coarse phase is never the better one."""
    runs = [
        run("base", 0, 0.90, [0.5, 0.9, 0.8], [0, 0, 0], [4, 4, 4]),
        run("fast", 1, 0.80, [0.1, 0.7, 0.7], [0, 1, 1], [1, 4, 4]),
        run("base", 1, 0.82, [0.5, 0.6, 0.8], [0, 0, 0], [4, 4, 4]),
        run("fast", 0, 0.91, [0.95, 0.91, 0.99], [0, 1, 1], [1, 4, 4]),
        run("fast", 0, 0.10, [0.0], [0], [1], leave_out="theo"),
        run("base", 0, 0.10, [0.0], [0], [1], leave_out="theo"),
    ]
    found = script.Comparison(runs, "fast", "base", left_out=False)
    np.testing.assert_allclose(found.accuracy, [91, 80])
    np.testing.assert_allclose(found.delta, [1, -2])
    np.testing.assert_allclose(found.saved("flops"), [25, 25])
    np.testing.assert_allclose(found.saved("seconds"), [25, 25])
    # Seed 0: better in its second epoch, 5 of 8; seed 1 never is.
    np.testing.assert_allclose(found.saved_when_better("flops"), [37.5])


def test_every_experiment_has_a_recipe(script):
    from fastast.train.recipe_file import settings_in

    for experiment in script.experiments():
        family, setting = experiment.kind.split("-")
        assert setting in settings_in(script.RECIPES[family])
    names = [experiment.name for experiment in script.experiments()]
    assert len(set(names)) == len(names) == 13 * 9 + 9 * 3
