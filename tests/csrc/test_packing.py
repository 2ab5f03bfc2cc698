"""fastast._packing against a next-fit written out in Python."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastast._packing import next_fit

INT64_MAX = np.iinfo(np.int64).max


def reference_next_fit(lengths, max_tokens, max_items):
    bins, bin_id, tokens, items = [], 0, 0, 0
    for length in lengths:
        if tokens + length > max_tokens or items + 1 > max_items:
            bin_id, tokens, items = bin_id + 1, 0, 0
        bins.append(bin_id)
        tokens += length
        items += 1
    return bins


def int64(values):
    return np.array(values, dtype=np.int64)


@given(st.data(), st.integers(0, 60) | st.just(INT64_MAX), st.integers(1, 6))
def test_equals_the_reference(data, max_tokens, max_items):
    lengths = data.draw(st.lists(st.integers(0, max_tokens), max_size=40))
    bins = next_fit(int64(lengths), max_tokens, max_items)
    assert bins.dtype == np.int64
    assert bins.tolist() == reference_next_fit(lengths, max_tokens, max_items)


def test_a_bin_that_is_exactly_full_is_legal():
    lengths = int64([1024, 512, 512, 1, 2047, 2048])
    assert next_fit(lengths, max_tokens=2048, max_items=99).tolist() == [0, 0, 0, 1, 1, 2]
    assert next_fit(lengths, max_tokens=2048, max_items=2).tolist() == [0, 0, 1, 1, 2, 3]


def test_zero_lengths_count_as_items_only():
    assert next_fit(int64([4, 0, 0, 0]), max_tokens=4, max_items=3).tolist() == [0, 0, 0, 1]


def test_no_items():
    bins = next_fit(int64([]), max_tokens=8, max_items=1)
    assert bins.shape == (0,) and bins.dtype == np.int64


def test_strided_and_narrower_input():
    lengths = np.array([3, 9, 3, 9, 3], dtype=np.int32)
    assert next_fit(lengths[::2], max_tokens=6, max_items=9).tolist() == [0, 0, 1]


@pytest.mark.parametrize("length", [-1, 9])
def test_a_length_out_of_range_is_named(length):
    expected = rf"lengths\[2\] is {length}; .* max_tokens = 8"
    with pytest.raises(ValueError, match=expected):
        next_fit(int64([1, 8, length, 1]), max_tokens=8, max_items=4)


@pytest.mark.parametrize(
    ("limits", "expected"), [((-1, 1), "max_tokens is -1"), ((8, 0), "max_items is 0")]
)
def test_limits_out_of_range(limits, expected):
    with pytest.raises(ValueError, match=expected):
        next_fit(int64([]), *limits)


def test_wrong_arrays():
    with pytest.raises(ValueError, match="2 dimensions"):
        next_fit(int64([[1, 2]]), max_tokens=8, max_items=1)
    with pytest.raises(TypeError):
        next_fit(np.array([1.5]), max_tokens=8, max_items=1)
