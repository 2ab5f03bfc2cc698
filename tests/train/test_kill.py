"""A run that is killed again and again ends like one that is not.

The runs are children of one process that has imported everything beforehand, so that each begins
in milliseconds. It is a process of its own: forking this one, whose threads have computed, is not
safe.
"""

import json
import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from fastast.train import PhaseConfig, RunDirectory, load_model

ROOT = Path(__file__).resolve().parents[2]
KILLS = 25

DRIVER = """
import json, os, signal, sys, time

recipe_file, run_dir, plan = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])

import torch
torch.set_num_threads(1)
from fastast.train import Recipe, RunDirectory, fit, run as run_module

recipe = Recipe.from_dict(json.loads(open(recipe_file).read()))
write_atomically = run_module.write_atomically

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def kill_while_writing(count, moment):
    # The count-th file is the last that this process touches: it dies with half of it written,
    # with all of it written but not renamed, or right after the renaming.
    left = [count]

    def writing(path, write):
        left[0] -= 1
        if left[0] > 0:
            return write_atomically(path, write)

        def half(temporary):
            write(temporary)
            if moment == "half":
                os.truncate(temporary, os.path.getsize(temporary) // 2)
            die()

        if moment == "renamed":
            write_atomically(path, write)
            die()
        write_atomically(path, half)

    run_module.write_atomically = writing

def child(kill):
    pid = os.fork()
    if pid:
        return pid
    try:
        if "file" in kill:
            kill_while_writing(kill["file"], kill["moment"])
        fit(recipe, run_dir, resume=True, quiet=True)
        status = 0
    except BaseException:
        import traceback
        traceback.print_exc()
        status = 1
    os._exit(status)

killed = []
for kill in plan:
    pid = child(kill)
    if "after" in kill:
        time.sleep(kill["after"])
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
    _, status = os.waitpid(pid, 0)
    if os.WIFSIGNALED(status):
        killed.append(kill)
    elif status:
        sys.exit(1)
print(json.dumps(len(killed)))
"""


def drive(recipe, run_dir, kills):
    """Runs ``recipe`` with kills, to the end; returns how many of them struck."""
    run_dir.parent.mkdir(parents=True, exist_ok=True)
    recipe_file = run_dir.parent / "recipe.json"
    recipe_file.write_text(json.dumps(recipe.to_dict()))
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, recipe_file, run_dir, json.dumps([*kills, {}])],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def curve(run_dir):
    """All that was logged of each step but the speed."""
    return RunDirectory(run_dir).metrics("train")


@pytest.fixture
def thorough(recipe):
    """A recipe with everything that has a state: averages, a plateau, mixing, phases, epochs."""
    recipe.data.validation = 0.2
    recipe.data.balance = "with_replacement"
    recipe.augment.mixup = 0.5
    recipe.augment.token_drop = 0.2
    recipe.optim.schedule, recipe.optim.patience = "plateau", 0
    recipe.phases = [PhaseConfig(compression=2, epochs=10, by="patch"), PhaseConfig(epochs=20)]
    recipe.train.average = "ema"
    recipe.train.log_every = 3
    recipe.train.log_clips = True
    recipe.train.checkpoint_minutes = 0.1 / 60
    return recipe


def test_killed_at_any_instant(thorough, tmp_path):
    begin = time.monotonic()
    assert drive(thorough, tmp_path / "whole", []) == 0
    seconds = time.monotonic() - begin
    whole = curve(tmp_path / "whole")
    assert sum(len(record["clips"]) for record in whole) > 100

    rng = np.random.default_rng()
    kills = [{"after": float(after)} for after in rng.uniform(0.05, seconds / 16, KILLS - 9)]
    for number, moment in enumerate(("half", "written", "renamed") * 3):
        # Weights and state, at the end of an epoch, or state alone, within one.
        kills.append({"file": 1 + number % 3, "moment": moment})
    rng.shuffle(kills)
    # Nearly all of them strike before the run is over; on another machine, some may not.
    assert drive(thorough, tmp_path / "cut", kills) >= KILLS - 5

    assert curve(tmp_path / "cut") == whole  # to the bit, and the same clips in each step
    epochs = [RunDirectory(tmp_path / name).metrics("epoch") for name in ("whole", "cut")]
    for name in ("epoch", "step", "tokens", "loss", "clips", "validation_loss", "validation_mAP"):
        assert [record[name] for record in epochs[0]] == [record[name] for record in epochs[1]]
    expected, found = (
        load_model(tmp_path / name)[0].model.state_dict() for name in ("whole", "cut")
    )
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert not list((tmp_path / "cut").glob("*.tmp"))


def test_each_clip_once_an_epoch(recipe, tmp_path):
    recipe.train.log_every, recipe.train.log_clips = 1, True
    recipe.train.checkpoint_minutes = 0.0
    drive(recipe, tmp_path / "run", [{"after": 0.3}, {"file": 4, "moment": "half"}] * 3)
    seen = Counter(
        (record["epoch"], clip) for record in curve(tmp_path / "run") for clip in record["clips"]
    )
    assert set(seen.values()) == {1}
    per_epoch = Counter(epoch for epoch, _ in seen)
    assert set(per_epoch) == {0, 1, 2} and len(set(per_epoch.values())) == 1
