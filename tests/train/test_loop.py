"""What the loop does besides training: averages, early stopping, signals, bad files, logs."""

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fastast.data import AudioDataset, Manifest, write_wav
from fastast.train import RunDirectory, fit, load_data, load_model, loop, make_loader
from fastast.train.averaging import EMA
from tests.testing import write_tone

ROOT = Path(__file__).resolve().parents[2]


def change(recipe, section, **settings):
    return replace(recipe, **{section: replace(getattr(recipe, section), **settings)})


def kept(run_dir):
    return load_model(run_dir)[0].model.state_dict()


@pytest.fixture
def states(monkeypatch):
    """The model's weights after every step and at the end of every epoch of a run."""
    found = {"step": [], "epoch": []}
    step, finish = loop._Training._train_step, loop._Training._finish_epoch

    def copy(training):
        return {name: x.clone() for name, x in training.method.model.state_dict().items()}

    def stepping(training, batches):
        if not found["step"]:
            found["start"] = copy(training)
        step(training, batches)
        found["step"].append(copy(training))

    def finishing(training):
        found["epoch"].append(copy(training))
        finish(training)

    monkeypatch.setattr(loop._Training, "_train_step", stepping)
    monkeypatch.setattr(loop._Training, "_finish_epoch", finishing)
    return found


def test_keeps_the_moving_average(recipe, states, tmp_path):
    recipe = change(recipe, "train", average="ema", ema_decay=0.9)
    method = fit(recipe, tmp_path, quiet=True)
    model, average = states["start"], None
    average = {name: value.double() for name, value in model.items()}
    for number, state in enumerate(states["step"]):
        decay = min(0.9, (1 + number) / (10 + number))
        average = {name: decay * x + (1 - decay) * state[name] for name, x in average.items()}
    for name, value in kept(tmp_path).items():
        torch.testing.assert_close(value, average[name].float(), rtol=1e-5, atol=1e-6)
        assert torch.equal(value, method.model.state_dict()[name])
    # What is validated is what is kept; what is trained on is not disturbed.
    assert RunDirectory(tmp_path).load_checkpoint()["model"].keys() == average.keys()
    last = RunDirectory(tmp_path).load_checkpoint()["model"]
    assert all(torch.equal(value, states["step"][-1][name]) for name, value in last.items())


def test_keeps_the_mean_of_epochs(recipe, states, tmp_path):
    recipe = change(recipe, "train", average="epochs", average_from=2)
    fit(recipe, tmp_path, quiet=True)
    for name, value in kept(tmp_path).items():
        mean = torch.stack([state[name].double() for state in states["epoch"][1:]]).mean(0)
        torch.testing.assert_close(value, mean.float(), rtol=1e-6, atol=1e-7)


def test_keeps_the_mean_of_the_best_epochs(recipe, states, tmp_path, monkeypatch):
    losses = iter([0.5, 0.2, float("nan"), 0.1, 0.4, 0.25])
    evaluate = loop.evaluate
    monkeypatch.setattr(
        loop,
        "evaluate",
        lambda *args, **kwargs: replace(evaluate(*args, **kwargs), loss=next(losses, 0.0)),
    )
    recipe = change(recipe, "train", epochs=6, average="best", average_best=2, metric="loss")
    fit(recipe, tmp_path, quiet=True)
    best = sorted(path.name for path in (tmp_path / "best").iterdir())
    assert best == ["epoch-0002.safetensors", "epoch-0004.safetensors"]
    for name, value in kept(tmp_path).items():
        expected = (states["epoch"][1][name].double() + states["epoch"][3][name]) / 2
        torch.testing.assert_close(value, expected.float(), rtol=1e-6, atol=1e-7)
    assert len(RunDirectory(tmp_path).metrics("final")) == 1


