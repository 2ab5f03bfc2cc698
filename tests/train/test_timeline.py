"""What is heard when in long recordings."""

import csv
import json

import numpy as np
import pytest
import torch

from fastast.cli import main
from fastast.data import write_wav
from fastast.train import fit, load_model
from fastast.train.predict import predict_files
from fastast.train.timeline import Timeline, predict_timeline, windows_of

RATE = 8000


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run that tells high tones from low ones."""
    from fastast.train import ModelConfig, OptimConfig, TrainConfig
    from fastast.train.recipe import DataConfig, FrontendConfig, Recipe

    root = tmp_path_factory.mktemp("timeline")
    for label, pitch in (("high", 1500), ("low", 300)):
        (root / "tones" / label).mkdir(parents=True)
        for index in range(12):
            write_wav(root / "tones" / label / f"{index}.wav", tone(pitch + 10 * index, 0.8), RATE)
    recipe = Recipe(
        DataConfig(root=str(root / "tones"), sample_rate=RATE, validation=0.0, test=0.0),
        FrontendConfig(num_mels=32),
        model=ModelConfig(patch_size=(16, 8), dim=32, depth=1, num_heads=2, max_time_patches=12),
        optim=OptimConfig(lr=5e-3),
        train=TrainConfig(epochs=12, batch_tokens=160, batch_clips=8, device="cpu"),
    )
    fit(recipe, root / "run", quiet=True)
    return root / "run"


def tone(pitch, seconds):
    samples = int(RATE * seconds)
    noise = np.random.default_rng(samples).standard_normal(samples)
    sound = 0.3 * np.sin(2 * np.pi * pitch * np.arange(samples) / RATE) + 0.02 * noise
    return torch.from_numpy((32767 * sound).astype(np.int16))


@pytest.mark.parametrize(
    "seconds, window, hop, begins",
    [
        (10.0, 4.0, 2.0, [0, 2, 4, 6]),
        (10.0, 4.0, 4.0, [0, 4, 6]),  # the last one ends with the recording
        (10.1, 4.0, 2.0, [0, 2, 4, 6, 6.1]),
        (4.0, 4.0, 2.0, [0]),
        (0.5, 4.0, 2.0, [0]),
        (0.9, 0.3, 0.1, [0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6]),
    ],
)
def test_windows_cover_the_recording(seconds, window, hop, begins):
    parts, edges = windows_of(seconds, window, hop)
    np.testing.assert_allclose(parts[:, 0], begins, atol=1e-9)
    np.testing.assert_allclose(parts[:, 1] - parts[:, 0], min(window, seconds))
    assert edges[0] == 0 and edges[-1] == seconds and (np.diff(edges) > 0).all()
    # A window speaks for what it has heard, its middle among it.
    assert (parts[:, 0] <= edges[:-1] + 1e-9).all() and (edges[1:] <= parts[:, 1] + 1e-9).all()
    middles = parts.mean(1)
    assert (edges[:-1] <= middles).all() and (middles <= edges[1:]).all()


@pytest.mark.parametrize(
    "window, hop, message",
    [
        (0.0, 1.0, "window must be positive"),
        (float("nan"), 1.0, "window must be positive"),
        (1.0, 0.0, "hop must be positive and at most window"),
        (1.0, 1.5, r"at most window \(1.0\), got 1.5"),
    ],
)
def test_windows_that_there_are_not(window, hop, message):
    with pytest.raises(ValueError, match=message):
        windows_of(10.0, window, hop)


def test_events_by_hand():
    edges = np.array([0.0, 1.5, 2.5, 3.5, 5.0])
    rows = np.array([[0.9, 0.6], [0.7, 0.2], [0.1, 0.8], [0.6, 0.9]], np.float32)
    several = Timeline("x.wav", edges, rows, ["dog", "cat"], True).events(0.5)
    assert [event[:3] for event in several] == [
        (0.0, 1.5, "cat"),
        (0.0, 2.5, "dog"),
        (2.5, 5.0, "cat"),
        (3.5, 5.0, "dog"),
    ]
    assert [event.probability for event in several] == pytest.approx([0.6, 0.8, 0.85, 0.6])
    one = Timeline("x.wav", edges, rows, ["dog", "cat"], False).events(0.5)
    assert [event[:3] for event in one] == [(0.0, 2.5, "dog"), (2.5, 5.0, "cat")]
    assert Timeline("x.wav", edges, rows, ["dog", "cat"], True).events(0.95) == []


def test_a_window_is_what_a_file_of_it_is(trained, tmp_path):
    """Whatever windows share its batch."""
    sound = torch.cat([tone(300, 1.7), tone(1500, 2.2), tone(700, 0.83)])
    write_wav(tmp_path / "long.wav", sound, RATE)
    method, recipe, names = load_model(trained)
    timeline = predict_timeline(
        method, recipe, tmp_path / "long.wav", "cpu", window=0.8, hop=0.5, class_names=names
    )
    parts, _ = windows_of(len(sound) / RATE, 0.8, 0.5)
    files = []
    for number, (begin, end) in enumerate(np.rint(parts * RATE).astype(int)):
        files.append(tmp_path / f"{number}.wav")
        write_wav(files[-1], sound[begin:end], RATE)
    alone = torch.stack(predict_files(method, recipe, files, "cpu"))
    torch.testing.assert_close(torch.from_numpy(timeline.probabilities), alone, rtol=0, atol=1e-6)


def test_the_command_writes_a_timeline(trained, tmp_path, capsys):
    write_wav(tmp_path / "day.wav", torch.cat([tone(300, 6), tone(1500, 9), tone(310, 3)]), RATE)
    (tmp_path / "other").mkdir()
    write_wav(tmp_path / "other" / "day.wav", tone(1500, 0.3), RATE)
    files = [str(tmp_path / "day.wav"), str(tmp_path / "other" / "day.wav")]
    out = tmp_path / "out"
    command = ["predict", str(trained), *files, "--window", "0.8", "--hop", "0.4"]
    assert main([*command, "--out", str(out)]) == 0
    assert "3 events in 44 windows" in capsys.readouterr().out
    with open(out / "day-1.csv", newline="") as file:
        events = list(csv.DictReader(file))
    assert [event["label"] for event in events] == ["low", "high", "low"]
    changes = [float(event["end"]) for event in events]
    assert changes == pytest.approx([6, 15, 18], abs=0.4) and changes[-1] == 18
    spans = [[event["begin"], event["end"], event["label"]] for event in events]
    labels = (out / "day-1.txt").read_text().splitlines()
    assert [line.split("\t") for line in labels] == spans
    found = json.loads((out / "day-1.json").read_text())
    assert (found["file"], found["seconds"], len(found["windows"])) == (files[0], 18.0, 44)
    assert found["windows"][0]["begin"] == 0 and found["windows"][-1]["end"] == 18
    assert all(sum(w["classes"].values()) == pytest.approx(1, abs=1e-3) for w in found["windows"])
    for name in ("day-1", "day-2"):
        assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert len(json.loads((out / "day-2.json").read_text())["windows"]) == 1


@pytest.mark.parametrize(
    "options, message",
    [
        (["--window", "1"], "--window and --out belong together"),
        (["--out", "x"], "--window and --out belong together"),
        (["--hop", "1"], "--hop needs --window"),
        (["--window", "-1", "--out", "x"], "window must be positive"),
        (["--threshold", "1"], "--threshold must lie between 0 and 1"),
    ],
)
def test_options_that_do_not_fit(trained, tmp_path, capsys, options, message):
    write_wav(tmp_path / "a.wav", tone(300, 1), RATE)
    assert main(["predict", str(trained), str(tmp_path / "a.wav"), *options]) == 1
    assert message in capsys.readouterr().err
