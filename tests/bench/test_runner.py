"""Checking before timing, interleaving, and the rows that come out."""

from dataclasses import replace
from functools import partial

import pytest
import torch

from bench.cases import elastic_ast
from bench.clock import CpuClock, clock_for
from bench.equality import DisagreementError, check, relative_errors
from bench.peers.padded import Padded
from bench.registry import Benchmark, Case, Contender, Settings, Work
from bench.runner import WARM_UP, measure, progress

BENCH = Benchmark("ops/toy", "A toy.", lambda settings: [])


def toy_case(calls: list[str], wrong: float = 0.0, **fields) -> Case:
    """Three contenders that say when they are called; the last may be wrong."""
    x = torch.linspace(1, 2, 100)

    def build() -> Work:
        def contender(name: str, error: float = 0.0, **more) -> Contender:
            def outputs():
                calls.append(f"check {name}")
                return {"out": x * (1 + error), "grad": 2 * x}

            return Contender(name, f"why {name}", outputs, lambda: calls.append(name), **more)

        contenders = (
            contender("ours", flops=50, bytes=8, tokens=5),
            contender("peer", flops=100, **fields),
            contender("other", error=wrong),
        )
        return Work(contenders, lambda dtype: {"out": x.to(dtype), "grad": 2 * x.to(dtype)})

    return Case("case", torch.float32, "tiny", {"lengths": [1, 2]}, build)


def test_contenders_are_checked_then_timed_in_turn():
    calls = []
    measure(BENCH, toy_case(calls), CpuClock(), "cpu", reps=4)
    names = ["ours", "peer", "other"]
    warm_up = [name for name in names for _ in range(WARM_UP)]
    assert calls == [f"check {name}" for name in names] + warm_up + names * 4


def test_a_contender_that_disagrees_is_an_error_and_nothing_is_timed():
    calls = []
    with pytest.raises(DisagreementError, match="other: out is off by"):
        measure(BENCH, toy_case(calls, wrong=1e-4), CpuClock(), "cpu", reps=1)
    assert all(call.startswith("check") for call in calls)


def test_rows_hold_what_was_measured_and_null_for_the_rest():
    case = toy_case([], saved_bytes=lambda: 12)
    ours, peer, other = measure(BENCH, case, CpuClock(), "cpu", reps=3)
    assert (ours["benchmark"], ours["case"], ours["contender"]) == ("ops/toy", "case", "ours")
    assert (ours["ours"], peer["ours"]) == (True, False)
    assert (ours["dtype"], ours["size"], ours["reps"]) == ("float32", "tiny", 3)
    assert 0 <= ours["p20_ms"] <= ours["median_ms"] <= ours["p80_ms"]
    assert (ours["flops"], ours["bytes"], ours["tokens"]) == (50, 8, 5)
    assert (peer["bytes"], peer["saved_bytes"], ours["saved_bytes"]) == (None, 12, None)
    assert (ours["peak_bytes"], other["flops"]) == (None, None)
    assert peer["ours_over_this"]["flops"] == 0.5
    assert "saved_bytes" not in peer["ours_over_this"]
    assert "flops" not in other["ours_over_this"]
    assert progress([ours, peer, other]).count(" ms") == 3


def test_what_has_no_step_is_not_timed():
    x = torch.ones(3)
    contender = Contender("ours", "", lambda: {"out": x}, saved_bytes=lambda: 1 << 20)
    work = Work((contender,), lambda dtype: {"out": x.to(dtype)})
    case = Case("case", torch.float32, "base", {}, lambda: work)
    (row,) = measure(BENCH, case, CpuClock(), "cpu", reps=3)
    assert (row["median_ms"], row["reps"], row["saved_bytes"]) == (None, None, 1 << 20)
    assert progress([row]) == "ours 1 MiB"


def test_relative_errors_in_both_norms():
    truth = torch.tensor([3.0, 4.0])
    assert relative_errors(torch.tensor([3.0, 4.5]), truth) == pytest.approx((0.1, 0.125))
    assert relative_errors(torch.tensor([3.0, torch.nan]), truth) == (torch.inf, torch.inf)


def test_the_budget_is_what_rounding_explains():
    truth = {"out": torch.linspace(1, 2, 1000, dtype=torch.float64)}
    rounded = {"out": truth["out"].to(torch.bfloat16)}
    assert 0 < check("it", rounded, truth, rounded, torch.bfloat16) < 2**-8
    with pytest.raises(DisagreementError, match="bfloat16 explains"):
        check("it", {"out": truth["out"] * 1.05}, truth, rounded, torch.bfloat16)
    # One wrong row among many: invisible to the Euclidean norm, not to the maximum.
    one = truth["out"].clone()
    one[17] += 0.1
    with pytest.raises(DisagreementError, match="max-norm"):
        check("it", {"out": one}, truth, rounded, torch.bfloat16)


def test_missing_tensors_and_other_shapes_disagree():
    truth = {"out": torch.ones(3)}
    with pytest.raises(DisagreementError, match="returns"):
        check("it", {}, truth, truth, torch.float32)
    with pytest.raises(DisagreementError, match=r"\(1, 3\)"):
        check("it", {"out": torch.ones(1, 3)}, truth, truth, torch.float32)


def whole_model(dtype: torch.dtype) -> Case:
    """The benchmark of whole models on short clips."""
    (case,) = elastic_ast.cases(Settings(torch.device("cpu"), dtype, "tiny"))
    build = partial(elastic_ast._build, torch.device("cpu"), dtype, "tiny", [16, 96, 48])
    return replace(case, build=build)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_whole_models_agree_and_are_timed(dtype):
    rows = measure(BENCH, whole_model(dtype), CpuClock(), "cpu", reps=1)
    assert [row["contender"] for row in rows] == ["fastast", "dense rows", "padded SDPA"]
    assert [row["tokens"] for row in rows] == [8 + 48 + 24, 8 + 48 + 24, 3 * 48]
    assert all(row["median_ms"] > 0 for row in rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_forgotten_mask_is_seen_even_in_bfloat16(dtype, monkeypatch):
    monkeypatch.setattr(Padded, "key_mask", lambda *arguments: None)
    with pytest.raises(DisagreementError, match="padded SDPA"):
        measure(BENCH, whole_model(dtype), CpuClock(), "cpu", reps=1)


@pytest.mark.gpu
def test_the_gpu_clock_times_and_sees_memory():
    device = torch.device("cuda")
    clock = clock_for(device)
    x = torch.randn(1024, 1024, device=device)
    assert 0 < clock.milliseconds(lambda: x @ x) < 1000
    assert clock.peak_bytes(lambda: torch.empty(1 << 22, device=device)) >= 1 << 24
