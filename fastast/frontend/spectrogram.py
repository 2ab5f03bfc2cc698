"""Augmentation of spectrograms: SpecAugment, noise, roll; in that order in :class:`MelFrontend`.

Draws and arithmetic belong to the clip alone and nothing waits for the device, as in
:mod:`fastast.frontend.waveform`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastast.frontend.stream import check_clip_ids, roll_segments, segment_of_rows
from fastast.random import purpose_key, random_below, random_bits, random_uniform
from fastast.segments import Spectrograms

_FREQUENCY_MASK = purpose_key("frequency mask")
_TIME_MASK = purpose_key("time mask")
_NOISE = purpose_key("noise")
_NOISE_LEVEL = purpose_key("noise level")
_FRAME_ROLL = purpose_key("frame roll")


def spec_augment(
    spectrograms: Spectrograms,
    clip_ids: Tensor,
    *,
    freq_mask: int,
    time_mask: float,
    num_freq_masks: int = 1,
    num_time_masks: int = 1,
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
        time_mask: limit of a mask's frames; 0 for none. 192 in AST on AudioSet. Below 1 it is a
            share of the clip's frames, rounded down to a whole frame: longer for longer clips and
            shorter at a coarser frame shift, as in ElasticAST (192 / 1024).
        num_freq_masks: masks along frequency, which may overlap.
        num_time_masks: masks along time, which may overlap.
        fill: the value that is written. AST masks with 0 before it normalises; after
            ``MelFilterbank(mean=..., std=...)`` that is ``filterbank.plan.normalized(0.0)``.
        seed: of the run.
        epoch: of the training.

    Returns:
        A new batch of the same geometry; zeros on dead rows.

    Raises:
        ValueError: negative limits or counts, a ``time_mask`` that is neither a share nor whole,
            or ``clip_ids`` of another length.
    """
    settings = {
        "freq_mask": freq_mask,
        "num_freq_masks": num_freq_masks,
        "num_time_masks": num_time_masks,
    }
    for name, value in settings.items():
        if value < 0:
            raise ValueError(f"{name} must not be negative, got {value}")
    check_time_mask(time_mask)
    frames, lengths = spectrograms.frames, spectrograms.segments.lengths
    check_clip_ids(clip_ids, len(lengths))
    num_mels = frames.shape[1]

    bins = torch.full_like(lengths, num_mels)
    draws = random_uniform(seed, epoch, clip_ids, _FREQUENCY_MASK, 2 * num_freq_masks)
    freq_begin, freq_end = _intervals(draws, bins, torch.full_like(bins, freq_mask))
    in_band = _covered(torch.arange(num_mels, device=frames.device), freq_begin, freq_end)

    limit = (lengths * time_mask).int() if time_mask < 1 else torch.full_like(lengths, time_mask)
    draws = random_uniform(seed, epoch, clip_ids, _TIME_MASK, 2 * num_time_masks)

    clip, place, alive = _rows(spectrograms)
    begin, end = (x.index_select(0, clip) for x in _intervals(draws, lengths, limit))
    in_stretch = ((place[:, None] >= begin) & (place[:, None] < end)).any(dim=1)
    # Dead rows are masked as well, with zero.
    masked = in_band.index_select(0, clip) | (in_stretch | ~alive)[:, None]
    value = torch.where(alive, fill, 0.0).to(frames.dtype)[:, None]
    return Spectrograms(torch.where(masked, value, frames), spectrograms.segments)


def add_noise(
    spectrograms: Spectrograms,
    clip_ids: Tensor,
    *,
    max_level: float,
    seed: int,
    epoch: int | Tensor,
) -> Spectrograms:
    """Adds to every bin ``U[0, 1)`` times the clip's level, which is ``U[0, max_level)``.

    The noise of AST (Gong et al., 2021) on Speech Commands, with 0.1 for ``max_level``. AST adds
    it to normalised spectrograms, and to their padding as well.

    Args:
        spectrograms: the batch.
        clip_ids: int64 ``[S]``, stable identifiers of the clips.
        max_level: limit of the level.
        seed: of the run.
        epoch: of the training.

    Returns:
        A new batch of the same geometry; zeros on dead rows.

    Raises:
        ValueError: a negative ``max_level``, or ``clip_ids`` of another length.
    """
    if max_level < 0:
        raise ValueError(f"max_level must not be negative, got {max_level}")
    frames, segments = spectrograms.frames, spectrograms.segments
    check_clip_ids(clip_ids, segments.num_segments)
    num_mels = frames.shape[1]
    level = max_level * random_uniform(seed, epoch, clip_ids, _NOISE_LEVEL, 1)
    clip_key = random_bits(seed, epoch, clip_ids, _NOISE, 1)[:, 0]

    clip, place, alive = _rows(spectrograms)
    row_key = clip_key.index_select(0, clip) + place
    # 16 bits are plenty for noise, so that each hash serves four bins.
    bits = random_bits(seed, epoch, row_key, _NOISE, -(-num_mels // 4)).view(torch.int16)
    uniform = bits[:, :num_mels].float().mul_(2.0**-16).add_(0.5)
    noisy = (frames + uniform.mul_(level.index_select(0, clip))).to(frames.dtype)
    return Spectrograms(torch.where(alive[:, None], noisy, 0.0), segments)


def roll_frames(
    spectrograms: Spectrograms,
    clip_ids: Tensor,
    *,
    max_frames: int,
    seed: int,
    epoch: int | Tensor,
) -> Spectrograms:
    """Moves each clip's frames later by ``-max_frames, ..., max_frames - 1`` of them, circularly.

    As AST (Gong et al., 2021) on Speech Commands, with 10 for ``max_frames``, except that AST's
    circle goes through the padding.

    Args:
        spectrograms: the batch.
        clip_ids: int64 ``[S]``, stable identifiers of the clips.
        max_frames: the farthest move, which may exceed a clip's length.
        seed: of the run.
        epoch: of the training.

    Returns:
        A new batch of the same geometry; zeros on dead rows.

    Raises:
        ValueError: a negative ``max_frames``, or ``clip_ids`` of another length.
    """
    if max_frames < 0:
        raise ValueError(f"max_frames must not be negative, got {max_frames}")
    frames, segments = spectrograms.frames, spectrograms.segments
    check_clip_ids(clip_ids, segments.num_segments)
    move = random_below(seed, epoch, clip_ids, _FRAME_ROLL, 2 * max_frames) - max_frames
    shift = move.int() % segments.lengths.clamp(min=1)
    return Spectrograms(roll_segments(frames, segments.offsets, shift), segments)


def check_time_mask(time_mask: float) -> None:
    """Raises ValueError unless ``time_mask`` is a share below 1 or a whole number of frames."""
    if time_mask < 0 or (time_mask > 1 and time_mask != int(time_mask)):
        raise ValueError(
            "time_mask must be a whole number of frames or, below 1, a share of the clip, "
            f"got {time_mask}"
        )


def _rows(spectrograms: Spectrograms) -> tuple[Tensor, Tensor, Tensor]:
    """Each row's clip, its place in it, and whether it is alive. Dead rows count for the last."""
    num_rows, segments = spectrograms.frames.shape[0], spectrograms.segments
    clip = segment_of_rows(segments.offsets, num_rows)
    alive = clip < segments.num_segments
    clip = clip.clamp(max=segments.num_segments - 1)
    row = torch.arange(num_rows, dtype=torch.int32, device=clip.device)
    return clip, row - segments.offsets.index_select(0, clip), alive


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
