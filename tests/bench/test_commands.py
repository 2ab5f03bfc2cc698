"""``python -m bench`` and the GPU script, as they are called."""

import json
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from bench import profile, sanitize, stages
from bench.__main__ import main
from bench.cases import packed_attention
from bench.peers.attention import sdpa_attention

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "bench" / "gpu_run.sh"
KERNELS = ("packed_attention", "segment_pool", "window_attention", "distillation_cross_entropy")
"""Operators with kernels in Triton."""


@pytest.mark.parametrize(
    "case", ["attention length 128, head dim 64, forward+", "pool length mixed, forward+"]
)
def test_ops_are_measured_written_and_reported(case, tmp_path, capsys):
    out = ["--device", "cpu", "--out", str(tmp_path / "results")]
    arguments = ["--case", case, "--reps", "1", "--docs", str(tmp_path / "page.md")]
    assert main(["ops", "report", *out, *arguments]) == 0
    assert "[1/1]" in capsys.readouterr().out
    document = json.loads((tmp_path / "results" / "cpu" / "ops.json").read_text())
    assert len(document["rows"]) == 3
    assert [row["contender"] for row in document["rows"] if row["ours"]] == ["fastast"]
    assert all(row["error"] < 1e-5 and row["flops"] > 0 for row in document["rows"])
    assert "fastast, ms" in (tmp_path / "page.md").read_text()


def test_a_peer_that_is_wrong_is_named_and_the_exit_code_says_so(tmp_path, monkeypatch, capsys):
    def wrong(q, k, v, mask, scale):
        return sdpa_attention(q, k, v, mask, 1.01 * scale)

    monkeypatch.setattr(packed_attention, "sdpa_attention", wrong)
    case = ["--case", "attention length 16, head dim 64, forward+", "--reps", "1"]
    assert main(["ops", "--device", "cpu", "--out", str(tmp_path), *case]) == 1
    printed = capsys.readouterr()
    assert "padded SDPA: out is off by" in printed.out
    case = "ops/packed_attention length 16, head dim 64, forward+backward"
    assert f"failed: {case}, padded SDPA" in printed.err
    rows = json.loads((tmp_path / "cpu" / "ops.json").read_text())["rows"]
    assert [row["contender"] for row in rows if row["median_ms"]] == ["fastast", "masked rows"]


def test_a_case_that_we_fail_is_not_written(tmp_path, monkeypatch, capsys):
    def broken(*arguments, **options):
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(packed_attention, "packed_attention", broken)
    case = ["--case", "attention length 16, head dim 64, forward+", "--reps", "1"]
    assert main(["ops", "--device", "cpu", "--out", str(tmp_path), *case]) == 1
    printed = capsys.readouterr()
    assert "FAILED, no such kernel" in printed.out
    assert printed.err.endswith("length 16, head dim 64, forward+backward\n")
    assert not (tmp_path / "cpu").exists()


