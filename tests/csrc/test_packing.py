"""fastast._packing: strategies against naive ones in Python, the look-ahead against its rules."""

import threading
import time

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from fastast._packing import STRATEGIES, pack, pack_all

INT64_MAX = np.iinfo(np.int64).max
HARD_TO_SPREAD = [6, 9, 5, 8, 11, 1, 10, 10, 8, 7, 5, 9, 6, 5, 9, 11]
"""First fit packs these into 6 bins of 20; spread over 7, longest first, a 5 finds no room."""

SORTED = ("first_fit", "best_fit_decreasing")


def reference_next_fit(lengths, max_tokens, max_items):
    bins, bin_id, tokens, items = [], 0, 0, 0
    for length in lengths:
        if tokens + length > max_tokens or items + 1 > max_items:
            bin_id, tokens, items = bin_id + 1, 0, 0
        bins.append(bin_id)
        tokens += length
        items += 1
    return bins


def reference_first_fit(lengths, max_tokens, max_items):
    bins, members = [], []
    for length in lengths:
        fits = [b for b, m in enumerate(members) if may_hold(m, length, max_tokens, max_items)]
        chosen = min(fits, default=len(members))
        if chosen == len(members):
            members.append([])
        members[chosen].append(length)
        bins.append(chosen)
    return bins


def reference_best_fit_decreasing(lengths, max_tokens, max_items):
    bins, members = [None] * len(lengths), []
    for clip in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        length = lengths[clip]
        fits = [b for b, m in enumerate(members) if may_hold(m, length, max_tokens, max_items)]
        chosen = min(fits, key=lambda b: (-sum(members[b]), b), default=len(members))
        if chosen == len(members):
            members.append([])
        members[chosen].append(length)
        bins[clip] = chosen
    return bins


def may_hold(members, length, max_tokens, max_items):
    return sum(members) + length <= max_tokens and len(members) < max_items


REFERENCES = {
    "next_fit": reference_next_fit,
    "first_fit": reference_first_fit,
    "best_fit_decreasing": reference_best_fit_decreasing,
}

every_strategy = pytest.mark.parametrize("strategy", STRATEGIES)
limits = st.tuples(st.integers(0, 60) | st.just(INT64_MAX), st.integers(1, 6))


@st.composite
def problems(draw, max_clips=60):
    """Lengths and limits."""
    max_tokens, max_items = draw(limits)
    lengths = draw(st.lists(st.integers(0, max_tokens), max_size=max_clips))
    return lengths, max_tokens, max_items


def int64(values):
    return np.array(values, dtype=np.int64)


def by_bin(bins, lengths):
    """Lengths in each bin, as Python's unbounded integers."""
    members = [[] for _ in range(max(bins, default=-1) + 1)]
    for bin_id, length in zip(bins, lengths, strict=True):
        members[bin_id].append(length)
    return members


def in_steps(bins, lengths, group):
    """Lengths of each rank of each step."""
    members = by_bin(bins, lengths)
    members += [[] for _ in range(-len(members) % group)]
    return [members[i : i + group] for i in range(0, len(members), group)]


@every_strategy
@given(problem=problems())
def test_equals_the_reference(strategy, problem):
    lengths, max_tokens, max_items = problem
    bins = pack_all(int64(lengths), max_tokens, max_items, strategy)
    assert bins.dtype == np.int64
    assert bins.tolist() == REFERENCES[strategy](lengths, max_tokens, max_items)


def test_the_references_know_the_strategies():
    assert tuple(REFERENCES) == STRATEGIES


def test_each_strategy_on_a_case_done_by_hand():
    lengths = int64([4, 7, 3, 6, 2, 8])
    assert pack_all(lengths, 10, 9, "next_fit").tolist() == [0, 1, 1, 2, 2, 3]
    assert pack_all(lengths, 10, 9, "first_fit").tolist() == [0, 1, 0, 2, 0, 3]
    assert pack_all(lengths, 10, 9, "best_fit_decreasing").tolist() == [2, 1, 1, 2, 0, 0]
    assert pack_all(lengths, 10, 1, "first_fit").tolist() == [0, 1, 2, 3, 4, 5]


@every_strategy
def test_a_bin_that_is_exactly_full_is_legal(strategy):
    lengths = int64([2048, 2047, 1, 1024, 512, 512])
    assert pack_all(lengths, 2048, 99, strategy).tolist() == [0, 1, 1, 2, 2, 2]
    assert pack_all(lengths, 2048, 2, strategy).tolist() == [0, 1, 1, 2, 2, 3]


