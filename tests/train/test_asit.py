"""Runs of ASiT: views from the plan, a teacher that resumes, fine-tuning that starts from it."""

from dataclasses import replace

import pytest
import torch

from fastast.data.sampling import VIEW
from fastast.models import ASiT
from fastast.train import (
    ASiTConfig,
    PhaseConfig,
    RunDirectory,
    build_method,
    fit,
    load_data,
    load_model,
    make_loader,
)
from fastast.train.embed import embed
from tests.train.test_fit import weights, with_train
from tests.train.test_ranks import torchrun


@pytest.fixture
def pretraining(recipe):
    """The recipe of tests/conftest.py, to pre-train a narrow model on views of 0.15 to 0.3 s."""
    size = {"name": "asit_small", "patch_size": (8, 8), "max_time_patches": None}
    return replace(
        recipe,
        augment=replace(recipe.augment, crop_seconds=[0.15, 0.3], crop="random", roll=True),
        model=replace(recipe.model, **size),
        asit=ASiTConfig(hidden=24, bottleneck=8, local_classes=12, global_classes=20, momentum=0.9),
        train=replace(recipe.train, method="asit", epochs=2, log_every=1),
    )


@pytest.fixture
def fine_tuning(pretraining, recipe):
    return replace(
        pretraining,
        data=replace(pretraining.data, max_seconds=0.5),
        augment=recipe.augment,
        model=replace(pretraining.model, stride=(8, 4)),
        train=replace(pretraining.train, method="supervised", max_steps=2),
    )


def with_statistics(recipe):
    return replace(recipe, frontend=replace(recipe.frontend, mean=0.0, std=1.0))


@pytest.mark.parametrize("fixed_shapes", [False, True])
@pytest.mark.parametrize("part", ["train", "validation"])
def test_views_stand_side_by_side(pretraining, part, fixed_shapes):
    recipe = with_statistics(pretraining)
    recipe.train.batch_clips = 7
    data = getattr(load_data(recipe.data), part)
    geometry = build_method(recipe, 2).model.geometry
    training = {"training": part == "train", "fixed_shapes": fixed_shapes}
    loader = make_loader(recipe, data, geometry, **training)
    seen, lengths, shifts = [], [], set()
    for batch in loader.epoch(0):
        assert len(batch.clip_ids) % 2 == 0 and batch.num_clips <= 6
        assert not fixed_shapes or len(batch.clip_ids) == 6
        ids = batch.clip_ids[: batch.num_clips].view(-1, 2)
        assert (ids[:, 1] - ids[:, 0] == VIEW).all()
        seen += ids[:, 0].tolist()
        samples = batch.sample_offsets.diff()[: batch.num_clips]
        lengths += samples.view(-1, 2).tolist()
        shifts |= set(batch.frame_shift[: batch.num_clips].tolist())
    assert sorted(seen) == sorted(data.clip_ids.tolist())
    assert max(map(max, lengths)) <= 0.3 * 8000
    assert any(first != second for first, second in lengths)
    assert len(shifts) == (3 if part == "train" else 1)
    assert loader.silent_batch().grid.segments.num_segments == (6 if fixed_shapes else 2)


def test_two_epochs_and_fine_tuning(pretraining, fine_tuning, tmp_path):
    kept = fit(pretraining, tmp_path / "pre", quiet=True)
    epochs = RunDirectory(tmp_path / "pre").metrics("epoch")
    names = ("loss", "reconstruction", "local", "global", "local_entropy", "global_spread")
    assert all(0 < epochs[-1][f"validation_{name}"] for name in names)
    parts = sum(epochs[-1][f"validation_{name}"] for name in ("reconstruction", "local", "global"))
    assert epochs[-1]["validation_loss"] == pytest.approx(parts, rel=1e-5)
    assert epochs[-1]["flops"] > 0

    # What is kept is the teacher, which the student has left behind.
    state = RunDirectory(tmp_path / "pre").load_checkpoint()
    saved = weights(tmp_path / "pre")
    assert set(state["model"]) == set(saved) and "local_center" in state["method"]
    for name, value in saved.items():
        assert torch.equal(value, state["method"][f"teacher.{name}"]), name
        assert torch.equal(value, kept.model.state_dict()[name]), name
    assert any(not torch.equal(value, state["model"][name]) for name, value in saved.items())
    method = load_model(tmp_path / "pre")[0]
    teacher = method.teacher.state_dict()
    assert all(torch.equal(value, teacher[name]) for name, value in saved.items())

    # Clips are embedded whole, each once.
    method, loaded, _ = load_model(tmp_path / "pre")
    data = load_data(loaded.data).test
    (found,) = embed(method, loaded, data, "cpu")
    assert found.names == list(data.names)
    clip = method.frontend.filterbank([data.waveform(0)], frame_shift=80)
    expected = method.model.embed(clip)[0]
    torch.testing.assert_close(found.vectors[0], expected, rtol=1e-4, atol=1e-5)

    recipe = replace(fine_tuning, model=replace(fine_tuning.model, init=str(tmp_path / "pre")))
    fit(recipe, tmp_path / "fine", quiet=True)
    model = load_model(tmp_path / "fine")[0].model
    assert isinstance(model, ASiT) and model.positions.grid == (4, 11)


