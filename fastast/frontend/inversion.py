r"""Sound from a log-mel spectrogram, to listen to what a model has made.

A filterbank forgets phases, and most of the fine structure of spectra; both are guessed.

*Powers.* With mel energies :math:`E = S W^T \ge 0`, the powers :math:`S \ge 0` are found by
multiplicative updates, which keep them positive (Lee and Seung, "Algorithms for non-negative matrix
factorization", NIPS 2000): :math:`S \leftarrow S \odot E W / (S W^T W)`, from :math:`S = E W`.

*Phases.* Griffin and Lim ("Signal estimation from modified short-time Fourier transform", 1984) in
turn make a signal of the spectra and take its phases; with :math:`c_n` the spectra of the n-th
signal, those of :math:`c_n + \alpha (c_n - c_{n-1})` converge faster (Perraudin, Balazs and
Søndergaard, "A fast Griffin-Lim algorithm", WASPAA 2013).

Frames, window and transform are those of the plan. What was done to single frames before their
transform cannot be undone exactly: their mean is lost, and pre-emphasis is undone for the signal as
a whole.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastast.ops.mel_plan import MelPlan, first_sample
from fastast.random import random_uniform

TINY = 1e-30


def spectral_magnitudes(log_mel: Tensor, plan: MelPlan, *, iterations: int = 100) -> Tensor:
    """Magnitudes of spectra whose mel spectrogram is the given one, as nearly as can be.

    Args:
        log_mel: ``[T, num_mels]``, normalised if the plan says how.
        plan: of the filterbank that made it.
        iterations: of the multiplicative updates.

    Returns:
        float64 ``[T, fft_size / 2 + 1]`` on the CPU.
    """
    values = log_mel.detach().cpu().double()
    if plan.mean is not None:
        values = values * (2 * plan.std) + plan.mean
    energies = ((values / plan.log_scale).exp() - plan.offset).clamp(min=0)
    weights = plan.exact_weights  # [num_mels, fft_size / 2]
    wanted = energies @ weights
    found = wanted.clone()
    gram = weights.T @ weights
    for _ in range(iterations):
        found *= wanted / (found @ gram).clamp(min=TINY)
    magnitudes = found if plan.magnitude else found.sqrt()
    return F.pad(magnitudes, (0, 1))  # no mel bin has the highest frequency


def griffin_lim(
    magnitudes: Tensor,
    plan: MelPlan,
    frame_shift: int,
    *,
    iterations: int = 60,
    momentum: float = 0.99,
    seed: int = 0,
) -> Tensor:
    """A signal whose frames have the given spectra, as nearly as can be.

    Args:
        magnitudes: ``[T, fft_size / 2 + 1]``, of at least one frame.
        plan: says how frames are cut and windowed.
        frame_shift: from one frame to the next, in samples.
        iterations: 60 to 100 are usual.
        momentum: :math:`\\alpha`; 0 is Griffin and Lim's own.
        seed: of the first phases.

    Returns:
        float64 ``[samples]``, as many as such a clip has at least.
    """
    window, length = plan.exact_window, len(plan.exact_window)
    total = (len(magnitudes) - 1) * frame_shift + length
    at = torch.arange(len(magnitudes))[:, None] * frame_shift + torch.arange(length)
    at = at.flatten()
    squares = window.square().repeat(len(magnitudes))
    weight = torch.zeros(total, dtype=torch.float64).index_add_(0, at, squares).clamp(min=1e-3)

    def signal(spectra: Tensor) -> Tensor:
        frames = torch.fft.irfft(spectra, plan.fft_size)[:, :length] * window
        return torch.zeros_like(weight).index_add_(0, at, frames.flatten()) / weight

    rows = torch.arange(len(magnitudes))
    phases = random_uniform(seed, 0, rows, "first phases", magnitudes.shape[1]).double()
    spectra = torch.polar(magnitudes, 2 * torch.pi * phases)
    last = torch.zeros_like(spectra)
    for _ in range(iterations):
        frames = signal(spectra).unfold(0, length, frame_shift) * window
        consistent = torch.fft.rfft(frames, plan.fft_size)
        ahead = consistent + momentum * (consistent - last)
        spectra = torch.polar(magnitudes, ahead.angle())
        last = consistent
    begin = -int(first_sample(length, torch.tensor(frame_shift), plan.padding))
    count = plan.framing.least_samples(len(magnitudes), frame_shift)
    return F.pad(signal(spectra), (0, count))[begin:][:count]


def invert(
    log_mel: Tensor, plan: MelPlan, frame_shift: int, *, iterations: int = 60, seed: int = 0
) -> Tensor:
    """The sound of a log-mel spectrogram, its loudest sample at 1.

    Args:
        log_mel: ``[T, num_mels]``, normalised if the plan says how.
        plan: of the filterbank that made it.
        frame_shift: from one frame to the next, in samples.
        iterations: of :func:`griffin_lim`.
        seed: of its first phases.

    Returns:
        float32 ``[samples]`` in [-1, 1].
    """
    magnitudes = spectral_magnitudes(log_mel, plan)
    sound = griffin_lim(magnitudes, plan, frame_shift, iterations=iterations, seed=seed)
    if plan.preemphasis:
        # y[n] = x[n] + p y[n - 1], as a product of spectra: zeros make room for what rings on.
        padded = 2 * len(sound) + 4096
        rate = torch.arange(padded // 2 + 1, dtype=torch.float64) * (2 * torch.pi / padded)
        filtered = 1 - plan.preemphasis * torch.polar(torch.ones_like(rate), -rate)
        spectrum = torch.fft.rfft(sound, padded) / filtered
        sound = torch.fft.irfft(spectrum, padded)[: len(sound)]
    return (sound / sound.abs().max().clamp(min=TINY)).float()
