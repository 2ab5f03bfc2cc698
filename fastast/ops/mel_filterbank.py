"""Log-mel filterbank of a ragged batch of waveforms.

Frame ``t`` of a clip is a window of ``N`` samples; a :class:`~fastast.ops.mel_plan.MelPlan` says
where it begins (:class:`~fastast.ops.mel_plan.Padding`) and holds the tables ``w`` and ``W`` and
the options. Each frame ``x`` goes through::

    x[i] = x[i] + dither g[i]                             noise, if asked
    y[i] = x[i] - mean(x)                                 remove the frame's DC offset, if asked
    z[i] = y[i] - preemphasis y[max(i - 1, 0)]            pre-emphasis, inside the frame
    P[k] = |FFT(w z, followed by zeros)[k]|^2             or without the square
    E[m] = sum_k W[m, k] P[k]                             triangles on the mel scale
    out[m] = log_scale ln(max(E[m], floor) + offset)      then, if asked, (out - mean) / (2 std)

The normalisation is AST's. Each clip has its own frame shift, so one batch may mix time
resolutions (ElasticAST).

The noise ``g`` is Gaussian and counter-based: with the clip's key, sample ``i`` of frame ``t`` has
the bits ``h`` and, from two of their parts (Box and Muller, 1958), the value ``g``::

    h = splitmix64(splitmix64(key ^ t) ^ i)
    g = sqrt(-2 ln(((h >> 40 & 0xffffff) + 1) / 2^24)) cos(2 pi (h >> 16 & 0xffffff) / 2^24)
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from fastast.ops._library import ANY_DEVICE, LIBRARY
from fastast.ops.mel_plan import (
    MelPlan,
    Padding,
    first_sample,
    frame_counts,
    frame_segments,
    hop_from_ms,
)
from fastast.random import purpose_key, random_bits, splitmix64
from fastast.segments import Segments

__all__ = [
    "INT16_SCALE",
    "MelPlan",
    "dense_mel_filterbank",
    "dither_keys",
    "frame_counts",
    "frame_segments",
    "hop_from_ms",
    "mel_filterbank",
    "mel_filterbank_reference",
    "portable_mel_filterbank",
]

INT16_SCALE = 2.0**-15
"""What int16 samples are multiplied with, so that they lie in [-1, 1)."""

_DITHER = purpose_key("dither")


def dither_keys(seed: int, epoch: int | Tensor, clips: Tensor) -> Tensor:
    """What the noise of a dithered filterbank is drawn from: int64 ``[S]``.

    Args:
        seed: of the run.
        epoch: of the training.
        clips: int64 ``[S]``, stable identifiers of the clips, such as their index in the data set.
            The same clip gets the same noise in any batch.
    """
    return random_bits(seed, epoch, clips, _DITHER, 1)[:, 0]


def mel_filterbank_reference(
    waveforms: Tensor,
    sample_offsets: Tensor,
    frame_shift: Tensor,
    frames: Segments,
    plan: MelPlan,
    num_rows: int | None = None,
    *,
    dither_keys: Tensor | None = None,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """What :func:`mel_filterbank` computes, in ``dtype`` throughout and from exact tables.

    Differentiable with respect to ``waveforms``. It takes memory for several copies of all
    frames.
    """
    num_rows = _rows(frames, num_rows)
    _check(waveforms, plan, 1, dither_keys)
    _check_tables(waveforms, sample_offsets, frame_shift, frames, plan, num_rows, dither_keys)
    return _reference(
        waveforms,
        sample_offsets,
        frame_shift,
        frames.offsets,
        plan,
        num_rows,
        dither_keys,
        dtype,
    )


def mel_filterbank(
    waveforms: Tensor,
    sample_offsets: Tensor,
    frame_shift: Tensor,
    frames: Segments,
    plan: MelPlan,
    num_rows: int | None = None,
    *,
    dither_keys: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Log-mel frames of all clips, end to end, computed in float32 under any autocast.

    Where ``waveforms`` require a gradient, :func:`mel_filterbank_reference` computes them, in
    float32 as well: slower, and with rounding errors of its own.

    Args:
        waveforms: ``[samples]``, the clips' samples end to end: int16, or floating point in
            [-1, 1]. What lies past the last clip is not looked at.
        sample_offsets: int64 ``[S + 1]``; clip ``i`` owns samples
            ``sample_offsets[i]:sample_offsets[i + 1]``.
        frame_shift: int32 ``[S]``, samples from a frame to the next (:func:`hop_from_ms`).
        frames: the stream that comes out, from :func:`frame_segments`. It may end a clip early.
        plan: on the device of ``waveforms``.
        num_rows: rows of the output: ``budget.tokens`` where ``frames`` has a budget. Default:
            as many as ``frames`` has, read from its ``host_offsets``; a function under
            ``torch.compile`` must pass it.
        dither_keys: int64 ``[S]`` from :func:`dither_keys`, for a plan with dither.
        dtype: of the output: float32, or bfloat16, to which the result is rounded.

    Returns:
        ``[num_rows, num_mels]``; zeros on dead rows.

    Raises:
        ValueError: arguments of a wrong dtype, shape or device, a plan with dither and no
            ``dither_keys``, and, on the CPU, ``frames`` that do not fit into the clips.
    """
    num_rows = _rows(frames, num_rows)
    _check(waveforms, plan, 1, dither_keys)
    _check_tables(waveforms, sample_offsets, frame_shift, frames, plan, num_rows, dither_keys)
    return _call(
        waveforms,
        sample_offsets,
        frame_shift,
        frames.offsets,
        plan,
        num_rows,
        dither_keys,
        dtype,
    )


