"""The page made of the results."""

import pytest

from bench import figures, report, results
from bench.runner import measure


def run(**fields) -> dict:
    machine = {"gpu": None, "gpu_memory": None, "cpu": "A CPU", "cores": 8, "threads": 4}
    versions = {"python": "3.12.0", "torch": "2.11.0", "cuda": None}
    commit = {"commit": "0123456789abcdef", "dirty": False, "date": "2026-01-01T00:00:00Z"}
    return {"machine": machine, "versions": versions} | commit | fields


def row(case: str, contender: str, **fields) -> dict:
    empty = dict.fromkeys(
        ("median_ms", "p20_ms", "p80_ms", "reps", "tokens", "flops", "bytes", "saved_bytes")
    )
    return empty | {
        "benchmark": "ops/packed_attention",
        "case": case,
        "contender": contender,
        "ours": contender == "fastast",
        "why": f"why {contender}",
        "device": "cpu",
        "dtype": "float32",
        "size": "tiny",
        "shapes": {},
        "peak_bytes": None,
        "ours_over_this": {},
    } | fields  # fmt: skip


def timed(median: float, ratio: float | None = None, **fields) -> dict:
    spread = {"median_ms": median, "p20_ms": median / 2, "p80_ms": median * 2, "reps": 5}
    return spread | fields | ({"ours_over_this": {"median_ms": ratio}} if ratio else {})


def test_every_table_names_machine_versions_commit_and_date(tmp_path):
    rows = [row("length 16, forward", "fastast", **timed(2.0, flops=4 * 10**9, bytes=10**9))]
    rows += [row("length 16, forward", "padded", **timed(3.0, 2 / 3))]
    results.merge(tmp_path / "cpu" / "ops.json", rows, run())
    page = report.render(tmp_path)
    assert "| length 16, forward | 2 (1 to 4) | 3 (1.5 to 6) | 1.50 | 2000 | 500 |" in page
    assert "| case | fastast, ms | padded, ms | padded / ours | GFLOP/s | GB/s |" in page
    assert (
        "A CPU, 8 cores, 4 threads; python 3.12.0, torch 2.11.0; "
        "commit 0123456789ab; 2026-01-01T00:00:00Z" in page
    )
    assert "- **padded**: why padded" in page


def test_how_busy_the_machine_was_is_said_where_it_is_known(tmp_path):
    machine = run()["machine"] | {"load": 0.3}
    rows = [row("length 16, forward", "fastast", **timed(2.0))]
    results.merge(tmp_path / "cpu" / "ops.json", rows, run(machine=machine))
    assert "A CPU, 8 cores, 4 threads, load 0.3 before; python" in report.render(tmp_path)


def on_gpu(case: str, contender: str, median: float | None, ours: float = 2.0, **fields) -> dict:
    """A row of a GPU's table; ``ours`` is our median of the case."""
    numbers = (
        {} if median is None else timed(median, None if contender == "fastast" else ours / median)
    )
    return row(case, contender, device="cuda", **numbers | fields)


@pytest.fixture
def gpu_results(tmp_path):
    """A sweep with two peers, one of which lacks a case; ours reaches half of everything."""
    rows = []
    for length, other in ((16, 8.0), (512, None)):
        case = f"length {length}, head dim 64, forward"
        reason = {"unavailable": "no kernel"} if other is None else {}
        rows += [
            on_gpu(case, "fastast", 2.0, flops=10**12, bytes=4 * 10**9),
            on_gpu(case, "padded", 3.0 if length == 512 else 16.0),
            on_gpu(case, "nested", other, **reason),
            on_gpu(case, "not the same", 0.1, unchecked="another definition"),
        ]
    gpu = {"gpu": "A GPU", "gpu_memory": 1, "cpu": "A CPU", "cores": 8, "threads": 4}
    ceilings = {"copy_bytes_per_s": 4e12, "matmul_flops_per_s": 1e15}
    results.merge(tmp_path / "a-gpu" / "ops.json", rows, run(machine=gpu, ceilings=ceilings))
    return tmp_path


def test_a_gpu_s_rates_stand_beside_its_ceilings(gpu_results):
    page = report.render(gpu_results)
    assert "| TFLOP/s | of matmul | TB/s | of copy |" in page
    assert "| 500 | 50% | 2 | 50% |" in page
    assert "copies at 4 TB/s, multiplies at 1000 TFLOP/s; commit" in page


