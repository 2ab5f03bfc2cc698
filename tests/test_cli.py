"""The command line, as a user types it."""

import json

import pytest
import yaml

from fastast.cli import main
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
    assert main(["evaluate", str(run_dir), "--lengths", "0.3,0.6", "--frame-shifts", "10,20"]) == 0
    result = json.loads((run_dir / "evaluation.json").read_text())
    assert [row["at"] for row in result["compression"]] == [1.0, 2.0]
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
    import numpy as np
    import soundfile

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
    assert main(["evaluate", str(run_dir), "--folder", str(tones)]) == 0
    assert json.loads((run_dir / "evaluation.json").read_text())["whole"]["clips"] == 40


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
    ],
)
def test_usage_and_errors(argv, status, message, capsys):
    assert main(argv) == status
    captured = capsys.readouterr()
    assert message in captured.out + captured.err


@pytest.mark.parametrize("lengths", ["1,x", "-1", "0"])
def test_bad_lengths(run_dir, lengths, capsys):
    assert main(["evaluate", str(run_dir), "--lengths", lengths]) == 1
    assert "--lengths takes" in capsys.readouterr().err