def dense_mel_filterbank(
    waveforms: Tensor,
    frame_shift: int,
    plan: MelPlan,
    *,
    dither_keys: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """:func:`mel_filterbank` of clips of one length: ``[B, L]`` to ``[B, T, num_mels]``."""
    _check(waveforms, plan, 2, dither_keys)
    if frame_shift < 1:
        raise ValueError(f"frame_shift must be at least 1 sample, got {frame_shift}")
    clips, length = waveforms.shape
    _check_table("dither_keys", dither_keys, torch.int64, clips, waveforms)
    count = plan.num_frames(length, frame_shift)
    index = torch.arange(clips + 1, device=waveforms.device)
    rows = _call(
        waveforms.flatten(),
        index * length,
        torch.full((clips,), frame_shift, dtype=torch.int32, device=waveforms.device),
        (index * count).int(),
        plan,
        clips * count,
        dither_keys,
        dtype,
    )
    return rows.view(clips, count, plan.num_mels)


def _check(waveforms: Tensor, plan: MelPlan, dim: int, keys: Tensor | None) -> None:
    if waveforms.dtype != torch.int16 and not waveforms.is_floating_point():
        raise ValueError(
            f"waveforms must be int16 or floating point, got {waveforms.dtype}; "
            "convert other integers to float in [-1, 1]"
        )
    if waveforms.ndim != dim:
        shape = "[samples] (clips end to end)" if dim == 1 else "[clips, samples]"
        raise ValueError(f"waveforms must be {shape}, got shape {list(waveforms.shape)}")
    if plan.window.dtype != torch.float32 or plan.mel_taps.dtype != torch.float32:
        raise ValueError(
            f"plan holds {plan.window.dtype} and {plan.mel_taps.dtype} tables; they must stay "
            "float32, make the plan anew"
        )
    if plan.window.device != waveforms.device:
        raise ValueError(
            f"plan is on {plan.window.device} and waveforms on {waveforms.device}; "
            "use plan.to(waveforms.device)"
        )
    if plan.dither and keys is None:
        raise ValueError(
            f"plan has dither={plan.dither}, which is drawn from dither_keys: pass "
            "fastast.ops.mel_filterbank.dither_keys(seed, epoch, clips)"
        )


def _check_tables(
    waveforms: Tensor,
    sample_offsets: Tensor,
    frame_shift: Tensor,
    frames: Segments,
    plan: MelPlan,
    num_rows: int,
    keys: Tensor | None,
) -> None:
    clips = frames.num_segments
    for name, table, dtype, size in (
        ("sample_offsets", sample_offsets, torch.int64, clips + 1),
        ("frame_shift", frame_shift, torch.int32, clips),
        ("frames.offsets", frames.offsets, torch.int32, clips + 1),
        ("dither_keys", keys, torch.int64, clips),
    ):
        _check_table(name, table, dtype, size, waveforms)
    # Values can be looked at where that does not wait for a device, and not while a graph is made.
    if torch.compiler.is_compiling() or type(frame_shift) is not Tensor:
        return
    if waveforms.device.type == "cpu":
        _check_frames_fit(
            sample_offsets, frame_shift, frames.offsets, plan, waveforms.shape[0], num_rows
        )


def _check_table(
    name: str, table: Tensor | None, dtype: torch.dtype, size: int, waveforms: Tensor
) -> None:
    if table is None:
        return
    if table.dtype != dtype or tuple(table.shape) != (size,):
        raise ValueError(
            f"{name} must be {dtype} of shape [{size}] to fit the clips, "
            f"got {table.dtype} of shape {list(table.shape)}"
        )
    if table.device != waveforms.device:
        raise ValueError(f"{name} is on {table.device} and waveforms on {waveforms.device}")


def _check_frames_fit(
    sample_offsets: Tensor,
    frame_shift: Tensor,
    frame_offsets: Tensor,
    plan: MelPlan,
    num_samples: int,
    num_rows: int,
) -> None:
    counts, lengths = frame_offsets.diff().numpy(), sample_offsets.diff().numpy()
    shifts = frame_shift.clamp(min=1).numpy()  # empty clips may have none
    possible = frame_counts(lengths, plan.window_length, shifts, plan.padding)
    bad = ((counts > possible) | (counts < 0) | (lengths < 0)).nonzero()[0]
    if len(bad):
        clip = int(bad[0])
        raise ValueError(
            f"frames gives clip {clip} {counts[clip]} frames, but its {lengths[clip]} samples "
            f"have {possible[clip]} at its frame_shift of {shifts[clip]}; make frames with "
            "frame_segments from the same numbers"
        )
    if int(sample_offsets[0]) < 0 or int(sample_offsets[-1]) > num_samples:
        raise ValueError(
            f"sample_offsets ends at {int(sample_offsets[-1])}, past the {num_samples} samples "
            "of waveforms"
        )
    if int(frame_offsets[-1]) > num_rows:
        raise ValueError(
            f"num_rows={num_rows} is less than the {int(frame_offsets[-1])} rows of frames; pass "
            "the budget's tokens"
        )


def _rows(frames: Segments, num_rows: int | None) -> int:
    return int(frames.host_offsets[-1]) if num_rows is None else num_rows


def _call(
    waveforms: Tensor,
    sample_offsets: Tensor,
    frame_shift: Tensor,
    frame_offsets: Tensor,
    plan: MelPlan,
    num_rows: int,
    keys: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    if dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"dtype must be torch.float32 or torch.bfloat16, got {dtype}")
    geometry = sample_offsets, frame_shift, frame_offsets
    if waveforms.requires_grad and torch.is_grad_enabled():
        out = _reference(waveforms, *geometry, plan, num_rows, keys, torch.float32)
        return out.to(dtype)
    if waveforms.dtype != torch.int16:
        waveforms = waveforms.float()
    return torch.ops.fastast.mel_filterbank(
        waveforms,
        *geometry,
        plan.window,
        plan.mel_bins,
        plan.mel_taps,
        plan.mel_starts,
        keys if plan.dither else None,
        num_rows,
        plan.fft_size,
        int(plan.padding),
        plan.dither,
        plan.remove_dc,
        plan.preemphasis,
        plan.magnitude,
        plan.floor,
        plan.offset,
        plan.log_scale,
        plan.mean,
        plan.std,
        dtype == torch.bfloat16,
    )


# The reference --------------------------------------------------------------------------------


def _reference(
    waveforms: Tensor,
    sample_offsets: Tensor,
    frame_shift: Tensor,
    frame_offsets: Tensor,
    plan: MelPlan,
    num_rows: int,
    keys: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    if num_rows == 0:  # a transform of nothing is an error
        return waveforms.new_zeros(0, plan.num_mels, dtype=dtype)
    frames = frame_samples(
        waveforms, sample_offsets, frame_shift, frame_offsets, plan, num_rows, keys, dtype
    )
    spectrum = torch.fft.rfft(windowed(frames, plan), n=plan.fft_size)[:, :-1]
    if plan.magnitude:
        power = spectrum.abs()
    else:
        power = spectrum.real.square() + spectrum.imag.square()
    weights = plan.exact_weights.to(power)
    with torch.autocast(waveforms.device.type, enabled=False):
        energy = power @ weights.T
    out = plan.log_scale * (energy.clamp(min=plan.floor) + plan.offset).log()
    if plan.mean is not None:
        out = (out - plan.mean) / (2 * plan.std)
    alive = _locate(frame_offsets, num_rows)[2]
    return torch.where(alive[:, None], out, 0.0)


def frame_samples(
    waveforms: Tensor,
    sample_offsets: Tensor,
    frame_shift: Tensor,
    frame_offsets: Tensor,
    plan: MelPlan,
    num_rows: int,
    keys: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """Frames with dither and without DC offset: ``[num_rows, window_length]``, dead rows zero."""
    length, scale = plan.window_length, INT16_SCALE if waveforms.dtype == torch.int16 else 1.0
    if waveforms.shape[0] == 0 or frame_shift.shape[0] == 0:
        return waveforms.new_zeros(num_rows, length, dtype=dtype)
    samples, origin = _with_edges(waveforms, sample_offsets, length, plan.padding)
    clip, frame, alive = _locate(frame_offsets, num_rows)
    lead = first_sample(length, frame_shift, plan.padding)
    start = (origin + lead)[clip] + frame * frame_shift[clip]
    place = start[:, None] + torch.arange(length, device=start.device)
    x = samples[place.clamp(0, samples.shape[0] - 1)].to(dtype) * scale
    if plan.dither:
        x = x + plan.dither * _noise(keys[clip], frame, length, dtype)
    x = torch.where(alive[:, None], x, 0.0)
    return x - x.mean(dim=1, keepdim=True) if plan.remove_dc else x


def windowed(frames: Tensor, plan: MelPlan) -> Tensor:
    """Frames after pre-emphasis and window."""
    before = torch.cat([frames[:, :1], frames[:, :-1]], dim=1)
    return (frames - plan.preemphasis * before) * plan.exact_window.to(frames)


# Where frames lie -----------------------------------------------------------------------------


def _locate(frame_offsets: Tensor, num_rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of each row its clip, its number in the clip, and whether it has any; else zeros."""
    rows = torch.arange(num_rows, device=frame_offsets.device, dtype=torch.int32)
    alive = rows < frame_offsets[-1]
    clip = torch.where(alive, torch.searchsorted(frame_offsets, rows, right=True) - 1, 0)
    frame = torch.where(alive, rows - frame_offsets[clip], 0)
    return clip, frame.long(), alive


def _with_edges(
    waveforms: Tensor, sample_offsets: Tensor, window_length: int, padding: Padding
) -> tuple[Tensor, Tensor]:
    """The stream with each clip padded on both sides, and where the clips' first samples lie.

    ``[samples + S * 2 * ceil(window_length / 2)]`` and int64 ``[S]``.
    """
    if padding == Padding.NONE:
        return waveforms, sample_offsets[:-1]
    reach = (window_length + 1) // 2
    clips, device = sample_offsets.shape[0] - 1, waveforms.device
    begins = sample_offsets + 2 * reach * torch.arange(clips + 1, device=device)
    place = torch.arange(waveforms.shape[0] + 2 * reach * clips, device=device)
    clip = (torch.searchsorted(begins, place, right=True) - 1).clamp_(0, clips - 1)
    length = sample_offsets.diff()[clip]
    inside = length > 0
    place = place - begins[clip] - reach
    if padding == Padding.ZEROS:
        inside = (place >= 0) & (place < length)
    else:
        edge = int(padding == Padding.KALDI)  # whether the mirror shows the edge itself
        period = (2 * (length - 1 + edge)).clamp_(min=1)
        place = place % period
        place = torch.minimum(place, period - edge - place)
    source = (sample_offsets[clip] + place).clamp_(0, waveforms.shape[0] - 1)
    return torch.where(inside, waveforms[source], 0), begins[:-1] + reach


def _noise(keys: Tensor, frame: Tensor, length: int, dtype: torch.dtype) -> Tensor:
    """Gaussian noise ``[rows, length]`` of the rows' keys and frame numbers."""
    sample = torch.arange(length, device=keys.device)
    bits = splitmix64(splitmix64(keys ^ frame)[:, None] ^ sample)
    radius = ((bits >> 40 & 0xFFFFFF) + 1).to(dtype) * 2.0**-24
    angle = (bits >> 16 & 0xFFFFFF).to(dtype) * (2 * math.pi * 2.0**-24)
    return (-2.0 * radius.log()).sqrt() * angle.cos()


# The operator ---------------------------------------------------------------------------------

LIBRARY.define(
    "mel_filterbank(Tensor waveforms, Tensor sample_offsets, Tensor frame_shift,"
    " Tensor frame_offsets, Tensor window, Tensor mel_bins, Tensor mel_taps, Tensor mel_starts,"
    " Tensor? dither_keys, SymInt num_rows, int fft_size, int padding, float dither,"
    " bool remove_dc, float preemphasis, bool magnitude, float floor, float offset,"
    " float log_scale, float? mean, float? std, bool bfloat16) -> Tensor"
)


@torch.library.register_fake("fastast::mel_filterbank", lib=LIBRARY)
def _fake(waveforms: Tensor, *args) -> Tensor:
    mel_starts, num_rows, bfloat16 = args[6], args[8], args[-1]
    dtype = torch.bfloat16 if bfloat16 else torch.float32
    return waveforms.new_empty(num_rows, mel_starts.shape[0] - 1, dtype=dtype)


@register_flop_formula(torch.ops.fastast.mel_filterbank)
def _flops(*args, out_shape=None, **kwargs) -> int:
    window, taps, num_rows, fft_size = args[4], args[6], args[9], args[10]
    # DC offset, pre-emphasis and window; a real FFT is half of the 5 n log2 n of a complex one;
    # two multiplications and an addition per bin; a multiply-add per tap.
    fft = 5 * fft_size * (fft_size.bit_length() - 1) // 2
    return num_rows * (5 * window[0] + fft + 3 * fft_size // 2 + 2 * taps[0])


@torch.library.impl(LIBRARY, "mel_filterbank", ANY_DEVICE)
def portable_mel_filterbank(
    waveforms: Tensor,
    sample_offsets: Tensor,
    frame_shift: Tensor,
    frame_offsets: Tensor,
    window: Tensor,
    mel_bins: Tensor,
    mel_taps: Tensor,
    mel_starts: Tensor,
    dither_keys: Tensor | None,
    num_rows: int,
    fft_size: int,
    padding: int,
    dither: float,
    remove_dc: bool,
    preemphasis: float,
    magnitude: bool,
    floor: float,
    offset: float,
    log_scale: float,
    mean: float | None,
    std: float | None,
    bfloat16: bool,
) -> Tensor:
    """The operator in terms of PyTorch's own, for any device and FFT size."""
    length, device, padding = window.shape[0], waveforms.device, Padding(padding)
    dtype = torch.bfloat16 if bfloat16 else torch.float32
    out = torch.zeros(num_rows, mel_starts.shape[0] - 1, dtype=dtype, device=device)
    if num_rows == 0 or frame_shift.shape[0] == 0 or waveforms.shape[0] == 0:
        return out
    samples, origin = _with_edges(waveforms, sample_offsets, length, padding)
    if samples.shape[0] < length:
        return out  # nothing to read: all clips are empty

    # No operation below mixes rows or multiplies matrices, so that the numbers of a clip do not
    # depend on its batch, nor on the precision that is set for matrix products. All chunks have
    # one size, because a transform of a single row may round differently.
    chunk = _chunk_rows(device, fft_size)
    clip, frame, alive = _locate(frame_offsets, -(-num_rows // chunk) * chunk)
    origin = origin + first_sample(length, frame_shift, padding)
    starts = origin[clip] + frame * frame_shift[clip]
    starts = torch.where(alive, starts, 0).clamp_(0, samples.shape[0] - length)
    windows = samples.unfold(0, length, 1)
    padded = torch.zeros(chunk, fft_size, device=device)
    emphasised = padded[:, :length]
    power = torch.empty(fft_size // 2 + 1, chunk, device=device)
    for begin in range(0, num_rows, chunk):
        rows = slice(begin, begin + chunk)
        frames = windows[starts[rows]].to(torch.float32)
        if waveforms.dtype == torch.int16:
            frames.mul_(INT16_SCALE)
        if dither:
            noise = _noise(dither_keys[clip[rows]], frame[rows], length, torch.float32)
            frames.add_(noise, alpha=dither)
        if remove_dc:
            frames.sub_(frames.mean(dim=1, keepdim=True))
        torch.mul(frames[:, :1], 1.0 - preemphasis, out=emphasised[:, :1])
        torch.sub(frames[:, 1:], frames[:, :-1], alpha=preemphasis, out=emphasised[:, 1:])
        emphasised.mul_(window)
        squares = torch.view_as_real(torch.fft.rfft(padded)).square_()
        # Transposed, as [bins, rows]: a mel bin is then a weighted sum of few contiguous rows.
        torch.add(squares[..., 0].T, squares[..., 1].T, out=power)
        if magnitude:
            power.sqrt_()
        energy = F.embedding_bag(
            mel_bins,
            power,
            mel_starts,
            mode="sum",
            per_sample_weights=mel_taps,
            include_last_offset=True,
        )
        log_mel = energy.clamp_(min=floor).add_(offset).log_().mul_(log_scale)
        if mean is not None:
            log_mel.sub_(mean).div_(2 * std)
        out[rows] = log_mel.T[: num_rows - begin]
    return out.masked_fill_(~alive[:num_rows, None], 0.0)


def _chunk_rows(device: torch.device, fft_size: int) -> int:
    """Frames to work on at a time."""
    # A CPU core's chunk should stay in its cache of 1 or 2 MiB: a whole batch at once takes twice
    # as long. A GPU's chunk must be large to be worth the launches.
    values = 3 << 16 if device.type == "cpu" else 1 << 22
    return max(2, values // fft_size)
