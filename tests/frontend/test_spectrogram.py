"""Augmentation of spectrograms, against the same draws applied clip by clip."""

import zlib

import numpy as np
import pytest
import torch
from torch import Tensor

from fastast.frontend import add_noise, roll_frames, spec_augment
from fastast.nn.mel_filterbank import MelFilterbank
from fastast.random import random_below, random_uniform
from fastast.segments import Segments, Spectrograms, TokenBudget
from tests.frontend.helpers import (
    KEYS,
    compiles_once,
    ids,
    same_in_every_batch,
    same_on_gpu,
    spectrograms_of,
)
from tests.testing import ragged

MASKS = {"freq_mask": 12, "time_mask": 20}


def ones(*lengths: int, budget: TokenBudget | None = None, num_mels: int = 32) -> Spectrograms:
    return spectrograms_of([torch.ones(length, num_mels) for length in lengths], budget)


def masked(clip: Tensor) -> tuple[list[int], list[int]]:
    """Fully masked mel bins and frames of a clip of ones that was filled with zeros."""
    return (clip == 0).all(dim=0).nonzero().flatten().tolist(), (
        (clip == 0).all(dim=1).nonzero().flatten().tolist()
    )


def is_stretch(places: list[int]) -> bool:
    return not places or places == list(range(places[0], places[-1] + 1))


# SpecAugment ----------------------------------------------------------------------------------


@pytest.mark.parametrize("num_masks", [(1, 1), (2, 3), (0, 1), (1, 0)])
def test_masks_equal_the_same_draws_clip_by_clip(num_masks):
    num_freq, num_time = num_masks
    lengths, clip_ids = (60, 0, 10, 35), ids(4, 5, 6, 7)
    batch = Spectrograms(torch.randn(105, 32), Segments.from_lengths(lengths))
    out = spec_augment(
        batch,
        clip_ids,
        **MASKS,
        num_freq_masks=num_freq,
        num_time_masks=num_time,
        fill=-7.0,
        **KEYS,
    )
    assert out.segments is batch.segments
    freq_draws = random_uniform(5, 2, clip_ids, "frequency mask", 2 * num_freq)
    time_draws = random_uniform(5, 2, clip_ids, "time mask", 2 * num_time)
    for clip, (expected, actual) in enumerate(zip(batch.unpack(), out.unpack(), strict=True)):
        expected = expected.clone()
        for axis, draws, masks, limit in (
            (1, freq_draws[clip], num_freq, 12),
            (0, time_draws[clip], num_time, 20),
        ):
            size = expected.shape[axis]
            for width, place in zip(draws[:masks], draws[masks:], strict=True):
                width = width * min(limit, size)
                begin = int(place * (size - width))
                expected.narrow(axis, begin, int(width)).fill_(-7.0)
        assert torch.equal(actual, expected)


def test_widths_and_places():
    clips = 3000
    out = spec_augment(ones(*[40] * clips), torch.arange(clips), **MASKS, **KEYS).unpack()
    widths = {"freq": [], "time": []}
    ends = {"freq": set(), "time": set()}
    for clip in out:
        for name, places in zip(("freq", "time"), masked(clip), strict=True):
            assert is_stretch(places)
            widths[name].append(len(places))
            ends[name] |= set(places[:1] + places[-1:])
    for name, limit, size in (("freq", 12, 32), ("time", 20, 40)):
        counts = torch.bincount(torch.tensor(widths[name]), minlength=limit)
        assert len(counts) == limit  # the limit itself is never reached
        assert (counts - clips / limit).abs().max() < 5 * (clips / limit) ** 0.5
        assert {0, size - 2} <= ends[name] and size - 1 not in ends[name]


@pytest.mark.parametrize(
    ("time_mask", "limits"),
    [
        (0.2, {100: 20, 25: 5, 250: 50, 4: 0}),  # a share of the clip
        (20, {100: 20, 25: 20, 250: 20, 4: 4}),  # frames, up to the clip's length
        (20.0, {100: 20}),
        (1, {100: 1}),
        (192 / 1024, {1024: 192, 998: 187, 1000: 187}),  # as 192 * frames // 1024
    ],
)
def test_limits_of_time_masks(time_mask, limits):
    clips = 400
    for length, limit in limits.items():
        batch = ones(*[length] * clips, num_mels=3)
        clip_ids = torch.arange(clips)
        out = spec_augment(batch, clip_ids, freq_mask=0, time_mask=time_mask, **KEYS)
        width = random_uniform(5, 2, clip_ids, "time mask", 2)[:, 0]
        widths = [len(masked(clip)[1]) for clip in out.unpack()]
        assert widths == (width * limit).int().tolist()
        assert max(widths) >= 0.98 * limit - 1


