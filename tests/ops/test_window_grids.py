"""Windows over patch grids, against a search patch by patch."""

import numpy as np
import pytest
import torch

from fastast.ops import WindowBudget, WindowGrids

CASES = [
    ([(8, 8)], 4, 0),
    ([(8, 8)], 4, 2),
    ([(64, 8)], 4, (2, 0)),
    ([(6, 10)], 4, (2, 2)),
    ([(16, 37), (3, 5), (9, 1), (1, 1)], 8, 4),
    ([(5, 7), (0, 3), (4, 0), (1, 1), (12, 2)], 3, (1, 2)),
    ([(4, 9)], 4, 3),
    ([(2, 2)] * 3, 1, 0),
    ([], 8, 4),
    ([(0, 0), (0, 5)], 8, 4),
]
every_case = pytest.mark.parametrize("sizes, window, shift", CASES, ids=str)


def windows_by_patch(sizes, window, shift):
    """The rows of each window, by asking each patch for its cell of the displaced grid."""
    shifts = (shift, shift) if isinstance(shift, int) else shift
    cells, row = {}, 0
    for clip, size in enumerate(sizes):
        by = [s if n > window else 0 for s, n in zip(shifts, size, strict=True)]
        for y in range(size[0]):
            for x in range(size[1]):
                cell = clip, (y - by[0]) // window, (x - by[1]) // window
                cells.setdefault(cell, []).append(row)
                row += 1
    return sorted(cells.values())


def listed(grids):
    """The rows that each row of the table stands for."""
    return [
        [row + y * pitch + x for y in range(height) for x in range(width)]
        for row, pitch, height, width in grids.windows.tolist()
    ]


@every_case
def test_every_patch_is_in_the_window_of_its_cell(sizes, window, shift):
    grids = WindowGrids.from_sizes(sizes, window, shift)
    rows = listed(grids)
    assert sorted(filter(None, rows)) == windows_by_patch(sizes, window, shift)
    assert rows[-1] == []
    used = sum(height * width for height, width in sizes)
    empty = grids.windows[[not window for window in rows]]
    assert (empty == torch.tensor([used, 0, 0, 0])).all()


@every_case
def test_windows_of_one_shape_are_neighbours(sizes, window, shift):
    shapes = WindowGrids.from_sizes(sizes, window, shift).windows[:, 2:].tolist()
    assert shapes == sorted(shapes, reverse=True)


@every_case
def test_a_budget_fixes_the_size_of_the_table(sizes, window, shift):
    exact = WindowGrids.from_sizes(sizes, window, shift)
    budget = WindowBudget(tokens=1000, windows=50)
    grids = WindowGrids.from_sizes(sizes, window, shift, budget)
    assert grids.num_windows == 50 and grids.windows.shape == (51, 4)
    assert [x for x in listed(grids) if x] == [x for x in listed(exact) if x]
    assert (grids.windows[:, 0] <= exact.windows[-1, 0]).all()
    assert torch.equal(grids.windows[-1], exact.windows[-1])


def test_an_axis_of_one_window_is_not_displaced():
    grids = WindowGrids.from_sizes([(8, 16), (5, 16), (8, 8)], 8, 4)
    assert grids.windows[grids.windows[:, 0] >= 8 * 16 + 5 * 16].tolist()[0] == [208, 8, 8, 8]
    assert sorted(grids.windows[:, 2:].tolist(), reverse=True)[:3] == [[8, 8], [8, 8], [8, 4]]


def test_sizes_as_an_array():
    sizes = np.array([(3, 5), (9, 1)], np.int32)
    expected = WindowGrids.from_sizes([(3, 5), (9, 1)], 4, 1)
    assert torch.equal(WindowGrids.from_sizes(sizes, 4, 1).windows, expected.windows)


def test_tables():
    grids = WindowGrids.from_sizes([(16, 16)], 8)
    assert (grids.num_windows, grids.num_offsets, grids.window) == (4, 225, 8)
    assert grids.windows.dtype == grids.host_windows.dtype == torch.int32
    moved = grids.to("meta")
    assert moved.windows.device.type == "meta" and moved.host_windows is grids.host_windows


@pytest.mark.parametrize(
    "arguments, message",
    [
        (([(2, 3, 4)], 4), r"sizes must be \(height, width\) pairs of integers, got int64"),
        (([(2.0, 3.0)], 4), "sizes must be .* got float64"),
        (([(2, -3)], 4), "sizes must not be negative, got -3"),
        (([(2, 3)], 0), "window must be at least 1"),
        (([(2, 3)], 4, 4), "shift must be one or two numbers from 0 to 3, got 4"),
        (([(2, 3)], 4, (1, -1)), r"shift must be .* got \(1, -1\)"),
        (([(2, 3)], 4, (1, 1, 1)), "shift must be one or two numbers"),
        (([(2**16, 2**15)], 4), r"a stream holds fewer than 2\*\*31"),
        (([(8, 8)], 4, 0, WindowBudget(63, 9)), "tokens=64 but the budget allows 63"),
        (([(8, 8)], 4, 2, WindowBudget(64, 8)), r"windows=9 .* raise WindowBudget\.windows"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_wrong_input_says_so(arguments, message):
    with pytest.raises(ValueError, match=message):
        WindowGrids.from_sizes(*arguments)


@pytest.mark.parametrize("name", ["tokens", "windows"])
def test_wrong_budget_says_so(name):
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        WindowBudget(**{"tokens": 8, "windows": 8, name: 0})