def test_a_sweep_is_summed_up_by_the_best_peer_that_does_the_same(gpu_results):
    page = report.render(gpu_results)
    # At 16 tokens nested takes 4 times as long as ours, at 512 padded 1.5 times.
    assert "| head dim 64, forward | 512 | padded | 2.45 | 1.50 |" in page
    assert report.geometric_mean([4.0, 1.5]) == pytest.approx(6**0.5)


def test_what_a_peer_cannot_do_is_blank_and_explained(gpu_results):
    page = report.render(gpu_results)
    assert "- nested, length 512, head dim 64, forward: not available: no kernel" in page
    assert "why not the same. Not compared: another definition" in page
    assert "| length 512, head dim 64, forward | 2 (1 to 4) |  | 0.1" in page


def test_a_peer_that_is_wrong_everywhere_is_named_once(tmp_path):
    rows = []
    for case in ("a", "b"):
        rows += [row(case, "fastast", **timed(1.0)), row(case, "peer", disagrees="off by 1")]
    results.merge(tmp_path / "cpu" / "ops.json", rows, run())
    assert "- peer, all cases: DISAGREES: off by 1" in report.render(tmp_path)


def test_clips_per_second_and_core_where_the_threads_are_known(tmp_path):
    rows = []
    for threads in (1, 2):
        shapes = {"shapes": {"clips": 8, "threads": threads}, "benchmark": "ops/mel_filterbank"}
        rows.append(row(f"clips, {threads} threads", "fastast", **timed(4.0 / threads), **shapes))
    results.merge(tmp_path / "cpu" / "ops.json", rows, run())
    page = report.render(tmp_path)
    assert "| clips / s | clips / s / core |" in page
    assert "| 2,000 | 2,000 |" in page and "| 4,000 | 2,000 |" in page


def test_the_peak_of_a_process_has_a_column(tmp_path):
    rows = [
        row("one clip", "fastast", peak_bytes=2**20),
        row("one clip", "peer", peak_bytes=2**24, ours_over_this={"peak_bytes": 1 / 16}),
    ]
    for each in rows:
        each["benchmark"] = "memory/mel_filterbank"
    results.merge(tmp_path / "cpu" / "memory.json", rows, run())
    page = report.render(tmp_path)
    assert "## Memory" in page and "| case | contender | peak, MiB | / ours |" in page
    assert "| one clip | peer | 16 | 16.00 |" in page


def test_clips_per_second_and_kept_bytes_have_columns_where_known(tmp_path):
    clips = {"shapes": {"clips": 1024}, "benchmark": "ops/mel_filterbank"}
    rows = [on_gpu("1024 clips", "fastast", 2.0, **clips)]
    kept = {"benchmark": "ops/segment_pool"}
    rows += [on_gpu("length 16, forward", "fastast", 2.0, saved_bytes=2**20, **kept)]
    rows += [on_gpu("length 16, forward", "padded", 4.0, saved_bytes=2**25, **kept)]
    results.merge(tmp_path / "a-gpu" / "ops.json", rows, run())
    page = report.render(tmp_path)
    assert "clips / s" in page and "| 512,000 |" in page
    assert "| fastast, kept MiB | padded, kept MiB |" in page and "| 1 | 32 |" in page


def test_a_figure_of_attention_is_drawn_and_linked(gpu_results):
    pytest.importorskip("matplotlib")
    page = gpu_results / "docs" / "page.md"
    report.write(gpu_results, page)
    image = gpu_results / "docs" / "figures" / "attention_a_gpu.png"
    assert image.stat().st_size > 1000
    assert "![ops/packed_attention](figures/attention_a_gpu.png)" in page.read_text()


def test_a_figure_shows_times_over_ours(gpu_results):
    rows = results.load(gpu_results / "a-gpu" / "ops.json")["rows"]
    (panel,) = figures.curves(rows).items()
    assert panel[0] == ("forward", 64)
    assert panel[1]["padded"] == pytest.approx({16: 8.0, 512: 1.5})
    assert panel[1]["nested"] == pytest.approx({16: 4.0})
    assert panel[1]["fastast"] == {16: 1.0, 512: 1.0}


def test_what_was_not_measured_is_blank(tmp_path):
    rows = [
        row("length 16, forward", "fastast", **timed(2.0)),
        row("length 64, forward", "fastast", **timed(2.0)),
        row("length 64, forward", "padded", **timed(3.0, 2 / 3)),
    ]
    results.merge(tmp_path / "cpu" / "ops.json", rows, run())
    page = report.render(tmp_path)
    assert "| length 16, forward | 2 (1 to 4) |  |  |  |  |" in page
    assert "None" not in page
    assert "nan" not in page