def test_stops_early_and_stays_stopped(recipe, tmp_path, monkeypatch):
    recipe = change(recipe, "optim", lr=1e-12)  # nothing will improve
    recipe = change(recipe, "train", epochs=9, patience=2, metric="accuracy")
    fit(recipe, tmp_path, quiet=True)
    assert len(RunDirectory(tmp_path).metrics("epoch")) == 3
    fit(recipe, tmp_path, resume=True, quiet=True)
    assert len(RunDirectory(tmp_path).metrics("epoch")) == 3


@pytest.mark.parametrize(
    ("section", "setting"),
    [
        ("train", {"average": "best"}),
        ("train", {"patience": 1}),
        ("optim", {"schedule": "plateau"}),
    ],
)
def test_what_needs_validation_says_so(recipe, tmp_path, section, setting):
    recipe = change(change(recipe, section, **setting), "data", validation=0.0)
    with pytest.raises(ValueError, match=r"needs clips to validate on: set data\.validation"):
        fit(recipe, tmp_path, quiet=True)


@pytest.mark.parametrize(
    ("number", "leaves"), [(signal.SIGTERM, SystemExit), (signal.SIGINT, KeyboardInterrupt)]
)
def test_signals_stop_a_run_between_two_steps(recipe, tmp_path, monkeypatch, number, leaves):
    recipe = change(recipe, "train", log_every=1)
    fit(recipe, tmp_path / "whole", quiet=True)
    train_step = loop._Training._train_step
    steps = []

    def stepping(training, batches):
        steps.append(1)
        if len(steps) == 4:
            os.kill(os.getpid(), number)
        train_step(training, batches)

    before = signal.getsignal(number)
    with monkeypatch.context() as patch, pytest.raises(leaves) as left:
        patch.setattr(loop._Training, "_train_step", stepping)
        fit(recipe, tmp_path / "cut", quiet=True)
    assert number == signal.SIGINT or left.value.code == 143
    assert signal.getsignal(number) is before
    state = RunDirectory(tmp_path / "cut").load_checkpoint()
    assert state["step"] == len(steps) == 4
    fit(recipe, tmp_path / "cut", resume=True, quiet=True)
    whole, cut = (RunDirectory(tmp_path / name).metrics("train") for name in ("whole", "cut"))
    assert whole == cut


def test_trains_in_a_thread(recipe, tmp_path):
    """Where signals cannot be handled, a run goes on without."""
    recipe = change(recipe, "train", epochs=1)
    thread = threading.Thread(target=fit, args=(recipe, tmp_path), kwargs={"quiet": True})
    thread.start()
    thread.join()
    assert len(RunDirectory(tmp_path).metrics("epoch")) == 1


@pytest.fixture
def damaged(recipe, tones, tmp_path):
    """The data with a file without a header, and one whose samples are NaN."""
    soundfile = pytest.importorskip("soundfile")
    root = tmp_path / "data"
    shutil.copytree(tones, root)
    (root / "high" / "3.wav").write_bytes(b"not audio")
    soundfile.write(root / "low" / "5.wav", [float("nan")] * 4000, 8000, subtype="FLOAT")
    return change(recipe, "data", root=str(root), test=0.0, validation=0.0)


def test_bad_files_are_left_out_and_listed(damaged, tmp_path, capsys):
    recipe = change(damaged, "train", epochs=2, log_clips=True)
    fit(recipe, tmp_path / "run")
    lines = (tmp_path / "run" / "left_out.tsv").read_text().splitlines()
    assert sorted(line.split("\t")[0].split("/")[-2:] for line in lines) == [
        ["high", "3.wav"],
        ["low", "5.wav"],
    ]
    assert "NaN" in "".join(lines)
    said = " ".join(capsys.readouterr().err.split())
    assert "2 files could not be used" in said and "left_out.tsv" in said
    for record in RunDirectory(tmp_path / "run").metrics("epoch"):
        assert record["clips"] == 38 and record["left_out"] == 1


