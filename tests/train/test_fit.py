"""Training runs: they learn, they resume bit for bit, and they lose nothing."""

import shutil
from dataclasses import replace

import pytest
import torch

from fastast.ops import hop_from_ms
from fastast.train import (
    FrontendConfig,
    RunDirectory,
    build_method,
    evaluate_over,
    fit,
    load_data,
    load_model,
    loop,
    make_loader,
)
from fastast.train.run import write_atomically


def weights(run_dir):
    method, _, _ = load_model(run_dir)
    return method.model.state_dict()


def with_train(recipe, **changes):
    return replace(recipe, train=replace(recipe.train, **changes))


def test_learns_and_can_be_used(recipe, tmp_path):
    fit(with_train(recipe, epochs=8), tmp_path / "run", quiet=True)
    records = RunDirectory(tmp_path / "run").metrics("epoch")
    assert [record["epoch"] for record in records] == list(range(8))
    assert records[-1]["loss"] < 0.5 * records[0]["loss"]
    assert records[-1]["padding"] == 0  # without fixed shapes, every row is a real token

    method, loaded, class_names = load_model(tmp_path / "run")
    assert class_names == ["high", "low"]
    assert loaded.frontend.std > 0  # measured, and kept with the weights
    test = load_data(loaded.data).test
    rows = evaluate_over(method, loaded, test, lengths=[0.3, 0.9], compression=[1.0, 2.0])
    assert [row["at"] for row in rows["lengths"]] == [0.3, 0.9]
    assert all(row["clips"] == len(test) for part in rows.values() for row in part)
    assert all(row["accuracy"] == 1 for part in rows.values() for row in part)
    short, long = rows["lengths"]
    assert short["tokens"] < long["tokens"]


PRESETS = {
    "kaldi": ({"window_type": "povey", "snip_edges": False, "dither": 2.0**-15}, 16000),
    "htsat": ({}, 32000),
    "epic_sounds": ({}, 24000),
}


@pytest.mark.parametrize("fixed_seconds", [None, 0.5])
@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_trains_and_is_evaluated(recipe, tmp_path, preset, fixed_seconds):
    settings, rate = PRESETS[preset]
    recipe.data = replace(recipe.data, sample_rate=rate)
    recipe.frontend = FrontendConfig(preset=preset, fixed_seconds=fixed_seconds, **settings)
    if fixed_seconds:
        recipe.model = replace(recipe.model, name="ast_tiny", stride=(16, 8), max_time_patches=None)
    else:
        recipe.frontend.compression = [1.0, 2.0]
        recipe.model = replace(recipe.model, max_time_patches=24)
    recipe = with_train(recipe, epochs=1, batch_tokens=4000, batch_clips=16)
    fit(recipe, tmp_path, quiet=True)
    (record,) = RunDirectory(tmp_path).metrics("epoch")
    assert record["step"] == 2 and record["validation_clips"] == 6

    method, loaded, _ = load_model(tmp_path)
    assert loaded.frontend == replace(
        recipe.frontend, mean=loaded.frontend.mean, std=loaded.frontend.std
    )
    test = load_data(loaded.data).test
    rows = evaluate_over(method, loaded, test, lengths=[0.3], compression=[1.0, 2.0])
    assert all(row["clips"] == len(test) for part in rows.values() for row in part)
    # Tokens are those of the frames that the filterbank makes of each clip.
    filterbank, shift = method.frontend.filterbank, loaded.frontend.frame_shift_ms
    for row, factor in zip(rows["compression"], (1.0, 2.0), strict=True):
        hop = hop_from_ms(factor * shift, rate)
        frames = filterbank([test.waveform(i) for i in range(len(test))], frame_shift=hop)
        counts = frames.segments.lengths.tolist()
        if fixed_seconds:
            counts = [filterbank.plan.num_frames(int(fixed_seconds * rate), hop)] * len(test)
        assert row["tokens"] == sum(method.model.geometry.num_tokens(n) for n in counts)


