"""Reports on runs: finished, going on, and killed."""

import json

import pytest
import yaml

from fastast.train.curves import curve_table
from fastast.train.report import (
    compute_curves,
    evaluated_curves,
    learning_curves,
    read_runs,
    results_table,
    savings_table,
    settings_table,
    shared_folder,
    write_report,
)


def make_run(folder, records, *, text="", evaluation=None, **settings):
    folder.mkdir(parents=True)
    config = {"optim": {"lr": 1e-3, "betas": [0.9, 0.98]}, "train": {"epochs": 3, "seed": 0}}
    config["train"] |= settings
    (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (folder / "metrics.jsonl").write_text(lines + text)
    if evaluation:
        (folder / "evaluation.json").write_text(json.dumps(evaluation))
    return folder


def epoch(number, loss, accuracy, **more):
    return {
        "kind": "epoch",
        "epoch": number,
        "step": 10 * (number + 1),
        "tokens": 500_000 * (number + 1),
        "seconds": 900.0,
        "loss": loss,
        "validation_accuracy": accuracy,
        "validation_loss": 2 * loss,
        "validation_clips": 40,
    } | more


def train(step, loss):
    tokens = 30_000 * step
    return {"kind": "train", "step": step, "epoch": step // 10, "tokens": tokens, "loss": loss}


@pytest.fixture
def folders(tmp_path):
    finished = make_run(
        tmp_path / "finished",
        [
            train(5, 2.5),
            epoch(0, 2.0, 0.5),
            epoch(1, 1.0, 0.75),
            train(25, 0.7),
            epoch(2, 0.5, 0.7),
        ],
        evaluation={
            "clips_of": "test set",
            "whole": {"accuracy": 0.625, "mAP": 0.7, "clips": 80, "left_out": 2},
        },
    )
    killed = make_run(
        tmp_path / "killed", [epoch(0, 1.5, None), train(17, 1.25)], text='{"kind": "ep', seed=1
    )
    return [finished, killed]


def column_of(run, paths):
    """A run's cells of the table, by the name of their row."""
    header, *rows = results_table(read_runs(paths))
    return {row[0]: row[header.index(run)] for row in rows}


def test_results(folders):
    assert column_of("finished", folders) == {
        "epochs": "3 of 3",
        "steps": "30",
        "tokens": "1,500,000",
        "time": "0:45:00",
        "training loss": "0.5000",
        "validation accuracy, last": "70.00%",
        "validation accuracy, best (epoch)": "75.00% (2)",
        "validation loss, last": "1.0000",
        "validation loss, best (epoch)": "1.0000 (3)",
        "validation clips": "40",
        "evaluated": "accuracy 62.50% (test set, 80 clips, 2 left out)",
    }
    killed = column_of("killed", folders)
    assert killed == killed | {
        "epochs": "1 of 3",
        "steps": "17",
        "tokens": "510,000",
        "training loss": "1.5000",
        "validation accuracy, last": "–",
        "validation accuracy, best (epoch)": "–",
        "evaluated": "–",
    }


def test_settings_that_differ(folders, tmp_path):
    older = make_run(tmp_path / "older", [])
    (older / "config.yaml").write_text("train: {epochs: 3, lr: 0.01}\n")
    assert settings_table(read_runs(folders)) == [
        ["setting", "finished", "killed"],
        ["train.seed", "0", "1"],
    ]
    assert settings_table(read_runs([folders[0], older])) == [
        ["setting", "finished", "older"],
        ["optim.lr", "0.001", "–"],
        ["optim.betas", "[0.9, 0.98]", "–"],
        ["train.seed", "0", "–"],
        ["train.lr", "–", "0.01"],
    ]


def test_learning_curves(folders):
    panels = learning_curves(read_runs(folders))
    assert panels == {
        "training loss": {"finished": ([5, 25], [2.5, 0.7]), "killed": ([17], [1.25])},
        "validation loss": {"finished": ([10, 20, 30], [4.0, 2.0, 1.0]), "killed": ([10], [3.0])},
        "validation accuracy (%)": {
            "finished": ([10, 20, 30], [50.0, 75.0, 70.0]),
            "killed": ([], []),
        },
    }


def test_multi_label_runs_are_judged_by_map(tmp_path):
    record = {"kind": "epoch", "epoch": 0, "step": 3, "loss": 0.1, "validation_mAP": 0.25}
    runs = read_runs([make_run(tmp_path / "run", [record])])
    assert list(learning_curves(runs)) == ["training loss", "validation mAP (%)"]
    assert ["validation mAP, best (epoch)", "25.00% (1)"] in results_table(runs)


def test_the_kept_weights_have_a_row(folders, tmp_path):
    final = {"kind": "final", "epoch": 0, "step": 10, "validation_accuracy": 0.8}
    averaged = make_run(tmp_path / "averaged", [epoch(0, 1.0, 0.6), final])
    paths = [averaged, folders[0]]
    assert column_of("averaged", paths)["validation accuracy, kept weights"] == "80.00%"
    assert column_of("finished", paths)["validation accuracy, kept weights"] == "–"


def test_a_run_that_has_just_begun(tmp_path):
    folder = make_run(tmp_path / "run", [])
    (folder / "metrics.jsonl").unlink()
    assert column_of("run", [folder]) == {"epochs": "0 of 3", "steps": "0"}
    assert write_report(read_runs([folder]), folder).read_text()


def coarse_epoch(number, phase, accuracy, flops):
    return epoch(number, 1.0, accuracy, phase=phase, flops=flops, audio_hours=0.5)


@pytest.fixture
def experiment(tmp_path):
    """A baseline that is best after 4 of 5 epochs, and two runs of two phases against it."""
    base = [coarse_epoch(n, 0, acc, 1e15) for n, acc in enumerate((0.1, 0.3, 0.4, 0.5, 0.45))]
    phases = [{"compression": 4, "epochs": 1}, {"epochs": 3}]
    coarse = [coarse_epoch(0, 0, 0.9, 2e14)]  # a coarse phase never counts as being better
    better = coarse + [coarse_epoch(n, 1, acc, 1e15) for n, acc in ((1, 0.45), (2, 0.51), (3, 0.6))]
    worse = coarse + [coarse_epoch(n, 1, acc, 1e15) for n, acc in ((1, 0.45), (2, 0.40))]
    started = coarse
    folders = [make_run(tmp_path / "baseline", base)]
    for name, records in (("better", better), ("worse", worse), ("started", started)):
        folder = make_run(tmp_path / name, records)
        config = yaml.safe_load((folder / "config.yaml").read_text()) | {"phases": phases}
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
        folders.append(folder)
    return read_runs(folders)


def test_savings(experiment):
    assert savings_table(experiment) == [
        ["", "accuracy", "delta", "FLOPs saved", "time saved", "epochs"],
        ["baseline", "50.00%", "–", "–", "–", "4"],
        ["better", "51.00%", "+1.00", "45.00%", "25.00%", "3"],
        ["worse", "45.00%", "-5.00", "70.00%", "50.00%", "2"],
        ["started", "–", "–", "–", "–", "–"],
    ]
    converged = {row[0]: row[1:] for row in savings_table(experiment, converged=True)}
    assert converged["better"] == ["60.00%", "+10.00", "20.00%", "0.00%", "4"]
    assert savings_table(experiment[:1]) == []


def test_phases_are_listed_in_short(experiment):
    rows = {row[0]: row[1:] for row in settings_table(experiment)}
    short = '[{"compression": 4, "epochs": 1}, {"epochs": 3}]'
    assert rows["phases"] == ["–", short, short, short]


def test_savings_without_measurements(tmp_path, folders):
    """Logs of old have no FLOPs, and some runs no validation."""
    rows = savings_table(read_runs(folders))
    assert rows[1][:2] == ["finished", "75.00%"] and rows[2] == ["killed", *["–"] * 5]
    assert savings_table(read_runs(folders[::-1])) == []
    same = make_run(tmp_path / "same", [epoch(0, 1.0, 0.8)])
    assert savings_table(read_runs([folders[0], same]))[2][2:5] == ["+5.00", "–", "50.00%"]


def test_compute_curves_and_costs(experiment, tmp_path):
    curves = compute_curves(experiment)
    assert curves["better"][0] == pytest.approx([2e14, 1.2e15, 2.2e15, 3.2e15])
    assert curves["better"][1] == pytest.approx([90, 45, 51, 60])
    table = {row[0]: row[1:] for row in results_table(experiment)}
    assert table["training FLOPs"] == ["5e+15", "3.2e+15", "2.2e+15", "2e+14"]
    assert table["audio heard, h"] == ["2.50", "2.00", "1.50", "0.50"]
    assert table["epochs"] == ["5 of 3", "4 of 4", "3 of 4", "1 of 4"]
    text = write_report(experiment, tmp_path / "new").read_text()
    assert "## What is saved over baseline" in text and "| better | 51.00% | +1.00 |" in text
    assert (tmp_path / "new" / "compute.png").read_bytes().startswith(b"\x89PNG")


def test_report_is_written(folders, tmp_path):
    path = write_report(read_runs(folders), tmp_path / "new")
    text = path.read_text()
    assert path == tmp_path / "new" / "report.md"
    assert (tmp_path / "new" / "report.png").read_bytes().startswith(b"\x89PNG")
    assert "![Learning curves](report.png)" in text
    assert "| train.seed | 0 | 1 |" in text
    assert "| epochs | 3 of 3 | 1 of 3 |" in text


def test_names_and_places(folders, tmp_path):
    other = make_run(tmp_path / "other" / "finished", [])
    assert [run.name for run in read_runs([folders[0], other])] == [str(folders[0]), str(other)]
    assert shared_folder(folders) == tmp_path
    assert shared_folder(folders[:1]) == folders[0]


def test_wrong_folders_say_so(folders, tmp_path):
    with pytest.raises(ValueError, match=r"is not a run directory: it has no config\.yaml"):
        read_runs([tmp_path])
    with pytest.raises(ValueError, match="named twice"):
        read_runs([folders[0], folders[0]])


def test_evaluations_side_by_side(tmp_path):
    def curve(key, places, values, **more):
        row = {"mAP": 0.1, "clips": 80, "left_out": 0}
        found = zip(places, values, strict=True)
        return {key: [row | more | {"at": at, "accuracy": value} for at, value in found]}

    whole = {"accuracy": 0.5, "clips": 80, "left_out": 0, "seconds": 10.255}
    evaluations = {
        "elastic": curve("lengths", [2.575, 10.255], [0.25, 0.5])
        | curve("time_pools", [2], [0.125]),
        "ast": curve("lengths", [30.735, 2.575], [0.4, None])
        | curve("compression", [2.0], [0.3], frame_shift_ms=20.0),
        "not evaluated": None,
    }
    paths = [
        make_run(
            tmp_path / name,
            [epoch(0, 2.0, 0.5)],
            evaluation=curves and {"clips_of": "test set", "whole": whole} | curves,
        )
        for name, curves in evaluations.items()
    ]
    runs = read_runs(paths)
    models = evaluated_curves(runs)
    assert curve_table(models, "lengths") == [
        ["clip length (s)", "elastic", "ast"],
        ["2.575", "25.00%", "–"],
        ["10.255", "50.00%", "–"],
        ["30.735", "–", "40.00%"],
    ]
    report = write_report(runs, tmp_path / "report").read_text()
    assert "## Evaluation: accuracy" in report and "| 20 | – | 30.00% |" in report
    assert (tmp_path / "report" / "evaluation.png").read_bytes().startswith(b"\x89PNG")
    lines = (tmp_path / "report" / "evaluation.csv").read_text().splitlines()
    assert lines[0] == "model,axis,place,mAP,clips,left_out,accuracy"
    assert lines[1:] == [
        "elastic,lengths,2.575,0.1,80,0,0.25",
        "elastic,lengths,10.255,0.1,80,0,0.5",
        "elastic,time_pools,2,0.1,80,0,0.125",
        "ast,lengths,30.735,0.1,80,0,0.4",
        "ast,lengths,2.575,0.1,80,0,",
        "ast,compression,20.0,0.1,80,0,0.3",
    ]
