"""Masks and corruption on a GPU: what a CPU draws, compiled and eager, without waiting."""

import pytest
import torch

from fastast import Segments, Spectrograms, TokenBudget
from fastast.tokens import (
    GMML,
    ClusteredMask,
    PatchGeometry,
    StructuredMask,
    UnstructuredMask,
    corrupted_share,
)

pytestmark = pytest.mark.gpu

KEYS = {"seed": 3, "epoch": 5}
GEOMETRY = PatchGeometry(128, (16, 16), prefix=1)
LENGTHS = [592, 0, 100, 16, 592, 1024, 40, 333]
BUDGET, TOKENS = TokenBudget(4000, 12, 1024), TokenBudget(2000, 12, 600)
MASKS = {
    "unstructured": UnstructuredMask(0.8),
    "structured": StructuredMask(0.3, 0.3),
    "clustered": ClusteredMask(),
    "clustered-code": ClusteredMask(as_code=True),
}
CORRUPTIONS = {
    "paper": GMML(),
    "aligned": GMML(ratio=(0.5, 0.7), align=(16, 16)),
    "noise": GMML(fill="noise", alien_share=0.3),
    "stripes": GMML(fill="time_stripes", alien_share=0.0),
}


def without_waiting(function, *args):
    """Twice, the second time with every wait for the device an error."""
    function(*args)
    torch.cuda.set_sync_debug_mode("error")
    try:
        return function(*args)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_masks_are_the_cpu_s(mask, compiled):
    torch._dynamo.reset()
    segments = Segments.from_lengths(LENGTHS, BUDGET)
    grid = GEOMETRY.grid(segments, TOKENS)
    kept = mask.num_kept(8, GEOMETRY.time_patches(segments.host_offsets.diff().numpy()))
    visible = Segments.from_lengths(kept + (kept > 0), TOKENS)

    def step(grid, clip_ids, visible):
        masked = mask(grid, GEOMETRY, clip_ids, **KEYS)
        shorter, rows = grid.visible(masked, visible, TOKENS.tokens)
        return masked, rows, shorter.first_frame, shorter.prefix_id

    expected = step(grid, torch.arange(12), visible)
    function = torch.compile(step, fullgraph=True) if compiled else step
    args = grid.to("cuda"), torch.arange(12, device="cuda"), visible.to("cuda")
    found = without_waiting(function, *args)
    assert all(torch.equal(x.cpu(), y) for x, y in zip(found, expected, strict=True))


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("gmml", CORRUPTIONS.values(), ids=CORRUPTIONS)
def test_corruption_is_the_cpu_s(gmml, compiled):
    torch._dynamo.reset()
    torch.manual_seed(0)
    batch = Spectrograms(torch.randn(4000, 128), Segments.from_lengths(LENGTHS, BUDGET))
    grid = GEOMETRY.grid(batch.segments, TOKENS)

    def step(batch, grid, clip_ids):
        corrupted = gmml(batch, clip_ids, **KEYS)
        share = corrupted_share(corrupted.mask, grid, GEOMETRY)
        return corrupted.mask, share, corrupted.spectrograms.frames

    mask, share, frames = step(batch, grid, torch.arange(12))
    function = torch.compile(step, fullgraph=True) if compiled else step
    args = batch.to("cuda"), grid.to("cuda"), torch.arange(12, device="cuda")
    found = without_waiting(function, *args)
    assert torch.equal(found[0].cpu(), mask)
    torch.testing.assert_close(found[1].cpu(), share)
    torch.testing.assert_close(found[2].cpu(), frames)


@pytest.mark.parametrize("setting", ["allow_tf32", "allow_bf16_reduced_precision_reduction"])
def test_first_covers_are_exact_in_tensor_cores(setting, monkeypatch):
    monkeypatch.setattr(torch.backends.cuda.matmul, setting, True)
    batch = Spectrograms(torch.zeros(4000, 128), Segments.from_lengths(LENGTHS, BUDGET))
    expected = GMML()(batch, torch.arange(12), **KEYS).mask
    with torch.autocast("cuda", torch.float16):
        found = GMML()(batch.to("cuda"), torch.arange(12, device="cuda"), **KEYS).mask
    assert torch.equal(found.cpu(), expected)