def test_list_measures_nothing(tmp_path, capsys):
    assert main(["e2e", "memory", "--list", "--device", "cpu", "--out", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "e2e/elastic_ast mixed resolutions, 12 clips [tiny, float32]"
    assert len(lines) == 5
    assert "memory/mel_filterbank one clip of 10 s, warm [tiny, float32]" in lines
    assert not list(tmp_path.iterdir())


def test_torch_numpy_and_triton_are_enough():
    extras = "rich soundfile soxr jsonargparse yaml matplotlib sklearn torchmetrics torchaudio"
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({extras.split()}));"
        "import bench.__main__ as b; b.main(['ops', '--list', '--device', 'cpu'])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_what_the_sanitizer_watches_is_right_where_it_can_be_checked(capsys):
    sanitize.main([])
    printed = capsys.readouterr().out
    for name in ("mel_filterbank, int16 to bfloat16", "packed_attention, long", *KERNELS):
        assert name in printed


def test_all_kernels_are_profiled():
    assert {name.split(",")[0] for name in profile.STEPS} == {"mel_filterbank", *KERNELS}


@pytest.mark.parametrize("name", ["window_attention, Audio-MAE decoder", "segment_pool, length 16"])
def test_what_is_profiled_runs(name, monkeypatch):
    """On few clips, on a CPU."""
    make = profile.STEPS[name]
    monkeypatch.setattr(profile, "GPU_TOKENS", 64)
    if isinstance(make.args[0], profile.Grid):
        make = partial(make.func, replace(make.args[0], clips=1, heads=2))
    assert all(x.isfinite().all() for x in make(torch.device("cpu"))())


def test_the_gpu_script_is_bash():
    subprocess.run(["bash", "-n", str(SCRIPT)], check=True)
    assert SCRIPT.stat().st_mode & 0o111


@pytest.fixture
def gpu_run(tmp_path):
    """Runs the script with an interpreter that plays the stages and keeps the real records."""
    python = tmp_path / "python"
    python.write_text(
        f"""#!/usr/bin/env bash
case "$*" in
    "-m bench.stages "*) FASTAST_COMMIT=abc exec {sys.executable} -S "$@" ;;
    *list_models*) echo "broken import"; exit 3 ;;
    *"-m pytest"*) exit 5 ;;
    *) echo "ran $*"; echo "$*" >> {tmp_path}/ran ;;
esac
"""
    )
    python.chmod(0o755)
    tools = tmp_path / "tools"
    tools.mkdir()
    sanitizer = tools / "compute-sanitizer"
    sanitizer.write_text('#!/bin/sh\nwhile [ "${1##*/}" != python ]; do shift; done\nexec "$@"\n')
    sanitizer.chmod(0o755)
    profiler = tools / "ncu"
    profiler.write_text(
        """#!/bin/bash
[[ $1 == --import ]] && { echo "Duration us 12"; exit; }
while [[ ${1##*/} != python ]]; do [[ $1 == -o ]] && echo counters > "$2.ncu-rep"; shift; done
exec "$@"
"""
    )
    profiler.chmod(0o755)

    def run(*stages: str) -> tuple[int, str, dict]:
        done = subprocess.run(
            ["bash", str(SCRIPT), *stages],
            env={
                "PATH": f"{tools}:/usr/bin:/bin",
                "PYTHON": str(python),
                "OUT": str(tmp_path / "out"),
                "FORCE": "1",
            },
            capture_output=True,
            text=True,
        )
        records = list((tmp_path / "out").glob("*/gpu_run.json"))
        return done.returncode, done.stdout, json.loads(records[0].read_text()) if records else {}

    return run


def test_a_stage_that_fails_is_recorded_and_the_rest_go_on(gpu_run):
    code, printed, record = gpu_run()
    assert code == 1
    measured = ["ops", "e2e", "memory", "sanitizer", "profile", "launches"]
    assert list(record) == ["build", "import", "tests", *measured]
    status = {stage: entry["status"] for stage, entry in record.items()}
    assert status.pop("import") == "failed"
    assert status.pop("tests") in ("ok", "nothing to do")
    assert set(status.values()) == {"ok"}
    assert record["import"]["exit_code"] == 3
    assert "broken import" in record["import"]["log"]
    assert "== summary" in printed


def test_a_sanitizer_that_a_machine_refuses_is_nothing_to_do(gpu_run, tmp_path):
    assert gpu_run("sanitizer")[2]["sanitizer"]["status"] == "ok"
    assert (tmp_path / "ran").read_text() == "-m bench.sanitize --probe\n-m bench.sanitize\n"
    (tmp_path / "tools" / "compute-sanitizer").write_text("#!/bin/sh\necho no debugger; exit 1\n")
    entry = gpu_run("sanitizer")[2]["sanitizer"]
    assert entry["status"] == "nothing to do"
    assert "no debugger" in entry["log"] and "does not run here" in entry["log"]


def test_a_profile_is_kept_where_counters_can_be_read(gpu_run, tmp_path):
    assert gpu_run("profile")[2]["profile"]["status"] == "ok"
    assert (tmp_path / "ran").read_text() == "-m bench.profile\n"
    (page,) = (tmp_path / "out").glob("*/profile.txt")
    assert page.read_text() == "Duration us 12\n"
    (tmp_path / "tools" / "ncu").write_text("#!/bin/sh\necho no counters; exit 1\n")
    entry = gpu_run("profile")[2]["profile"]
    assert entry["status"] == "nothing to do" and "no counters" in entry["log"]


def test_an_unknown_stage_is_refused(gpu_run):
    assert gpu_run("nonsense")[0] == 2


def test_stages_that_have_succeeded_on_a_clean_commit_are_done(tmp_path, monkeypatch):
    path = tmp_path / "gpu_run.json"
    state = ["a" * 40, False]
    monkeypatch.setattr(stages, "commit_and_dirty", lambda: tuple(state))
    stages.record(path, "ops", 0, 7, f"log of {ROOT}/bench")
    stages.record(path, "e2e", 124, 480, "")
    assert json.loads(path.read_text())["ops"]["log"] == "log of ./bench"
    assert stages.is_done(path, "ops")
    assert not stages.is_done(path, "e2e")
    assert not stages.is_done(path, "tests")
    assert stages.read(path)["e2e"]["status"] == "timed out"
    text, good = stages.summary(path)
    assert "timed out" in text
    assert not good
    state[1] = True
    assert not stages.is_done(path, "ops")
    state[:] = ["b" * 40, False]
    assert not stages.is_done(path, "ops")
    state[:] = [None, None]
    assert not stages.is_done(path, "ops")
