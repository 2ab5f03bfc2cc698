"""Masks over ragged batches: exact counts, the papers' laws, one clip at a time."""

import numpy as np
import pytest
import torch

from fastast import Segments, TokenBudget
from fastast.random import random_bits
from fastast.tokens import (
    ClusteredMask,
    PatchGeometry,
    StructuredMask,
    UnstructuredMask,
    kept_lists,
)
from fastast.tokens.cover import cover_rank

KEYS = {"seed": 3, "epoch": 5}
GEOMETRY = PatchGeometry(128, (16, 16), prefix=1)
FRAMES = [1024, 0, 592, 16, 100, 1024, 40]
MASKS = {
    "unstructured": UnstructuredMask(0.8),
    "time": StructuredMask(time_ratio=0.3),
    "frequency": StructuredMask(freq_ratio=0.3),
    "both": StructuredMask(0.7, 0.3),
    "clustered": ClusteredMask(),
    "clustered-code": ClusteredMask(as_code=True),
}
every_mask = pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)


def ids(count):
    return torch.arange(100, 100 + count)


def masked_patches(mask, frames, clip_ids=None, geometry=GEOMETRY, budget=None, **keys):
    """Each clip's mask, bool ``[freq, time]``, and the mask per row."""
    grid = geometry.grid(frames, budget)
    clip_ids = ids(grid.segments.num_segments) if clip_ids is None else clip_ids
    rows = mask(grid, geometry, clip_ids, **(KEYS | keys))
    assert rows.dtype == torch.bool and rows.shape == (grid.num_rows,)
    offsets = grid.segments.host_offsets.tolist()
    assert not rows[offsets[-1] :].any() and not rows[grid.prefix_id >= 0].any()
    clips = [rows[a + geometry.prefix : b] for a, b in zip(offsets[:-1], offsets[1:], strict=True)]
    return [clip.view(geometry.freq_patches, -1) for clip in clips], rows


# Counts ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "mask, kept",
    [
        # Audio-MAE on 64 x 8 patches, as its published code counts.
        (UnstructuredMask(0.8), 102),
        (UnstructuredMask(0.75), 128),
        (UnstructuredMask(0.7), 153),
        (UnstructuredMask(0.3), 358),
        (UnstructuredMask(0.0), 512),
        (StructuredMask(0.7, 0.3), 19 * 5),
        (StructuredMask(0.2, 0.2), 51 * 6),
        (StructuredMask(0.3, 0.3), 44 * 5),
        (StructuredMask(0.6, 0.5), 25 * 4),
        (StructuredMask(time_ratio=0.3), 44 * 8),
        (StructuredMask(freq_ratio=0.3), 64 * 5),
        # SSAST: 400, 250 and 100 of 512 are masked.
        (ClusteredMask(), 112),
        (ClusteredMask(250 / 512), 262),
        (ClusteredMask(100 / 512), 412),
        (ClusteredMask(as_code=True), 112),
        (ClusteredMask(0.0), 512),
    ],
    ids=str,
)
def test_counts_of_the_papers(mask, kept):
    assert mask.num_kept(8, 64) == kept
    clips, _ = masked_patches(mask, [1024] * 50)
    assert {int((~clip).sum()) for clip in clips} == {kept}


@every_mask
def test_counts_of_ragged_clips(mask):
    widths = np.array([GEOMETRY.time_patches(frames) for frames in FRAMES])
    kept = mask.num_kept(8, widths)
    assert kept.tolist() == [mask.num_kept(8, int(width)) for width in widths]
    assert (kept[widths > 0] > 0).all() and (kept[widths == 0] == 0).all()
    clips, _ = masked_patches(mask, FRAMES)
    assert [int((~clip).sum()) for clip in clips] == kept.tolist()


@every_mask
@pytest.mark.parametrize(
    "geometry", [PatchGeometry(128, (16, 16), (10, 10)), PatchGeometry(128, (128, 2))]
)
def test_any_patches(mask, geometry):
    """Overlapping ones, and frames: every kind masks as many as it says."""
    clips, _ = masked_patches(mask, FRAMES, geometry=geometry)
    widths = geometry.time_patches(np.array(FRAMES))
    kept = mask.num_kept(geometry.freq_patches, widths)
    assert [int((~clip).sum()) for clip in clips] == kept.tolist()


# Which patches --------------------------------------------------------------------------------


@every_mask
def test_a_clip_is_masked_alike_in_any_batch(mask):
    budget = TokenBudget(2000, 12, 600)
    together, _ = masked_patches(mask, FRAMES)
    padded, _ = masked_patches(
        mask, Segments.from_lengths(FRAMES, TokenBudget(3000, 12, 1100)), budget=budget
    )
    assert all(torch.equal(a, b) for a, b in zip(together, padded, strict=False))
    for index, frames in enumerate(FRAMES):
        (alone,), _ = masked_patches(mask, [frames], ids(10)[index : index + 1])
        assert torch.equal(alone, together[index])


