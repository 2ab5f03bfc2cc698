"""GMML corruption: the sequential algorithm with our draws, the original's statistics, ragged."""

import numpy as np
import pytest
import torch

from fastast import Segments, Spectrograms, TokenBudget
from fastast.random import random_bits
from fastast.tokens import GMML, PatchGeometry, corrupted_share
from fastast.tokens.gmml import FILLS, another_clip
from tests.testing import poisoned_memory, ragged

KEYS = {"seed": 3, "epoch": 5}
LENGTHS = [592, 0, 100, 7, 592, 16, 1, 333]
MELS = 128


def ids(count):
    return torch.arange(100, 100 + count)


def of_clips(spectrograms, values):
    """A per-row tensor, clip by clip."""
    return Spectrograms(values, spectrograms.segments).unpack()


# The mask -------------------------------------------------------------------------------------


def sequential_mask(gmml, length, clip, num_mels=MELS):
    """The loop: block after block until enough is covered, with our draws."""
    bits = random_bits(**KEYS, clips=torch.tensor([clip]), purpose="gmml blocks", draws=4003)[0]
    draws = [(int(b) % 2**64) for b in bits]
    alien = (draws[0] >> 40) * 2.0**-24 < gmml.alien_share
    low, high = gmml.ratio if isinstance(gmml.ratio, tuple) else (gmml.ratio, gmml.ratio)
    share = low + (high - low) * ((draws[1] >> 40) * 2.0**-24)
    wanted = (gmml.alien_ratio if alien else share) * (length * num_mels)

    def interval(size, align, first, second):
        begin = ((first >> 32) * max(size - align, 1) >> 32) // align * align
        extent = align + ((second >> 32) * max(int(size * gmml.max_block) - align, 1) >> 32)
        return begin, begin + round(min(extent, size - begin) / align) * align

    mask = torch.zeros(length, num_mels, dtype=torch.bool)
    draws = draws[3:]
    while mask.sum() < wanted:
        (a, b), (c, d) = (
            interval(length, gmml.align[1], *draws[:2]),
            interval(num_mels, gmml.align[0], *draws[2:4]),
        )
        mask[a:b, c:d] = True
        draws = draws[4:]
    return mask, alien


SETTINGS = {
    "paper": GMML(),
    "code": GMML(ratio=(0.5, 0.7)),
    "code-aligned": GMML(ratio=(0.5, 0.7), align=(16, 16)),
    "filled": GMML(alien_share=0.0),
    "alien": GMML(alien_share=1.0),
    "alien-aligned": GMML(alien_share=1.0, align=(16, 16)),
    "uneven": GMML(ratio=0.4, align=(128, 2), max_block=0.5),
}
every_setting = pytest.mark.parametrize("gmml", SETTINGS.values(), ids=SETTINGS)


@every_setting
def test_mask_equals_the_sequential_algorithm(gmml):
    lengths = [592, 48, 592, 333, 592, 592, 100]
    batch = ragged(lengths, MELS, torch.float32)
    corrupted = gmml(batch, ids(7), **KEYS)
    for index, mask in enumerate(of_clips(batch, corrupted.mask)):
        expected, alien = sequential_mask(gmml, lengths[index], 100 + index)
        assert torch.equal(mask, expected)
        assert corrupted.alien[index] == alien


STORED = {
    "zeros_p70_a1": GMML(ratio=(0.5, 0.7), alien_share=0.0),
    "zeros_p70_a16": GMML(ratio=(0.5, 0.7), alien_share=0.0, align=(16, 16)),
    "alien_p30_a1": GMML(alien_share=1.0),
    "alien_p30_a16": GMML(alien_share=1.0, align=(16, 16)),
}
DRAWS = 1000