def test_resumes_bit_for_bit(pretraining, tmp_path):
    recipe = with_train(pretraining, checkpoint_minutes=0.0, accumulate=2)
    recipe.asit.teacher_temp_epochs = 3
    fit(recipe, tmp_path / "whole", quiet=True)

    class KilledError(Exception):
        pass

    def die(self, *args, before=torch.optim.AdamW.step, **kwargs):
        die.steps += 1
        if die.steps == steps + 2:  # within the second epoch
            raise KilledError
        return before(self, *args, **kwargs)

    die.steps = 0
    whole = RunDirectory(tmp_path / "whole")
    steps = whole.metrics("epoch")[0]["step"]
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KilledError):
        patch.setattr(torch.optim.AdamW, "step", die)
        fit(recipe, tmp_path / "cut", quiet=True)
    fit(recipe, tmp_path / "cut", resume=True, quiet=True)
    cut = RunDirectory(tmp_path / "cut")
    assert [r["loss"] for r in whole.metrics("train")] == [r["loss"] for r in cut.metrics("train")]
    expected, found = (run.load_checkpoint() for run in (whole, cut))
    for part in ("model", "method"):
        for name, value in expected[part].items():
            assert torch.equal(found[part][name], value), name
    saved = weights(tmp_path / "cut")
    assert all(torch.equal(saved[name], x) for name, x in weights(tmp_path / "whole").items())


def test_two_ranks_equal_one_with_the_same_batches(pretraining, tmp_path):
    """Their teachers and centres too, which see what all of them have seen."""
    recipe = with_train(pretraining, max_steps=4, log_clips=True)
    fit(with_train(recipe, accumulate=2), tmp_path / "alone", quiet=True)
    done = torchrun(2, recipe, tmp_path / "pair")
    assert done.returncode == 0, done.stderr
    one, two = (RunDirectory(tmp_path / name) for name in ("alone", "pair"))
    for expected, found in zip(one.metrics("train"), two.metrics("train"), strict=True):
        assert found["clips"] == expected["clips"]
        assert found["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    expected, found = (run.load_checkpoint()["method"] for run in (one, two))
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5, msg=name)
    assert expected["global_center"].abs().sum() > 0


def test_teacher_and_centres_go_on_in_the_next_phase(pretraining, tmp_path):
    pretraining.phases = [PhaseConfig(compression=2.0, steps=2), PhaseConfig(steps=2)]
    pretraining.frontend = replace(pretraining.frontend, compression=[1.0])
    pretraining.asit.momentum = pretraining.asit.momentum_end = 1.0  # a teacher that stays
    pretraining.asit.center_momentum = 1.0
    fit(pretraining, tmp_path, quiet=True)
    assert len(RunDirectory(tmp_path).metrics("phase")) == 2
    method = build_method(with_statistics(pretraining), 2)
    torch.manual_seed(pretraining.train.seed)
    first = replace(with_statistics(pretraining), phases=[])
    first.frontend = replace(first.frontend, compression=[2.0])
    first = build_method(first, 2).teacher.state_dict()
    state = RunDirectory(tmp_path).load_checkpoint()["method"]
    for name, value in method.teacher.state_dict().items():
        assert state[f"teacher.{name}"].shape == value.shape
        if name != "positions.table":
            assert torch.equal(state[f"teacher.{name}"], first[name]), name


def test_what_does_not_fit_says_so(pretraining):
    recipe = with_statistics(pretraining)
    for part, name, value in (
        ("train", "loss", "cross_entropy"),
        ("train", "average", "ema"),
        ("augment", "mixup", 0.5),
        ("augment", "token_drop", 0.1),
        ("frontend", "fixed_seconds", 0.5),
        ("model", "init", "runs/x"),
    ):
        wrong = replace(recipe, **{part: replace(getattr(recipe, part), **{name: value})})
        with pytest.raises(ValueError, match=rf"{part}\.{name} .* leave it out"):
            build_method(wrong, 2)
    wrong = replace(recipe, augment=replace(recipe.augment, crop_seconds=None))
    with pytest.raises(ValueError, match=r"set augment\.crop_seconds"):
        build_method(wrong, 2)
    wrong = replace(recipe, model=replace(recipe.model, stride=(4, 4)))
    with pytest.raises(ValueError, match="asit_small does not take these settings"):
        build_method(wrong, 2)
    wrong = replace(recipe, train=replace(recipe.train, batch_clips=1))
    data, geometry = load_data(recipe.data).train, build_method(recipe, 2).model.geometry
    with pytest.raises(ValueError, match=r"views must lie in \[1, 1\]"):
        make_loader(wrong, data, geometry, training=True)
    wrong = replace(recipe, train=replace(recipe.train, batch_tokens=25))
    with pytest.raises(ValueError, match="tokens but the budget allows 12 for each of 2 views"):
        make_loader(wrong, data, geometry, training=True)
