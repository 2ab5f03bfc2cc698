"""Sound from log-mel spectrograms."""

import math

import pytest
import torch

from fastast import MelFilterbank
from fastast.frontend.inversion import griffin_lim, invert, spectral_magnitudes
from fastast.ops import MelPlan

RATE, SHIFT = 16000, 160
SETTINGS = {
    "kaldi": {},
    "htsat": {"high_freq": None},
    "epic_sounds": {"fft_size": 1024, "frame_length_ms": 25.0},
}
PLANS = {name: getattr(MelPlan, name)(RATE, **given) for name, given in SETTINGS.items()}
PLANS["kaldi"] = MelPlan.kaldi(mean=-4.27, std=4.57)


def chirps(seconds=1.0):
    """Harmonics that rise and fade, and a little noise: float32 in [-1, 1]."""
    time = torch.arange(int(RATE * seconds)) / RATE
    pitch = 200 + 150 * time
    phase = 2 * torch.pi * (pitch.cumsum(0) / RATE)
    sound = sum((phase * k).sin() / k for k in range(1, 12)) * (-2 * time).exp()
    noise = torch.randn(len(time), generator=torch.Generator().manual_seed(0))
    return 0.3 * sound + 0.003 * noise


def test_magnitudes_give_the_mel_energies_they_were_made_from():
    plan = MelPlan.kaldi()
    generator = torch.Generator().manual_seed(0)
    powers = torch.rand(20, 256, generator=generator, dtype=torch.float64).pow(4)
    energies = powers @ plan.exact_weights.T
    found = spectral_magnitudes(energies.clamp(min=plan.floor).log(), plan)
    assert found.shape == (20, 257) and (found >= 0).all()
    again = found[:, :-1].square() @ plan.exact_weights.T
    alive = plan.exact_weights.sum(1) > 0
    assert (again / energies - 1)[:, alive].abs().median() < 0.01


def test_phases_of_a_signal_s_own_spectra_are_found():
    plan, sound = MelPlan.kaldi(), chirps(0.5).double()
    frames = sound.unfold(0, 400, SHIFT) * plan.exact_window
    wanted = torch.fft.rfft(frames, 512).abs()
    errors = {}
    for momentum in (0.0, 0.99):
        found = griffin_lim(wanted, plan, SHIFT, iterations=60, momentum=momentum)
        assert len(found) == (len(frames) - 1) * SHIFT + 400
        again = torch.fft.rfft(found.unfold(0, 400, SHIFT) * plan.exact_window, 512).abs()
        errors[momentum] = float((again - wanted).norm() / wanted.norm())
    assert errors[0.99] < errors[0.0] < 0.3 and errors[0.99] < 0.15


@pytest.mark.parametrize("name", PLANS)
def test_the_sound_has_the_spectrogram_it_was_made_from(name):
    plan = PLANS[name]
    filterbank = MelFilterbank(RATE, preset=name, mean=plan.mean, std=plan.std, **SETTINGS[name])
    frames = filterbank([chirps()], frame_shift=SHIFT).frames
    found = invert(frames, plan, SHIFT)
    assert found.dtype == torch.float32 and found.abs().max() == 1
    again = filterbank([found], frame_shift=SHIFT).frames
    assert again.shape == frames.shape
    # In decibels, away from the clip's ends, down to 40 below the loudest; loudness is not kept.
    decibels = (2 * plan.std if plan.std else 1) / plan.log_scale * (20 if plan.magnitude else 10)
    wanted, made = (x[6:-6].double() * decibels / math.log(10) for x in (frames, again))
    difference = (made - wanted)[wanted > wanted.max() - 40]
    assert (difference - difference.median()).abs().mean() < 1.5


def test_silence_stays_silent():
    plan = MelPlan.kaldi()
    silence = torch.full((5, 128), float(torch.tensor(plan.floor).log()))
    assert invert(silence, plan, SHIFT).isfinite().all()
