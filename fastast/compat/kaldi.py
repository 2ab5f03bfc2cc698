"""``torchaudio.compliance.kaldi.fbank``, with its signature and its numbers.

Differences, all on purpose:

- a clip shorter than a frame has no frames, as in Kaldi, or with ``snip_edges=False`` those of
  its repeated mirror images; torchaudio fails;
- noise (``dither``) is drawn from ``seed`` instead of the global random state;
- warped mel scales (``vtln_warp``) are not supported.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from fastast.ops.mel_filterbank import (
    dither_keys,
    frame_samples,
    mel_filterbank,
    mel_filterbank_reference,
    windowed,
)
from fastast.ops.mel_plan import ENERGY_FLOOR, MelPlan, frame_segments, hop_from_ms


def fbank(
    waveform: Tensor,
    blackman_coeff: float = 0.42,
    channel: int = -1,
    dither: float = 0.0,
    energy_floor: float = 1.0,
    frame_length: float = 25.0,
    frame_shift: float = 10.0,
    high_freq: float = 0.0,
    htk_compat: bool = False,
    low_freq: float = 20.0,
    min_duration: float = 0.0,
    num_mel_bins: int = 23,
    preemphasis_coefficient: float = 0.97,
    raw_energy: bool = True,
    remove_dc_offset: bool = True,
    round_to_power_of_two: bool = True,
    sample_frequency: float = 16000.0,
    snip_edges: bool = True,
    subtract_mean: bool = False,
    use_energy: bool = False,
    use_log_fbank: bool = True,
    use_power: bool = True,
    vtln_high: float = -500.0,
    vtln_low: float = 100.0,
    vtln_warp: float = 1.0,
    window_type: str = "povey",
    *,
    seed: int = 0,
) -> Tensor:
    """Log-mel frames of one channel; see :mod:`fastast.compat.kaldi` for the differences.

    For a batch, and for speed, take :class:`fastast.MelFilterbank`.

    Args:
        waveform: ``[channels, samples]``, floating point, in any scale; computed in float64 if
            it is of that type, else in float32. Differentiable.
        blackman_coeff: of the window "blackman".
        channel: which channel; -1 is the first.
        dither: standard deviation of the noise added to each frame.
        energy_floor: the energy column is at least its logarithm.
        frame_length: in milliseconds.
        frame_shift: in milliseconds.
        high_freq: in Hz; counted from half of ``sample_frequency`` if it is 0 or negative.
        htk_compat: put the energy last instead of first.
        low_freq: in Hz.
        min_duration: shorter clips, in seconds, give ``torch.empty(0)``.
        num_mel_bins: number of mel bins.
        preemphasis_coefficient: 0 for none.
        raw_energy: energy before pre-emphasis and window, instead of after them.
        remove_dc_offset: subtract each frame's mean.
        round_to_power_of_two: of the FFT's size; else it is the frame's, which must be even.
        sample_frequency: of the waveform, in Hz.
        snip_edges: only frames that fit into the clip; else mirror its edges.
        subtract_mean: from each column.
        use_energy: add a column of log energies.
        use_log_fbank: logarithms; else the sums themselves, to about six digits.
        use_power: power spectrum; else magnitudes.
        vtln_high: without effect, as in torchaudio if ``vtln_warp`` is 1.
        vtln_low: without effect.
        vtln_warp: must be 1.
        window_type: "hanning", "povey", "hamming", "rectangular" or "blackman".
        seed: of the noise. It alone decides, so take another for every clip.

    Returns:
        ``[frames, num_mel_bins + use_energy]``: float64 if ``waveform`` is, else float32.

    Raises:
        ValueError: an argument out of range, or not supported.
    """
    if vtln_warp != 1.0:
        raise ValueError(f"vtln_warp={vtln_warp} is not supported; it must be 1.0")
    if waveform.ndim != 2:
        raise ValueError(f"waveform must be [channels, samples], got {list(waveform.shape)}")
    if not waveform.is_floating_point():
        raise ValueError(
            f"waveform must be floating point, got {waveform.dtype}; pass waveform.float() for "
            "features in int16's scale, or that divided by 32768 for samples in [-1, 1]"
        )
    channel = max(channel, 0)
    if channel >= waveform.shape[0]:
        raise ValueError(
            f"channel={channel} does not exist: waveform has {waveform.shape[0]} channels"
        )
    samples, device = waveform[channel], waveform.device
    if len(samples) < min_duration * sample_frequency:
        return samples.new_empty(0)

    plan = kaldi_plan(
        device,
        sample_rate=sample_frequency,
        num_mels=num_mel_bins,
        frame_length_ms=frame_length,
        window_type=window_type,
        blackman_coeff=blackman_coeff,
        low_freq=low_freq,
        high_freq=high_freq,
        preemphasis=preemphasis_coefficient,
        remove_dc_offset=remove_dc_offset,
        snip_edges=snip_edges,
        dither=dither,
        use_power=use_power,
        round_to_power_of_two=round_to_power_of_two,
    )
    if not use_log_fbank:
        plan = replace(plan, floor=1e-37)
    hop = hop_from_ms(frame_shift, sample_frequency)
    frames = frame_segments([len(samples)], hop, plan)
    rows = int(frames.host_offsets[-1])
    frames = frames.to(device)
    offsets = torch.tensor([0, len(samples)], device=device)
    shift = torch.tensor([hop], dtype=torch.int32, device=device)
    keys = dither_keys(seed, 0, torch.zeros(1, dtype=torch.int64, device=device))

    exact = samples.dtype == torch.float64
    filterbank = mel_filterbank_reference if exact else mel_filterbank
    out = filterbank(samples, offsets, shift, frames, plan, rows, dither_keys=keys)
    if not use_log_fbank:
        out = out.exp()
    if use_energy:
        x = frame_samples(samples, offsets, shift, frames.offsets, plan, rows, keys, out.dtype)
        if not raw_energy:
            x = windowed(x, plan)
        energy = x.square().sum(dim=1, keepdim=True).clamp(min=ENERGY_FLOOR).log()
        if energy_floor:
            energy = energy.clamp(min=math.log(energy_floor))
        out = torch.cat([out, energy] if htk_compat else [energy, out], dim=1)
    return out - out.mean(dim=0) if subtract_mean else out


@lru_cache(maxsize=32)
@torch.inference_mode(False)
def kaldi_plan(device: torch.device, **settings: Any) -> MelPlan:
    """:meth:`MelPlan.kaldi` on a device, remembered: tables are made once, not for every clip."""
    return MelPlan.kaldi(**settings).to(device)
