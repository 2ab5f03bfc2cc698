"""Runs of Audio-MAE: pre-training, also over ranks and resumed, and fine-tuning from it."""

from dataclasses import replace

import pytest
import torch

from fastast.data import Batch
from fastast.models import AudioMAEPretraining
from fastast.train import RunDirectory, build_method, evaluate_over, fit, load_data, load_model
from fastast.train.build import make_loader
from fastast.train.init import start_from
from fastast.train.loop import measure_statistics, pick_metric
from tests.train.test_fit import weights, with_train


@pytest.fixture
def pretraining(recipe):
    """The recipe of tests/conftest.py, to pre-train two narrow blocks and a decoder of two."""
    return replace(
        recipe,
        frontend=replace(recipe.frontend, compression=[1.0]),
        model=replace(
            recipe.model, name="audio_mae_tiny", patch_size=(8, 8), max_time_patches=None
        ),
        audio_mae=replace(
            recipe.audio_mae,
            decoder_dim=24,
            decoder_depth=2,
            decoder_heads=2,
            bias_dropout=0.1,
            average="patches",
        ),
        train=replace(recipe.train, method="audio_mae", batch_tokens=400, log_every=1),
    )


@pytest.fixture
def fine_tuning(pretraining):
    """Its encoder as a classifier, to be told where it starts from."""
    return replace(
        pretraining,
        augment=replace(pretraining.augment, time_drop=0.3, freq_drop=0.3),
        optim=replace(pretraining.optim, layer_decay=0.75),
        train=replace(pretraining.train, method="supervised"),
    )


def starting(recipe, path):
    return replace(recipe, model=replace(recipe.model, init=str(path)))


def test_a_run_and_one_that_starts_from_it(pretraining, fine_tuning, tmp_path):
    fit(with_train(pretraining, max_steps=2), tmp_path / "pre", quiet=True)
    (epoch,) = RunDirectory(tmp_path / "pre").metrics("epoch")
    assert epoch["step"] == 2 and epoch["flops"] > 0
    assert epoch["validation_loss"] > 0 and epoch["validation_clips"] > 0
    method, loaded, _ = load_model(tmp_path / "pre")
    assert isinstance(method.model, AudioMAEPretraining)
    data = load_data(loaded.data).test
    (row,) = evaluate_over(method, loaded, data, lengths=[0.4])["lengths"]
    assert row["clips"] == len(data) and row["loss"] > 0

    recipe = with_train(starting(fine_tuning, tmp_path / "pre"), max_steps=2)
    fit(recipe, tmp_path / "fine", quiet=True)
    assert RunDirectory(tmp_path / "fine").metrics("epoch")[-1]["validation_accuracy"] >= 0
    before = weights(tmp_path / "pre")
    fine_tuning.frontend = replace(fine_tuning.frontend, mean=0.0, std=1.0)
    model = build_method(fine_tuning, 2).model
    start_from(model, "audio_mae_tiny", tmp_path / "pre")
    for name, value in model.state_dict().items():
        if not name.startswith(("norm.", "head.")):
            assert torch.equal(value, before[name]), name
    fine_tuning.model.position_wrap = 10
    with pytest.raises(ValueError, match=r"model\.init: .*position_wrap is 10, but was None"):
        start_from(build_method(fine_tuning, 2).model, "audio_mae_tiny", tmp_path / "pre")


def test_resumes_bit_for_bit(pretraining, tmp_path):
    recipe = with_train(pretraining, epochs=2, checkpoint_minutes=0.0)
    fit(recipe, tmp_path / "whole", quiet=True)
    whole = RunDirectory(tmp_path / "whole").metrics("epoch")

    class KilledError(Exception):
        pass

    def die(self, *args, before=torch.optim.AdamW.step, **kwargs):
        die.steps += 1
        if die.steps == whole[0]["step"] + 2:  # within the second epoch
            raise KilledError
        return before(self, *args, **kwargs)

    die.steps = 0
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KilledError):
        patch.setattr(torch.optim.AdamW, "step", die)
        fit(recipe, tmp_path / "cut", quiet=True)
    fit(recipe, tmp_path / "cut", resume=True, quiet=True)
    cut = RunDirectory(tmp_path / "cut").metrics("epoch")
    for name in ("epoch", "step", "tokens", "loss", "validation_loss"):
        assert [record[name] for record in whole] == [record[name] for record in cut]
    expected, found = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_a_step_is_the_mean_over_its_batches_patches(pretraining, tmp_path, monkeypatch):
    """Whatever is accumulated, each hidden patch counts alike."""
    denominators = []
    before = Batch.with_denominator

    def noted(self, denominator):
        denominators.append((denominator, int(self.grid.hidden.host_offsets[-1])))
        return before(self, denominator)

    monkeypatch.setattr(Batch, "with_denominator", noted)
    recipe = with_train(pretraining, max_steps=1, accumulate=2, batch_tokens=120)
    fit(recipe, tmp_path, quiet=True)
    (first, hidden), (second, more) = denominators[:2]
    assert first == second == hidden + more


def test_times_and_frequencies_are_dropped_in_training_alone(fine_tuning):
    data = load_data(fine_tuning.data).train
    recipe = measure_statistics(fine_tuning, data)
    geometry = build_method(recipe, 2).model.geometry
    for training in (True, False):
        loader = make_loader(recipe, data, geometry, training=training, fixed_shapes=True)
        for batch in loader.epoch(0):
            offsets = batch.grid.segments.host_offsets.tolist()
            for begin, end in zip(offsets[:-1], offsets[1:], strict=True):
                if begin == end:
                    continue
                rows = slice(begin + 1, end)  # after the class token
                times, freqs = (x[rows].unique() for x in (batch.grid.time, batch.grid.freq))
                width = int(batch.grid.clip_width[begin + 1])
                assert len(times) * len(freqs) == end - begin - 1
                assert len(freqs) == (2 if training else 4)
                assert len(times) == (max(int(0.7 * width), 1) if training else width)
    fine_tuning.augment.token_drop = 0.1
    with pytest.raises(ValueError, match=r"choose one of the two"):
        make_loader(fine_tuning, data, geometry, training=True)


def test_there_is_no_metric_but_the_loss(pretraining):
    assert pick_metric(pretraining, False) == "loss"
    with pytest.raises(ValueError, match=r"train\.method audio_mae learns no classes: use loss$"):
        pick_metric(with_train(pretraining, metric="accuracy"), False)