@every_mask
def test_keys(mask):
    (first,), _ = masked_patches(mask, [1024])
    for changed in ({"seed": 4}, {"epoch": 6}, {"clip_ids": torch.tensor([7])}):
        assert not torch.equal(masked_patches(mask, [1024], **changed)[0][0], first)
    (again,), _ = masked_patches(mask, [1024], epoch=torch.tensor(5))
    assert torch.equal(first, again)


@every_mask
def test_draws_are_those_of_keep_lists(mask):
    clips, _ = masked_patches(mask, FRAMES)
    times = [clip.shape[1] for clip in clips]
    # Prefix rows and pooling have no part in it.
    geometry = PatchGeometry(128, (16, 16), prefix=2, time_pool=2)
    lists = kept_lists(mask, geometry, times, ids(7), **KEYS)
    for clip, keep in zip(clips, lists, strict=True):
        assert np.array_equal((~clip.flatten()).nonzero().flatten(), keep)
    assert kept_lists(mask, geometry, [], [], **KEYS) == []


@every_mask
def test_most_times_is_a_bound(mask):
    times = np.arange(1, 200)
    kept = mask.num_kept(8, times)
    assert all(mask.most_times(8, k, 1) >= t for k, t in zip(kept.tolist(), times, strict=True))
    assert mask.most_times(8, int(kept.sum()), len(times)) >= times.sum()
    assert mask.most_times(8, int(kept[-1]), 1) < 1.1 * times[-1]


def test_structured_masks_are_whole_rows_and_columns():
    for clip in masked_patches(StructuredMask(0.3, 0.4), [1024] * 20)[0]:
        kept = ~clip
        assert torch.equal(kept, kept.any(1, keepdim=True) & kept.any(0, keepdim=True))
        assert (kept.any(1).sum(), kept.any(0).sum()) == (4, 44)


@pytest.mark.parametrize("mask", [UnstructuredMask(0.7), StructuredMask(0.5, 0.25)], ids=str)
def test_patches_are_masked_uniformly(mask):
    clips = torch.stack(masked_patches(mask, [128] * 2000)[0]).double()  # 8 x 8 patches
    share = 1 - mask.num_kept(8, 8) / 64
    assert ((clips.mean(0) - share).abs() < 5 * (share * (1 - share) / 2000) ** 0.5).all()


def sequential_clusters(mask, width, clip):
    """The mask of a clip of 8 x ``width`` patches, one square after the other, with our draws."""
    patches = 8 * width
    bits = random_bits(**KEYS, clips=torch.tensor([clip]), purpose="mask clusters", draws=2000)[0]
    draws = [(int(b) % 2**64 >> 32) for b in bits]
    side = mask.sizes[0] + (draws[0] * (mask.sizes[1] - mask.sizes[0] + 1) >> 32)
    wanted = int(patches * mask.ratio)
    chosen: list[int] = []
    for draw in draws[1:]:
        start = draw * patches >> 32
        new = []
        for i in range(side):
            for j in range(side):
                if mask.as_code:
                    index = start + width * i + j
                    new += [index] * (0 < index < patches)
                else:
                    freq, time = (
                        start // width + i - (side - 1) // 2,
                        start % width + j - (side - 1) // 2,
                    )
                    new += [freq * width + time] * (0 <= freq < 8 and 0 <= time < width)
        chosen += [index for index in new if index not in chosen]
        if len(chosen) > wanted - (not mask.as_code):
            break
    flat = torch.zeros(patches, dtype=torch.bool)
    flat[sorted(chosen)[:wanted] if mask.as_code else chosen[:wanted]] = True
    return flat.view(8, width)


@pytest.mark.parametrize("as_code", [False, True])
@pytest.mark.parametrize("ratio", [400 / 512, 0.3])
@pytest.mark.parametrize("width", [64, 9, 37])
def test_clusters_equal_the_sequential_algorithm(width, ratio, as_code):
    mask = ClusteredMask(ratio, as_code=as_code)
    clip_ids = torch.arange(20)
    clips, _ = masked_patches(mask, [16 * width] * 20, clip_ids)
    for clip, found in enumerate(clips):
        assert torch.equal(found, sequential_clusters(mask, width, clip))


def test_clusters_are_clusters():
    """A masked patch has more masked neighbours than without clusters."""

    def neighbours(mask):
        clips = torch.stack(masked_patches(mask, [1024] * 50)[0])
        return (clips[:, :, 1:] & clips[:, :, :-1]).double().mean()

    assert neighbours(ClusteredMask(0.4)) > 1.5 * neighbours(UnstructuredMask(0.4))


