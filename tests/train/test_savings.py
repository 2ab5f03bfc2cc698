"""The FLOPs that From Coarse to Fine saves, from its epochs: tables 2, 4 and 6."""

from functools import cache
from types import SimpleNamespace

import pytest
import torch

from fastast.train import FrontendConfig, ModelConfig, PhaseConfig, Recipe, TrainConfig
from fastast.train.build import build_method
from fastast.train.phases import phase_recipe
from fastast.train.report import RunRecord, savings_table

WITHIN = 0.15  # points of a percentage
CHOICES = [
    # What is compressed by which methods, phases of (C, epochs), the baseline's best epoch, saved.
    ("VGGSound", "fshift pool", [(4, 5), (1, 3)], 10, 58.31),
    ("VGGSound", "fshift pool", [(2, 5), (1, 3)], 10, 46.16),
    ("VGGSound", "patch", [(4, 5), (1, 3)], 10, 58.23),
    ("VGGSound", "patch", [(2, 5), (1, 3)], 10, 46.11),
    ("AudioSet", "fshift pool", [(4, 1), (1, 3)], 5, 35.32),
    ("AudioSet", "fshift pool", [(2, 1), (1, 3)], 5, 30.47),
    ("AudioSet", "patch", [(4, 1), (1, 3)], 5, 35.29),
    ("AudioSet", "patch", [(2, 1), (1, 3)], 5, 30.44),
    ("VoxCeleb", "fshift pool", [(4, 5), (1, 3)], 9, 53.67),
    ("VoxCeleb", "fshift pool", [(4, 5), (1, 4)], 9, 42.56),
    ("VoxCeleb", "fshift pool", [(4, 5), (1, 5)], 9, 31.45),
    ("VoxCeleb", "fshift pool", [(4, 5), (1, 6)], 9, 20.34),
    ("VoxCeleb", "patch", [(4, 5), (1, 6)], 9, 20.25),
    ("VoxCeleb", "fshift pool", [(2, 5), (1, 3)], 9, 40.18),
    ("Kinetics-Sounds", "patch", [(4, 5), (1, 5)], 9, 31.36),
    ("Kinetics-Sounds", "fshift pool", [(2, 5), (1, 4)], 9, 29.07),
    ("Kinetics-Sounds", "fshift pool", [(2, 5), (1, 5)], 9, 17.96),
    ("Kinetics-Sounds", "patch", [(2, 5), (1, 4)], 9, 29.01),
    ("VGGSound", "fshift pool", [(4, 3), (2, 3), (1, 2)], 10, 58.68),
    ("VGGSound", "patch", [(4, 3), (2, 3), (1, 2)], 10, 58.60),
    ("VoxCeleb", "fshift pool", [(4, 3), (2, 3), (1, 4)], 9, 31.87),
    ("VoxCeleb", "fshift pool", [(4, 3), (2, 3), (1, 3)], 9, 42.98),
    ("VoxCeleb", "patch", [(4, 3), (2, 3), (1, 5)], 9, 20.67),
]
METHODS = {"fshift pool": ("frame_shift", "average", "max")}


PRETRAINING = 34.58  # 100,000 and 500,000 iterations in place of 800,000


@cache
def flops_of_a_clip(compression, by):
    """Of a training step of AST base on 1,024 frames in patches of 16 x 16, and its tokens."""
    recipe = Recipe(
        frontend=FrontendConfig(fixed_seconds=10.255, mean=0.0, std=1.0),
        model=ModelConfig(name="ast_base", patch_size=(16, 16), stride=(16, 16)),
        phases=[PhaseConfig(compression=compression, by=by)],
    )
    with torch.device("meta"):
        model = build_method(phase_recipe(recipe, 0), 527, multi_label=True).model
    tokens = model.geometry.num_tokens(model.input_frames)
    return model.flops([tokens]).training, tokens


def logged(name, phases, by, accuracy):
    """What the log of a run would hold."""
    epochs = [
        {
            "epoch": 0,
            "phase": phase,
            "flops": flops_of_a_clip(compression, by)[0],
            "validation_accuracy": 0.1,
        }
        for phase, (compression, count) in enumerate(phases)
        for _ in range(count)
    ]
    epochs = [epoch | {"epoch": number} for number, epoch in enumerate(epochs)]
    epochs[-1]["validation_accuracy"] = accuracy
    return RunRecord(name, {"phases": [{}] * len(phases)}, epochs, [], {}, None)


@pytest.mark.parametrize(
    "methods, phases, best, saved",
    [choice[1:] for choice in CHOICES],
    ids=[f"{c[0]}-{c[1]}-{'+'.join(f'{n}x{factor}' for factor, n in c[2])}" for c in CHOICES],
)
def test_the_paper_s_savings(methods, phases, best, saved):
    for by in METHODS.get(methods, ("patch",)):
        baseline = logged("baseline", [(1, best)], by, 0.5)
        rows = savings_table([baseline, logged("coarse to fine", phases, by, 0.51)])
        assert float(rows[2][3].rstrip("%")) == pytest.approx(saved, abs=WITHIN)


@cache
def flops_of_pretraining(compression):
    """Of a step of SSAST's on a clip of 1,024 frames, as the log of a run counts it."""
    recipe = Recipe(
        frontend=FrontendConfig(fixed_seconds=10.255, mean=0.0, std=1.0),
        model=ModelConfig(name="ssast_patch_base"),
        train=TrainConfig(method="ssast"),
        phases=[PhaseConfig(compression=compression)],
    )
    with torch.device("meta"):
        method = build_method(phase_recipe(recipe, 0), 0)
    grid = method.model.geometry.grid([method.model.input_frames])
    return method.flops(SimpleNamespace(grid=grid))


def test_the_paper_s_saving_on_pretraining():
    whole, coarse = flops_of_pretraining(1), flops_of_pretraining(4)
    saved = 1 - (100_000 * coarse + 500_000 * whole) / (800_000 * whole)
    assert 100 * saved == pytest.approx(PRETRAINING, abs=WITHIN)


@pytest.mark.parametrize("by", ["frame_shift", "average", "max"])
def test_cost_ratios(by):
    whole, half, quarter = (flops_of_a_clip(factor, by) for factor in (1, 2, 4))
    assert (whole[1], half[1], quarter[1]) == (514, 258, 130)
    assert half[0] / whole[0] == pytest.approx(0.4769, abs=2e-4)
    assert quarter[0] / whole[0] == pytest.approx(0.2340, abs=2e-4)