@pytest.mark.parametrize(
    ("file", "workers"), [("high/3.wav", 0), ("low/5.wav", 0), ("low/5.wav", 1)]
)
def test_bad_files_stop_a_run_that_asks_for_it(damaged, tmp_path, file, workers):
    recipe = change(damaged, "data", bad_files="stop")
    recipe = change(recipe, "frontend", mean=-5.0, std=3.0)
    recipe = change(recipe, "train", workers=workers)
    for other in {"high/3.wav", "low/5.wav"} - {file}:
        write_tone(tmp_path / "data" / other, 440.0, 0.5)
    with pytest.raises(ValueError, match=rf"{file}.*; "):
        fit(recipe, tmp_path / "run", quiet=True)


@pytest.mark.parametrize("method", ["_log_steps", "_finish_epoch"])
def test_an_error_that_is_kept_keeps_no_decoding_processes(recipe, tmp_path, monkeypatch, method):
    """Python keeps the error that ends it, with all that its traceback holds."""
    recipe = change(recipe, "train", workers=1, log_every=2)

    def fail(training):
        assert multiprocessing.active_children()
        if method == "_finish_epoch":
            training._validate()
        raise FloatingPointError

    monkeypatch.setattr(loop._Training, method, fail)
    with pytest.raises(FloatingPointError) as error:
        fit(recipe, tmp_path, quiet=True)
    assert error.traceback and not multiprocessing.active_children()


@pytest.mark.parametrize("validation", [0.0, 0.2])
def test_a_vanished_disk_stops_a_run(recipe, tones, tmp_path, monkeypatch, validation):
    root = tmp_path / "data"
    shutil.copytree(tones, root)
    recipe = change(recipe, "data", root=str(root), validation=validation, test=0.0)
    recipe = change(recipe, "frontend", mean=-5.0, std=3.0)
    recipe = change(recipe, "train", log_every=1)
    monkeypatch.setattr("fastast.data.dataset.CACHE_BYTES", 0)
    make = loop.make_loader

    def unmount(*args, **kwargs):
        shutil.rmtree(root, ignore_errors=True)
        return make(*args, **kwargs)

    monkeypatch.setattr(loop, "make_loader", unmount)
    with pytest.raises(ValueError, match="cannot be read and 0 can.*is the disk there"):
        fit(recipe, tmp_path / "run", quiet=True)
    assert not RunDirectory(tmp_path / "run").model_path.exists()


def test_a_run_stopped_after_its_last_step_finishes_its_epoch(recipe, tmp_path, monkeypatch):
    recipe = change(recipe, "train", epochs=50, max_tokens=700, checkpoint_minutes=0.0)
    fit(recipe, tmp_path / "whole", quiet=True)

    def die(self):
        if self._share_done() >= 1:
            raise KeyboardInterrupt
        finish(self)

    finish = loop._Training._finish_epoch
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(loop._Training, "_finish_epoch", die)
        fit(recipe, tmp_path / "cut", quiet=True)
    fit(recipe, tmp_path / "cut", resume=True, quiet=True)
    for kind in ("train", "epoch"):
        whole, cut = (
            [(record["step"], record["loss"]) for record in RunDirectory(path).metrics(kind)]
            for path in (tmp_path / "whole", tmp_path / "cut")
        )
        assert whole == cut
    one, two = kept(tmp_path / "whole"), kept(tmp_path / "cut")
    assert all(torch.equal(two[name], value) for name, value in one.items())


SLOW_RUN = """
import json, sys, time
from fastast.train import Recipe, fit, loop
step = loop._Training._train_step
def slow(self, batches):
    step(self, batches)
    time.sleep(0.05)
    print("step", flush=True)
loop._Training._train_step = slow
fit(Recipe.from_dict(json.loads(open(sys.argv[1]).read())), sys.argv[2], quiet=True)
"""