@pytest.mark.parametrize("name", STORED)
def test_statistics_of_the_original(name, shared_dir):
    """Two samples: 500 draws of the original, as quantiles, means and profiles, and ours."""
    stored = np.load(shared_dir / "fixtures/ssl_family/gmml_statistics.npz")
    geometry = PatchGeometry()
    coverage, touched, full, masks = [], [], [], 0
    for begin in range(0, DRAWS, 100):
        segments = Segments.from_lengths([592] * 100, TokenBudget(59200, 100, 592))
        batch = Spectrograms(torch.zeros(59200, MELS), segments)
        mask = STORED[name](batch, torch.arange(begin, begin + 100), seed=0, epoch=0).mask
        share = corrupted_share(mask, geometry.grid(segments), geometry).view(100, -1)
        mask = mask.view(100, 592, MELS).double()
        coverage.append(mask.mean((1, 2)))
        touched.append((share > 0).double().mean(1))
        full.append((share == 1).double().mean(1))
        masks = masks + mask.sum(0)
    for what, values in (
        ("coverage", coverage),
        ("tokens_touched", touched),
        ("tokens_full", full),
    ):
        values = torch.cat(values).numpy()
        mean, std = stored[f"{name}_{what}_mean_std"]
        limit = 4 * np.sqrt(std**2 / 500 + values.std() ** 2 / DRAWS) + 1e-9
        assert abs(values.mean() - mean) < limit, what
        # Kolmogorov-Smirnov at the stored quantiles: the share of ours below each differs from
        # its level by less than the two samples' 0.1 % limit, 1.95 sqrt(1/n + 1/m). Where values
        # repeat, a quantile stands for a range of levels.
        levels = np.array([0, 1, 5, 10, 25, 50, 75, 90, 95, 99, 100]) / 100
        limit = 1.95 * np.sqrt(1 / 500 + 1 / DRAWS)
        for level, quantile in zip(
            levels[1:-1], stored[f"{name}_{what}_quantiles"][1:-1], strict=True
        ):
            below, up_to = (values < quantile - 1e-6).mean(), (values <= quantile + 1e-6).mean()
            assert below - limit < level < up_to + limit, (what, level)
    # Where blocks fall: the profiles over 16 frames and over 4 mel bins.
    masks = masks / DRAWS
    rows = masks.view(37, 16, MELS).mean((1, 2)).numpy()
    cols = masks.view(592, 32, 4).mean((0, 2)).numpy()
    # A band's mean coverage varies between clips by less than 0.5, half of its range.
    limit = 5 * 0.5 * np.sqrt(1 / 500 + 1 / DRAWS)
    assert abs(rows - stored[f"{name}_row_profile"]).max() < limit
    assert abs(cols - stored[f"{name}_col_profile"]).max() < limit


@pytest.mark.parametrize(
    "gmml, lengths",
    [
        (GMML(), (592, 48)),
        (GMML(ratio=0.8), (592,)),
        (GMML(align=(16, 16)), (592, 160)),
        (GMML(ratio=0.3), (592, 48, 9)),
    ],
    ids=str,
)
def test_enough_blocks_are_drawn(gmml, lengths):
    """That those drawn at once do not suffice is not seen in 500 clips."""
    for length in lengths:
        batch = ragged([length] * 500, MELS, torch.float32)
        corrupted = gmml(batch, torch.arange(500), **KEYS)
        coverage = corrupted.mask.view(500, -1).double().mean(1)
        wanted = corrupted.alien.double() * (gmml.alien_ratio - gmml.ratio) + gmml.ratio
        assert (coverage >= wanted - 1e-12).all()


def test_a_share_out_of_reach_ends():
    """Blocks of one frame that never begin at the last of nine: the loop would not end."""
    coverage = GMML(ratio=0.95)(ragged([9], MELS, torch.float32), ids(1), **KEYS).mask
    assert 0.3 < coverage.double().mean() <= 8 / 9


@pytest.mark.parametrize("align", [(1, 1), (16, 16), (8, 4)], ids=str)
def test_aligned_blocks_cover_whole_patches(align):
    geometry = PatchGeometry(MELS, align)
    batch = ragged([592, 320], MELS, torch.float32)
    corrupted = GMML(align=align)(batch, ids(2), **KEYS)
    share = corrupted_share(corrupted.mask, geometry.grid(batch.segments), geometry)
    assert ((share == 0) | (share == 1)).all()


def test_half_of_the_clips_are_alien():
    batch = ragged([20] * 1000, 16, torch.float32)
    alien = GMML()(batch, ids(1000), **KEYS).alien.double()
    assert (alien.mean() - 0.5).abs() < 5 * 0.5 / 1000**0.5


# Values ---------------------------------------------------------------------------------------


def test_zeros():
    batch = ragged(LENGTHS, MELS, torch.float32)
    corrupted = GMML(alien_share=0.0)(batch, ids(8), **KEYS)
    expected = torch.where(corrupted.mask, 0, batch.frames)
    assert torch.equal(corrupted.spectrograms.frames, expected)


def test_alien_blocks_are_of_another_clip_at_the_same_place():
    clips = [torch.full((length, MELS), float(index)) for index, length in enumerate(LENGTHS)]
    clips[4] += torch.arange(592)[:, None] / 1000
    batch = Spectrograms.from_list(clips)
    corrupted = GMML(alien_share=1.0)(batch, ids(8), **KEYS)
    for index, (clip, mask) in enumerate(
        zip(corrupted.spectrograms.unpack(), of_clips(batch, corrupted.mask), strict=True)
    ):
        if len(clip) == 0:
            continue
        assert torch.equal(clip[~mask], clips[index][~mask])
        sources = clip[mask].floor().unique()
        assert len(sources) == 1 and int(sources) != index and LENGTHS[int(sources)] > 0


