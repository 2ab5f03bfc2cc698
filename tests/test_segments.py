"""Geometry of packed streams: offsets, budgets, tile tables, and spectrograms over them."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastast import Segments, Spectrograms, TokenBudget
from fastast.segments import TILE_ROWS
from tests.testing import GEOMETRIES, ragged

lengths_and_slack = st.tuples(
    st.lists(st.integers(0, 3 * TILE_ROWS), max_size=8),
    st.integers(1, 2 * TILE_ROWS),  # dead rows
    st.integers(1, 3),  # empty clips
)


@pytest.mark.parametrize("convert", [list, np.array, torch.tensor])
def test_offsets_lay_clips_end_to_end(convert):
    segments = Segments.from_lengths(convert([5, 0, 2, 7]))
    assert segments.offsets.tolist() == [0, 5, 5, 7, 14]
    assert segments.offsets.dtype == segments.host_offsets.dtype == torch.int32
    assert segments.host_offsets.tolist() == segments.offsets.tolist()
    assert segments.lengths.tolist() == [5, 0, 2, 7]
    assert segments.num_segments == 4


@pytest.mark.parametrize(
    "longest, bound", [(0, 16), (1, 16), (16, 16), (17, 32), (512, 512), (513, 1024)]
)
def test_max_length_is_a_power_of_two(longest, bound):
    assert Segments.from_lengths([longest, 0]).max_length == bound


def test_budget_pads_the_geometry():
    segments = Segments.from_lengths([5, 0, 2], TokenBudget(tokens=100, clips=6, max_length=40))
    assert segments.lengths.tolist() == [5, 0, 2, 0, 0, 0]
    assert segments.max_length == 40
    assert segments.tiles[:, 1].max() == 100


@pytest.mark.parametrize(
    "lengths, budget, message",
    [
        ([3, -1], None, "lengths must not be negative, got -1"),
        ([1.5, 2.0], None, "lengths must be a flat list of integers, got float64"),
        ([[1, 2]], None, r"lengths must be a flat list of integers.*\(1, 2\)"),
        ([2**30, 2**30], None, r"lengths add up to 2147483648 rows.*2\*\*31"),
        ([60, 41], TokenBudget(100, 4, 80), r"tokens=101.*allows 100.*TokenBudget\.tokens"),
        ([1] * 5, TokenBudget(100, 4, 80), r"clips=5.*allows 4.*TokenBudget\.clips"),
        ([81], TokenBudget(100, 4, 80), r"max_length=81.*allows 80.*TokenBudget\.max_length"),
    ],
    ids=["negative", "float", "nested", "int32", "tokens", "clips", "max_length"],
)
def test_wrong_lengths_say_so(lengths, budget, message):
    with pytest.raises(ValueError, match=message):
        Segments.from_lengths(lengths, budget)


@pytest.mark.parametrize(
    "sizes, message",
    [
        ((0, 1, 1), "tokens must be at least 1, got 0"),
        ((1, 0, 1), "clips must be at least 1, got 0"),
        ((1, 1, -3), "max_length must be at least 1, got -3"),
        ((8, 1, 9), r"max_length \(9\) exceeds tokens \(8\)"),
    ],
)
def test_wrong_budgets_say_so(sizes, message):
    with pytest.raises(ValueError, match=message):
        TokenBudget(*sizes)


def check_tiles(segments: Segments, capacity: int) -> None:
    offsets = segments.offsets.tolist()
    written = np.zeros(capacity, int)
    for begin, end, first_key, last_key in segments.tiles.tolist():
        assert 0 <= end - begin <= TILE_ROWS
        written[begin:end] += 1
        if begin == end or begin >= offsets[-1]:  # surplus, or dead rows
            assert first_key == last_key
        else:
            clip = np.searchsorted(offsets, begin, side="right") - 1
            assert [first_key, last_key] == offsets[clip : clip + 2]
            assert end <= last_key
    assert (written == 1).all()


@settings(deadline=None)
@given(lengths_and_slack)
def test_tiles_cover_every_row_once(case):
    lengths, dead, empty = case
    check_tiles(Segments.from_lengths(lengths), sum(lengths))
    budget = TokenBudget(sum(lengths) + dead, len(lengths) + empty, max([1, *lengths]))
    check_tiles(Segments.from_lengths(lengths, budget), budget.tokens)


@settings(deadline=None)
@given(st.integers(1, 6 * TILE_ROWS), st.integers(1, 8), st.data())
def test_one_budget_gives_one_number_of_tiles(tokens, clips, data):
    budget = TokenBudget(tokens, clips, max_length=tokens)
    counts = set()
    for _ in range(3):
        cuts = data.draw(st.lists(st.integers(0, tokens), min_size=1, max_size=clips))
        lengths = np.diff(sorted(cuts), prepend=0)
        counts.add(Segments.from_lengths(lengths, budget).tiles.shape)
    # The worst case: every clip, and the dead rows, end just after a tile begins.
    ones = [1] * min(clips, tokens)
    counts.add(Segments.from_lengths(ones, budget).tiles.shape)
    assert counts == {(math.ceil(tokens / TILE_ROWS) + clips + 1, 4)}


@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES)
def test_row_ids_and_mask(geometry):
    segments, rows = geometry
    ids = np.full(rows, segments.num_segments)
    for clip, place in enumerate(geometry.clips):
        ids[place] = clip
    assert segments.row_ids(rows).tolist() == ids.tolist()
    assert segments.row_mask(rows).tolist() == [row < geometry.used for row in range(rows)]


def test_to_keeps_host_offsets_on_the_host():
    segments = Segments.from_lengths([3, 4]).to("meta")
    assert segments.offsets.is_meta and segments.tiles.is_meta
    assert segments.host_offsets.tolist() == [0, 3, 7]
    assert segments.max_length == 16


@pytest.mark.gpu
def test_pinned_segments_move_without_blocking():
    pinned = Segments.from_lengths([3, 4]).pin_memory()
    assert pinned.offsets.is_pinned() and pinned.tiles.is_pinned()
    assert pinned.to("cuda", non_blocking=True).offsets.tolist() == [0, 3, 7]


def test_spectrograms_from_list_unpack_to_the_same_clips():
    clips = [torch.randn(length, 6) for length in (4, 0, 9, 1)]
    packed = Spectrograms.from_list(clips)
    assert packed.frames.shape == (14, 6)
    views = packed.unpack()
    for view, clip in zip(views, clips, strict=True):
        assert torch.equal(view, clip)
    assert views[2].data_ptr() == packed.frames[4:].data_ptr()


def test_spectrograms_from_dense_are_equal_segments():
    batch = torch.randn(3, 5, 6)
    packed = Spectrograms.from_dense(batch)
    assert packed.segments.lengths.tolist() == [5, 5, 5]
    assert torch.equal(torch.stack(packed.unpack()), batch)


def test_spectrograms_move_together():
    moved = ragged([3, 4], 6).to("meta")
    assert moved.frames.is_meta and moved.segments.offsets.is_meta


@pytest.mark.parametrize(
    "shapes, message",
    [
        ([], "clips is empty"),
        ([(4, 6), (4, 5)], r"clips must be \[frames, num_mels\] with one num_mels.*\(4, 5\)"),
        ([(1, 4, 6)], r"clips must be \[frames, num_mels\].*\(1, 4, 6\)"),
        ([(4, 6), (6,)], r"clips must be \[frames, num_mels\].*\(6,\)"),
    ],
)
def test_wrong_clips_say_so(shapes, message):
    with pytest.raises(ValueError, match=message):
        Spectrograms.from_list([torch.zeros(shape) for shape in shapes])


def test_wrong_dense_batches_say_so():
    with pytest.raises(ValueError, match=r"batch must be \[clips, frames, num_mels\]"):
        Spectrograms.from_dense(torch.zeros(4, 6))