def test_decoding_processes_live_until_the_state_is_saved(recipe, tmp_path):
    """A scheduler that stops a job signals all its processes."""
    recipe = change(recipe, "train", epochs=500, workers=2)
    (tmp_path / "recipe.json").write_text(json.dumps(recipe.to_dict()))
    command = [sys.executable, "-c", SLOW_RUN, tmp_path / "recipe.json", tmp_path / "run"]
    run = subprocess.Popen(
        command, start_new_session=True, stdout=subprocess.PIPE, cwd=ROOT, text=True
    )
    for _ in range(8):
        assert run.stdout.readline() == "step\n"
    os.killpg(run.pid, signal.SIGTERM)
    run.stdout.read()
    assert run.wait(timeout=60) == 143
    assert RunDirectory(tmp_path / "run").load_checkpoint()["step"] >= 8


@pytest.mark.parametrize(
    ("section", "setting", "message"),
    [
        ("train", {"average": "bset"}, r"train\.average must be one of last, ema, epochs, best"),
        ("train", {"metric": "f1"}, r"train\.metric must be one of accuracy"),
        ("train", {"average": "epochs", "average_from": 9}, "comes after the last of train.epochs"),
        ("data", {"balance": "always"}, r"data\.balance must be one of"),
        ("augment", {"crop": "middle"}, r"augment\.crop must be one of"),
        ("optim", {"clip": "some"}, r"optim\.clip must be one of global, per_tensor"),
    ],
)
def test_settings_that_there_are_not(recipe, section, setting, message):
    with pytest.raises(ValueError, match=message):
        change(recipe, section, **setting)


def test_workers_change_nothing(recipe, tmp_path):
    recipe = change(recipe, "frontend", dither=1e-3)
    recipe = change(recipe, "train", epochs=2, log_every=1)
    for workers in (0, 2):
        fit(change(recipe, "train", workers=workers), tmp_path / str(workers), quiet=True)
    one, two = (RunDirectory(tmp_path / name).metrics("train") for name in ("0", "2"))
    assert one == two
    (epoch, _) = RunDirectory(tmp_path / "2").metrics("epoch")
    assert 0 < epoch["data_wait"] < 1


def test_accumulated_batches_equal_one_large_one(recipe, tmp_path):
    """The same clips in a step, in four batches or in one: the same mean over the clips."""
    recipe = change(recipe, "train", epochs=1, log_every=1, log_clips=True, packing="next_fit")
    recipe = change(recipe, "optim", clip_norm=0.0)
    large = change(recipe, "train", batch_clips=8, batch_tokens=10_000)
    small = change(recipe, "train", batch_clips=2, batch_tokens=10_000, accumulate=4)
    for name, variant in (("large", large), ("small", small)):
        fit(variant, tmp_path / name, quiet=True)
    one, four = (RunDirectory(tmp_path / name).metrics("train") for name in ("large", "small"))
    by_clips = {tuple(record["clips"]): record for record in one}
    same = [record for record in four if tuple(record["clips"]) in by_clips]
    assert len(same) >= 2
    first = min(four, key=lambda record: record["step"])
    assert first["loss"] == pytest.approx(by_clips[tuple(first["clips"])]["loss"], rel=1e-5)


def test_tensorboard_follows_the_log(recipe, tmp_path):
    event_accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator"
    )
    recipe = change(recipe, "train", epochs=2, log_every=1)
    fit(recipe, tmp_path, quiet=True)
    events = event_accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    losses = [event.value for event in events.Scalars("train/loss")]
    expected = [record["loss"] for record in RunDirectory(tmp_path).metrics("train")]
    assert losses == pytest.approx(expected, rel=1e-6)
    assert len(events.Scalars("epoch/validation_accuracy")) == 2


def test_a_shortened_log_is_not_resumed(recipe, tmp_path):
    fit(change(recipe, "train", epochs=1), tmp_path, quiet=True)
    run = RunDirectory(tmp_path)
    os.truncate(run.metrics_path, 10)
    with pytest.raises(ValueError, match=r"metrics\.jsonl has 10 bytes but had"):
        fit(change(recipe, "train", epochs=1), tmp_path, resume=True, quiet=True)


