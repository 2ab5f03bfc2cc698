"""Augmentation of waveforms, against NumPy in float64, clip by clip."""

import math

import numpy as np
import pytest
import torch

from fastast.frontend import circular_roll, gain_jitter, mix_waveforms
from fastast.frontend.waveform import _BLOCK, _sums
from fastast.nn.mel_filterbank import MelFilterbank
from fastast.random import random_below, random_uniform
from tests.frontend.helpers import (
    KEYS,
    compiles_once,
    ids,
    offsets_of,
    pad_dead,
    same_in_every_batch,
    same_on_gpu,
)

SCALE = 2.0**-15


def noise(*lengths, mean=0.0, seed=0):
    """int16 clips, and where each begins."""
    rng = np.random.default_rng(seed)
    clips = [(3000 * rng.standard_normal(length) + mean).astype(np.int16) for length in lengths]
    return [torch.from_numpy(clip) for clip in clips]


def stream(clips):
    return torch.cat(clips), offsets_of(*map(len, clips))


# Roll -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.int16, torch.float32, torch.float64])
def test_roll_equals_numpy_clip_by_clip(dtype):
    clips, clip_ids = [x.to(dtype) for x in noise(5, 0, 1, 700, 33)], ids(3, 9, 4, 1, 2**45)
    waveforms, offsets = stream(clips)
    rolled = circular_roll(pad_dead(waveforms, 9), offsets, clip_ids, **KEYS)
    assert rolled.dtype == dtype and len(rolled) == len(waveforms) + 9
    assert (rolled[-9:] == 0).all()
    shifts = random_below(5, 2, clip_ids, "roll", offsets.diff()).tolist()
    assert 0 < shifts[3] < 700
    rolled = rolled[:-9].split([len(clip) for clip in clips])
    for actual, clip, shift in zip(rolled, clips, shifts, strict=True):
        assert np.array_equal(actual.numpy(), np.roll(clip.numpy(), shift))


def test_rolls_are_uniform():
    clips, length = 7000, 7
    waveforms = torch.arange(length, dtype=torch.int16).repeat(clips)
    offsets = torch.arange(clips + 1) * length
    rolled = circular_roll(waveforms, offsets, torch.arange(clips), **KEYS).view(clips, length)
    counts = torch.bincount(rolled[:, 0].long(), minlength=length)
    assert ((counts - 1000).abs() < 5 * 1000**0.5).all()


# Mix ------------------------------------------------------------------------------------------


def mixed_as_in_ast(clip, partner, weight):
    """AST's steps, one after another, in float64."""
    clip, partner = (x.numpy().astype(np.float64) * SCALE for x in (clip, partner))
    if weight == 1:
        return clip
    clip, partner = clip - clip.mean(), partner - (partner.mean() if len(partner) else 0.0)
    if len(partner) < len(clip):
        partner = np.pad(partner, (0, len(clip) - len(partner)))
    else:
        partner = partner[: len(clip)]
    mix = weight * clip + (1 - weight) * partner
    return mix - mix.mean()


def test_mix_equals_the_steps_of_ast():
    clips = noise(1000, 500, 513, 0, 7, 256, 1, 90, mean=4000, seed=1)
    partners = noise(1000, 900, 100, 40, 0, 255, 2, 90, mean=-9000, seed=2)
    weights = torch.tensor([0.5, 0.3, 0.7, 0.4, 0.6, 0.0, 0.9, 1.0])
    waveforms, offsets = stream(clips)
    partner_waveforms, partner_offsets = stream(partners)
    mix = mix_waveforms(
        pad_dead(waveforms, 11), offsets, pad_dead(partner_waveforms, 3), partner_offsets, weights
    )
    assert mix.dtype == torch.float32 and len(mix) == len(waveforms) + 11
    assert (mix[-11:] == 0).all()
    mix = mix[:-11].split([len(clip) for clip in clips])
    for actual, clip, partner, weight in zip(mix, clips, partners, weights.tolist(), strict=True):
        expected = mixed_as_in_ast(clip, partner, weight) if len(clip) else []
        np.testing.assert_allclose(actual.numpy(), expected, rtol=0, atol=2e-7)


def test_weight_one_changes_nothing():
    clips = noise(700, 300, 0, 50, mean=5000)
    waveforms, offsets = stream(clips)
    for partners in (noise(0, 0, 0, 0), noise(700, 10, 5, 90)):
        mix = mix_waveforms(waveforms, offsets, *stream(partners), torch.ones(4))
        assert torch.equal(mix, waveforms.float() * SCALE)


