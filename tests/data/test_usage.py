"""Padding and cutting, counted by hand and against the numbers of the ElasticAST paper."""

import numpy as np
import pytest

from bench.packing import voxceleb_like
from fastast.data.usage import fixed_usage, row_usage, stream_usage, token_usage


def test_fixed_lengths():
    usage = fixed_usage([100, 512, 600], 512)
    assert (usage.available, usage.computed, usage.cut, usage.padding) == (1212, 1536, 88, 412)
    assert usage.padding_share == 412 / 1536 and usage.cut_share == 88 / 1212


def test_rows():
    """One batch: whatever the order, two rows of one clip each, and two batches of one."""
    usage = row_usage([1500, 700], 2)
    assert (usage.computed, usage.padding, usage.cut) == (3000, 800, 0)
    assert row_usage([1500, 700], 1).padding == 0
    equal = row_usage([1024] * 7, 4)  # 2 + 2 clips, then 2 + 1
    assert (equal.computed, equal.padding) == (4 * 2048, 1024)
    assert row_usage([1024] * 8, 4).padding == 0  # what fills a row just fits
    assert row_usage([1025] * 4, 2).computed == 4 * 1025  # rows end with their longest


def test_stream():
    assert stream_usage([3, 5, 8]).padding == 0
    fixed = stream_usage([3, 5, 8], 8)
    assert (fixed.computed, fixed.padding) == (16, 0)
    assert stream_usage([3, 5, 8], 10).padding == 4


def test_the_papers_numbers():
    """VoxCeleb, 1,024 frames: 31.1 % padding, 15.2 % cut; padding of rows falls with the batch.

    The two shares say how long the clips are on average, 8.3 s, where the data set's authors say
    8.2 s. Lengths drawn like VoxCeleb's, up to 30 s, have the same padding, and less to cut.
    """
    kept = 512 * (1 - 0.311)
    frames = kept / (1 - 0.152) / 8 * 16
    assert frames / 100 == pytest.approx(8.2, abs=0.15)

    tokens = voxceleb_like(20_000)
    rows = token_usage(tokens)
    by_name = {(row["input"], row["batch"]): row for row in rows}
    fixed = by_name["fixed, 512 tokens", None]
    assert fixed["padding"] == pytest.approx(0.311, abs=0.01)
    assert 0.11 < fixed["cut"] < 0.152
    padding = [by_name["rows of 2048", batch]["padding"] for batch in (12, 24, 48, 96)]
    assert padding == sorted(padding, reverse=True) and padding[0] < fixed["padding"]
    assert by_name["stream", None]["padding"] == by_name["stream", None]["cut"] == 0
    shapes = [by_name["stream, fixed shapes", batch]["padding"] for batch in (12, 96)]
    assert shapes[1] < shapes[0] < padding[-1]
    assert all(row["cut"] == 0 for row in rows[1:])


@pytest.mark.parametrize(
    "tokens, message",
    [
        ([], "at least one clip"),
        ([5, 0], "one token for each"),
        ([5, 3000], r"3000 tokens, more than a row \(2048\)"),
    ],
)
def test_what_cannot_be_counted(tokens, message):
    with pytest.raises(ValueError, match=message):
        token_usage(np.array(tokens))
