"""Checking before timing, interleaving, and the rows that come out."""

import time
from dataclasses import replace
from functools import partial

import pytest
import torch

from bench import ceilings, results
from bench.cases import elastic_ast
from bench.clock import CpuClock, CudaClock, clock_for, head_start
from bench.equality import DisagreementError, check, relative_errors
from bench.peers.padded import Padded
from bench.registry import Benchmark, Case, Contender, Settings, Work, peer
from bench.runner import FEWEST_REPS, WARM_UP, measure, progress

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
    measure(BENCH, toy_case(calls), CpuClock(), "cpu", reps=24)
    names = ["ours", "peer", "other"]
    before = [f"check {name}" for name in names]
    before += [name for name in names for _ in range(WARM_UP)]
    assert calls[: len(before)] == before
    timed = calls[len(before) :]
    turns = [tuple(timed[i : i + 3]) for i in range(0, len(timed), 3)]
    # Each once in a turn, and in every order.
    assert len(turns) == 24 and all(sorted(turn) == sorted(names) for turn in turns)
    assert len(set(turns)) == 6


def test_what_we_get_wrong_is_an_error_and_nothing_is_timed():
    calls = []
    case = toy_case(calls)
    work = case.build()
    ours = replace(work.contenders[0], outputs=lambda: {"out": torch.zeros(100)})
    wrong = replace(work, contenders=(ours, *work.contenders[1:]))
    with pytest.raises(DisagreementError, match="ours returns"):
        measure(BENCH, replace(case, build=lambda: wrong), CpuClock(), "cpu", reps=1)
    assert not calls


def test_a_peer_that_disagrees_is_recorded_and_not_timed():
    calls = []
    ours, peer, other = measure(BENCH, toy_case(calls, wrong=1e-4), CpuClock(), "cpu", reps=2)
    assert "other" not in calls
    assert "other: out is off by" in other["disagrees"]
    assert (other["median_ms"], other["reps"], other["error"]) == (None, None, None)
    assert (other["unavailable"], other["ours_over_this"]) == (None, {})
    assert ours["reps"] == peer["reps"] == 2
    assert ours["disagrees"] is None
    assert "other WRONG" in progress([ours, peer, other])


@pytest.mark.parametrize("when", ["built", "checked", "counted", "warmed up", "timed"])
def test_a_peer_that_cannot_do_a_case_is_recorded_with_the_reason(when):
    x = torch.ones(3)
    runs = []

    def fail(*arguments):
        raise RuntimeError(f"no kernel in {results.ROOT}/bench\nand more")

    def step():
        runs.append(0)
        if when == "warmed up" or (when == "timed" and len(runs) > WARM_UP):
            fail()

    def make(name: str, why: str) -> Contender:
        if when == "built":
            fail()
        outputs = fail if when == "checked" else lambda: {"out": x}
        return Contender(name, why, outputs, step, fail if when == "counted" else None)

    good = partial(Contender, outputs=lambda: {"out": x}, step=lambda: None)
    contenders = (good("ours", "a"), peer("peer", "b", make), good("other", "c"))
    work = Work(contenders, lambda dtype: {"out": x.to(dtype)})
    case = Case("case", torch.float32, "tiny", {}, lambda: work)
    ours, failed, other = measure(BENCH, case, CpuClock(), "cpu", reps=3)
    assert failed["unavailable"] == "no kernel in ./bench"
    assert (failed["median_ms"], failed["why"]) == (None, "b")
    assert ours["reps"] == other["reps"] == 3
    assert "peer not available" in progress([ours, failed, other])

    swapped = replace(work, contenders=(contenders[1], contenders[0]))
    with pytest.raises(RuntimeError, match="no kernel"):
        measure(BENCH, replace(case, build=lambda: swapped), CpuClock(), "cpu", reps=3)


def test_what_is_not_compared_says_why_and_is_timed():
    x = torch.ones(3)
    ours = Contender("ours", "", lambda: {"out": x}, lambda: None)
    other = replace(ours, name="other", outputs=lambda: {"out": x[:1]}, unchecked="another layout")
    work = Work((ours, other), lambda dtype: {"out": x.to(dtype)})
    case = Case("case", torch.float32, "tiny", {}, lambda: work)
    ours, other = measure(BENCH, case, CpuClock(), "cpu", reps=2)
    assert (ours["unchecked"], other["unchecked"]) == (None, "another layout")
    assert (other["error"], other["reps"]) == (None, 2)