def test_alien_blocks_of_given_partners():
    batch = ragged([50, 20, 70], MELS, torch.float32)
    a, b, c = batch.unpack()
    corrupted = GMML(alien_share=1.0)(batch, ids(3), partner=torch.tensor([2, 0, 1]), **KEYS)
    sources = c[:50], a[:20], b.repeat(4, 1)[:70]
    for source, clip, found, mask in zip(
        sources,
        (a, b, c),
        corrupted.spectrograms.unpack(),
        of_clips(batch, corrupted.mask),
        strict=True,
    ):
        assert torch.equal(found, torch.where(mask, source, clip))


def test_partners_are_uniform_among_the_others():
    lengths = torch.tensor([3, 0, 5, 1, 0, 2])
    counts = torch.zeros(6, 6)
    for bits in random_bits(0, 0, torch.arange(2000), "test", 6):
        counts[torch.arange(6), another_clip(lengths, bits)] += 1
    for clip in (0, 2, 3, 5):
        others = [other for other in (0, 2, 3, 5) if other != clip]
        assert counts[clip, others].sum() == 2000
        assert ((counts[clip, others] - 2000 / 3).abs() < 5 * (2000 * 2 / 9) ** 0.5).all()
    alone = torch.tensor([0, 4, 0])
    assert another_clip(alone, torch.arange(3))[1] == 1


@pytest.mark.parametrize("fill", ["noise", "time_stripes", "freq_stripes"])
def test_noise(fill):
    batch = Spectrograms.from_list([torch.full((592, MELS), 7.0)] * 20)
    gmml = GMML(fill=fill, alien_share=0.0, noise=(0.25, 0.5))
    corrupted = gmml(batch, ids(20), **KEYS)
    values = corrupted.spectrograms.frames[corrupted.mask].double()
    # As many independent values as pixels, frames or mel bins.
    count = {"noise": len(values), "time_stripes": 20 * 592, "freq_stripes": 20 * MELS}[fill]
    assert (values.mean() - 0.25).abs() < 6 * 0.5 / count**0.5
    assert (values.std() - 0.5).abs() < 6 * 0.5 / (2 * count) ** 0.5
    frames, mask = corrupted.spectrograms.frames[:592], corrupted.mask[:592]
    rows = [frames[t][mask[t]] for t in range(592) if mask[t].sum() > 1]
    assert all((row == row[0]).all() for row in rows) == (fill == "time_stripes")
    cols = [frames[:, m][mask[:, m]] for m in range(MELS) if mask[:, m].sum() > 1]
    assert all((col == col[0]).all() for col in cols) == (fill == "freq_stripes")
    first, second = (corrupted.spectrograms.unpack()[i] for i in (0, 1))
    both = corrupted.mask[:592] & corrupted.mask[592:1184]
    assert (first[both] != second[both]).double().mean() > 0.99


# The batch ------------------------------------------------------------------------------------


@pytest.mark.parametrize("fill", FILLS)
def test_a_clip_is_corrupted_alike_in_any_batch(fill):
    gmml = GMML(fill=fill, alien_share=0.0)
    batch = ragged(LENGTHS, MELS, torch.float32)
    together = gmml(batch, ids(8), **KEYS)
    for index, clip in enumerate(batch.unpack()):
        alone = gmml(Spectrograms.from_list([clip]), ids(8)[index : index + 1], **KEYS)
        assert torch.equal(alone.spectrograms.frames, together.spectrograms.unpack()[index])
        assert torch.equal(alone.mask, of_clips(batch, together.mask)[index])


def test_masks_do_not_depend_on_partners():
    batch = ragged(LENGTHS, MELS, torch.float32)
    together = GMML()(batch, ids(8), **KEYS)
    order = torch.tensor([6, 3, 0, 7, 2, 1, 5, 4])
    clips = batch.unpack()
    shuffled = Spectrograms.from_list([clips[i] for i in order])
    found = of_clips(shuffled, GMML()(shuffled, ids(8)[order], **KEYS).mask)
    masks = of_clips(batch, together.mask)
    assert all(torch.equal(mask, masks[i]) for mask, i in zip(found, order, strict=True))


