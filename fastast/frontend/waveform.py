"""Augmentation of waveforms: roll, mix, gain; in that order in :class:`MelFrontend`.

Every draw is a function of (seed, epoch, clip), see :mod:`fastast.random`, and no arithmetic
crosses from one clip to the next: a clip comes out the same, bit for bit, whichever batch, rank or
worker it turns up in. Nothing here waits for the device or depends on values on the host, so that
it can be compiled and captured in a graph.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from fastast.frontend.stream import (
    NOWHERE,
    alternate,
    check_clip_ids,
    pick_rows,
    roll_segments,
    segment_of_rows,
    split,
    to_rows,
)
from fastast.ops.mel_filterbank import INT16_SCALE
from fastast.random import purpose_key, random_below, random_uniform

_ROLL = purpose_key("roll")
_GAIN = purpose_key("gain")
_BLOCK = 256


def circular_roll(
    waveforms: Tensor,
    sample_offsets: Tensor,
    clip_ids: Tensor,
    *,
    seed: int,
    epoch: int | Tensor,
) -> Tensor:
    """Lets each clip begin at a random one of its samples, and go on from its end to its beginning.

    Args:
        waveforms: ``[samples]``, the clips' samples end to end, of any dtype.
        sample_offsets: int64 ``[S + 1]``, where each clip begins; the first at 0.
        clip_ids: int64 ``[S]``, stable identifiers of the clips.
        seed: of the run.
        epoch: of the training.

    Returns:
        The same samples in another order, ``[samples]``; zeros past the last clip.

    Raises:
        ValueError: ``clip_ids`` of another length.
    """
    check_clip_ids(clip_ids, sample_offsets.shape[0] - 1)
    shift = random_below(seed, epoch, clip_ids, _ROLL, sample_offsets.diff())
    return roll_segments(waveforms, sample_offsets, shift)


def mix_waveforms(
    waveforms: Tensor,
    sample_offsets: Tensor,
    partners: Tensor,
    partner_offsets: Tensor,
    mix_weight: Tensor,
) -> Tensor:
    """Mixes each clip with a partner: mixup (Zhang et al., 2018) of waveforms, as in AST's code.

    With a clip ``x`` of ``L`` samples, its partner ``y`` and the weight ``w``::

        out[i] = w (x[i] - mean(x)) + (1 - w) (y[i] - mean(y[:L]))       where y has a sample i
        out[i] = w (x[i] - mean(x))                                      past the end of y

    This is what AST computes in more steps: remove both means, cut the partner to the clip's
    length or extend it with zeros, mix, and remove the mean of the mix. A clip of weight 1 keeps
    its mean and comes out as it was. (AST removes it there too. Log-mel features do not depend
    on it, as the filterbank removes the mean of every frame.)

    Args:
        waveforms: int16 ``[samples]``, the clips' samples end to end.
        sample_offsets: int64 ``[S + 1]``, where each clip begins; the first at 0.
        partners: int16, the partners' samples end to end.
        partner_offsets: int64 ``[S + 1]``, where the partner of each clip begins.
        mix_weight: float32 ``[S]``, share of the clip in the mix; 1 leaves it alone.

    Returns:
        float32 ``[samples]``, in the scale where int16 fills [-1, 1); zeros past the last clip.

    Raises:
        ValueError: samples of another dtype, or tables of another length.
    """
    for name, samples in (("waveforms", waveforms), ("partners", partners)):
        if samples.dtype != torch.int16:
            raise ValueError(f"{name} must be int16 (mix before the gain), got {samples.dtype}")
    clips = sample_offsets.shape[0] - 1
    for name, table, size in (
        ("partner_offsets", partner_offsets, clips + 1),
        ("mix_weight", mix_weight, clips),
    ):
        if tuple(table.shape) != (size,):
            raise ValueError(
                f"{name} must be of shape [{size}] for {clips} clips, got {list(table.shape)}"
            )
    begin, lengths = sample_offsets[:-1], sample_offsets.diff()
    heard = torch.minimum(lengths, partner_offsets.diff())  # samples of the partner
    num_samples = waveforms.shape[0]
    clip = F.pad(waveforms, (0, _BLOCK - num_samples % _BLOCK)).float()
    part = segment_of_rows(split(sample_offsets, heard), clip.shape[0])
    step = alternate(partner_offsets[:-1] - begin, torch.full_like(begin, NOWHERE)).int()
    partner = pick_rows(partners, to_rows(step, part, dead=NOWHERE)).float()

    mean = _sums(clip, sample_offsets) / lengths.clamp(min=1)
    partner_mean = _sums(partner, sample_offsets) / heard.clamp(min=1)
    offset = torch.where(mix_weight == 1, 0.0, -mix_weight * mean)
    offsets = alternate(offset - (1 - mix_weight) * partner_mean, offset)
    # The difference of integers is exact, so that a weight of 1 gives the clip exactly.
    mix = (clip - partner).mul_(to_rows(alternate(mix_weight, mix_weight), part)).add_(partner)
    return mix.mul_(INT16_SCALE).add_(to_rows(offsets * INT16_SCALE, part))[:num_samples]


def _sums(samples: Tensor, offsets: Tensor) -> Tensor:
    """Sums of each segment, int64 ``[S]``, of float32 samples that are 16-bit integers.

    Exact, and so the same however a device orders the additions: float32 holds sums of a block of
    samples, which are below 2**24, and int64 the sums of those.

    Args:
        samples: whole blocks of them, and at least one sample past the last segment.
        offsets: int64 ``[S + 1]``, where each segment begins.
    """
    blocks = samples.view(-1, _BLOCK)
    until_block = F.pad(blocks.sum(dim=1).long().cumsum(0), (1, 0))
    block, place = offsets // _BLOCK, offsets % _BLOCK
    before = torch.arange(_BLOCK, device=offsets.device) < place[:, None]
    until = until_block[block] + (blocks[block] * before).sum(dim=1).long()
    return until.diff()


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
    check_clip_ids(clip_ids, sample_offsets.shape[0] - 1)
    draw = random_uniform(seed, epoch, clip_ids, _GAIN, 1)[:, 0]
    # `exp`: the last bit of PyTorch's `pow` depends on where in the tensor a number stands.
    gain = torch.exp((2.0 * draw - 1.0) * (max_db * math.log(10.0) / 20.0))
    clip = segment_of_rows(sample_offsets, waveforms.shape[0])
    if waveforms.dtype == torch.int16:
        return waveforms.float().mul_(to_rows(gain * INT16_SCALE, clip))
    scaled = waveforms * to_rows(gain.to(waveforms.dtype), clip)
    # Masked rather than multiplied by zero: what lies there may be NaN.
    return torch.where(clip < len(clip_ids), scaled, 0.0)