class StopWatch:
    """A clock that lets a contender take a twentieth of a second in all."""

    seconds = 0.05

    def timer(self, step):
        return lambda: step() or 1.0

    def peak_bytes(self, step):
        return None


def test_slow_contenders_are_timed_less_often_and_over_all_turns(monkeypatch):
    x, calls, now = torch.ones(3), [], [0.0]
    monkeypatch.setattr("bench.runner.time.perf_counter", lambda: now[0])

    def contender(name: str, seconds: float) -> Contender:
        def step() -> None:
            calls.append(name)
            now[0] += seconds

        return Contender(name, "", lambda: {"out": x}, step)

    work = Work((contender("fast", 0.001), contender("slow", 0.02)), lambda d: {"out": x.to(d)})
    case = Case("case", torch.float32, "tiny", {}, lambda: work)
    fast, slow = measure(BENCH, case, StopWatch(), "cpu", reps=20)
    assert (fast["reps"], slow["reps"]) == (20, FEWEST_REPS)
    turns = calls[-25:]
    # In every fourth turn, before or after the fast one.
    slow = [i for i, name in enumerate(turns) if name == "slow"]
    assert all(place - i in (0, 1) for i, place in zip(slow, range(4, 25, 5), strict=True))


@pytest.mark.parametrize(("host", "start"), [(0.0, 1.0), (0.5, 2.0), (10.0, 21.0), (400.0, 50.0)])
def test_the_head_start_outlasts_the_host(host, start):
    assert head_start(host) == start


class FakeEvent:
    """Of a GPU on which every cycle of sleep takes a microsecond; logs what is enqueued."""

    log: list = []  # noqa: RUF012

    def __init__(self, enable_timing: bool) -> None:
        self.at = None

    def record(self) -> None:
        self.at = len(self.log)
        self.log.append("event")

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end) -> float:
        return 1e-3 * sum(what for what in self.log[self.at : end.at] if isinstance(what, int))


def test_a_gpu_sleeps_before_the_first_event_while_the_step_is_enqueued(monkeypatch):
    log = FakeEvent.log = []
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "_sleep", log.append)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)

    class Buffer:
        def zero_(self):
            log.append("evict")

    clock = CudaClock.__new__(CudaClock)
    clock.device, clock.buffer = None, Buffer()
    clock.cycles_per_ms = clock._cycles_per_ms()
    assert clock.cycles_per_ms == 1000
    timer = clock.timer(lambda: time.sleep(0.002) or log.append(123))
    log.clear()
    assert timer() == 0.123
    assert log[0] == "evict" and log[2:] == ["event", 123, "event"]
    assert 5000 <= log[1] <= 50_000  # 1 ms and twice the host's 2 ms


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
    rows = measure(BENCH, whole_model(dtype), CpuClock(), "cpu", reps=1)
    assert "padded SDPA" in rows[2]["disagrees"]


@pytest.mark.gpu
def test_the_gpu_clock_times_and_sees_memory():
    device = torch.device("cuda")
    clock = clock_for(device)
    x = torch.randn(1024, 1024, device=device)
    assert 0 < clock.timer(lambda: x @ x)() < 1000
    assert clock.peak_bytes(lambda: torch.empty(1 << 22, device=device)) >= 1 << 24


@pytest.mark.gpu
def test_the_ceilings_are_of_a_gpu():
    found = ceilings.measure(torch.device("cuda"), size=1 << 28, edge=4096)
    assert 1e11 < found["copy_bytes_per_s"] < 2e13
    assert 1e13 < found["matmul_flops_per_s"] < 1e16


@pytest.mark.gpu
def test_launches_are_not_what_the_gpu_clock_measures():
    x = torch.zeros(1, device="cuda")

    def step() -> None:
        for _ in range(50):
            x.add_(1)

    for _ in range(3):
        step()
    torch.cuda.synchronize()
    begin = time.perf_counter()
    step()
    host = 1e3 * (time.perf_counter() - begin)
    timer = clock_for(torch.device("cuda")).timer(step)
    assert sorted(timer() for _ in range(5))[2] < max(host, 0.2)
