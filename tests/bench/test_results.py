"""The result files: keys, replacement, provenance, atomicity."""

import json
import subprocess

import pytest

from bench import results


def row(contender="ours", median=1.0, **fields) -> dict:
    keys = dict.fromkeys(results.KEY, "x") | {"contender": contender}
    return keys | {"median_ms": median, "ours": contender == "ours"} | fields


def run(commit="a" * 40, dirty=False, date="2026-01-01T00:00:00Z") -> dict:
    return {"commit": commit, "dirty": dirty, "date": date, "machine": {}, "versions": {}}


def test_a_case_measured_again_is_replaced_whole_and_other_cases_kept(tmp_path):
    path = tmp_path / "cpu" / "ops.json"
    first, second = run(), run(commit="b" * 40, date="2026-01-02T00:00:00Z")
    rows = [row("peer", 2.0), row("ours", 1.0), row("ours", 5.0, dtype="y")]
    results.merge(path, rows, first)
    results.merge(path, [row("other", 3.0), row("ours", 4.0)], second)
    document = results.load(path)
    found = [(r["dtype"], r["contender"], r["median_ms"]) for r in document["rows"]]
    assert found == [("x", "ours", 4.0), ("x", "other", 3.0), ("y", "ours", 5.0)]
    runs = [document["runs"][r["run"]] for r in document["rows"]]
    assert runs == [second, second, first]


def test_runs_that_no_row_comes_from_are_dropped(tmp_path):
    path = tmp_path / "ops.json"
    results.merge(path, [row()], run())
    results.merge(path, [row()], run(date="2026-01-02T00:00:00Z"))
    assert [r["date"] for r in results.load(path)["runs"].values()] == ["2026-01-02T00:00:00Z"]


def test_measured_cases_are_those_of_this_clean_commit(tmp_path):
    path = tmp_path / "ops.json"
    results.merge(path, [row(case="old")], run(commit="b" * 40, date="1"))
    results.merge(path, [row(case="tainted")], run(dirty=True, date="2"))
    results.merge(path, [row(case="new")], run(date="3"))
    assert results.measured_cases(path, run()) == {("x", "new", "x", "x")}
    assert results.measured_cases(path, run(dirty=True)) == set()
    assert results.measured_cases(path, run(commit=None)) == set()


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "ops.json"
    results.merge(path, [row()], run())
    before = path.read_text()
    with pytest.raises(ValueError, match="not JSON compliant"):
        results.merge(path, [row(median=float("nan"))], run())
    assert path.read_text() == before
    assert list(tmp_path.iterdir()) == [path]


def test_another_schema_is_refused(tmp_path):
    path = tmp_path / "ops.json"
    path.write_text(json.dumps({"schema": 0}))
    with pytest.raises(ValueError, match="schema 0"):
        results.load(path)


def test_the_run_says_machine_versions_and_code():
    current = results.current_run("cpu")
    assert current["machine"]["gpu"] is None
    assert current["machine"]["cpu"]
    assert current["machine"]["cores"] >= 1
    assert {"python", "torch", "triton", "numpy"} <= current["versions"].keys()
    json.dumps(current, allow_nan=False)


def test_results_do_not_make_the_tree_dirty(tmp_path, monkeypatch):
    def git(*arguments):
        identity = ["-c", "user.name=n", "-c", "user.email=e@example.org"]
        subprocess.run(["git", "-C", str(tmp_path), *identity, *arguments], check=True)

    for name, value in (("ROOT", "."), ("RESULTS", "bench/results"), ("DOCS", "docs/page.md")):
        monkeypatch.setattr(results, name, tmp_path / value)
    (tmp_path / "code.py").write_text("1")
    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "first")
    commit, dirty = results.commit_and_dirty()
    assert len(commit) == 40
    assert dirty is False
    results.write(tmp_path / "bench" / "results" / "cpu" / "ops.json", {})
    results.write(tmp_path / "docs" / "page.md", {})
    assert results.commit_and_dirty() == (commit, False)
    (tmp_path / "code.py").write_text("2")
    assert results.commit_and_dirty() == (commit, True)


def test_without_git_the_environment_names_the_commit(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "ROOT", tmp_path)
    for name in ("RESULTS", "DOCS"):
        monkeypatch.setattr(results, name, tmp_path / name)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.delenv("FASTAST_COMMIT", raising=False)
    assert results.commit_and_dirty() == (None, None)
    monkeypatch.setenv("FASTAST_COMMIT", "c" * 40)
    assert results.commit_and_dirty() == ("c" * 40, False)


def test_folders_are_named_after_the_machine():
    assert results.machine_folder("cpu") == "cpu"
    assert results.slug("NVIDIA H200") == "nvidia-h200"