def test_statistics_are_those_of_dithered_clips(recipe, tones):
    """Silence would otherwise be far below all that the model sees in training."""
    train = load_data(recipe.data).train
    recipe.frontend.dither = 0.0
    plain = loop.measure_statistics(recipe, train).frontend
    recipe.frontend.dither = 0.1
    dithered = loop.measure_statistics(recipe, train).frontend
    assert dithered.mean > plain.mean + 0.5
    recipe.frontend.dither_in_evaluation = True
    assert loop.measure_statistics(recipe, train).frontend.mean == dithered.mean


def test_dither_is_trainings_alone(recipe, tmp_path):
    """What a trained model says about a clip does not depend on the noise that it trained with."""
    recipe.frontend.dither = 0.01
    fit(with_train(recipe, epochs=1), tmp_path, quiet=True)
    method, loaded, _ = load_model(tmp_path)
    test = load_data(loaded.data).test
    (batch,) = make_loader(loaded, test, method.model.geometry).epoch(0)
    logits = {}
    for name, settings in {
        "trained": {},
        "plain": {"dither": 0.0},
        "dithered": {"dither_in_evaluation": True},
    }.items():
        changed = replace(loaded, frontend=replace(loaded.frontend, **settings))
        other = build_method(changed, 2).eval()
        other.model.load_state_dict(method.model.state_dict())
        logits[name] = other(batch)["logits"]
        assert torch.equal(logits[name], other(batch)["logits"])
    assert torch.equal(method(batch)["logits"], logits["plain"])
    assert torch.equal(logits["trained"], logits["plain"])
    assert not torch.equal(logits["dithered"], logits["plain"])


@pytest.mark.parametrize("dither", [0.0, 2.0**-15])
def test_resumes_bit_for_bit(recipe, tmp_path, dither):
    recipe.frontend.dither = dither
    fit(recipe, tmp_path / "whole", quiet=True)

    class KilledError(Exception):
        pass

    def die(step, before=torch.optim.AdamW.step):
        def stepping(self, *args, **kwargs):
            stepping.count += 1
            if stepping.count == step:
                raise KilledError
            return before(self, *args, **kwargs)

        stepping.count = 0
        return stepping

    steps = RunDirectory(tmp_path / "whole").metrics("epoch")[0]["step"]
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KilledError):
        patch.setattr(torch.optim.AdamW, "step", die(2 * steps))  # within the second epoch
        fit(recipe, tmp_path / "cut", quiet=True)
    assert len(RunDirectory(tmp_path / "cut").metrics("epoch")) == 1
    fit(recipe, tmp_path / "cut", resume=True, quiet=True)

    whole, cut = (RunDirectory(tmp_path / name).metrics("epoch") for name in ("whole", "cut"))
    for name in ("epoch", "step", "tokens", "lr", "loss", "validation_loss"):
        assert [record[name] for record in whole] == [record[name] for record in cut]
    for name, value in weights(tmp_path / "whole").items():
        assert torch.equal(value, weights(tmp_path / "cut")[name]), name