def test_exchanged_weights_come_back(recipe):
    model = torch.nn.Linear(2, 2)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    other = EMA(model, 0.5)
    with torch.no_grad():
        model.weight.add_(1)
    with pytest.raises(RuntimeError), loop.exchanged_weights(model, other.weights()):
        assert torch.equal(model.weight, before["weight"])
        raise RuntimeError
    assert torch.equal(model.weight, before["weight"] + 1)


def test_training_and_evaluation_see_other_settings(recipe):
    """Augmentation, balance and accumulation are training's alone."""
    recipe = change(recipe, "augment", mixup=1.0, token_drop=0.5, crop_seconds=[0.1, 0.2])
    recipe = change(recipe, "data", balance="with_replacement", clips_per_epoch=7)
    recipe = change(recipe, "train", accumulate=2)
    recipe = change(recipe, "frontend", mean=0.0, std=1.0)
    data = load_data(recipe.data).train
    geometry = loop.build_method(recipe, 2).model.geometry
    training = list(make_loader(recipe, data, geometry, training=True).epoch(0))
    assert sum(batch.num_clips for batch in training) == 7 and len(training) % 2 == 0
    assert all(batch.mix_weight is not None for batch in training)
    evaluation = list(make_loader(recipe, data, geometry).epoch(0))
    assert sum(batch.num_clips for batch in evaluation) == len(data)
    assert all(batch.mix_weight is None for batch in evaluation)
    assert sum(batch.audio_seconds for batch in evaluation) == pytest.approx(
        data.lengths.sum() / 8000
    )


def test_unreadable_clips_do_not_weaken_a_step(damaged, tmp_path):
    """The loss is the mean over the clips that were read."""
    recipe = change(damaged, "train", epochs=1, batch_clips=64, batch_tokens=10_000, log_every=1)
    recipe = change(recipe, "frontend", mean=-5.0, std=3.0)
    recipe = change(recipe, "augment", gain_db=0.0, time_mask=0.0)
    fit(recipe, tmp_path / "bad", quiet=True)
    for file in ("high/3.wav", "low/5.wav"):
        (tmp_path / "data" / file).unlink()
    fit(recipe, tmp_path / "good", quiet=True)
    (bad,), (good,) = (RunDirectory(tmp_path / name).metrics("train") for name in ("bad", "good"))
    assert bad["loss"] == pytest.approx(good["loss"], rel=0.1)  # other draws, as ids differ
    state = RunDirectory(tmp_path / "bad").load_checkpoint()
    assert state["step"] == 1


def test_a_file_that_is_mended_makes_other_data(damaged, tmp_path):
    """Clips behind it would have other numbers, and so other draws."""
    fit(change(damaged, "train", epochs=1), tmp_path / "run", quiet=True)
    (tmp_path / "data" / "high" / "3.wav").unlink()
    with pytest.raises(ValueError, match="are not those that"):
        fit(change(damaged, "train", epochs=1), tmp_path / "run", resume=True, quiet=True)


def test_a_clip_that_just_fills_its_last_patch_can_be_evaluated(recipe, tmp_path):
    """Lengths go through no floating point on their way to the token budget."""
    recipe = change(recipe, "frontend", mean=0.0, std=1.0, compression=[1.0])
    recipe = change(recipe, "train", batch_tokens=2)
    geometry = loop.build_method(recipe, 2).model.geometry
    for patches in range(2, 80):
        samples = 200 + 80 * (8 * patches - 1)
        path = tmp_path / "a" / f"{patches}.wav"
        path.parent.mkdir(exist_ok=True)
        write_wav(path, torch.ones(samples, dtype=torch.int16), 8000)
        dataset = AudioDataset(Manifest([str(path)], [(0,)], ["a"]), 8000)
        (batch,) = make_loader(recipe, dataset, geometry).epoch(0)
        assert batch.num_tokens == geometry.num_tokens(8 * patches)