@every_strategy
def test_zero_lengths_count_as_items_only(strategy):
    assert pack_all(int64([4, 0, 0, 0]), 4, 3, strategy).tolist() == [0, 0, 0, 1]


@every_strategy
def test_no_clips(strategy):
    for bins in (
        pack_all(int64([]), 8, 1, strategy),
        pack(int64([]), 8, 1, strategy, window=4, group=3),
    ):
        assert bins.shape == (0,) and bins.dtype == np.int64


def test_strided_and_narrower_input():
    lengths = np.array([3, 9, 3, 9, 3], dtype=np.int32)
    assert pack_all(lengths[::2], 6, 9, "next_fit").tolist() == [0, 0, 1]


@every_strategy
@given(problem=problems(), window=st.integers(1, 70), group=st.integers(1, 9))
@example(problem=(HARD_TO_SPREAD, 20, 99), window=16, group=7)
@example(problem=([20, *HARD_TO_SPREAD], 20, 99), window=17, group=8)
@example(problem=([INT64_MAX] * 9, INT64_MAX, 6), window=2, group=2)
@example(problem=([0] * 9, 0, 6), window=9, group=4)
def test_look_ahead_keeps_the_limits_and_fills_every_rank(strategy, problem, window, group):
    lengths, max_tokens, max_items = problem
    bins = pack(int64(lengths), max_tokens, max_items, strategy, window, group).tolist()
    assert bins == pack(int64(lengths), max_tokens, max_items, strategy, window, group).tolist()
    assert all(bin_id >= 0 for bin_id in bins)
    steps = in_steps(bins, lengths, group)
    assert all(sum(m) <= max_tokens and len(m) <= max_items for step in steps for m in step)
    assert all(m for step in steps[:-1] for m in step)
    if steps:
        clips = sum(len(m) for m in steps[-1])
        assert sum(bool(m) for m in steps[-1]) == min(group, clips)


@given(problem=problems(), window=st.integers(1, 70), group=st.integers(1, 9))
def test_next_fit_keeps_its_order_whatever_the_window(problem, window, group):
    lengths, max_tokens, max_items = problem
    bins = pack(int64(lengths), max_tokens, max_items, "next_fit", window, group).tolist()
    alone = reference_next_fit(lengths, max_tokens, max_items)
    last_step = max(alone, default=0) // group
    for bin_id, expected in zip(bins, alone, strict=True):
        if expected // group < last_step:
            assert bin_id == expected
        else:
            assert bin_id // group == last_step


@pytest.mark.parametrize("strategy", SORTED)
@given(problem=problems())
def test_one_window_on_one_rank_is_the_strategy_fullest_bin_first(strategy, problem):
    lengths, max_tokens, max_items = problem
    bins = pack(int64(lengths), max_tokens, max_items, strategy, window=99, group=1).tolist()
    alone = REFERENCES[strategy](lengths, max_tokens, max_items)
    tokens = [sum(m) for m in by_bin(alone, lengths)]
    order = sorted(range(len(tokens)), key=lambda b: (-tokens[b], b))
    assert bins == [order.index(b) for b in alone]


@pytest.mark.parametrize("strategy", SORTED)
@given(
    lengths=st.lists(st.integers(1, 50), max_size=200),
    window=st.integers(1, 50),
    group=st.integers(1, 6),
)
def test_no_rank_is_systematically_fuller(strategy, lengths, window, group):
    bins = pack(int64(lengths), 50, 9, strategy, window, group).tolist()
    totals, most = np.zeros(group, np.int64), 0
    for step in in_steps(bins, lengths, group):
        tokens = int64([sum(m) for m in step])
        totals += tokens
        most = max(most, np.ptp(tokens))
        assert np.ptp(totals) <= most


