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
from fastast.ops import Framing, dither_keys
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


FRAMING = Framing(400)


FRAMING = Framing(400)


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


def batch_of(*numbers, epoch=3, mixing=True, budget=None, dense_frames=None, framing=FRAMING):
    geometry = PatchGeometry(num_mels=128, patch_size=(16, 16))
    return collate(
        clips_of(*numbers),
        geometry,
        framing=framing,
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


DITHERED = {
    "kaldi": MelFilterbank(mean=-4.0, std=4.5, dither=1e-3),
    "mirrored": MelFilterbank(mean=-4.0, std=4.5, dither=1e-3, snip_edges=False),
}


def test_dither_is_drawn_from_seed_epoch_and_clip():
    filterbank, batch = DITHERED["kaldi"], batch_of(5, 2, mixing=False)
    for seed in (0, 7):
        expected = filterbank(
            batch.waveforms,
            batch.sample_offsets,
            batch.frame_shift,
            dither_keys=dither_keys(seed, 3, torch.tensor([5, 2])),
        )
        actual = MelFrontend(filterbank, seed=seed)(batch)
        assert torch.equal(actual.frames, expected.frames)


@pytest.mark.parametrize("name", DITHERED)
def test_a_dithered_clip_comes_out_the_same_in_every_batch(name):
    frontend = MelFrontend(DITHERED[name], **SETTINGS)
    framing = DITHERED[name].plan.framing

    def batch(order, padded):
        made = batch_of(*order, budget=BUDGET if padded else None, framing=framing)
        return frontend(made).unpack()[: len(order)]

    same_in_every_batch(batch, 4)
    now, later = (
        MelFrontend(DITHERED[name])(batch_of(0, 1, epoch=epoch, framing=framing)).unpack()
        for epoch in (3, 4)
    )
    for a, b in zip(now, later, strict=True):
        assert not torch.equal(a, b)


def test_evaluation_is_dithered_only_if_asked():
    batch, plain = batch_of(0, 1, mixing=False), MelFrontend(FILTERBANK)
    frontend = MelFrontend(DITHERED["kaldi"])
    training = frontend(batch).frames
    assert torch.equal(frontend.eval()(batch).frames, plain(batch).frames)
    asked = MelFrontend(DITHERED["kaldi"], dither_in_evaluation=True)
    for module in (asked, asked.eval()):
        assert torch.equal(module(batch).frames, training)
    assert not torch.equal(training, plain(batch).frames)


def test_dense_batches_are_augmented_alike():
    frontend = MelFrontend(FILTERBANK, **SETTINGS)
    dense = frontend(batch_of(0, 1, 2, dense_frames=40))
    assert torch.equal(dense, pad_or_cut(frontend(batch_of(0, 1, 2)), 40, frontend.fill))


@pytest.mark.parametrize("filterbank", [FILTERBANK, DITHERED["kaldi"]])
@pytest.mark.parametrize("training", [True, False])
def test_compiles_once(filterbank, training):
    frontend = MelFrontend(filterbank, **SETTINGS).train(training)
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