def test_means_of_long_clips_are_accurate():
    # Samples near full scale whose sum no float32 and no int32 holds.
    clip = (noise(2_000_003)[0] // 100 - 32000).to(torch.int16)
    partner = noise(1_500_000, mean=20000, seed=3)[0] // 4 + 20000
    mix = mix_waveforms(*stream([clip]), *stream([partner]), torch.tensor([0.5]))
    assert abs(mix.double().mean().item()) < 1e-8
    np.testing.assert_allclose(mix.numpy(), mixed_as_in_ast(clip, partner, 0.5), atol=2e-7)


def test_sums_are_exact():
    # Odd numbers near full scale: in float32, sums of more than some hundred are rounded.
    samples = -torch.randint(32000, 32767, (64 * _BLOCK,), dtype=torch.int64) // 2 * 2 + 1
    offsets = offsets_of(0, 1, _BLOCK - 1, 2 * _BLOCK, 20 * _BLOCK + 3, 0, 7, 40 * _BLOCK)
    expected = [clip.sum().item() for clip in samples[: offsets[-1]].split(offsets.diff().tolist())]
    assert _sums(samples.float(), offsets).tolist() == expected


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


def test_gain_does_not_depend_on_the_place():
    # Vectorised functions may round differently at the end of a tensor.
    gains = {}
    for clips in (1, 3, 300):
        for begin in range(0, 900, clips):
            clip_ids = torch.arange(begin, begin + clips)
            out = gain_jitter(
                torch.ones(clips), torch.arange(clips + 1), clip_ids, max_db=6.0, **KEYS
            )
            gains.setdefault(clips, []).append(out)
    gains = {clips: torch.cat(out) for clips, out in gains.items()}
    assert torch.equal(gains[1], gains[300]) and torch.equal(gains[3], gains[300])


def test_gain_zeroes_what_no_clip_owns():
    waveforms = pad_dead(torch.ones(30), 10)
    out = gain_jitter(waveforms, offsets_of(10, 20, 0, 0), ids(1, 2, 0, 0), max_db=3.0, **KEYS)
    assert out.isfinite().all() and (out[30:] == 0).all() and (out[:30] > 0).all()
    waveforms = pad_dead(torch.ones(30, dtype=torch.int16), 10)
    out = gain_jitter(waveforms, offsets_of(10, 20, 0, 0), ids(1, 2, 0, 0), max_db=3.0, **KEYS)
    assert (out[30:] == 0).all() and (out[:30] > 0).all()


def test_gain_of_int16_samples():
    samples = torch.tensor([-(2**15), 0, 1, 2**14], dtype=torch.int16)
    out = gain_jitter(samples, offsets_of(4), ids(0), max_db=0.0, **KEYS)
    assert out.dtype == torch.float32
    assert torch.equal(out, torch.tensor([-1.0, 0.0, 2.0**-15, 0.5]))
    half = gain_jitter(torch.ones(4).half(), offsets_of(4), ids(0), max_db=0.0, **KEYS)
    assert half.dtype == torch.float16
    louder = gain_jitter(samples, offsets_of(4), ids(0), max_db=6.0, **KEYS)
    assert torch.equal(louder, gain_jitter(out, offsets_of(4), ids(0), max_db=6.0, **KEYS))


def test_gain_moves_log_mel_by_its_decibels():
    filterbank = MelFilterbank()
    waveforms, offsets = stream(noise(8000))
    waveforms = waveforms.float() * SCALE
    louder = gain_jitter(waveforms, offsets, ids(1), max_db=6.0, **KEYS)
    gain = 20 * (louder[0] / waveforms[0]).log10()
    assert gain.abs() > 1
    # Of the lowest bins some are empty, and some so narrow that the floor may reach them.
    change = (filterbank(louder, offsets).frames - filterbank(waveforms, offsets).frames)[:, 20:]
    expected = gain * math.log(10) / 10
    torch.testing.assert_close(change, expected.expand_as(change), rtol=0, atol=1e-3)


# All three ------------------------------------------------------------------------------------


def rolled_and_louder(waveforms, offsets, clip_ids, epoch):
    rolled = circular_roll(waveforms, offsets, clip_ids, seed=5, epoch=epoch)
    return rolled, gain_jitter(rolled, offsets, clip_ids, max_db=6.0, seed=5, epoch=epoch)


def test_a_clip_comes_out_the_same_in_every_batch():
    lengths = (50, 401, 1, 1000, 77)
    clips, partners = noise(*lengths, mean=900), noise(70, 400, 3, 0, 900, seed=1)
    weights, clip_ids = torch.tensor([0.3, 0.7, 0.45, 1.0, 0.1]), ids(7, 8, 2**41, 3, 1)

    def batch(order, padded):
        dead, empty = (37, 2) if padded else (0, 0)
        waveforms, offsets = stream([clips[clip] for clip in order])
        other, other_offsets = stream([partners[clip] for clip in order])
        waveforms, other = pad_dead(waveforms, dead), pad_dead(other, dead)
        offsets, other_offsets = (
            torch.cat([x, x[-1:].expand(empty)]) for x in (offsets, other_offsets)
        )
        keys = torch.cat([clip_ids[order], ids(*[-1] * empty)])
        weight = torch.cat([weights[order], torch.ones(empty)])
        rolled, louder = rolled_and_louder(waveforms, offsets, keys, 2)
        mix = mix_waveforms(rolled, offsets, other, other_offsets, weight)
        both = gain_jitter(pad_dead(mix[: offsets[-1]], dead), offsets, keys, max_db=6.0, **KEYS)
        parts = [x[: offsets[-1]].split(offsets.diff().tolist()) for x in (rolled, louder, both)]
        return [torch.stack([x.double() for x in clip]) for clip in zip(*parts, strict=True)][
            : len(order)
        ]

    same_in_every_batch(batch, len(clips))


def test_draws_depend_on_seed_and_epoch():
    waveforms, offsets = stream(noise(400, 300, 500))
    arguments = waveforms, offsets, ids(1, 2, 3)
    for once, again, later in zip(
        rolled_and_louder(*arguments, 2),
        rolled_and_louder(*arguments, torch.tensor(2)),
        rolled_and_louder(*arguments, 3),
        strict=True,
    ):
        assert torch.equal(once, again)
        for a, b in zip(once.split([400, 300, 500]), later.split([400, 300, 500]), strict=True):
            assert not torch.equal(a, b)
    other_seed = circular_roll(*arguments, seed=6, epoch=2)
    assert not torch.equal(other_seed, circular_roll(*arguments, **KEYS))


def everything(waveforms, offsets, clip_ids, partners, partner_offsets, weight, epoch):
    rolled, louder = rolled_and_louder(waveforms, offsets, clip_ids, epoch)
    mix = mix_waveforms(rolled, offsets, partners, partner_offsets, weight)
    return rolled, louder, gain_jitter(mix, offsets, clip_ids, max_db=6.0, seed=5, epoch=epoch)


def padded_batch(turn):
    """A batch of fixed shapes."""
    waveforms, offsets = stream(noise(50 - turn, 7 * turn, 320, 0, seed=turn))
    partners, partner_offsets = stream(noise(30, 5 * turn, 0, 0, seed=turn))
    return (
        pad_dead(waveforms, 500 - len(waveforms)),
        offsets,
        ids(turn, 1, 2, -1),
        pad_dead(partners, 300 - len(partners)),
        partner_offsets,
        torch.tensor([0.5, turn / 10, 1.0, 1.0]),
        torch.tensor(turn),
    )


def test_compiles_once_for_all_batches_of_a_budget():
    compiles_once(everything, [padded_batch(turn) for turn in range(4)])


@pytest.mark.gpu
def test_the_same_on_a_gpu():
    same_on_gpu(everything, padded_batch(3))


def test_compiles_once_for_ragged_batches():
    def batch(turn):
        waveforms, offsets = stream(noise(50 - turn, 7 * turn + 2, 320, seed=turn))
        partners, partner_offsets = stream(noise(30, 5 * turn, 9, seed=turn))
        for x in (waveforms, partners):
            torch._dynamo.mark_dynamic(x, 0)
        return (
            *(waveforms, offsets, ids(turn, 1, 2), partners, partner_offsets),
            torch.tensor([0.5, turn / 10, 1.0]),
            torch.tensor(turn),
        )

    compiles_once(everything, [batch(turn) for turn in range(4)])


def test_errors():
    waveforms, offsets = stream(noise(10, 10))
    mix = (waveforms, offsets, waveforms, offsets)
    for call, message in (
        (lambda: circular_roll(waveforms, offsets, ids(0), **KEYS), r"shape \[2\]"),
        (lambda: gain_jitter(waveforms, offsets, ids(0), max_db=3.0, **KEYS), r"shape \[2\]"),
        (lambda: gain_jitter(waveforms, offsets, ids(0, 1), max_db=-1.0, **KEYS), "max_db"),
        (lambda: mix_waveforms(waveforms.float(), *mix[1:], torch.ones(2)), "waveforms must be"),
        (
            lambda: mix_waveforms(waveforms, offsets, waveforms.float(), offsets, torch.ones(2)),
            "partners must be int16",
        ),
        (lambda: mix_waveforms(*mix[:3], offsets[1:], torch.ones(2)), "partner_offsets must be"),
        (lambda: mix_waveforms(*mix, torch.ones(3)), r"mix_weight must be of shape \[2\]"),
        (
            lambda: circular_roll(
                torch.empty(2**31, dtype=torch.int16, device="meta"),
                torch.zeros(1, dtype=torch.int64, device="meta"),
                torch.zeros(0, dtype=torch.int64, device="meta"),
                **KEYS,
            ),
            "fewer than 2",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            call()