# First covers ---------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [0, 1, 122, 123, 124, 300])
def test_cover_rank(count):
    generator = torch.Generator().manual_seed(count)
    bounds = torch.randint(-3, 22, (4, 3, count), generator=generator)
    rows, cols = (bounds[0], bounds[1]), (bounds[2], bounds[3])
    rank, most = cover_rank(rows, cols, (17, 20))
    assert most >= count
    expected = torch.zeros(3, 17, 20, dtype=torch.int16)
    for clip in range(3):
        for k in reversed(range(count)):
            (a, b), (c, d) = ([int(x[clip, k]) for x in pair] for pair in (rows, cols))
            expected[clip, max(a, 0) : max(b, 0), max(c, 0) : max(d, 0)] = most - k
    assert torch.equal(rank, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_cover_rank_under_autocast(dtype):
    """Also where a cell is covered by all rectangles from the k-th on: sums of 4/3."""
    begin = torch.arange(200)[None]
    rows = (begin, torch.full_like(begin, 200))
    cols = (torch.zeros_like(begin), torch.ones_like(begin))
    reverse = tuple(x.flip(1) for x in rows)
    with torch.autocast("cpu", dtype):
        rank, most = cover_rank(rows, cols, (200, 1))
        assert (rank == most).all()
        rank, most = cover_rank(reverse, cols, (200, 1))
    assert torch.equal(most - rank[0, :, 0].long(), torch.arange(200).flip(0))


# The visible stream ---------------------------------------------------------------------------


@every_mask
@pytest.mark.parametrize("budget", [None, TokenBudget(1400, 12, 600)], ids=["exact", "budget"])
def test_visible_rows_are_a_keep_list(mask, budget):
    clips, rows = masked_patches(mask, FRAMES)
    grid = GEOMETRY.grid(FRAMES)
    kept = mask.num_kept(8, GEOMETRY.time_patches(np.array(FRAMES)))
    segments = Segments.from_lengths(kept + (kept > 0), budget)
    num_rows = budget.tokens if budget else int(segments.host_offsets[-1])
    visible, source = grid.visible(rows, segments, num_rows)
    keep = [(~clip.flatten()).nonzero().flatten().numpy() for clip in clips]
    expected = GEOMETRY.grid(FRAMES, budget, keep)
    for name in ("first_frame", "freq", "time", "clip_width", "prefix_id", "time_pool"):
        assert torch.equal(getattr(visible, name), getattr(expected, name)), name
    alive = visible.segments.row_mask(num_rows)
    assert torch.equal(grid.freq[source[alive]], visible.freq[alive])
    assert (source[~alive] == grid.num_rows).all()


def test_visible_of_a_padded_grid():
    budget = TokenBudget(2000, 12, 600)
    mask = UnstructuredMask(0.8)
    _, rows = masked_patches(mask, FRAMES, budget=budget, clip_ids=ids(12))
    grid = GEOMETRY.grid(FRAMES, budget)
    kept = mask.num_kept(8, GEOMETRY.time_patches(np.array(FRAMES)))
    segments = Segments.from_lengths(kept + (kept > 0), TokenBudget(500, 12, 120))
    visible, source = grid.visible(rows, segments, 500)
    exact, exact_source = GEOMETRY.grid(FRAMES).visible(
        rows[: int(grid.segments.host_offsets[-1])], segments, 500
    )
    assert torch.equal(visible.first_frame, exact.first_frame)
    used = int(segments.host_offsets[-1])
    assert torch.equal(source[:used], exact_source[:used])


# Tracing --------------------------------------------------------------------------------------


@every_mask
def test_ragged_batches_compile_once(mask):
    torch._dynamo.reset()
    budget = TokenBudget(3000, 12, 600)
    visible_budget = TokenBudget(3000, 12, 600)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(grid, clip_ids, epoch, segments):
        masked = mask(grid, GEOMETRY, clip_ids, seed=0, epoch=epoch)
        return masked, grid.visible(masked, segments, 3000)[0].freq

    for index, frames in enumerate(([1024, 500], FRAMES, [16] * 12, [160])):
        grid = GEOMETRY.grid(frames, budget)
        kept = mask.num_kept(8, GEOMETRY.time_patches(np.array(frames)))
        segments = Segments.from_lengths(kept + (kept > 0), visible_budget)
        with torch._dynamo.config.patch(error_on_recompile=index > 0):
            masked, freq = step(grid, ids(12), torch.tensor(index), segments)
        expected = mask(grid, GEOMETRY, ids(12), seed=0, epoch=index)
        assert torch.equal(masked, expected)
        assert torch.equal(freq, grid.visible(expected, segments, 3000)[0].freq)


# Wrong input ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: UnstructuredMask(1.0), r"ratio must lie in \[0, 1\), got 1.0"),
        (lambda: StructuredMask(-0.1), "time_ratio must lie in"),
        (lambda: StructuredMask(0.1, 2), "freq_ratio must lie in"),
        (lambda: ClusteredMask(1.5), "ratio must lie in"),
        (lambda: ClusteredMask(sizes=(4, 3)), r"sizes must be a positive range, got \(4, 3\)"),
    ],
)
def test_wrong_masks_say_so(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@every_mask
def test_wrong_clip_ids_say_so(mask):
    with pytest.raises(ValueError, match="clip_ids must be torch.int64 of shape .2."):
        mask(GEOMETRY.grid([32, 32]), GEOMETRY, ids(3), **KEYS)


@every_mask
def test_no_clips(mask):
    assert masked_patches(mask, [])[1].shape == (0,)
    assert masked_patches(mask, [], budget=TokenBudget(64, 3, 20))[1].shape == (64,)
