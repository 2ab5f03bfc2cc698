"""Augmentation of packed batches, on the device, with draws that belong to the clip.

Every draw is a function of (seed, epoch, clip), see :mod:`fastast.random`: a clip is augmented in
the same way whichever batch, rank or worker it turns up in. Nothing here waits for the device or
depends on values on the host, so that it can be compiled and captured in a graph.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastast.ops.mel_filterbank import INT16_SCALE
from fastast.random import purpose_key, random_uniform
from fastast.segments import Spectrograms

_GAIN = purpose_key("gain")
_FREQUENCY_MASK = purpose_key("frequency mask")
_TIME_MASK = purpose_key("time mask")


def gain_jitter(
    waveforms: Tensor,
    sample_offsets: Tensor,
    clip_ids: Tensor,
    *,
    max_db: float,
    seed: int,
    epoch: int | Tensor,
) -> Tensor:
    """Scales each clip by a gain that is uniform in decibels.

    Args:
        waveforms: ``[samples]``, the clips' samples end to end: int16, or floating point.
        sample_offsets: int64 ``[S + 1]``, where each clip begins; the first at 0.
        clip_ids: int64 ``[S]``, stable identifiers of the clips.
        max_db: the gain lies in [-max_db, max_db).
        seed: of the run.
        epoch: of the training.

    Returns:
        ``[samples]``: in [-1, 1] times the gain, float32, where ``waveforms`` is int16, else in
        its dtype; zeros past the last clip. Samples are not clipped.

    Raises:
        ValueError: a negative ``max_db``, or ``clip_ids`` of another length.
    """
    if max_db < 0:
        raise ValueError(f"max_db must not be negative, got {max_db}")
    _check_clip_ids(clip_ids, sample_offsets.shape[0] - 1)
    if waveforms.dtype == torch.int16:
        waveforms = waveforms.to(torch.float32) * INT16_SCALE
    num_samples = waveforms.shape[0]
    draw = random_uniform(seed, epoch, clip_ids, _GAIN, 1)[:, 0]
    gain = 10.0 ** ((2.0 * draw - 1.0) * (max_db / 20.0))
    # One segment more, for the samples past the last clip. (32-bit indices and `index_select`, as
    # this is bound by memory, and faster than `gain[clip]` on CPUs.)
    lengths = torch.cat([sample_offsets, sample_offsets.new_full((1,), num_samples)]).diff()
    clip = torch.repeat_interleave(lengths.int(), output_size=num_samples)
    scaled = waveforms * F.pad(gain, (0, 1)).to(waveforms.dtype).index_select(0, clip)
    # Masked rather than multiplied by zero: what lies there may be NaN.
    return torch.where(clip < len(clip_ids), scaled, 0.0)


def spec_augment(
    spectrograms: Spectrograms,
    clip_ids: Tensor,
    *,
    freq_mask: int,
    time_mask: int,
    num_freq_masks: int = 1,
    num_time_masks: int = 1,
    reference_frames: int | None = None,
    fill: float = 0.0,
    seed: int,
    epoch: int | Tensor,
) -> Spectrograms:
    """Overwrites random bands of mel bins and stretches of frames of each clip.

    SpecAugment (Park et al., 2019) without time warping, drawn as in AST (Gong et al., 2021): of
    ``size`` bins or frames, a mask begins at ``floor(U[0, size - width))`` and covers
    ``floor(width)``, where ``width`` is ``U[0, limit)``. (The last bin and the last frame are
    thus never masked.) The limit is ``freq_mask`` or ``time_mask``, but no more than ``size``.

    AST pads before it masks, so that part of a time mask may fall on padding; here masks fall on
    the clip's own frames.

    Args:
        spectrograms: the batch.
        clip_ids: int64 ``[S]``, stable identifiers of the clips.
        freq_mask: limit of a mask's mel bins; 0 for none. 48 in AST on AudioSet.
        time_mask: limit of a mask's frames; 0 for none. 192 in AST on AudioSet.
        num_freq_masks: masks along frequency, which may overlap.
        num_time_masks: masks along time, which may overlap.
        reference_frames: the clip length that ``time_mask`` is meant for. The limit is then
            ``time_mask * frames // reference_frames``, longer for longer clips and shorter at a
            coarser frame shift, as in ElasticAST (with 1024). Default: the same for all clips.
        fill: the value that is written. AST masks with 0 before it normalises; after
            ``MelFilterbank(mean=..., std=...)`` that is ``filterbank.plan.normalized(0.0)``.
        seed: of the run.
        epoch: of the training.

    Returns:
        A new batch of the same geometry; zeros on dead rows.

    Raises:
        ValueError: negative limits or counts, or ``clip_ids`` of another length.
    """
    settings = {
        "freq_mask": freq_mask,
        "time_mask": time_mask,
        "num_freq_masks": num_freq_masks,
        "num_time_masks": num_time_masks,
    }
    for name, value in settings.items():
        if value < 0:
            raise ValueError(f"{name} must not be negative, got {value}")
    if reference_frames is not None and reference_frames < 1:
        raise ValueError(f"reference_frames must be at least 1, got {reference_frames}")
    frames, segments = spectrograms.frames, spectrograms.segments
    _check_clip_ids(clip_ids, segments.num_segments)
    num_rows, num_mels = frames.shape

    bins = torch.full_like(segments.lengths, num_mels)
    draws = random_uniform(seed, epoch, clip_ids, _FREQUENCY_MASK, 2 * num_freq_masks)
    freq_begin, freq_end = _intervals(draws, bins, torch.full_like(bins, freq_mask))
    in_band = _covered(torch.arange(num_mels, device=frames.device), freq_begin, freq_end)

    lengths = segments.lengths
    limit = torch.full_like(lengths, time_mask)
    if reference_frames is not None:
        limit = limit * lengths // reference_frames
    draws = random_uniform(seed, epoch, clip_ids, _TIME_MASK, 2 * num_time_masks)
    time_begin, time_end = _intervals(draws, lengths, limit)

    # Dead rows read the last clip's masks, to no effect.
    clip = segments.row_ids(num_rows).clamp(max=segments.num_segments - 1)
    row = torch.arange(num_rows, device=frames.device, dtype=torch.int32)
    row = (row - segments.offsets[clip])[:, None]
    in_stretch = ((row >= time_begin[clip]) & (row < time_end[clip])).any(dim=1)
    masked = in_band[clip] | in_stretch[:, None]

    alive = segments.row_mask(num_rows)[:, None]
    kept = torch.where(masked, fill, frames)
    return Spectrograms(torch.where(alive, kept, 0.0), segments)


def _intervals(draws: Tensor, size: Tensor, limit: Tensor) -> tuple[Tensor, Tensor]:
    """Masks ``[begin, end)`` within each clip's ``size``, int32 ``[S, masks]`` each."""
    width, place = draws.chunk(2, dim=1)
    # Kept as a fraction for the place, as in torchaudio's masking, which AST uses.
    width = width * torch.minimum(limit, size)[:, None]
    begin = (place * (size[:, None] - width)).int()
    return begin, begin + width.int()


def _covered(position: Tensor, begin: Tensor, end: Tensor) -> Tensor:
    """Which positions lie in any of a clip's masks: bool ``[S, positions]``."""
    inside = (position >= begin[..., None]) & (position < end[..., None])
    return inside.any(dim=1)


def _check_clip_ids(clip_ids: Tensor, clips: int) -> None:
    if clip_ids.dtype != torch.int64 or tuple(clip_ids.shape) != (clips,):
        raise ValueError(
            f"clip_ids must be torch.int64 of shape [{clips}], one per clip, got "
            f"{clip_ids.dtype} of shape {list(clip_ids.shape)}"
        )