@every_strategy
@given(
    lengths=st.lists(st.integers(0, 10), min_size=30, max_size=200),
    window=st.integers(8, 30),
    group=st.integers(1, 3),
)
def test_no_clip_waits_for_more_than_one_window(strategy, lengths, window, group):
    # With two clips to a bin every window makes more than `group` bins, so steps follow each.
    bins = pack(int64(lengths), 10, 2, strategy, window, group)
    arrived = np.arange(len(lengths)) // window
    bins_before_last_step = range(bins.max() // group * group)
    windows = [arrived[bins == b] for b in bins_before_last_step]
    assert all(np.ptp(w) <= 1 for w in windows)
    opened = int64([w.min() for w in windows])
    assert all(np.maximum.accumulate(opened) <= opened + 1)


@pytest.mark.parametrize("strategy", SORTED)
def test_an_awkward_clip_is_not_left_over_until_the_end(strategy):
    # Nothing fits beside the 6. Its bin is the least full but those of single 5s, which fill up.
    lengths = [6] + [5] * 419
    bins = pack(int64(lengths), 10, 9, strategy, window=21, group=2)
    assert bins[0] < 22
    assert bins.max() >= 210


def test_bins_of_a_step_are_about_equally_full():
    # Three kinds of bins, 10, 9 and 8 full, mixed: sorted, each step holds one kind.
    lengths = [10, 9, 8] * 8 + [1]
    bins = pack(int64(lengths), 10, 1, "best_fit_decreasing", window=25, group=8)
    assert [{sum(m) for m in step} for step in in_steps(bins, lengths, 8)][:3] == [{10}, {9}, {8}]


@every_strategy
def test_the_last_step_is_spread_evenly(strategy):
    lengths = [8, 1, 1, 1, 5, 1, 1, 3, 3]
    bins = pack(int64(lengths), 24, 9, strategy, window=99, group=3)
    assert sorted(sum(m) for m in by_bin(bins, lengths)) == [8, 8, 8]
    few = pack(int64([3, 4]), 24, 9, strategy, window=99, group=5)
    assert sorted(few.tolist()) != [0, 0] and few.max() < 5


def test_a_last_step_that_cannot_be_spread_stays_packed_and_is_halved():
    lengths = HARD_TO_SPREAD
    packed = by_bin(pack_all(int64(lengths), 20, 99, "first_fit"), lengths)
    assert len(packed) == 6
    bins = pack(int64(lengths), 20, 99, "first_fit", window=99, group=7)
    spread = by_bin(bins, lengths)
    kept = [m for m in packed if m in spread]
    assert len(spread) == 7 and len(kept) == 5
    (halved,) = [m for m in packed if m not in kept]
    assert sum(halved) == 20
    assert sorted(sum(m) for m in spread if m not in kept) == [9, 11]


@every_strategy
def test_a_full_last_step_stays_packed(strategy):
    lengths = [6, 4, 5, 5, 7, 3, 4, 4, 2]
    bins = pack(int64(lengths), 10, 9, strategy, window=99, group=4)
    assert [sum(m) for m in by_bin(bins, lengths)] == [10] * 4


@every_strategy
def test_sums_beyond_int64_do_not_overflow(strategy):
    lengths = [INT64_MAX, INT64_MAX - 1, 1, INT64_MAX, 2, INT64_MAX - 2] * 5
    bins = pack(int64(lengths), INT64_MAX, 9, strategy, window=7, group=3)
    assert all(sum(m) <= INT64_MAX for m in by_bin(bins, lengths))
    huge = pack(int64(lengths), INT64_MAX, INT64_MAX, strategy, window=INT64_MAX, group=1)
    assert all(sum(m) <= INT64_MAX for m in by_bin(huge, lengths))


def test_packing_leaves_the_interpreter_to_other_threads():
    lengths = np.random.default_rng(0).integers(1, 1000, 2_000_000)
    thread = threading.Thread(target=lambda: pack_all(lengths, 10_000, 1000, "best_fit_decreasing"))
    start = time.perf_counter()
    longest_pause, last = 0.0, start
    thread.start()
    while thread.is_alive():
        now = time.perf_counter()
        longest_pause, last = max(longest_pause, now - last), now
        time.sleep(0.001)
    assert longest_pause < 0.5 * (time.perf_counter() - start)


@every_strategy
@pytest.mark.parametrize("length", [-1, 9])
def test_a_length_out_of_range_is_named(strategy, length):
    expected = rf"lengths\[2\] is {length}; .* max_tokens = 8"
    lengths = int64([1, 8, length, 1])
    with pytest.raises(ValueError, match=expected):
        pack_all(lengths, 8, 4, strategy)
    with pytest.raises(ValueError, match=expected):
        pack(lengths, 8, 4, strategy, window=1, group=2)


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"max_tokens": -1}, "max_tokens is -1"),
        ({"max_items": 0}, "max_items is 0"),
        ({"window": 0}, "window is 0"),
        ({"group": 0}, "group is 0"),
        ({"strategy": "best"}, "strategy is 'best'; it must be one of next_fit, first_fit, best"),
    ],
)
def test_arguments_out_of_range(changed, expected):
    arguments = {"max_tokens": 8, "max_items": 1, "strategy": "first_fit", "window": 1, "group": 1}
    with pytest.raises(ValueError, match=expected):
        pack(int64([]), **arguments | changed)


def test_wrong_arrays():
    with pytest.raises(ValueError, match="2 dimensions"):
        pack_all(int64([[1, 2]]), 8, 1, "next_fit")
    with pytest.raises(TypeError):
        pack_all(np.array([1.5]), 8, 1, "next_fit")
