"""Augmentation of packed batches, against the same draws applied clip by clip."""

import math

import pytest
import torch
from torch import Tensor

from fastast.frontend import gain_jitter, spec_augment
from fastast.nn.mel_filterbank import MelFilterbank
from fastast.random import random_uniform
from fastast.segments import Segments, Spectrograms, TokenBudget

KEYS = {"seed": 5, "epoch": 2}
MASKS = {"freq_mask": 12, "time_mask": 20}


def offsets_of(*lengths: int) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0)


def ids(*numbers: int) -> Tensor:
    return torch.tensor(numbers)


def ones(*lengths: int, budget: TokenBudget | None = None, num_mels: int = 32) -> Spectrograms:
    """Clips of ones, and NaN on dead rows."""
    rows = budget.tokens if budget else sum(lengths)
    frames = torch.full((rows, num_mels), math.nan)
    frames[: sum(lengths)] = 1.0
    return Spectrograms(frames, Segments.from_lengths(lengths, budget))


def masked(clip: Tensor) -> tuple[list[int], list[int]]:
    """Fully masked mel bins and frames of a clip of ones that was filled with zeros."""
    return (clip == 0).all(dim=0).nonzero().flatten().tolist(), (
        (clip == 0).all(dim=1).nonzero().flatten().tolist()
    )


def is_stretch(places: list[int]) -> bool:
    return not places or places == list(range(places[0], places[-1] + 1))


# Gain -----------------------------------------------------------------------------------------


def test_gain_is_one_number_per_clip():
    lengths = (50, 0, 30, 20)
    waveforms = torch.randn(100).double()
    out = gain_jitter(waveforms, offsets_of(*lengths), ids(3, 9, 4, 1), max_db=6.0, **KEYS)
    draws = random_uniform(5, 2, ids(3, 4, 1), "gain", 1)[:, 0].double()
    expected = 10 ** (6.0 * (2 * draws - 1) / 20)
    ratios = (out / waveforms).split([50, 30, 20])
    for ratio, gain in zip(ratios, expected, strict=True):
        torch.testing.assert_close(ratio, gain.expand_as(ratio), rtol=1e-6, atol=0)


def test_gains_are_uniform_in_decibels():
    clips = 4000
    out = gain_jitter(
        torch.ones(clips), torch.arange(clips + 1), torch.arange(clips), max_db=10.0, **KEYS
    )
    decibels = 20 * out.double().log10()
    assert -10 - 1e-4 < decibels.min() < -9.9 and 9.9 < decibels.max() < 10 + 1e-4
    assert decibels.mean().abs() < 0.5
    assert decibels.std() == pytest.approx(20 / 12**0.5, rel=0.03)


def test_gain_follows_the_clip():
    clips = torch.randn(3, 40)
    everything = gain_jitter(
        clips.flatten(), offsets_of(40, 40, 40), ids(7, 8, 9), max_db=6.0, **KEYS
    ).view(3, 40)
    swapped = gain_jitter(
        clips[[2, 0]].flatten(), offsets_of(40, 40), ids(9, 7), max_db=6.0, **KEYS
    ).view(2, 40)
    assert torch.equal(swapped, everything[[2, 0]])
    other_epoch = gain_jitter(
        clips.flatten(), offsets_of(40, 40, 40), ids(7, 8, 9), max_db=6.0, seed=5, epoch=3
    ).view(3, 40)
    assert (other_epoch != everything).any(dim=1).all()


def test_gain_zeroes_what_no_clip_owns():
    waveforms = torch.cat([torch.ones(30), torch.full((10,), math.nan)])
    out = gain_jitter(waveforms, offsets_of(10, 20, 0, 0), ids(1, 2, 0, 0), max_db=3.0, **KEYS)
    assert out.isfinite().all() and (out[30:] == 0).all() and (out[:30] > 0).all()


def test_gain_of_int16_samples():
    samples = torch.tensor([-(2**15), 0, 1, 2**14], dtype=torch.int16)
    out = gain_jitter(samples, offsets_of(4), ids(0), max_db=0.0, **KEYS)
    assert out.dtype == torch.float32
    assert torch.equal(out, torch.tensor([-1.0, 0.0, 2.0**-15, 0.5]))
    half = gain_jitter(torch.ones(4).half(), offsets_of(4), ids(0), max_db=0.0, **KEYS)
    assert half.dtype == torch.float16


def test_gain_moves_log_mel_by_its_decibels():
    filterbank = MelFilterbank()
    waveforms, offsets = 0.1 * torch.randn(8000), offsets_of(8000)
    louder = gain_jitter(waveforms, offsets, ids(1), max_db=6.0, **KEYS)
    gain = 20 * (louder[0] / waveforms[0]).log10()
    change = filterbank(louder, offsets).frames - filterbank(waveforms, offsets).frames
    change = change[:, 4:]  # mel bin 3 is empty
    expected = gain * math.log(10) / 10
    torch.testing.assert_close(change, expected.expand_as(change), rtol=0, atol=1e-3)


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


