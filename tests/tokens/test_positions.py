"""Positional tables against resizing them with the stock interpolation."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastast import TokenBudget
from fastast.tokens import (
    FactorisedPositions,
    GridPositions,
    PatchGeometry,
    SinCosPositions,
    resize_positions,
)

FREQ, TIME, DIM = 3, 8, 6
GEOMETRY = PatchGeometry(12, (4, 4))
PREFIXED = PatchGeometry(12, (4, 4), prefix=2)
SHORT, LONG = [1, 2, 5, 7, 8], [9, 11, 16, 23, 200]  # widths within and beyond the table


def grid_of(geometry: PatchGeometry, widths: list[int], budget: TokenBudget | None = None):
    return geometry.grid([4 * width for width in widths], budget)


def clips_of(rows: Tensor, geometry: PatchGeometry, widths: list[int]) -> list[Tensor]:
    """Each clip's rows ``[prefix + freq * width, dim]``."""
    return list(rows.split([geometry.prefix + FREQ * width for width in widths]))


def randomised(module: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    return module.double()


def resized_time(table: Tensor, width: int) -> Tensor:
    """A time table laid over ``width`` columns: ``[width, dim]``."""
    resized = F.interpolate(table.T[None], size=width, mode="linear", align_corners=False)
    return resized[0].T


def resized_grid(table: Tensor, width: int) -> Tensor:
    """A patch table laid over ``width`` columns: ``[freq * width, dim]``, frequency-major."""
    image = table.unflatten(0, (FREQ, TIME)).permute(2, 0, 1)[None]
    resized = F.interpolate(image, size=(FREQ, width), mode="bilinear", align_corners=False)
    return resized[0].permute(1, 2, 0).flatten(0, 1)


def check_gradients(module: nn.Module, actual: Tensor, expected: Tensor) -> None:
    weights = torch.randn_like(actual)
    parameters = list(module.parameters())
    grads = torch.autograd.grad(actual, parameters, weights)
    expected_grads = torch.autograd.grad(expected, parameters, weights)
    torch.testing.assert_close(grads, expected_grads, rtol=2e-5, atol=2e-5)


def test_factorised_indexes_within_the_table():
    positions = randomised(FactorisedPositions(FREQ, TIME, DIM))
    rows = clips_of(positions(grid_of(GEOMETRY, SHORT)), GEOMETRY, SHORT)
    for width, clip in zip(SHORT, rows, strict=True):
        expected = positions.freq[:, None] + positions.time[None, :width]
        assert torch.equal(clip, expected.flatten(0, 1))


def test_factorised_interpolates_beyond_the_table():
    positions = randomised(FactorisedPositions(FREQ, TIME, DIM))
    widths = SHORT + LONG
    actual = positions(grid_of(GEOMETRY, widths))
    expected = []
    for width in widths:
        time = positions.time[:width] if width <= TIME else resized_time(positions.time, width)
        expected.append((positions.freq[:, None] + time).flatten(0, 1))
    expected = torch.cat(expected)
    # The weights are float32, and the places they come from go up to TIME.
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)
    check_gradients(positions, actual, expected)


@pytest.mark.parametrize("widths", [[TIME], SHORT, LONG, SHORT + LONG], ids=str)
def test_grid_positions_are_the_resized_table(widths):
    positions = randomised(GridPositions(2, FREQ, TIME, DIM))
    actual = positions(grid_of(PREFIXED, widths))
    prefix, table = positions.table[:2], positions.table[2:]
    expected = torch.cat([row for w in widths for row in (prefix, resized_grid(table, w))])
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)
    check_gradients(positions, actual, expected)


@pytest.mark.parametrize("time", [TIME, TIME + 1])
def test_shorter_clips_may_use_the_columns_in_the_middle(time):
    positions = randomised(GridPositions(2, FREQ, time, DIM, shorter="middle"))
    widths = [*SHORT, 9, 30]
    table = positions.table[2:].unflatten(0, (FREQ, time))
    rows = clips_of(positions(grid_of(PREFIXED, widths)), PREFIXED, widths)
    for width, clip in zip(widths, rows, strict=True):
        assert torch.equal(clip[:2], positions.table[:2])
        if width <= time:
            begin = time // 2 - width // 2
            assert torch.equal(clip[2:], table[:, begin : begin + width].flatten(0, 1))
        else:
            assert torch.equal(clip[2 : 2 + width : width - 1], table[0, :: time - 1])


def test_an_unknown_way_to_be_short_says_so():
    with pytest.raises(ValueError, match="shorter must be 'stretch' or 'middle', got 'last'"):
        GridPositions(2, FREQ, TIME, DIM, shorter="last")


def test_clips_of_another_width_are_as_in_the_adapted_table():
    positions = randomised(GridPositions(2, FREQ, TIME, DIM, shorter="middle"))
    for width in (3, 8, 13):
        adapted = resize_positions(
            positions.table, (FREQ, TIME), (FREQ, width), prefix=2, shrink="cut"
        )
        rows = positions(grid_of(PREFIXED, [width]))
        torch.testing.assert_close(rows, adapted, rtol=0, atol=1e-5)


def test_grid_positions_are_the_table_at_its_own_width():
    positions = randomised(GridPositions(2, FREQ, TIME, DIM))
    rows = clips_of(positions(grid_of(PREFIXED, [TIME, 5, TIME])), PREFIXED, [TIME, 5, TIME])
    assert torch.equal(rows[0], positions.table)
    assert torch.equal(rows[2], positions.table)


def test_kept_tokens_have_the_rows_of_their_places():
    positions = randomised(GridPositions(2, FREQ, TIME, DIM))
    keep = [0, 4, 11]
    kept = positions(PREFIXED.grid([4 * 5], keep=[torch.tensor(keep).numpy()]))
    full = positions(PREFIXED.grid([4 * 5]))
    assert torch.equal(kept, full[[0, 1, *(2 + place for place in keep)]])


@pytest.mark.parametrize(
    "positions",
    [FactorisedPositions(FREQ, TIME, DIM), GridPositions(2, FREQ, TIME, DIM), SinCosPositions(8)],
    ids=lambda module: type(module).__name__,
)
def test_dead_rows_are_finite(positions):
    rows = positions(grid_of(PREFIXED, [3, 9, 0], TokenBudget(64, 6, 40)))
    assert rows.shape[0] == 64
    assert rows.isfinite().all()


def test_sines_and_cosines():
    dim, widths = 16, [5, 200]
    grid = grid_of(GEOMETRY, widths)
    rows = SinCosPositions(dim)(grid)
    assert rows.dtype == torch.float32 and rows.shape == (FREQ * sum(widths), dim)
    rates = 10000.0 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    clips = clips_of(rows, GEOMETRY, widths)
    for width, clip in zip(widths, clips, strict=True):
        f, t = torch.meshgrid(torch.arange(FREQ), torch.arange(width), indexing="ij")
        f, t = (place.flatten()[:, None] * rates for place in (f, t))
        expected = torch.cat([f.sin(), f.cos(), t.sin(), t.cos()], 1)
        torch.testing.assert_close(clip.double(), expected, rtol=0, atol=1e-7)


def test_sines_and_cosines_have_no_state():
    positions = SinCosPositions(8)
    assert not positions.state_dict() and not list(positions.parameters())
    with pytest.raises(ValueError, match=r"dim \(6\) must be a multiple of 4"):
        SinCosPositions(6)
