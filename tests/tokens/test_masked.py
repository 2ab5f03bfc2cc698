"""The lists of a masked autoencoder: which rows are encoded, decoded and restored."""

import numpy as np
import pytest
import torch

from fastast import TokenBudget, WindowGrids
from fastast.tokens import (
    ClusteredMask,
    MaskedGeometry,
    PatchGeometry,
    PatchGrid,
    StructuredMask,
    UnstructuredMask,
)

FRAMES = [40, 0, 9, 64, 40, 24]
MASKS = {
    "unstructured": UnstructuredMask(0.7),
    "structured": StructuredMask(0.5, 0.3),
    "clustered": ClusteredMask(0.6, (2, 3)),
}
every_mask = pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)


def geometry_of(mask, **settings):
    settings = {"prefix": 1, "window": 2, "shift": (1, 1)} | settings
    return MaskedGeometry(32, (8, 8), mask=mask, **settings)


def drawn(geometry, frames, budget=None):
    grid = geometry.grid(frames, budget)
    ids = torch.arange(grid.segments.num_segments)
    return grid, geometry.mask(grid, geometry, ids, seed=1, epoch=2)


def places(grid, rows=slice(None)):
    """What rows are: first frame, frequency, time, prefix."""
    return torch.stack([grid.first_frame, grid.freq, grid.time, grid.prefix_id], 1)[rows]


@every_mask
@pytest.mark.parametrize("decode_prefix", [False, True])
@pytest.mark.parametrize("budget", [None, TokenBudget(200, 8, 40)], ids=["exact", "budget"])
def test_split(mask, decode_prefix, budget):
    window = None if decode_prefix else 2
    geometry = geometry_of(mask, decode_prefix=decode_prefix, window=window)
    grid, masked = drawn(geometry, FRAMES, budget)
    assert isinstance(grid, PatchGrid)
    split = grid.split(masked)
    encoded, hidden, decoded = (
        list_.segments.host_offsets.tolist()
        for list_ in (split.encoded, split.hidden, grid.decoded)
    )
    offsets = grid.segments.host_offsets.tolist()
    for clip in range(len(FRAMES)):
        rows = torch.arange(offsets[clip], offsets[clip + 1])
        seen, left = rows[~masked[rows]], rows[masked[rows]]
        assert torch.equal(
            places(split.encoded, slice(*encoded[clip : clip + 2])), places(grid, seen)
        )
        assert torch.equal(
            places(split.hidden, slice(*hidden[clip : clip + 2])), places(grid, left)
        )
        whole = rows if decode_prefix else rows[grid.prefix_id[rows] < 0]
        own = slice(*decoded[clip : clip + 2])
        assert torch.equal(places(grid.decoded, own), places(grid, whole))
        source = split.source[own]
        assert torch.equal(source < 0, masked[whole])
        assert torch.equal(
            places(split.encoded, source[source >= 0]), places(grid, whole[~masked[whole]])
        )
        back = split.hidden_rows[slice(*hidden[clip : clip + 2])]
        assert torch.equal(places(grid.decoded, back), places(grid, left))
    assert (split.source[decoded[-1] :] == -1).all()
    assert (split.hidden_rows[hidden[-1] :] == grid.decoded.num_rows).all()


@every_mask
def test_sizes_are_those_of_the_budget_and_nothing_overflows(mask):
    geometry, budget = geometry_of(mask), TokenBudget(300, 12, 80)
    generator, shapes = np.random.default_rng(0), set()
    for _ in range(60):
        frames, tokens = [], 0
        while len(frames) < 12:
            clip = int(generator.choice([8, 9, 16, 24, 64, 150]))
            if (tokens := tokens + geometry.num_tokens(clip)) > 300:
                break
            frames.append(clip)
        grid, masked = drawn(geometry, frames, budget)
        split = grid.split(masked)
        assert int(grid.encoded.host_offsets[-1]) == int(
            (~masked & grid.segments.row_mask(grid.num_rows)).sum()
        )
        assert int(grid.hidden.host_offsets[-1]) == int(masked.sum())
        shapes.add(
            (grid.encoded_rows, grid.hidden_rows, split.encoded.num_rows, split.hidden.num_rows)
            + tuple(windows.num_windows for windows in grid.windows)
        )
    ((encoded, hidden, *_),) = shapes
    # No more than a few rows a clip beyond what the longest clips need.
    share = mask.num_kept(4, 18) / 72
    assert encoded <= 300 * share + 3 * 12 and hidden <= 300 * (1 - share) + 3 * 12


def test_windows():
    geometry = geometry_of(UnstructuredMask(0.5))
    grid = geometry.grid([40, 0, 16])
    for windows, shift in zip(grid.windows, [(0, 0), (1, 1)], strict=True):
        expected = WindowGrids.from_sizes([(4, 5), (0, 0), (4, 2)], 2, shift)
        assert torch.equal(windows.windows, expected.windows)
    assert geometry_of(UnstructuredMask(0.5), window=None).grid([40]).windows == ()


def test_moving_keeps_everything():
    geometry = geometry_of(UnstructuredMask(0.5))
    grid, masked = drawn(geometry, FRAMES)
    moved = grid.to("cpu")
    assert moved.geometry is geometry and len(moved.windows) == 2
    for mine, other in zip(grid.split(masked), moved.split(masked), strict=True):
        if isinstance(mine, PatchGrid):
            mine, other = places(mine), places(other)
        assert torch.equal(mine, other)


def test_what_makes_no_sense_says_so():
    geometry = geometry_of(UnstructuredMask(0.5))
    assert geometry.unmasked == PatchGeometry(32, (8, 8), prefix=1)
    with pytest.raises(ValueError, match="drop no tokens"):
        geometry.grid([16], keep=[np.arange(3)])
    with pytest.raises(ValueError, match="set decode_prefix=False"):
        geometry_of(UnstructuredMask(0.5), decode_prefix=True)
    with pytest.raises(ValueError, match=r"masked must be torch\.bool of shape \[9\]"):
        geometry.grid([16]).split(torch.zeros(8, dtype=torch.bool))