def test_cases_are_ordered_by_their_numbers(tmp_path):
    rows = [row(f"length {n}, forward", "fastast", **timed(1.0)) for n in (512, "mixed", 64, 16)]
    results.merge(tmp_path / "cpu" / "ops.json", rows, run())
    page = report.render(tmp_path)
    places = [page.index(f"| length {n}, forward") for n in (16, 64, 512, "mixed")]
    assert places == sorted(places)


def test_dirty_trees_and_other_machines_are_said_to_be(tmp_path):
    gpu = {"gpu": "A GPU", "gpu_memory": 1, "cpu": "A CPU", "cores": 8, "threads": 4}
    memory = {"saved_bytes": 3 * 2**20, "tokens": 10}
    name = {"benchmark": "memory/elastic_ast", "device": "cuda"}
    rows = [row("batch", "fastast", **memory, **name)]
    rows += [
        row(
            "batch",
            "rows",
            saved_bytes=12 * 2**20,
            tokens=20,
            ours_over_this={"saved_bytes": 0.25},
            **name,
        )
    ]
    results.merge(tmp_path / "a-gpu" / "memory.json", rows, run(machine=gpu, dirty=True))
    page = report.render(tmp_path)
    assert "**A GPU; float32, tiny**" in page
    assert "with uncommitted changes" in page
    assert "| case | contender | tokens | kept, MiB | / ours |" in page
    assert "| batch | rows | 20 | 12 | 4.00 |" in page


def test_without_results_the_page_has_no_tables(tmp_path):
    page = report.render(tmp_path)
    assert page.startswith("# Benchmarks")
    assert "|" not in page
    report.write(tmp_path, tmp_path / "docs" / "page.md")
    assert (tmp_path / "docs" / "page.md").read_text() == page


def test_the_page_reads_what_the_runner_writes(tmp_path):
    import torch

    from bench.clock import CpuClock
    from bench.registry import Benchmark, Case, Contender, Work

    x = torch.ones(3)
    contenders = tuple(
        Contender(name, "why", lambda: {"out": x}, lambda: None, flops=1, bytes=1, tokens=1)
        for name in ("fastast", "peer")
    )
    work = Work(contenders, lambda dtype: {"out": x.to(dtype)})
    case = Case("case", torch.float32, "tiny", {}, lambda: work)
    rows = measure(Benchmark("e2e/toy", "", lambda s: []), case, CpuClock(), "cpu", 2)
    results.merge(tmp_path / "cpu" / "e2e.json", rows, results.current_run("cpu"))
    page = report.render(tmp_path)
    assert "### e2e/toy" in page
    assert page.count("| case | ") == 3  # the header and two contenders


def test_packing_has_a_section_of_its_own(tmp_path):
    measured = {
        "lengths": "VoxCeleb",
        "clips": 200_000,
        "ranks": 1,
        "strategy": "next_fit",
        "window": None,
        "max_clips": None,
        "bins": 10,
        "padding": 0.0123,
        "least_padding": 0.001,
        "token_imbalance": 0.0,
        "work_imbalance": 0.0,
        "most_clips": 75,
        "ns_per_clip": 12.34,
        "us_per_bin": 0.567,
    }
    on_eight = {"ranks": 8, "window": 1024, "token_imbalance": 0.002, "work_imbalance": 0.05}
    on_eight["max_clips"] = 76
    document = {"schema": results.SCHEMA, "run": run(), "rows": [measured, measured | on_eight]}
    results.write(tmp_path / "cpu" / "packing.json", document)
    page = report.render(tmp_path)
    cells = "VoxCeleb | next_fit | 200,000"
    assert f"| {cells} | 1 |  | 1.23% | 0.10% |  |  | 75 |  | 12.3 | 0.567 |" in page
    assert (
        f"| {cells} | 8 | 1,024 | 1.23% | 0.10% | 0.20% | 5.00% | 75 | 76 | 12.3 | 0.567 |" in page
    )
    assert "A CPU, 8 cores, 4 threads" in page


@pytest.mark.parametrize(("value", "text"), [(None, ""), (0.01234, "0.0123"), (1234.5, "1234")])
def test_numbers_have_three_digits(value, text):
    assert report._number(value) == text