def test_nothing_to_mask():
    batch = ones(30, 20)
    out = spec_augment(batch, ids(0, 1), freq_mask=0, time_mask=0, **KEYS)
    assert torch.equal(out.frames, batch.frames)
    empty = spec_augment(ragged([], 32), ids(), **MASKS, **KEYS)
    assert empty.frames.shape == (0, 32)


def test_fill_for_normalised_spectrograms():
    # Masking with 0 and then normalising, as AST does, is masking with `normalized(0.0)` after.
    waveforms = [0.1 * torch.randn(8000), 0.1 * torch.randn(5000)]
    raw, normalising = MelFilterbank(), MelFilterbank(mean=-4.2677393, std=4.5689974)
    first = spec_augment(raw(waveforms), ids(0, 1), **MASKS, **KEYS)
    then_normalised = (first.frames + 4.2677393) / (2 * 4.5689974)
    fill = normalising.plan.normalized(0.0)
    after = spec_augment(normalising(waveforms), ids(0, 1), **MASKS, fill=fill, **KEYS)
    torch.testing.assert_close(after.frames, then_normalised)


# Noise ----------------------------------------------------------------------------------------

WORD = (1 << 64) - 1


def splitmix64(state):
    """The published generator's output for the state, in Python's unbounded integers."""
    state = (state + 0x9E3779B97F4A7C15) & WORD
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & WORD
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & WORD
    return state ^ (state >> 31)


def hashed(seed, epoch, clip, purpose, index):
    state = seed
    for key in (zlib.crc32(purpose.encode()), epoch, clip & WORD):
        state = splitmix64(state ^ key)
    return splitmix64(splitmix64(state) ^ index)