def test_runs_with_one_seed_are_equal(recipe, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        fit(with_train(recipe, epochs=1, seed=seed), tmp_path / name, quiet=True)
    a, b, c = (weights(tmp_path / name)["head.weight"] for name in "abc")
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


def test_a_run_is_not_overwritten_or_mixed_up(recipe, tmp_path):
    fit(with_train(recipe, epochs=1), tmp_path, quiet=True)
    with pytest.raises(ValueError, match="holds a run already"):
        fit(with_train(recipe, epochs=1), tmp_path, quiet=True)
    recipe.optim = replace(recipe.optim, lr=0.1)
    with pytest.raises(ValueError, match=r"optim\.lr: 0\.002 -> 0\.1"):
        fit(with_train(recipe, epochs=1), tmp_path, resume=True, quiet=True)


def test_token_limit_ends_the_run(recipe, tmp_path):
    fit(with_train(recipe, epochs=50, max_tokens=700), tmp_path, quiet=True)
    last = RunDirectory(tmp_path).metrics("epoch")[-1]
    assert 700 <= last["tokens"] <= 700 + recipe.train.batch_tokens


def test_fixed_length_ast(recipe, tmp_path):
    recipe.frontend = replace(recipe.frontend, compression=[1.0], fixed_seconds=0.5)
    recipe.model = replace(recipe.model, name="ast_tiny", stride=(8, 8), max_time_patches=None)
    fit(with_train(recipe, epochs=1), tmp_path, quiet=True)
    method, loaded, _ = load_model(tmp_path)
    test = load_data(loaded.data).test
    rows = evaluate_over(method, loaded, test, lengths=[0.3, 0.5], compression=[2.0])
    grid = method.model.geometry
    # 0.3 s are 28 frames of 10 ms and 25 ms width; every clip takes as many tokens, and a table
    # of positions for 48 frames is laid over them.
    assert rows["lengths"][0]["tokens"] == len(test) * grid.num_tokens(28)
    assert rows["lengths"][1]["tokens"] == len(test) * grid.num_tokens(48)
    assert rows["compression"][0]["tokens"] == len(test) * grid.num_tokens(24)


def test_nan_stops_the_run_and_keeps_the_last_state(recipe, tmp_path, monkeypatch):
    fit(with_train(recipe, epochs=2), tmp_path, quiet=True)
    before = RunDirectory(tmp_path).load_checkpoint()
    before["recipe"]["train"]["epochs"] = 3
    before["model"]["head.bias"].fill_(torch.nan)
    RunDirectory(tmp_path).save_checkpoint(before)
    with pytest.raises(FloatingPointError, match=r"loss is nan .* \(epoch 2\): lower optim\.lr"):
        fit(with_train(recipe, epochs=3), tmp_path, resume=True, quiet=True)
    assert RunDirectory(tmp_path).load_checkpoint()["epoch"] == 2
    assert len(RunDirectory(tmp_path).metrics("epoch")) == 2


def test_bf16_and_compile(recipe, tmp_path):
    fit(with_train(recipe, epochs=1, bf16=True), tmp_path / "bf16", quiet=True)
    fit(with_train(recipe, epochs=1), tmp_path / "eager", quiet=True)
    fit(with_train(recipe, epochs=1, compile=True), tmp_path / "compiled", quiet=True)
    loss = {
        name: RunDirectory(tmp_path / name).metrics("epoch")[0]["loss"]
        for name in ("bf16", "eager", "compiled")
    }
    assert loss["bf16"] == pytest.approx(loss["eager"], rel=0.02)
    assert loss["compiled"] == pytest.approx(loss["eager"], rel=1e-4)


def test_a_diverged_state_does_not_replace_the_last_good_one(recipe, tmp_path, monkeypatch):
    """An infinite gradient in an epoch's last step leaves the losses finite, not the weights."""
    fit(with_train(recipe, epochs=1), tmp_path, quiet=True)
    good = RunDirectory(tmp_path).load_checkpoint()
    good["recipe"]["train"]["epochs"] = 2
    RunDirectory(tmp_path).save_checkpoint(good)
    monkeypatch.setattr(loop, "clip_gradients", lambda *_: torch.tensor(torch.inf))
    with pytest.raises(FloatingPointError, match=r"gradient_norm is inf.*still holds the state"):
        fit(with_train(recipe, epochs=2), tmp_path, resume=True, quiet=True)
    assert RunDirectory(tmp_path).load_checkpoint()["epoch"] == 1


def test_other_data_is_not_resumed_on(recipe, tones, tmp_path):
    root = tmp_path / "data"
    shutil.copytree(tones, root)
    recipe.data = replace(recipe.data, root=str(root))
    fit(with_train(recipe, epochs=1), tmp_path / "run", quiet=True)
    (root / "high").rename(root / "zzz")
    with pytest.raises(ValueError, match="are not those that"):
        fit(with_train(recipe, epochs=1), tmp_path / "run", resume=True, quiet=True)


def test_moved_data_is_resumed_on(recipe, tones, tmp_path):
    fit(with_train(recipe, epochs=1), tmp_path / "run", quiet=True)
    shutil.copytree(tones, tmp_path / "moved")
    recipe.data = replace(recipe.data, root=str(tmp_path / "moved"))
    fit(with_train(recipe, epochs=1), tmp_path / "run", resume=True, quiet=True)


def test_half_a_split_is_refused(recipe, tones, tmp_path):
    for part in ("test", "validation"):
        shutil.copytree(tones, tmp_path / part)
    recipe.data = replace(recipe.data, root=str(tmp_path))
    with pytest.raises(ValueError, match="no folder train"):
        load_data(recipe.data)


def test_evaluates_at_the_finest_resolution_that_was_trained(recipe, tones):
    recipe.frontend = replace(recipe.frontend, compression=[2.0, 3.0], mean=0.0, std=1.0)
    data = load_data(recipe.data).test
    loader = make_loader(recipe, data, build_method(recipe, 2).model.geometry)
    assert set(next(loader.epoch(0)).frame_shift.tolist()) == {160}


def test_settings_of_another_model_say_so(recipe):
    recipe.frontend = replace(recipe.frontend, mean=0.0, std=1.0)
    recipe.model = replace(recipe.model, stride=(8, 8))
    with pytest.raises(ValueError, match="elastic_ast_tiny does not take.*stride"):
        build_method(recipe, 2)


@pytest.mark.parametrize("damage", ["cut", "noise"])
def test_damaged_files_say_so(recipe, tmp_path, damage):
    fit(with_train(recipe, epochs=1), tmp_path, quiet=True)
    run = RunDirectory(tmp_path)
    for path in (run.checkpoint_path, run.model_path):
        content = path.read_bytes()
        path.write_bytes(content[:100] if damage == "cut" else b"\x80" * len(content))
    with pytest.raises(ValueError, match=r"checkpoint\.pt cannot be read"):
        fit(with_train(recipe, epochs=1), tmp_path, resume=True, quiet=True)
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged"):
        load_model(tmp_path)
    with pytest.raises(ValueError, match="does not exist"):
        load_model(tmp_path / "nothing")


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")

    def full_disk(temporary):
        temporary.write_text("ne")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        write_atomically(path, full_disk)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_metrics_line_cut_short_is_left_out(tmp_path):
    run = RunDirectory(tmp_path)
    run.log({"kind": "epoch", "epoch": 0, "loss": 1.0})
    with open(run.metrics_path, "a") as file:
        file.write('{"epoch": 1, "lo')
    assert run.metrics() == [{"kind": "epoch", "epoch": 0, "loss": 1.0}]


def test_several_labels_per_clip(recipe, tones, tmp_path):
    """From a table to mAP: binary cross-entropy, balanced draws, mixed waveforms and targets."""
    lines = ["path,labels"]
    for path in sorted(tones.rglob("*.wav")):
        labels = [path.parent.name] + ["long"] * (int(path.stem) >= 10)
        lines.append(f"{path.relative_to(tones)},{';'.join(labels)}")  # the split goes by this
    table = tmp_path / "clips.csv"
    table.write_text("\n".join(lines) + "\n")
    recipe.data = replace(
        recipe.data,
        root=str(table),
        kind="csv",
        options={"audio": str(tones)},
        balance="with_replacement",
        clips_per_epoch=50,
    )
    recipe.augment = replace(recipe.augment, mixup=0.5, time_mask=0.0)
    recipe = with_train(recipe, epochs=8)
    fit(recipe, tmp_path / "run", quiet=True)
    records = RunDirectory(tmp_path / "run").metrics("epoch")
    assert all(record["clips"] == 50 for record in records)
    assert "validation_accuracy" not in records[-1]
    assert 0 < records[-1]["validation_mAP"] <= 1

    method, loaded, class_names = load_model(tmp_path / "run")
    assert class_names == ["high", "long", "low"]
    assert method.loss == "binary_cross_entropy"
    # A few clips of a class say little: what was learnt shows on those that were trained on.
    train = load_data(loaded.data).train
    rows = evaluate_over(method, loaded, train, lengths=[0.9])
    assert rows["lengths"][0]["mAP"] > 0.8 and rows["lengths"][0]["clips"] == len(train)
    assert records[-1]["loss"] < 0.8 * records[0]["loss"]
