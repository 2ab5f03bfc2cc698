"""Processes that train together do what one does alone."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fastast.train import PhaseConfig, RunDirectory, fit, load_model

ROOT = Path(__file__).resolve().parents[2]


def torchrun(ranks, recipe, run_dir, *options, program=("-m", "fastast.cli")):
    """Trains by the command line, as a person would; or by another program that does."""
    file = run_dir.parent / f"{run_dir.name}.json"
    file.write_text(json.dumps(recipe.to_dict()))
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    return subprocess.run(
        [sys.executable, *launch, *program, "fit", file, "--run-dir", run_dir, *options],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.fixture
def pair(recipe):
    """Everything that must agree between ranks; an odd number of clips in the last step."""
    recipe.data.validation = 0.2
    recipe.augment.mixup = 0.5
    recipe.frontend.dither = 1e-3
    recipe.augment.crop_seconds, recipe.augment.crop = [0.2, 0.8], "cyclic"
    recipe.train.epochs = 2
    recipe.train.log_every, recipe.train.log_clips = 1, True
    return recipe


def phased(recipe):
    """A phase that glides, then a fine one that keeps the optimiser's moments."""
    glide = PhaseConfig(compression=4, to=2, epochs=2)
    recipe.phases = [glide, PhaseConfig(epochs=1, keep_moments=True)]


def flexible(recipe):
    """With patches of another size in each step."""
    recipe.model = replace(
        recipe.model, name="flexi_ast_tiny", patch_size=(8, 8), max_time_patches=None
    )
    recipe.augment.patch_sizes, recipe.train.batch_tokens = [8, (16, 8)], 512


def pretraining(recipe):
    """Without labels, in a coarse phase and a fine one."""
    recipe.model = replace(
        recipe.model, name="ssast_patch_tiny", patch_size=(8, 8), max_time_patches=None
    )
    recipe.augment.mixup = 0.0
    recipe.train.method, recipe.train.batch_tokens = "ssast", 512
    phased(recipe)


@pytest.mark.parametrize(
    "change",
    [phased, flexible, pretraining],
    ids=["elastic in phases", "flexi", "pretraining in phases"],
)
def test_two_ranks_equal_one_with_the_same_batches(pair, change, tmp_path):
    change(pair)
    alone = replace(pair, train=replace(pair.train, accumulate=2))
    fit(alone, tmp_path / "alone", quiet=True)
    done = torchrun(2, pair, tmp_path / "pair")
    assert done.returncode == 0, done.stderr
    # Clip for clip the same batches make up the steps, and a step is the mean over its clips.
    one, two = (RunDirectory(tmp_path / name).metrics("train") for name in ("alone", "pair"))
    assert [record["clips"] for record in one] == [record["clips"] for record in two]
    for name in ("loss", "gradient_norm"):
        expected = torch.tensor([record[name] for record in one], dtype=torch.float64)
        found = torch.tensor([record[name] for record in two], dtype=torch.float64)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)

    one, two = (RunDirectory(tmp_path / name).metrics("epoch") for name in ("alone", "pair"))
    for name in ("step", "tokens", "clips", "validation_clips"):
        assert [record[name] for record in one] == [record[name] for record in two]
    # That of patches is a mean over the clips, whose sum has another order.
    for name, budget in (("validation_accuracy", 1e-6), ("validation_loss", 1e-5)):
        assert [record[name] for record in two] == pytest.approx(
            [record[name] for record in one], rel=budget
        )
    expected, found = (load_model(tmp_path / name)[0].state_dict() for name in ("alone", "pair"))
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=2e-6, msg=name)


def test_a_pair_can_be_taken_up_by_one_with_the_same_steps(pair, tmp_path):
    pair.train = replace(pair.train, checkpoint_minutes=0.0)
    done = torchrun(2, pair, tmp_path / "whole")
    assert done.returncode == 0, done.stderr
    run = RunDirectory(tmp_path / "whole")
    state = run.load_checkpoint()
    assert state["batches_per_step"] == 2 and state["epoch"] == 2
    pair.train.accumulate = 2
    fit(pair, tmp_path / "whole", resume=True, quiet=True)  # nothing is left to do

    pair.train.accumulate = 1
    with pytest.raises(ValueError, match="2 batches per step and cannot go on with 1"):
        fit(pair, tmp_path / "whole", resume=True, quiet=True)


STOPPER = """
import os, signal, sys
import torch
before = torch.optim.AdamW.step
steps = 0
def step(self, *args, **kwargs):
    global steps
    steps += 1
    if steps == 3 and os.environ["RANK"] == "1":  # one rank alone is asked
        os.kill(os.getpid(), signal.SIGTERM)
    return before(self, *args, **kwargs)
torch.optim.AdamW.step = step
from fastast.cli import main
sys.exit(main())
"""


def test_three_ranks_stopped_within_an_epoch_resume_to_the_bit(pair, tmp_path):
    """Also the sums over three gradients, which depend on the order that DDP puts them in."""
    pair.phases = [PhaseConfig(compression=2), PhaseConfig(epochs=1)]
    whole, cut, stopper = (tmp_path / name for name in ("whole", "cut", "stopper.py"))
    done = torchrun(3, pair, whole)
    assert done.returncode == 0, done.stderr
    stopper.write_text(STOPPER)
    done = torchrun(3, pair, cut, program=[stopper])
    assert done.returncode != 0
    assert RunDirectory(cut).load_checkpoint()["step"] == 3, done.stderr
    done = torchrun(3, pair, cut, "--resume")
    assert done.returncode == 0, done.stderr
    assert RunDirectory(whole).metrics("train") == RunDirectory(cut).metrics("train")
    one, two = (RunDirectory(run).metrics("epoch") for run in (whole, cut))
    for name in ("step", "tokens", "clips", "loss", "validation_loss"):
        assert [record[name] for record in one] == [record[name] for record in two]


APART = """
import os, sys
from fastast.train import loop
load = loop.load_data
def load_data(*args):
    splits = load(*args)
    if os.environ["RANK"] == "1":
        splits.train = splits.train.subset(range(len(splits.train) - 1))
    return splits
loop.load_data = load_data
from fastast.cli import main
sys.exit(main())
"""


def test_ranks_that_see_other_data_say_so(pair, tmp_path):
    (tmp_path / "apart.py").write_text(APART)
    done = torchrun(2, pair, tmp_path / "pair", program=[tmp_path / "apart.py"])
    assert done.returncode != 0
    assert "process 1 sees another data than process 0" in done.stderr


COUNTER = """
import os, sys
from fastast.cli import main
status = main()
names = [open(f"/proc/self/task/{task}/comm").read() for task in os.listdir("/proc/self/task")]
print("threads of gloo:", sum(name.startswith("pt_gloo") for name in names))
sys.exit(status)
"""


def test_no_thread_of_gloo_outlives_training(pair, tmp_path):
    """A process that exits while one runs may abort, and torchrun take the run for failed."""
    pair.train = replace(pair.train, epochs=1)
    (tmp_path / "counter.py").write_text(COUNTER)
    done = torchrun(2, pair, tmp_path / "pair", program=[tmp_path / "counter.py"])
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("threads of gloo: 0") == 2
