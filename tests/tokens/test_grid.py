"""Token lists and the patches they name, against unfolding each clip by itself."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastast import Segments, Spectrograms, TokenBudget
from fastast.tokens import PatchGeometry, kept_patches, patchify
from tests.testing import ragged

PATCHES = {
    "plain": PatchGeometry(12, (4, 4)),
    "overlapping": PatchGeometry(13, (4, 5), (3, 2)),
    "with-gaps": PatchGeometry(13, (2, 3), (3, 5)),
    "tall": PatchGeometry(12, (12, 2)),
    "flat": PatchGeometry(5, (1, 6), (1, 3), prefix=1),
    "prefixed": PatchGeometry(11, (4, 4), (3, 3), prefix=2),
    "average-pooled": PatchGeometry(11, (4, 2), (3, 1), time_pool=2),
    "max-pooled": PatchGeometry(12, (4, 1), prefix=1, time_pool=3, time_pooling="max"),
}
LENGTHS = [9, 3, 0, 25, 4, 1, 10]  # some shorter than a patch, wherever they may be
every_geometry = pytest.mark.parametrize("geometry", PATCHES.values(), ids=PATCHES)


def pooled(clip: Tensor, geometry: PatchGeometry) -> Tensor:
    """``[..., frames, mels]`` with whole groups of frames pooled."""
    if geometry.time_pool == 1 or clip.shape[-2] < geometry.time_pool:
        return clip[..., : clip.shape[-2] // geometry.time_pool, :]
    pool = F.avg_pool1d if geometry.time_pooling == "average" else F.max_pool1d
    return pool(clip.mT, geometry.time_pool).mT


def unfolded(clip: Tensor, geometry: PatchGeometry) -> Tensor:
    """All patches of a clip, ``[patches, height * width]``, frequency-major."""
    clip = pooled(clip, geometry)
    if len(clip) < geometry.patch_size[1]:
        return clip.new_zeros(0, geometry.patch_size[0] * geometry.patch_size[1])
    return F.unfold(clip.T[None, None], geometry.patch_size, stride=geometry.stride)[0].T


def expected_tokens(
    clips: list[Tensor],
    geometry: PatchGeometry,
    budget: TokenBudget | None = None,
    keep: list[np.ndarray] | None = None,
) -> Tensor:
    """Zeros for the prefix, then the patches, clip after clip, then zeros up to the budget."""
    tokens = []
    for index, clip in enumerate(clips):
        patches = unfolded(clip, geometry)
        if keep is not None:
            patches = patches[torch.from_numpy(keep[index])]
        if len(patches):
            tokens += [patches.new_zeros(geometry.prefix, patches.shape[1]), patches]
    tokens = torch.cat(tokens)
    return F.pad(tokens, (0, 0, 0, budget.tokens - len(tokens))) if budget else tokens


def some_of(geometry: PatchGeometry, lengths: list[int]) -> list[np.ndarray]:
    """A keep list: about half of each clip's patches, and none of the last clip's."""
    rng = np.random.default_rng(0)
    keep = [np.flatnonzero(rng.random(n) < 0.5) for n in all_patches(geometry, lengths)]
    return [*keep[:-1], np.zeros(0, np.int64)]


def all_patches(geometry: PatchGeometry, lengths: list[int]) -> np.ndarray:
    return geometry.freq_patches * geometry.time_patches(np.array(lengths))


@every_geometry
@pytest.mark.parametrize("budgeted", [False, True], ids=["exact", "budget"])
@pytest.mark.parametrize("kept", [False, True], ids=["all", "kept"])
def test_patchify_unfolds_each_clip(geometry, budgeted, kept):
    stream = ragged(LENGTHS, geometry.num_mels)
    budget = TokenBudget(400, 12, 200) if budgeted else None
    keep = some_of(geometry, LENGTHS) if kept else None
    grid = geometry.grid(stream.segments, budget, keep)
    frames = stream.frames.requires_grad_()
    actual = patchify(frames, grid, geometry)
    expected = expected_tokens(stream.unpack(), geometry, budget, keep)
    if geometry.time_pool > 1 and geometry.time_pooling == "average":
        torch.testing.assert_close(actual, expected, rtol=1e-14, atol=1e-14)  # sums, in an order
    else:
        assert torch.equal(actual, expected)

    weights = torch.randn_like(actual)
    (grad,) = torch.autograd.grad(actual, frames, weights)
    (expected_grad,) = torch.autograd.grad(expected, frames, weights)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-12, atol=1e-12)


@every_geometry
def test_patchify_and_a_linear_layer_are_a_convolution(geometry):
    clip = torch.randn(1, 25, geometry.num_mels, dtype=torch.float64)
    weight = torch.randn(7, 1, *geometry.patch_size, dtype=torch.float64)
    packed = Spectrograms.from_dense(clip)
    tokens = patchify(packed.frames, geometry.grid(packed.segments), geometry)[geometry.prefix :]
    expected = (
        F.conv2d(pooled(clip, geometry).mT[None], weight, stride=geometry.stride)[0].flatten(1).T
    )
    torch.testing.assert_close(tokens @ weight.flatten(1).T, expected, rtol=1e-12, atol=1e-12)


def test_patchify_never_reads_dead_frames():
    geometry = PATCHES["overlapping"]
    stream = ragged(LENGTHS, geometry.num_mels)
    segments = Segments.from_lengths(LENGTHS, TokenBudget(80, 10, 40))
    frames = F.pad(stream.frames, (0, 0, 0, 80 - len(stream.frames)), value=torch.nan)
    frames.requires_grad_()
    tokens = patchify(frames, geometry.grid(segments, TokenBudget(400, 12, 200)), geometry)
    assert tokens.isfinite().all()
    (grad,) = torch.autograd.grad(tokens.square().sum(), frames)
    assert grad.isfinite().all()
    assert (grad[sum(LENGTHS) :] == 0).all()


POOLED = {
    "average": PatchGeometry(12, (4, 4), time_pool=2),
    "max": PatchGeometry(13, (4, 5), (3, 2), time_pool=3, time_pooling="max"),
    "tall": PatchGeometry(12, (12, 2), prefix=1, time_pool=4),
}


@pytest.mark.parametrize("geometry", POOLED.values(), ids=POOLED)
@pytest.mark.parametrize("per_clip", [False, True], ids=["all", "per-clip"])
@pytest.mark.parametrize("kept", [False, True], ids=["all", "kept"])
def test_patches_of_pooled_frames(geometry, per_clip, kept):
    lengths = [37, 3, 0, 60, 16, 1, 41]
    stream = ragged(lengths, geometry.num_mels)
    pool = [1, 2, 1, 2, 2, 1, geometry.time_pool] if per_clip else None
    pools = np.array(pool or [geometry.time_pool] * 7)
    patches = geometry.freq_patches * geometry.time_patches(np.array(lengths), pools)
    rng = np.random.default_rng(0)
    keep = [np.flatnonzero(rng.random(n) < 0.5) for n in patches] if kept else None
    budget = TokenBudget(600, 9, 300)
    grid = geometry.grid(stream.segments, budget, keep, pool)
    assert grid.num_rows == 600

    frames = stream.frames.requires_grad_()
    actual = patchify(frames, grid, geometry)
    clips = [
        pooled(clip, replace(geometry, time_pool=pool))
        for clip, pool in zip(stream.unpack(), pools.tolist(), strict=True)
    ]
    expected = expected_tokens(clips, replace(geometry, time_pool=1), budget, keep)
    torch.testing.assert_close(actual, expected, rtol=1e-14, atol=1e-14)
    weights = torch.randn_like(actual)
    grads = [torch.autograd.grad(x, frames, weights)[0] for x in (actual, expected)]
    torch.testing.assert_close(*grads, rtol=1e-12, atol=1e-12)


def test_pooled_geometry_counts_pooled_patches():
    geometry = PatchGeometry(12, (4, 4), prefix=1, time_pool=2)
    assert geometry.min_frames() == 8
    assert geometry.num_tokens(np.array([7, 8, 9, 15, 16])).tolist() == [0, 4, 4, 4, 7]
    assert geometry.time_patches(np.array([16, 16]), np.array([1, 2])).tolist() == [4, 2]


def test_mean_of_low_precision_frames_is_taken_in_float32():
    geometry = PatchGeometry(4, (4, 4), time_pool=4)
    frames = torch.randn(16, 4).bfloat16()
    tokens = patchify(frames, geometry.grid([16]), geometry)
    expected = frames.float().view(4, 4, 4).mean(1).T.flatten()[None]
    assert tokens.dtype == torch.bfloat16
    assert torch.equal(tokens, expected.bfloat16())


@pytest.mark.parametrize("geometry", [PATCHES["overlapping"], POOLED["max"]], ids=["plain", "max"])
def test_gradcheck(geometry):
    stream = ragged([17, 2, 20], geometry.num_mels)
    pool = None if geometry.time_pool == 1 else [1, 3, 2]
    grid = geometry.grid(stream.segments, TokenBudget(60, 4, 40), pool=pool)
    frames = stream.frames.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: patchify(x, grid, geometry), [frames])


@pytest.mark.parametrize(
    "geometry", [PATCHES["overlapping"], POOLED["average"]], ids=["plain", "mean"]
)
def test_a_compiler_makes_one_kernel_of_it(geometry):
    """With the augmentation before it and the cast after it: no copy of the frames in between."""
    from torch._inductor.utils import run_and_get_code

    stream = ragged([60, 40], geometry.num_mels, torch.float32)
    grid = geometry.grid(stream.segments, TokenBudget(300, 2, 200))
    masked = torch.rand_like(stream.frames) < 0.2

    def step(frames, masked, grid):
        return patchify(torch.where(masked, 0.5, frames), grid, geometry).bfloat16()

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True)
    found, (code,) = run_and_get_code(compiled, stream.frames, masked, grid)
    torch.testing.assert_close(found, step(stream.frames, masked, grid))
    assert code.count("= empty_strided_cpu(") == 1


@pytest.mark.parametrize("budget", [None, TokenBudget(8, 3, 8)], ids=["exact", "budget"])
@pytest.mark.parametrize("lengths", [[0, 0], [3, 1], []], ids=str)
def test_batches_without_a_patch(lengths, budget):
    geometry = PATCHES["prefixed"]
    frames = torch.randn(sum(lengths), geometry.num_mels)
    grid = geometry.grid(lengths, budget)
    assert grid.segments.offsets.sum() == 0
    assert torch.equal(
        patchify(frames, grid, geometry), torch.zeros(budget.tokens if budget else 0, 16)
    )


@every_geometry
def test_places_are_frequency_major(geometry):
    grid = geometry.grid(LENGTHS)
    freq, time, width, prefix = [], [], [], []
    for length in LENGTHS:
        columns = geometry.time_patches(length)
        if columns:
            f, t = np.indices((geometry.freq_patches, columns)).reshape(2, -1)
            blank = [0] * geometry.prefix
            freq += [*blank, *f]
            time += [*blank, *t]
            width += [*blank, *[columns] * len(f)]
            prefix += [*range(geometry.prefix), *[-1] * len(f)]
    assert grid.freq.tolist() == freq
    assert grid.time.tolist() == time
    assert grid.clip_width.tolist() == width
    assert grid.prefix_id.tolist() == prefix
    assert grid.num_rows == len(freq) == geometry.num_tokens(np.array(LENGTHS)).sum()
    assert grid.segments.lengths.tolist() == [geometry.num_tokens(n) for n in LENGTHS]


def test_kept_tokens_keep_their_places():
    geometry = PATCHES["prefixed"]
    keep = some_of(geometry, LENGTHS)
    kept, full = geometry.grid(LENGTHS, keep=keep), geometry.grid(LENGTHS)
    rows = []
    for begin, patches in zip(full.segments.offsets.tolist(), keep, strict=False):
        if len(patches):
            rows += [begin, begin + 1, *(begin + 2 + patches)]
    for name in ("first_frame", "freq", "time", "clip_width", "prefix_id"):
        assert getattr(kept, name).tolist() == getattr(full, name)[rows].tolist()


def test_frames_may_be_segments_or_lengths():
    geometry = PATCHES["overlapping"]
    budgeted = Segments.from_lengths(LENGTHS, TokenBudget(80, 10, 40))
    a, b = geometry.grid(LENGTHS), geometry.grid(budgeted)
    assert torch.equal(a.first_frame, b.first_frame)
    assert b.segments.lengths.tolist() == a.segments.lengths.tolist() + [0] * 3
    # A keep list for the real clips is enough.
    keep = some_of(geometry, LENGTHS)
    a, b = geometry.grid(LENGTHS, keep=keep), geometry.grid(budgeted, keep=keep)
    assert torch.equal(a.first_frame, b.first_frame)


@pytest.mark.parametrize("frames, tokens", [(0, 0), (3, 0), (4, 5), (7, 8), (8, 8), (25, 26)])
def test_num_tokens(frames, tokens):
    geometry = PatchGeometry(11, (4, 4), (3, 3), prefix=2)
    assert geometry.num_tokens(frames) == tokens
    assert geometry.num_tokens(np.array([frames])).tolist() == [tokens]
    assert (frames >= geometry.min_frames()) == (tokens > 0)


def test_grid_moves_whole():
    moved = PATCHES["prefixed"].grid(LENGTHS).to("meta")
    assert all(table.is_meta for table in moved._tables())
    assert moved.segments.offsets.is_meta and not moved.segments.host_offsets.is_meta


@pytest.mark.parametrize(
    "options, message",
    [
        ({"patch_size": (0, 4)}, r"patch_size \(0, 4\)"),
        ({"stride": (4, -1)}, r"stride \(4, -1\)"),
        ({"time_pool": 0}, r"time_pool must be at least 1"),
        ({"time_pooling": "mean"}, r"time_pooling must be 'average' or 'max', got 'mean'"),
        ({"num_mels": 8}, r"patch_size\[0\] \(16 mel bins\) exceeds num_mels \(8\)"),
    ],
)
def test_wrong_geometry_says_so(options, message):
    with pytest.raises(ValueError, match=message):
        PatchGeometry(**options)


@pytest.mark.parametrize(
    "keep, message",
    [
        ([[0, 8]], r"keep\[0\] names patch 8; the clip has 8"),
        ([[0], [-1, 2]], r"keep\[1\] names patch -1; the clip has 8"),
        ([[2, 1]], r"keep\[0\] must be sorted"),
        ([[1, 1]], r"keep\[0\] must be sorted"),
        ([[0, 9, 1]], r"keep\[0\]"),
        ([[0], [1], [2]], r"keep .*3.*2 clips"),
    ],
    ids=["beyond", "negative", "unsorted", "twice", "beyond-inside", "too-many"],
)
def test_wrong_keep_says_so(keep, message):
    geometry = PatchGeometry(16, (4, 4))
    with pytest.raises(ValueError, match=message):
        geometry.grid([8, 8], keep=[np.array(kept) for kept in keep])


@pytest.mark.parametrize(
    "pool, message",
    [
        ([1, 4], r"pool must lie in 1, ..., time_pool \(3\), got 1 to 4"),
        ([0], "pool must lie in"),
        ([1, 1, 1], "pool has 3 entries for 2 clips"),
    ],
    ids=str,
)
def test_wrong_pool_says_so(pool, message):
    with pytest.raises(ValueError, match=message):
        PatchGeometry(16, (4, 4), time_pool=3).grid([20, 20], pool=pool)


def test_wrong_budget_says_so():
    with pytest.raises(ValueError, match=r"tokens=16.*allows 15.*TokenBudget\.tokens"):
        PatchGeometry(16, (4, 4)).grid([8, 8], TokenBudget(15, 2, 8))


@pytest.mark.parametrize("shape", [(9, 12), (2, 9, 11), (11,)], ids=str)
def test_wrong_frames_say_so(shape):
    geometry = PATCHES["prefixed"]
    with pytest.raises(ValueError, match=r"frames must be \[rows, 11\] \(num_mels\), got"):
        patchify(torch.zeros(shape), geometry.grid([9]), geometry)


@pytest.mark.parametrize(
    "patches, drop, kept", [(100, 0.1, 90), (10, 0.25, 7), (64, 0.0, 64), (5, 0.99, 1), (0, 0.5, 0)]
)
def test_kept_patches(patches, drop, kept):
    assert kept_patches(patches, drop) == kept
    assert kept_patches(np.array([patches]), drop).tolist() == [kept]