def test_masks_follow_the_clip():
    batch = spec_augment(ones(50, 40, 30), ids(1, 2, 3), **MASKS, **KEYS).unpack()
    order = spec_augment(ones(30, 50), ids(3, 1), **MASKS, **KEYS).unpack()
    assert torch.equal(order[0], batch[2]) and torch.equal(order[1], batch[0])
    clip_ids = torch.arange(20)
    now = spec_augment(ones(*[40] * 20), clip_ids, **MASKS, **KEYS).frames
    later = spec_augment(ones(*[40] * 20), clip_ids, **MASKS, seed=5, epoch=3).frames
    assert not torch.equal(now, later)


def test_time_mask_scales_with_the_clip():
    clips = 400
    settings = {"freq_mask": 0, "time_mask": 20, "reference_frames": 100}
    for length, limit in ((100, 20), (25, 5), (250, 50), (4, 0)):
        out = spec_augment(ones(*[length] * clips), torch.arange(clips), **settings, **KEYS)
        widths = [len(masked(clip)[1]) for clip in out.unpack()]
        assert max(widths) == max(limit - 1, 0)
    # Without a reference the same limit holds for all clips, up to their length.
    del settings["reference_frames"]
    out = spec_augment(ones(*[4] * clips), torch.arange(clips), **settings, **KEYS)
    assert max(len(masked(clip)[1]) for clip in out.unpack()) == 3


def test_dead_rows_are_zeros():
    budget = TokenBudget(tokens=80, clips=6, max_length=64)
    clip_ids = ids(1, 2, 3, 0, 0, 0)
    out = spec_augment(ones(30, 0, 25, budget=budget), clip_ids, **MASKS, fill=9.0, **KEYS)
    assert (out.frames[55:] == 0).all() and out.frames.isfinite().all()
    alone = spec_augment(ones(30, 0, 25), clip_ids[:3], **MASKS, fill=9.0, **KEYS)
    assert torch.equal(out.frames[:55], alone.frames)


def test_nothing_to_mask():
    batch = ones(30, 20)
    out = spec_augment(batch, ids(0, 1), freq_mask=0, time_mask=0, **KEYS)
    assert torch.equal(out.frames, batch.frames)
    empty = spec_augment(ones(), ids().long(), **MASKS, **KEYS)
    assert empty.frames.shape == (0, 32)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dtype_is_kept(dtype):
    batch = ones(30)
    batch = Spectrograms(batch.frames.to(dtype), batch.segments)
    assert spec_augment(batch, ids(0), **MASKS, fill=0.467, **KEYS).frames.dtype == dtype


def test_fill_for_normalised_spectrograms():
    # Masking with 0 and then normalising, as AST does, is masking with `normalized(0.0)` after.
    waveforms = [0.1 * torch.randn(8000), 0.1 * torch.randn(5000)]
    raw, normalising = MelFilterbank(), MelFilterbank(mean=-4.2677393, std=4.5689974)
    first = spec_augment(raw(waveforms), ids(0, 1), **MASKS, **KEYS)
    then_normalised = (first.frames + 4.2677393) / (2 * 4.5689974)
    fill = normalising.plan.normalized(0.0)
    after = spec_augment(normalising(waveforms), ids(0, 1), **MASKS, fill=fill, **KEYS)
    torch.testing.assert_close(after.frames, then_normalised)


def test_compiles_once_for_all_batches_of_a_budget():
    budget = TokenBudget(tokens=128, clips=4, max_length=64)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(waveforms, offsets, batch, clip_ids, epoch):
        louder = gain_jitter(waveforms, offsets, clip_ids, max_db=6.0, seed=0, epoch=epoch)
        out = spec_augment(batch, clip_ids, **MASKS, reference_frames=50, seed=0, epoch=epoch)
        return louder, out.frames

    waveforms = torch.randn(500)
    for turn in range(4):
        lengths = [50 - turn, 7 * turn, 20]
        batch = ones(*lengths, budget=budget)
        offsets = offsets_of(*(3 * length for length in lengths), 0)
        arguments = waveforms, offsets, batch, ids(turn, 1, 2, 3), torch.tensor(turn)
        with torch.compiler.set_stance("force_eager"):
            expected = step(*arguments)
        with torch.compiler.set_stance("fail_on_recompile" if turn else "default"):
            actual = step(*arguments)
        assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def test_errors():
    waveforms, offsets, batch = torch.randn(20), offsets_of(10, 10), ones(10, 10)
    for call, message in (
        (lambda: gain_jitter(waveforms, offsets, ids(0), max_db=3.0, **KEYS), r"shape \[2\]"),
        (lambda: gain_jitter(waveforms, offsets, ids(0, 1), max_db=-1.0, **KEYS), "max_db"),
        (lambda: spec_augment(batch, ids(0), **MASKS, **KEYS), "one per clip"),
        (lambda: spec_augment(batch, ids(0, 1).int(), **MASKS, **KEYS), "torch.int64"),
        (
            lambda: spec_augment(batch, ids(0, 1), freq_mask=-1, time_mask=0, **KEYS),
            "freq_mask must not be negative",
        ),
        (
            lambda: spec_augment(batch, ids(0, 1), **MASKS, reference_frames=0, **KEYS),
            "reference_frames must be at least 1",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            call()