@pytest.mark.parametrize("gmml", [GMML(), GMML(fill="noise"), GMML(alien_share=1.0)], ids=str)
def test_dead_rows(gmml):
    batch = ragged(LENGTHS, MELS, torch.float32)
    used = sum(LENGTHS)
    segments = Segments.from_lengths(LENGTHS, TokenBudget(2000, 12, 600))
    frames = torch.cat([batch.frames, torch.full((2000 - used, MELS), torch.nan)])
    with poisoned_memory():
        found = gmml(Spectrograms(frames, segments), ids(12), **KEYS)
    expected = gmml(batch, ids(8), **KEYS)
    assert torch.equal(found.mask[:used], expected.mask)
    assert torch.equal(found.spectrograms.frames[:used], expected.spectrograms.frames)
    assert not found.mask[used:].any() and not found.spectrograms.frames[used:].any()


def test_keys():
    batch = ragged([592], MELS, torch.float32)
    first = GMML()(batch, ids(1), **KEYS)
    assert torch.equal(first.mask, GMML()(batch, ids(1), seed=3, epoch=torch.tensor(5)).mask)
    for change in ({"seed": 4}, {"epoch": 6}):
        assert not torch.equal(first.mask, GMML()(batch, ids(1), **(KEYS | change)).mask)
    assert not torch.equal(first.mask, GMML()(batch, ids(2)[1:], **KEYS).mask)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_dtype_is_kept(dtype):
    batch = ragged(LENGTHS, MELS, dtype)
    for fill in FILLS:
        assert GMML(fill=fill)(batch, ids(8), **KEYS).spectrograms.frames.dtype == dtype


def test_no_clips():
    corrupted = GMML()(ragged([], MELS, torch.float32), ids(0), **KEYS)
    assert corrupted.mask.shape == (0, MELS)
    corrupted = GMML()(ragged([0, 0], MELS, torch.float32), ids(2), **KEYS)
    assert corrupted.mask.shape == (0, MELS)


@pytest.mark.parametrize("gmml", [GMML(), GMML(fill="noise", alien_share=0.0)], ids=str)
def test_ragged_batches_compile_once(gmml):
    torch._dynamo.reset()
    budget = TokenBudget(1500, 6, 600)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(batch, clip_ids, epoch):
        return gmml(batch, clip_ids, seed=0, epoch=epoch)

    for index, lengths in enumerate(([592, 300], [100] * 6, [592, 592, 3], [])):
        segments = Segments.from_lengths(lengths, budget)
        batch = Spectrograms(torch.randn(1500, MELS), segments)
        with torch._dynamo.config.patch(error_on_recompile=index > 0):
            found = step(batch, ids(6), torch.tensor(index))
        expected = gmml(batch, ids(6), seed=0, epoch=index)
        assert torch.equal(found.mask, expected.mask)
        assert torch.equal(found.spectrograms.frames, expected.spectrograms.frames)


def test_share_of_tokens():
    geometry = PatchGeometry(8, (4, 4), prefix=1)
    mask = torch.zeros(8, 8, dtype=torch.bool)
    mask[:4, :4] = True
    mask[4, 4] = True
    share = corrupted_share(mask, geometry.grid([8]), geometry)
    assert share.tolist() == [0, 1, 0, 0, 1 / 16]


# Wrong input ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, message",
    [
        ({"ratio": 1.0}, r"ratio must be a share in \[0, 1\) or a range of it, got 1.0"),
        ({"ratio": (0.7, 0.5)}, r"ratio must be .*got \(0.7, 0.5\)"),
        ({"alien_ratio": -0.1}, "alien_ratio must lie in"),
        ({"alien_share": 1.1}, "alien_share must lie in"),
        ({"max_block": 0.0}, "max_block must lie in"),
        ({"fill": "ones"}, "fill must be one of .*got 'ones'"),
        ({"align": (0, 16)}, r"align must be at least \(1, 1\), got \(0, 16\)"),
    ],
    ids=str,
)
def test_wrong_settings_say_so(options, message):
    with pytest.raises(ValueError, match=message):
        GMML(**options)


def test_wrong_input_says_so():
    batch = ragged([20, 30], MELS, torch.float32)
    with pytest.raises(ValueError, match="clip_ids must be torch.int64 of shape .2."):
        GMML()(batch, ids(3), **KEYS)
    with pytest.raises(ValueError, match="partner must be integers of shape .2."):
        GMML()(batch, ids(2), partner=torch.zeros(2), **KEYS)


def test_nothing_to_corrupt():
    batch = ragged([20, 30], MELS, torch.float32)
    corrupted = GMML(ratio=0.0, alien_share=0.0)(batch, ids(2), **KEYS)
    assert not corrupted.mask.any()
    assert torch.equal(corrupted.spectrograms.frames, batch.frames)
