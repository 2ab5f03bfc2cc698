"""The command line, as a user types it."""

import csv
import json
import subprocess
import sys

import numpy as np
import pytest
import soundfile
import torch
import yaml
from pyarrow import parquet

from fastast.cli import COMMANDS, main
from fastast.data import Manifest, write_wav
from tests.testing import write_tone


@pytest.fixture
def run_dir(recipe, tmp_path):
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(recipe.to_dict()))
    run = tmp_path / "run"
    command = ["fit", str(path), "--run-dir", str(run), "--train.epochs", "2"]
    assert main(command) == 0
    return run


def test_fit_evaluate_predict(run_dir, tmp_path, capsys):
    settings = yaml.safe_load((run_dir / "config.yaml").read_text())
    assert settings["train"]["epochs"] == 2
    command = ["evaluate", str(run_dir), "--lengths", "0.3", "--frames", "24,48"]
    assert main([*command, "--frame-shifts", "10,20", "--time-pools", "1,2"]) == 0
    result = json.loads((run_dir / "evaluation.json").read_text())
    assert [row["at"] for row in result["compression"]] == [1.0, 2.0]
    assert [row["at"] for row in result["lengths"]] == [0.255, 0.3, 0.495]
    assert 0.6 < result["whole"]["seconds"] <= 0.865
    with open(run_dir / "evaluation.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["axis"], float(row["place"])) for row in rows] == [
        *(("lengths", at) for at in (0.255, 0.3, 0.495)),
        *(("compression", at) for at in (10.0, 20.0)),
        *(("time_pools", at) for at in (1.0, 2.0)),
    ]
    assert float(rows[0]["accuracy"]) == result["lengths"][0]["accuracy"]
    assert (run_dir / "evaluation.png").read_bytes().startswith(b"\x89PNG")

    files = []
    for index, seconds in enumerate((0.9, 0.02, 3.0)):  # one far shorter than a patch
        files.append(str(tmp_path / f"{index}.wav"))
        write_tone(files[-1], 300, seconds)
    capsys.readouterr()
    assert main(["predict", str(run_dir), *files, "--json"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["file"] for line in lines] == files
    assert all(abs(sum(line["classes"].values()) - 1) < 1e-5 for line in lines)
    # What a file is called does not depend on the files beside it.
    assert main(["predict", str(run_dir), files[2], "--json"]) == 0
    alone = json.loads(capsys.readouterr().out)
    assert alone["classes"] == pytest.approx(lines[2]["classes"], abs=1e-6)


def test_predict_reads_files_whole(run_dir, tmp_path, capsys):
    """Whatever data.max_seconds was in training."""
    low = 0.3 * np.sin(2 * np.pi * 300 * np.arange(8000) / 8000)
    high = 0.3 * np.sin(2 * np.pi * 1500 * np.arange(40 * 8000) / 8000)
    soundfile.write(tmp_path / "short.wav", low, 8000)
    soundfile.write(tmp_path / "long.wav", np.concatenate([low, high]), 8000)
    found = []
    for name in ("short", "long"):
        assert main(["predict", str(run_dir), str(tmp_path / f"{name}.wav"), "--json"]) == 0
        found.append(json.loads(capsys.readouterr().out.splitlines()[-1])["classes"])
    assert found[0] != pytest.approx(found[1], abs=1e-3)


def test_bad_audio_is_named(run_dir, tmp_path, capsys):
    (tmp_path / "bad.wav").write_bytes(b"not audio at all")
    for name in ("bad.wav", "missing.wav"):
        assert main(["predict", str(run_dir), str(tmp_path / name)]) == 1
        assert name in capsys.readouterr().err


def test_evaluates_a_folder(run_dir, tones, capsys):
    (tones / "low" / "damaged.wav").write_bytes(b"not audio")
    try:
        assert main(["evaluate", str(run_dir), "--folder", str(tones), "--per-class"]) == 0
    finally:
        (tones / "low" / "damaged.wav").unlink()
    printed = capsys.readouterr()
    assert "damaged.wav" in printed.err
    result = json.loads((run_dir / "evaluation.json").read_text())
    whole = result["whole"]
    assert (whole["clips"], whole["left_out"]) == (40, 1)
    assert result["left_out"][0]["path"] == str(tones / "low" / "damaged.wav")
    assert {"accuracy", "mAP", "mAUC", "d_prime", "loss"} < set(whole)

    rows = list(csv.DictReader((run_dir / "per_class.csv").open()))
    assert sorted(row["class"] for row in rows) == ["high", "low"]
    precision = [float(row["AP"]) for row in rows]
    assert precision == sorted(precision, reverse=True)
    assert np.mean(precision) == pytest.approx(whole["mAP"])
    recalls = [float(row["recall"]) * int(row["positives"]) for row in rows]
    assert sum(recalls) / 40 == pytest.approx(whole["accuracy"])
    assert (run_dir / "per_class.png").read_bytes().startswith(b"\x89PNG")


def test_several_labels_per_clip(recipe, tones, tmp_path, capsys):
    """Tones are high or low, and maybe long; one of those to train on is called silent."""
    lines = ["path,labels,split"]
    for number, path in enumerate(sorted(tones.glob("*/*.wav"))):
        labels = [path.parent.name] + ["long"] * (int(path.stem) > 9) + ["silent"] * (number == 0)
        split = ("train", "test", "validation")[number % 3]
        lines.append(f"{path},{'|'.join(labels)},{split}")
    (tmp_path / "clips.csv").write_text("\n".join(lines) + "\n")
    settings = recipe.to_dict()
    settings["data"] |= {"kind": "csv", "root": str(tmp_path / "clips.csv")}
    (tmp_path / "labels.yaml").write_text(yaml.safe_dump(settings))
    run = str(tmp_path / "run")
    command = ["fit", str(tmp_path / "labels.yaml"), "--run-dir", run, "--train.epochs", "1"]
    assert main(command) == 0
    capsys.readouterr()
    command = ["evaluate", run, "--split", "validation", "--frame-shifts", "10,20", "--per-class"]
    assert main(command) == 0
    assert "over 3 of 4 classes" in capsys.readouterr().out
    result = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert "accuracy" not in result["whole"] and 0 < result["whole"]["mAP"] <= 1
    assert [row["absent_classes"] for row in result["compression"]] == [1, 1]

    file = str(next(tones.glob("*/*.wav")))
    assert main(["predict", run, file, "--json", "--top", "4"]) == 0
    classes = json.loads(capsys.readouterr().out)["classes"]
    assert sum(classes.values()) > 1.2  # each class stands for itself: about one half as yet
    assert main(["report", run]) == 0
    assert "| validation mAP, last |" in (tmp_path / "run" / "report.md").read_text()


def test_evaluates_a_part_that_there_is_not(run_dir, capsys):
    assert main(["evaluate", str(run_dir), "--split", "trian"]) == 1
    assert "--split must be train, validation or test, got 'trian'" in capsys.readouterr().err


@pytest.fixture
def sounds(tmp_path):
    """Two good files of one name, one that is damaged and one shorter than a frame."""
    for folder, pitch in (("a", 300), ("b", 1500)):
        (tmp_path / "sounds" / folder).mkdir(parents=True)
        write_tone(tmp_path / "sounds" / folder / "1.wav", pitch, 0.5)
    (tmp_path / "sounds" / "damaged.wav").write_bytes(b"not audio")
    write_wav(tmp_path / "sounds" / "short.wav", torch.ones(50, dtype=torch.int16), 8000)
    return tmp_path / "sounds"


def test_embed(run_dir, sounds, capsys):
    out = sounds.parent / "x.npz"
    assert main(["embed", str(run_dir), str(sounds), "--out", str(out)]) == 0
    printed = capsys.readouterr()
    assert "Wrote 3 embeddings" in printed.out and "1 clips were left out" in printed.out
    assert "damaged.wav: cannot be decoded" in printed.err
    with np.load(out) as found:
        assert found["names"].tolist() == ["a/1.wav", "b/1.wav", "short.wav"]
        assert found["embeddings"].shape == (3, 32) and found["embeddings"].dtype == np.float32
        embeddings = found["embeddings"]

    manifest = Manifest(["a/1.wav", "b/1.wav"], [(), ()], [], sounds)
    manifest.write_csv(sounds / "clips.csv")
    out = sounds.parent / "x.parquet"
    assert main(["embed", str(run_dir), str(sounds / "clips.csv"), "--out", str(out)]) == 0
    table = parquet.read_table(out).to_pydict()
    assert table["path"] == [str(sounds / "a" / "1.wav"), str(sounds / "b" / "1.wav")]
    np.testing.assert_allclose(table["embedding"], embeddings[:2], rtol=1e-4, atol=1e-5)


def test_features(sounds, capsys):
    files = [str(sounds / name) for name in ("a/1.wav", "damaged.wav", "b/1.wav", "short.wav")]
    command = ["features", *files, "--out", str(sounds / "out"), "--frame-shift-ms", "20"]
    assert main([*command, "--sample-rate", "8000", "--num-mels", "40"]) == 0
    printed = capsys.readouterr()
    assert "Wrote the features of 2 files" in printed.out and "2 were left out" in printed.out
    assert "damaged.wav: cannot be decoded" in printed.err and "short.wav: lasts" in printed.err
    written = sorted(path.relative_to(sounds / "out").as_posix() for path in out_files(sounds))
    assert written == ["a/1.npz", "a/1.png", "b/1.npz", "b/1.png"]
    with np.load(sounds / "out" / "b" / "1.npz") as found:
        # 4,000 samples in windows of 200 and steps of 160.
        assert found["frames"].shape == (24, 40) and found["frames"].dtype == np.float32
        assert (found["frame_shift_ms"], found["sample_rate"]) == (20.0, 8000)
        assert str(found["path"]) == files[2]
        assert found["frames"].mean(0).argmax() > 20  # the pitch is high


@pytest.mark.parametrize(
    "options, shape, rate",
    [
        (["--preset", "kaldi", "--window-type", "povey"], (48, 128), 16000),
        (["--preset", "htsat"], (51, 64), 32000),
        (["--preset", "epic_sounds", "--low-freq", "50"], (101, 128), 24000),
        (["--preset", "htsat", "--sample-rate", "8000", "--high-freq", "0"], (51, 64), 8000),
    ],
)
def test_features_of_a_preset(sounds, options, shape, rate):
    """At the preset's own sample rate, unless another is asked for; with a picture."""
    write_tone(sounds / "half.wav", 440, 0.5)
    command = ["features", str(sounds / "half.wav"), "--out", str(sounds / "out"), *options]
    assert main(command) == 0
    assert sorted(path.name for path in out_files(sounds)) == ["half.npz", "half.png"]
    with np.load(sounds / "out" / "half.npz") as found:
        assert found["frames"].shape == shape and found["sample_rate"] == rate
        assert np.isfinite(found["frames"]).all()


def out_files(folder):
    return [path for path in (folder / "out").rglob("*") if path.is_file()]


def test_features_of_a_front_end(run_dir, sounds, capsys):
    """The checkpoint's and its recipe's are the same but for the statistics."""
    file = str(sounds / "a" / "1.wav")
    config = run_dir / "config.yaml"
    settings = yaml.safe_load(config.read_text())
    mean, std = (settings["frontend"].pop(name) for name in ("mean", "std"))
    config.write_text(yaml.safe_dump(settings))
    found = []
    for source in (["--checkpoint", str(run_dir)], ["--recipe", str(config)]):
        out = ["--out", str(sounds / "out"), "--pictures", "sheet"]
        assert main(["features", file, *source, *out]) == 0
        assert {path.name for path in out_files(sounds)} == {"1.npz", "features.png"}
        found.append(np.load(sounds / "out" / "1.npz")["frames"])
    assert found[0].shape == (48, 32)
    np.testing.assert_allclose(found[0], (found[1] - mean) / (2 * std), atol=1e-5)


@pytest.mark.parametrize("options, shift", [([], 15.0), (["--frame-shift-ms", "20"], 20.0)])
def test_features_at_a_frame_shift(sounds, options, shift):
    """The recipe's finest, or what is asked for."""
    (sounds / "r.yaml").write_text("frontend: {frame_shift_ms: 10.0, compression: [2.0, 1.5]}\n")
    command = ["features", str(sounds / "a" / "1.wav"), "--recipe", str(sounds / "r.yaml")]
    assert main([*command, *options, "--out", str(sounds / "out"), "--pictures", "none"]) == 0
    assert [path.name for path in out_files(sounds)] == ["1.npz"]
    assert np.load(sounds / "out" / "1.npz")["frame_shift_ms"] == shift


def test_report(run_dir, tmp_path, capsys):
    assert main(["evaluate", str(run_dir)]) == 0
    command = ["fit", str(tmp_path / "small.yaml"), "--run-dir", str(tmp_path / "other")]
    assert main([*command, "--train.epochs", "1", "--train.seed", "5"]) == 0
    capsys.readouterr()
    assert main(["report", str(run_dir), str(tmp_path / "other")]) == 0
    text = (tmp_path / "report.md").read_text()
    assert "| train.epochs | 2 | 1 |" in text and "| train.seed | 0 | 5 |" in text
    assert "|  | run | other |" in text and "| epochs | 2 of 2 | 1 of 1 |" in text
    assert "(test set, 8 clips)" in text
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")
    assert "train.seed" in capsys.readouterr().out


@pytest.mark.parametrize("command", COMMANDS)
def test_help(command, capsys):
    if command == "doctor":
        pytest.skip("takes no options")
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    assert COMMANDS[command].split(";")[0] in " ".join(capsys.readouterr().out.split())


def test_as_a_module():
    result = subprocess.run(
        [sys.executable, "-m", "fastast.cli", "trian"], capture_output=True, text=True
    )
    assert result.returncode == 2 and "no command 'trian'" in result.stderr


def test_what_is_missing_is_named():
    code = "import sys; sys.modules['yaml'] = None; from fastast.cli import main"
    code += "; sys.exit(main(['evaluate', 'x']))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 1
    assert "fastast evaluate needs yaml: pip install 'fastast[train]'" in result.stderr


def test_doctor(capsys):
    assert main(["doctor"]) == 0
    assert "native build" in capsys.readouterr().out


@pytest.mark.parametrize(
    "argv, status, message",
    [
        ([], 2, "usage: fastast"),
        (["--help"], 0, "evaluate"),
        (["trian"], 2, "no command 'trian'"),
        (["evaluate", "nowhere"], 1, "nowhere does not exist"),
        (["predict", "nowhere", "x.wav"], 1, "nowhere does not exist"),
        (["fit", "--train.epochs", "3"], 1, "recipe file comes first"),
        (["fit", "nowhere.yaml"], 1, "no recipe file nowhere.yaml"),
        (["embed", "nowhere", "x.wav", "--out", "x.npz"], 1, "nowhere does not exist"),
        (["features", "nowhere.wav"], 1, "none of the files can be used"),
        (["features", "x.wav", "--recipe", "nowhere.yaml"], 1, "no recipe file nowhere.yaml"),
        (["features", "x.wav", "--recipe", __file__], 1, "is not YAML"),
        (["features", "x.wav", "--checkpoint", "nowhere"], 1, "nowhere does not exist"),
        (["features", "x.wav", "--num-mels", "0"], 1, "--num-mels must be positive"),
        (["features", "x.wav", "--preset", "mfcc"], 1, "preset must be one of kaldi, htsat, epic"),
        (["features", "x.wav", "--preset", "htsat", "--recipe", "r"], 1, "exclude each other"),
        (["features", "x.wav", "--preset", "htsat", "--window-type", "povey"], 1, "leave it out"),
        (["features", "x.wav", "--pictures", "some"], 1, "--pictures must be each, sheet or none"),
        (["report", "nowhere"], 1, "nowhere is not a run directory"),
    ],
)
def test_usage_and_errors(argv, status, message, capsys):
    assert main(argv) == status
    captured = capsys.readouterr()
    assert message in captured.out + captured.err


def test_evaluates_patch_sizes(tones, recipe, tmp_path, capsys):
    recipe.augment.patch_sizes = [8, (16, 8)]
    recipe.model.name, recipe.model.max_time_patches = "flexi_ast_tiny", None
    path, run = tmp_path / "flexi.yaml", tmp_path / "run"
    path.write_text(yaml.safe_dump(recipe.to_dict()))
    command = ["fit", str(path), "--run-dir", str(run), "--train.epochs", "1"]
    assert main([*command, "--train.batch_tokens", "512"]) == 0
    assert main(["evaluate", str(run), "--patch-sizes", "8,4x16"]) == 0
    rows = json.loads((run / "evaluation.json").read_text())["patch_sizes"]
    assert [row["at"] for row in rows] == [[8, 8], [4, 16]]
    assert "4x16" in capsys.readouterr().out
    assert (run / "evaluation.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("sizes", ["8,", "8x", "0", "8x0", "8x8x8", "-8", "1.5", "x"])
def test_bad_patch_sizes(run_dir, sizes, capsys):
    assert main(["evaluate", str(run_dir), f"--patch-sizes={sizes}"]) == 1
    assert "--patch-sizes takes sizes such as" in capsys.readouterr().err


def test_patch_sizes_of_another_model(run_dir, capsys):
    assert main(["evaluate", str(run_dir), "--patch-sizes", "8"]) == 1
    assert "for FlexiAST alone" in capsys.readouterr().err


@pytest.mark.parametrize(
    "option, given", [("lengths", "1,x"), ("lengths", "-1"), ("lengths", "0"), ("frames", "1.5")]
)
def test_bad_lengths(run_dir, option, given, capsys):
    assert main(["evaluate", str(run_dir), f"--{option}={given}"]) == 1
    assert f"--{option} takes" in capsys.readouterr().err


def test_tokens(tones, tmp_path, capsys):
    (tmp_path / "lengths.txt").write_text("10.255 4.015\n2.575\n40\n")
    command = ["tokens", str(tmp_path / "lengths.txt"), "--fixed", "1024", "--batches", "2"]
    assert main([*command, "--out", str(tmp_path / "tokens.csv")]) == 0
    assert "4 clips" in capsys.readouterr().out
    with open(tmp_path / "tokens.csv", newline="") as file:
        fixed, rows, stream, shapes = csv.DictReader(file)
    # 512, 200, 128 and, of the first 3,072 frames, 1,536 tokens.
    assert int(fixed["computed"]) == 4 * 512
    assert float(fixed["padding"]) == (312 + 384) / 2048
    assert float(fixed["cut"]) == 1024 / 2376
    assert int(stream["computed"]) == 2376 and float(stream["padding"]) == 0
    assert rows["input"] == "rows of 2048" and shapes["batch"] == "2"
    assert main(["tokens", str(tones), "--row", "10"]) == 1
    assert "more than a row (10)" in capsys.readouterr().err
    (tmp_path / "lengths.txt").write_text("1.0\nten\n")
    assert main(["tokens", str(tmp_path / "lengths.txt")]) == 1
    assert "takes numbers" in capsys.readouterr().err
