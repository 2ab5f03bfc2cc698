"""The window benchmark and Swin's way, built and compared on small grids."""

from functools import partial

import pytest
import torch

from bench.cases import window_attention as cases
from bench.clock import CpuClock
from bench.peers.windows import RolledWindows
from bench.registry import Benchmark, Case
from bench.runner import measure

CPU = torch.device("cpu")
SCALED = cases.Grid("scaled", (8, 16), 4, 2, 8, (), 2)
COSINE = cases.Grid("cosine", (16, 8), 4, 2, 8, (), 2, cosine=True)


def measured(build):
    case = Case("case", torch.float32, "tiny", {}, build)
    rows = measure(Benchmark("ops/toy", "", lambda s: []), case, CpuClock(), "cpu", 1)
    return {row["contender"]: row for row in rows}


@pytest.mark.parametrize("grid", [SCALED, COSINE], ids=lambda grid: grid.name)
@pytest.mark.parametrize("shift", [(0, 0), (2, 2), (2, 0)], ids=str)
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_all_ways_compute_the_same(grid, shift, backward):
    rows = measured(partial(cases._build, CPU, torch.float32, grid, shift, 2, backward))
    assert list(rows) == ["fastast", "roll, SDPA", "roll, explicit"]
    assert all(row["error"] < 1e-5 and row["median_ms"] > 0 for row in rows.values())
    if backward:
        assert rows["fastast"]["saved_bytes"] < rows["roll, SDPA"]["saved_bytes"]


@pytest.mark.parametrize("shift", [(0, 0), (2, 2)], ids=str)
def test_layers_compute_the_same(shift):
    rows = measured(partial(cases._build_layer, CPU, torch.float32, SCALED, shift, 2))
    assert all(row["error"] < 1e-5 for row in rows.values())


def test_clipped_windows_have_fewer_scores():
    build = partial(cases._build, CPU, torch.float32, SCALED, (2, 2), 2, False)
    rows = measured(build)
    # Heights 2, 4, 2 and widths 2, 4, 4, 4, 2, squared, to whole windows of 16 patches.
    share = ((4 + 16 + 4) * (4 + 16 + 16 + 16 + 4)) / (2 * 4 * 16 * 16)
    assert rows["fastast"]["flops"] == share * rows["roll, SDPA"]["flops"]


@pytest.mark.parametrize("shift", [(0, 0), (3, 1)], ids=str)
def test_merging_undoes_partitioning(shift):
    rolled = RolledWindows(8, 12, 4, shift)
    stream = torch.arange(2 * 96)[:, None]
    windows = rolled.partition(stream)
    assert windows.shape == (12, 16, 1)
    assert torch.equal(rolled.merge(windows), stream)
