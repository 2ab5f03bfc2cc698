"""Batches to model input."""

import numpy as np
import pytest
import torch

from fastast import MelFilterbank
from fastast.data import BatchBudget, Clip, collate
from fastast.frontend import (
    MelFrontend,
    add_noise,
    circular_roll,
    gain_jitter,
    mix_waveforms,
    pad_or_cut,
    roll_frames,
    spec_augment,
)
from fastast.segments import Segments, Spectrograms, TokenBudget
from fastast.tokens import PatchGeometry
from tests.frontend.helpers import compiles_once, same_in_every_batch
from tests.testing import ragged


def test_pad_or_cut_equals_padding_each_clip():
    spectrograms = ragged([5, 0, 9, 3], 4)
    dense = pad_or_cut(spectrograms, 6, fill=-7.0)
    for clip, row in zip(spectrograms.unpack(), dense, strict=True):
        kept = clip[:6]
        assert torch.equal(row[: len(kept)], kept)
        assert (row[len(kept) :] == -7).all()


def test_pad_or_cut_does_not_read_dead_rows():
    frames = torch.full((12, 4), torch.nan)
    frames[:5] = 1.0
    segments = Segments.from_lengths([2, 3], TokenBudget(12, 4, 6))
    dense = pad_or_cut(Spectrograms(frames, segments), 4, fill=0.0)
    assert dense.shape == (4, 4, 4)
    assert dense.isfinite().all()
    assert dense[2:].eq(0).all()


def clips_of(*numbers):
    """Clips with a partner each but the first; noise that depends on the number alone."""
    clips = []
    for number in numbers:
        rng = np.random.default_rng(number)
        waveform, partner = (
            torch.from_numpy((3000 * rng.standard_normal(samples)).astype(np.int16))
            for samples in (6000 + 931 * number, 4000)
        )
        mix = {"partner": partner, "mix_weight": 0.2 + 0.1 * number} if number else {}
        clips.append(Clip(waveform, 0, number, 160 + 16 * number, **mix))
    return clips


def batch_of(*numbers, epoch=3, mixing=True, budget=None, dense_frames=None):
    geometry = PatchGeometry(num_mels=128, patch_size=(16, 16))
    return collate(
        clips_of(*numbers),
        geometry,
        window=400,
        sample_rate=16000,
        epoch=epoch,
        mixing=mixing,
        budget=budget,
        dense_frames=dense_frames,
    )


SETTINGS = {
    "roll": True,
    "gain_db": 6.0,
    "freq_mask": 30,
    "time_mask": 0.3,
    "noise": 0.1,
    "roll_frames": 10,
    "seed": 7,
}
FILTERBANK = MelFilterbank(mean=-4.0, std=4.5)
BUDGET = BatchBudget(TokenBudget(2000, 7, 600), TokenBudget(500, 7, 100), 90_000)


def test_training_applies_everything_in_order():
    batch = batch_of(0, 1, 2)
    keys = {"seed": 7, "epoch": 3}
    waveforms = circular_roll(batch.waveforms, batch.sample_offsets, batch.clip_ids, **keys)
    waveforms = mix_waveforms(
        waveforms,
        batch.sample_offsets,
        batch.partner_waveforms,
        batch.partner_offsets,
        batch.mix_weight,
    )
    waveforms = gain_jitter(waveforms, batch.sample_offsets, batch.clip_ids, max_db=6.0, **keys)
    expected = FILTERBANK(waveforms, batch.sample_offsets, batch.frame_shift)
    silence = (0.0 + 4.0) / (2 * 4.5)
    expected = spec_augment(
        expected, batch.clip_ids, freq_mask=30, time_mask=0.3, fill=silence, **keys
    )
    expected = add_noise(expected, batch.clip_ids, max_level=0.1, **keys)
    expected = roll_frames(expected, batch.clip_ids, max_frames=10, **keys)
    actual = MelFrontend(FILTERBANK, **SETTINGS)(batch)
    assert torch.equal(actual.frames, expected.frames)
    assert actual.segments is batch.frames


@pytest.mark.parametrize("name", list(SETTINGS))
def test_every_setting_matters(name):
    batch = batch_of(1, 2)
    without = {key: value for key, value in SETTINGS.items() if key != name}
    full, less = (MelFrontend(FILTERBANK, **settings)(batch) for settings in (SETTINGS, without))
    assert not torch.equal(full.frames, less.frames)


def test_in_evaluation_nothing_is_random():
    frontend = MelFrontend(FILTERBANK, **SETTINGS).eval()
    batch = batch_of(0, 1, 2, mixing=False)
    expected = FILTERBANK(batch.waveforms, batch.sample_offsets, batch.frame_shift)
    assert torch.equal(frontend(batch).frames, expected.frames)
    # Targets that are mixed need clips that are mixed.
    mixed = frontend(batch_of(0, 1, 2)).unpack()
    for clip, plain in enumerate(expected.unpack()):
        assert torch.equal(mixed[clip], plain) == (clip == 0)


def test_a_clip_comes_out_the_same_in_every_batch():
    frontend = MelFrontend(FILTERBANK, **SETTINGS)

    def batch(order, padded):
        made = batch_of(*order, budget=BUDGET if padded else None)
        if padded:
            made.waveforms[made.sample_offsets[-1] :] = 12345
        return frontend(made).unpack()[: len(order)]

    same_in_every_batch(batch, 4)
    now, later = (frontend(batch_of(0, 1, 2, epoch=epoch)).unpack() for epoch in (3, 4))
    for a, b in zip(now, later, strict=True):
        assert not torch.equal(a, b)


def test_dense_batches_are_augmented_alike():
    frontend = MelFrontend(FILTERBANK, **SETTINGS)
    dense = frontend(batch_of(0, 1, 2, dense_frames=40))
    assert torch.equal(dense, pad_or_cut(frontend(batch_of(0, 1, 2)), 40, frontend.fill))


def test_compiles_once():
    frontend = MelFrontend(FILTERBANK, **SETTINGS)
    batches = [batch_of(turn, 5, epoch=turn, budget=BUDGET) for turn in range(4)]
    # What is for logs alone takes many values, and must not be looked at.
    assert len({batch.audio_seconds for batch in batches}) == 4
    compiles_once(lambda batch: [frontend(batch).frames], [(batch,) for batch in batches])


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"gain_db": -1.0}, "gain_db must not be negative"),
        ({"freq_mask": -1}, "freq_mask must not be negative"),
        ({"noise": -0.1}, "noise must not be negative"),
        ({"roll_frames": -1}, "roll_frames must not be negative"),
        ({"time_mask": -0.1}, "time_mask must be a whole number of frames or, below 1, a share"),
        ({"time_mask": 1.5}, "time_mask must be a whole number of frames or, below 1, a share"),
    ],
)
def test_errors(setting, message):
    with pytest.raises(ValueError, match=message):
        MelFrontend(FILTERBANK, **setting)