@pytest.mark.parametrize("num_mels", [1, 4, 7])
def test_noise_equals_an_independent_implementation(num_mels):
    batch, clip_ids = ragged([5, 0, 3], num_mels), ids(3, 4, 2**41)
    out = add_noise(batch, clip_ids, max_level=0.4, **KEYS)
    assert out.segments is batch.segments and out.frames.dtype == torch.float64
    levels = 0.4 * random_uniform(5, 2, clip_ids, "noise level", 1)[:, 0].double()
    for clip, before, after, level in zip(
        clip_ids.tolist(), batch.unpack(), out.unpack(), levels.tolist(), strict=True
    ):
        key = hashed(5, 2, clip, "noise", 0)
        expected = np.zeros(before.shape)
        for row, column in np.ndindex(*expected.shape):
            word = hashed(5, 2, key + row, "noise", column // 4)
            bits = (word >> 16 * (column % 4)) & 0xFFFF
            # The 16 bits are read as a signed number.
            expected[row, column] = ((bits ^ 0x8000) / 2**16) * level
        np.testing.assert_allclose((after - before).numpy(), expected, atol=1e-7)


def test_noise_is_uniform_and_so_is_its_level():
    clips, length, num_mels = 1500, 5, 32
    silence = spectrograms_of([torch.zeros(length, num_mels)] * clips)
    noise = add_noise(silence, torch.arange(clips), max_level=0.1, **KEYS).frames
    noise = noise.view(clips, length, num_mels).double()
    levels = 0.1 * random_uniform(5, 2, torch.arange(clips), "noise level", 1).double()
    uniform = noise / levels[..., None]
    assert 0 <= uniform.min() and uniform.max() < 1 + 1e-6
    count = uniform.numel()
    assert (uniform.mean() - 0.5).abs() < 5 * (1 / 12 / count) ** 0.5
    counts = torch.histc(uniform, bins=64, min=0, max=1)
    assert 22 < ((counts - count / 64).square() / (count / 64)).sum() < 120  # chi-square, 63
    assert (levels.mean() - 0.05).abs() < 5 * 0.1 * (1 / 12 / clips) ** 0.5
    # Neighbours in time, in frequency (in the same hash or not) and of other clips are unrelated.
    centred = uniform - 0.5
    for axis, step in ((0, 1), (1, 1), (2, 1), (2, 4)):
        correlation = 12 * (centred * centred.roll(step, axis)).mean()
        assert correlation.abs() < 5 / count**0.5


# Roll -----------------------------------------------------------------------------------------


def test_frame_roll_equals_numpy_clip_by_clip():
    batch, clip_ids = ragged([20, 0, 3, 1, 9], 4), ids(3, 4, 2**41, 1, 2)
    out = roll_frames(batch, clip_ids, max_frames=10, **KEYS)
    moves = (random_below(5, 2, clip_ids, "frame roll", 20) - 10).tolist()
    assert min(moves) < 0 < max(moves)
    assert max(map(abs, moves)) > 3  # farther than the shortest clips are long
    for before, after, move in zip(batch.unpack(), out.unpack(), moves, strict=True):
        assert np.array_equal(after.numpy(), np.roll(before.numpy(), move, axis=0))


def test_frame_rolls_are_uniform():
    clips, length = 4000, 50
    rows = torch.arange(length)[:, None].float()
    batch = spectrograms_of([rows] * clips)
    out = roll_frames(batch, torch.arange(clips), max_frames=10, **KEYS)
    first = out.frames.view(clips, length)[:, 0].int()
    moves = torch.where(first > length // 2, length - first, -first)
    counts = torch.bincount(moves + 10, minlength=20)
    assert len(counts) == 20  # from -10 to 9
    assert ((counts - 200).abs() < 5 * 200**0.5).all()


def test_no_move():
    batch = ragged([20, 3], 4)
    assert torch.equal(roll_frames(batch, ids(0, 1), max_frames=0, **KEYS).frames, batch.frames)


# All three ------------------------------------------------------------------------------------


def everything(batch, clip_ids, epoch):
    keys = {"seed": 5, "epoch": epoch}
    return (
        spec_augment(batch, clip_ids, freq_mask=12, time_mask=0.3, fill=9.0, **keys).frames,
        add_noise(batch, clip_ids, max_level=0.1, **keys).frames,
        roll_frames(batch, clip_ids, max_frames=10, **keys).frames,
    )


def test_a_clip_comes_out_the_same_in_every_batch():
    lengths, clip_ids = (60, 1, 10, 35, 130), ids(4, 5, 2**41, 7, 8)
    clips = [torch.randn(length, 30) for length in lengths]
    budget = TokenBudget(tokens=300, clips=9, max_length=130)

    def batch(order, padded):
        made = spectrograms_of([clips[clip] for clip in order], budget if padded else None)
        keys = torch.cat([clip_ids[order], ids(*[-1] * (made.segments.num_segments - len(order)))])
        frames = torch.cat(everything(made, keys, 2), dim=1)
        return Spectrograms(frames, made.segments).unpack()[: len(order)]

    same_in_every_batch(batch, len(clips))


def test_dead_rows_are_zeros():
    budget = TokenBudget(tokens=80, clips=6, max_length=64)
    clip_ids = ids(1, 2, 3, 0, 0, 0)
    for frames in everything(ones(30, 0, 25, budget=budget), clip_ids, 2):
        assert (frames[55:] == 0).all() and frames.isfinite().all()


def test_draws_depend_on_seed_and_epoch():
    clips = 20
    batch = ragged([40] * clips, 32, torch.float32)
    arguments = batch, torch.arange(clips)
    for once, again, later in zip(
        everything(*arguments, 2),
        everything(*arguments, torch.tensor(2)),
        everything(*arguments, 3),
        strict=True,
    ):
        assert torch.equal(once, again)
        assert (once != later).view(clips, -1).any(dim=1).sum() > 0.8 * clips


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dtype_is_kept(dtype):
    for frames in everything(ragged([30], 32, dtype), ids(0), 2):
        assert frames.dtype == dtype


def padded_batch(turn):
    """A batch of fixed shapes."""
    budget = TokenBudget(tokens=128, clips=4, max_length=64)
    batch = ones(50 - turn, 7 * turn, 20, budget=budget)
    return batch, ids(turn, 1, 2, -1), torch.tensor(turn)


def test_compiles_once_for_all_batches_of_a_budget():
    compiles_once(everything, [padded_batch(turn) for turn in range(4)])


@pytest.mark.gpu
def test_the_same_on_a_gpu():
    same_on_gpu(everything, padded_batch(3))


def test_compiles_once_for_ragged_batches():
    def batch(turn):
        made = ones(50 - turn, 7 * turn, 20)
        torch._dynamo.mark_dynamic(made.frames, 0)
        return made, ids(turn, 1, 2), torch.tensor(turn)

    compiles_once(everything, [batch(turn) for turn in range(4)])


def test_errors():
    batch, good, bad = ones(10, 10), ids(0, 1), ids(0)
    for call, message in (
        (lambda: spec_augment(batch, bad, **MASKS, **KEYS), "one per clip"),
        (lambda: spec_augment(batch, good.int(), **MASKS, **KEYS), "torch.int64"),
        (
            lambda: spec_augment(batch, good, freq_mask=-1, time_mask=0, **KEYS),
            "freq_mask must not be negative",
        ),
        (
            lambda: spec_augment(batch, good, freq_mask=0, time_mask=1.5, **KEYS),
            "time_mask must be a whole number of frames or, below 1, a share",
        ),
        (lambda: add_noise(batch, bad, max_level=0.1, **KEYS), "one per clip"),
        (lambda: add_noise(batch, good, max_level=-0.1, **KEYS), "max_level must not be negative"),
        (lambda: roll_frames(batch, bad, max_frames=3, **KEYS), "one per clip"),
        (lambda: roll_frames(batch, good, max_frames=-3, **KEYS), "max_frames must not be"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
