"""Kaldi log-mel filterbank of a ragged batch of waveforms.

Frame ``t`` of a clip is the window of ``N`` samples that begins ``t * frame_shift`` samples into
it; there are ``1 + (L - N) // frame_shift`` of them in ``L`` samples, none if ``L < N``. Each
frame ``x`` goes through::

    y[i] = x[i] - mean(x)                                 remove the frame's DC offset
    z[i] = y[i] - 0.97 y[max(i - 1, 0)]                   pre-emphasis, inside the frame
    w[i] = z[i] (0.5 - 0.5 cos(2 pi i / (N - 1)))         symmetric Hann window
    P[k] = |FFT(w, zero-padded to the next power of two)[k]|^2        0 <= k < fft_size / 2
    E[m] = sum_k W[m, k] P[k]                             triangles on the mel scale
    out[m] = ln max(E[m], 2^-23)                          then, if asked, (out - mean) / (2 std)

``W`` has triangles with equal spacing in ``mel(f) = 1127 ln(1 + f / 700)`` between ``low_freq``
and ``high_freq``, straight-sided in mel, sampled at the FFT's bins below the Nyquist frequency.
Narrow triangles may miss all bins: at 16 kHz, bin 3 of 128 is empty and always ``ln 2^-23``.
These are the numbers of Kaldi's ``compute-fbank-feats`` (Povey et al., "The Kaldi speech
recognition toolkit", 2011) with the options of AST (Gong et al., 2021): no dither, window type
``hanning``, samples in [-1, 1]. The normalisation is AST's.

Each clip has its own frame shift, so one batch may mix time resolutions (ElasticAST).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from fastast.ops._library import ANY_DEVICE, LIBRARY
from fastast.segments import Segments, TokenBudget

ENERGY_FLOOR = 2.0**-23
"""Mel energies below this are raised to it before the logarithm."""

INT16_SCALE = 2.0**-15
"""What int16 samples are multiplied with, so that they lie in [-1, 1)."""


def hop_from_ms(shift_ms: float, sample_rate: int) -> int:
    """Samples per frame shift, rounded down as Kaldi's front ends round it.

    A product that ought to be a whole number may come out one lower in floating point; the
    order of the factors decides where. This order gives torchaudio's frame counts for every
    shift, and exact ones for a shift of ``10 * C`` ms with ``C`` on a grid of 0.001.

    Args:
        shift_ms: in milliseconds.
        sample_rate: in Hz.

    Raises:
        ValueError: the shift is shorter than one sample.
    """
    hop = int(sample_rate * shift_ms * 0.001)
    if hop < 1:
        raise ValueError(
            f"shift_ms={shift_ms} is shorter than one sample at sample_rate={sample_rate}; "
            f"it must be at least {1000 / sample_rate:.3g} ms"
        )
    return hop


def frame_counts(
    num_samples: int | np.ndarray, window_length: int, frame_shift: int | np.ndarray
) -> int | np.ndarray:
    """Frames of clips of so many samples: one wherever a whole window fits."""
    frames = 1 + (np.asarray(num_samples) - window_length) // frame_shift
    return np.where(np.asarray(num_samples) < window_length, 0, frames)[()]


def hanning_window(length: int) -> Tensor:
    """Symmetric Hann window: float64 ``[length]``, zero at both ends."""
    angle = _arange(0, length) * (2 * math.pi / (length - 1))
    return 0.5 - 0.5 * torch.cos(angle)


def mel_triangles(
    sample_rate: int, num_mels: int, fft_size: int, low_freq: float, high_freq: float
) -> Tensor:
    """Weights ``W[m, k]`` of the FFT's bins below Nyquist: float64 ``[num_mels, fft_size / 2]``."""

    low, high = (1127.0 * math.log1p(freq / 700.0) for freq in (low_freq, high_freq))
    step = (high - low) / (num_mels + 1)
    center = low + step * _arange(1, num_mels + 1)
    freq = _arange(0, fft_size // 2) * (sample_rate / fft_size)
    mel = 1127.0 * torch.log1p(freq / 700.0)
    return (1.0 - (mel - center[:, None]).abs() / step).clamp(min=0.0)


def _arange(begin: int, end: int) -> Tensor:
    # On the CPU even where the default device is another, or "meta" while a model is laid out.
    return torch.arange(begin, end, dtype=torch.float64, device="cpu")


@dataclass(frozen=True, eq=False)
class MelPlan:
    """Settings of a filterbank and the tables that follow from them; make it with :meth:`kaldi`.

    The tables are computed in float64 and rounded to float32. The weights are in compressed
    rows, as each FFT bin feeds two mel bins at most: mel bin ``m`` sums
    ``mel_taps[j] * P[mel_bins[j]]`` over ``mel_starts[m] <= j < mel_starts[m + 1]``.

    Attributes:
        sample_rate: of the waveforms, in Hz.
        num_mels: mel bins.
        window_length: samples of a frame.
        fft_size: the next power of two.
        low_freq: where the lowest triangle begins, in Hz.
        high_freq: where the highest triangle ends, in Hz.
        preemphasis: 0.97 in Kaldi.
        mean: of the log-mel values of the data set, or None for no normalisation.
        std: their standard deviation, or None.
        window: float32 ``[window_length]``.
        mel_bins: int64 ``[nnz]``, FFT bins.
        mel_taps: float32 ``[nnz]``, weights.
        mel_starts: int64 ``[num_mels + 1]``.
    """

    sample_rate: int
    num_mels: int
    window_length: int
    fft_size: int
    low_freq: float
    high_freq: float
    preemphasis: float
    mean: float | None
    std: float | None
    window: Tensor
    mel_bins: Tensor
    mel_taps: Tensor
    mel_starts: Tensor

    TABLES: ClassVar = ("window", "mel_bins", "mel_taps", "mel_starts")
    """Names of the attributes that are tensors."""

    @classmethod
    def kaldi(
        cls,
        sample_rate: int = 16000,
        num_mels: int = 128,
        *,
        frame_length_ms: float = 25.0,
        low_freq: float = 20.0,
        high_freq: float | None = None,
        preemphasis: float = 0.97,
        mean: float | None = None,
        std: float | None = None,
    ) -> MelPlan:
        """Builds the tables, on the CPU.

        Args:
            sample_rate: of the waveforms, in Hz.
            num_mels: mel bins.
            frame_length_ms: rounded down to whole samples.
            low_freq: in Hz.
            high_freq: in Hz; default half the sample rate.
            preemphasis: between 0 (none) and 1.
            mean: log-mel mean of the data set, such as -4.2677393 for AudioSet.
            std: log-mel standard deviation, such as 4.5689974.

        Raises:
            ValueError: settings that contradict each other.
        """
        window_length = int(sample_rate * frame_length_ms * 0.001)
        if window_length < 2:
            raise ValueError(
                f"frame_length_ms={frame_length_ms} is {window_length} samples at "
                f"sample_rate={sample_rate}; a frame needs at least 2"
            )
        fft_size = 1 << (window_length - 1).bit_length()
        nyquist = 0.5 * sample_rate
        high_freq = nyquist if high_freq is None else high_freq
        if not 0.0 <= low_freq < high_freq <= nyquist:
            raise ValueError(
                f"low_freq={low_freq} and high_freq={high_freq} must satisfy 0 <= low_freq < "
                f"high_freq <= {nyquist} (half of sample_rate={sample_rate}); is sample_rate "
                "that of the waveforms?"
            )
        if not 1 <= num_mels <= fft_size // 2:
            raise ValueError(
                f"num_mels={num_mels} must lie between 1 and {fft_size // 2}, the bins of the "
                f"{fft_size}-point FFT of {window_length} samples; lower num_mels or raise "
                "frame_length_ms"
            )
        if not 0.0 <= preemphasis <= 1.0:
            raise ValueError(f"preemphasis must lie between 0 and 1, got {preemphasis}")
        if (mean is None) != (std is None):
            raise ValueError(f"mean={mean} and std={std}: pass both, or neither")
        if std is not None and std <= 0:
            raise ValueError(f"std must be positive, got {std}")

        weights = mel_triangles(sample_rate, num_mels, fft_size, low_freq, high_freq)
        rows, bins = weights.nonzero(as_tuple=True)
        starts = F.pad((weights > 0).sum(dim=1).cumsum(dim=0), (1, 0))
        return cls(
            sample_rate,
            num_mels,
            window_length,
            fft_size,
            low_freq,
            high_freq,
            preemphasis,
            mean,
            std,
            hanning_window(window_length).float(),
            bins,
            weights[rows, bins].float(),
            starts,
        )

    def to(self, device: torch.device | str) -> MelPlan:
        """The same plan with its tables on another device."""
        return replace(self, **{name: getattr(self, name).to(device) for name in self.TABLES})

    def num_frames(self, num_samples: int, frame_shift: int) -> int:
        """Frames of a clip."""
        return int(frame_counts(num_samples, self.window_length, frame_shift))

    def normalized(self, value: float) -> float:
        """What an unnormalised log-mel value becomes in the output.

        ``normalized(0.0)`` is the value of AST's padding and SpecAugment masks, which are zeros
        written before the normalisation.
        """
        return value if self.mean is None else (value - self.mean) / (2 * self.std)


def frame_segments(
    num_samples: Sequence[int],
    frame_shift: int | Sequence[int],
    plan: MelPlan,
    budget: TokenBudget | None = None,
) -> Segments:
    """The frame stream that clips of these lengths yield. Runs on the host, in the loader.

    Args:
        num_samples: of each clip; clips shorter than a frame yield none.
        frame_shift: in samples, of all clips or of each.
        plan: says how long a frame is.
        budget: of the frame stream: ``tokens`` are frames.

    Raises:
        ValueError: lengths that do not match or are negative, a shift below one sample, or
            clips that do not fit the budget.
    """
    num_samples = np.asarray(num_samples, np.int64)
    frame_shift = np.asarray(frame_shift, np.int64)
    if frame_shift.ndim and frame_shift.shape != num_samples.shape:
        raise ValueError(
            f"frame_shift holds {frame_shift.size} shifts for {num_samples.size} clips; "
            "pass one number, or one per clip"
        )
    if (num_samples < 0).any():
        raise ValueError(f"num_samples must not be negative, got {num_samples.min()}")
    if (frame_shift < 1).any():
        raise ValueError(f"frame_shift must be at least 1 sample, got {frame_shift.min()}")
    return Segments.from_lengths(frame_counts(num_samples, plan.window_length, frame_shift), budget)


def mel_filterbank_reference(
    waveforms: Tensor,
    sample_offsets: Tensor,
    frame_shift: Tensor,
    frames: Segments,
    plan: MelPlan,
    num_rows: int | None = None,
    *,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """What :func:`mel_filterbank` computes, clip by clip, in ``dtype`` throughout.

    Differentiable with respect to ``waveforms``: the way to train through a filterbank. It reads
    the offsets on the host.
    """
    device = waveforms.device
    window = hanning_window(plan.window_length).to(device, dtype)
    weights = mel_triangles(
        plan.sample_rate, plan.num_mels, plan.fft_size, plan.low_freq, plan.high_freq
    ).to(device, dtype)
    samples = waveforms.to(dtype)
    if waveforms.dtype == torch.int16:
        samples = samples * INT16_SCALE

    clips = []
    shifts, counts = frame_shift.tolist(), frames.lengths.tolist()
    for begin, shift, count in zip(sample_offsets[:-1].tolist(), shifts, counts, strict=True):
        if count == 0:
            continue
        end = begin + (count - 1) * shift + plan.window_length
        x = samples[begin:end].unfold(0, plan.window_length, shift)
        y = x - x.mean(dim=1, keepdim=True)
        z = y - plan.preemphasis * torch.cat([y[:, :1], y[:, :-1]], dim=1)
        spectrum = torch.fft.rfft(z * window, n=plan.fft_size)[:, :-1]
        power = spectrum.real.square() + spectrum.imag.square()
        with torch.autocast(device.type, enabled=False):
            energy = power @ weights.T
        clips.append(energy.clamp(min=ENERGY_FLOOR).log())
    out = torch.cat([samples.new_zeros(0, plan.num_mels), *clips])
    if plan.mean is not None:
        out = (out - plan.mean) / (2 * plan.std)
    capacity = _rows(frames, num_rows)
    return F.pad(out, (0, 0, 0, capacity - out.shape[0]))


def mel_filterbank(
    waveforms: Tensor,
    sample_offsets: Tensor,
    frame_shift: Tensor,
    frames: Segments,
    plan: MelPlan,
    num_rows: int | None = None,
) -> Tensor:
    """Log-mel frames of all clips, end to end, computed in float32 under any autocast.

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

    Returns:
        float32 ``[num_rows, num_mels]``; zeros on dead rows. No gradient flows to ``waveforms``;
        :func:`mel_filterbank_reference` is the differentiable form.

    Raises:
        ValueError: arguments of a wrong dtype, shape or device, ``waveforms`` that require a
            gradient, and, on the CPU, ``frames`` that do not fit into the clips.
    """
    clips = frames.num_segments
    _check(waveforms, plan, dim=1)
    for name, table, dtype, size in (
        ("sample_offsets", sample_offsets, torch.int64, clips + 1),
        ("frame_shift", frame_shift, torch.int32, clips),
        ("frames.offsets", frames.offsets, torch.int32, clips + 1),
    ):
        if table.dtype != dtype or tuple(table.shape) != (size,):
            raise ValueError(
                f"{name} must be {dtype} of shape [{size}] for the {clips} segments of frames, "
                f"got {table.dtype} of shape {list(table.shape)}"
            )
        if table.device != waveforms.device:
            raise ValueError(
                f"{name} is on {table.device} and waveforms on {waveforms.device}; move it there"
            )
    return _call(
        waveforms, sample_offsets, frame_shift, frames.offsets, plan, _rows(frames, num_rows)
    )


def dense_mel_filterbank(waveforms: Tensor, frame_shift: int, plan: MelPlan) -> Tensor:
    """:func:`mel_filterbank` of clips of one length: ``[B, L]`` to float32 ``[B, T, num_mels]``."""
    _check(waveforms, plan, dim=2)
    if frame_shift < 1:
        raise ValueError(f"frame_shift must be at least 1 sample, got {frame_shift}")
    clips, length = waveforms.shape
    count = plan.num_frames(length, frame_shift)
    index = torch.arange(clips + 1, device=waveforms.device)
    shifts = torch.full((clips,), frame_shift, dtype=torch.int32, device=waveforms.device)
    rows = _call(
        waveforms.flatten(), index * length, shifts, (index * count).int(), plan, clips * count
    )
    return rows.view(clips, count, plan.num_mels)


def _check(waveforms: Tensor, plan: MelPlan, dim: int) -> None:
    if waveforms.dtype != torch.int16 and not waveforms.is_floating_point():
        raise ValueError(
            f"waveforms must be int16 or floating point, got {waveforms.dtype}; "
            "convert other integers to float in [-1, 1]"
        )
    if waveforms.ndim != dim:
        shape = "[samples] (clips end to end)" if dim == 1 else "[clips, samples]"
        raise ValueError(f"waveforms must be {shape}, got shape {list(waveforms.shape)}")
    if waveforms.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            "waveforms requires a gradient, which mel_filterbank does not pass on; detach it, "
            "or use mel_filterbank_reference"
        )
    if plan.window.dtype != torch.float32 or plan.mel_taps.dtype != torch.float32:
        raise ValueError(
            f"plan holds {plan.window.dtype} and {plan.mel_taps.dtype} tables; they must stay "
            "float32, make the plan anew with MelPlan.kaldi"
        )
    if plan.window.device != waveforms.device:
        raise ValueError(
            f"plan is on {plan.window.device} and waveforms on {waveforms.device}; "
            "use plan.to(waveforms.device)"
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
) -> Tensor:
    return torch.ops.fastast.mel_filterbank(
        waveforms,
        sample_offsets,
        frame_shift,
        frame_offsets,
        plan.window,
        plan.mel_bins,
        plan.mel_taps,
        plan.mel_starts,
        num_rows,
        plan.fft_size,
        plan.preemphasis,
        plan.mean,
        plan.std,
    )


# The operator ---------------------------------------------------------------------------------

LIBRARY.define(
    "mel_filterbank(Tensor waveforms, Tensor sample_offsets, Tensor frame_shift,"
    " Tensor frame_offsets, Tensor window, Tensor mel_bins, Tensor mel_taps, Tensor mel_starts,"
    " SymInt num_rows, int fft_size, float preemphasis, float? mean, float? std) -> Tensor"
)


@torch.library.register_fake("fastast::mel_filterbank", lib=LIBRARY)
def _fake(waveforms: Tensor, *args) -> Tensor:
    mel_starts, num_rows = args[6:8]
    return waveforms.new_empty(num_rows, mel_starts.shape[0] - 1, dtype=torch.float32)


@register_flop_formula(torch.ops.fastast.mel_filterbank)
def _flops(*args, out_shape=None, **kwargs) -> int:
    window, taps, num_rows, fft_size = args[4], args[6], args[8], args[9]
    # DC offset, pre-emphasis and window; a real FFT is half of the 5 n log2 n of a complex one;
    # two multiplications and an addition per bin; a multiply-add per tap.
    fft = 5 * fft_size * (fft_size.bit_length() - 1) // 2
    return num_rows * (5 * window[0] + fft + 3 * fft_size // 2 + 2 * taps[0])


@torch.library.impl(LIBRARY, "mel_filterbank", ANY_DEVICE)
def _impl(
    waveforms: Tensor,
    sample_offsets: Tensor,
    frame_shift: Tensor,
    frame_offsets: Tensor,
    window: Tensor,
    mel_bins: Tensor,
    mel_taps: Tensor,
    mel_starts: Tensor,
    num_rows: int,
    fft_size: int,
    preemphasis: float,
    mean: float | None,
    std: float | None,
) -> Tensor:
    length, device = window.shape[0], waveforms.device
    out = torch.zeros(num_rows, mel_starts.shape[0] - 1, dtype=torch.float32, device=device)
    if device.type == "cpu":
        _check_frames_fit(
            sample_offsets, frame_shift, frame_offsets, length, waveforms.shape[0], num_rows
        )
    if num_rows == 0 or frame_shift.shape[0] == 0 or waveforms.shape[0] < length:
        return out  # nothing to read: all clips are empty

    starts, alive = _first_samples(sample_offsets, frame_shift, frame_offsets, num_rows)
    starts = starts.clamp_(0, waveforms.shape[0] - length)
    windows = waveforms.unfold(0, length, 1)
    # No operation below mixes rows or multiplies matrices, so that the numbers of a clip do not
    # depend on its batch, nor on the precision that is set for matrix products.
    rows = _chunk_rows(device, fft_size)
    padded = torch.zeros(rows, fft_size, device=device)
    emphasised = padded[:, :length]
    power = torch.empty(fft_size // 2 + 1, rows, device=device)
    for begin, end, chunk in _chunks(starts, rows):
        frames = windows[chunk].to(torch.float32)
        if waveforms.dtype == torch.int16:
            frames.mul_(INT16_SCALE)
        frames.sub_(frames.mean(dim=1, keepdim=True))
        torch.mul(frames[:, :1], 1.0 - preemphasis, out=emphasised[:, :1])
        torch.sub(frames[:, 1:], frames[:, :-1], alpha=preemphasis, out=emphasised[:, 1:])
        emphasised.mul_(window)
        squares = torch.view_as_real(torch.fft.rfft(padded)).square_()
        # Transposed, as [bins, rows]: a mel bin is then a weighted sum of few contiguous rows.
        torch.add(squares[..., 0].T, squares[..., 1].T, out=power)
        energy = F.embedding_bag(
            mel_bins,
            power,
            mel_starts,
            mode="sum",
            per_sample_weights=mel_taps,
            include_last_offset=True,
        )
        log_mel = energy.clamp_(min=ENERGY_FLOOR).log_()
        if mean is not None:
            log_mel.sub_(mean).div_(2 * std)
        out[begin:end] = log_mel.T[: end - begin]
    return out.masked_fill_(~alive[:, None], 0.0)


def _chunk_rows(device: torch.device, fft_size: int) -> int:
    """Frames to work on at a time."""
    # A CPU core's chunk should stay in its cache of 1 or 2 MiB: a whole batch at once takes twice
    # as long. A GPU's chunk must be large to be worth the launches.
    values = 3 << 16 if device.type == "cpu" else 1 << 22
    return max(2, values // fft_size)


def _chunks(starts: Tensor, rows: int) -> Iterator[tuple[int, int, Tensor]]:
    """Pieces of exactly ``rows`` starts, the last one padded, as (begin, end, starts)."""
    # All of one size, because a transform of a single row may round differently.
    total = starts.shape[0]
    for begin, chunk in enumerate(F.pad(starts, (0, -total % rows)).split(rows)):
        yield begin * rows, min((begin + 1) * rows, total), chunk


def _first_samples(
    sample_offsets: Tensor, frame_shift: Tensor, frame_offsets: Tensor, num_rows: int
) -> tuple[Tensor, Tensor]:
    """Where each row's frame begins, int64 ``[num_rows]``, and whether the row has one."""
    rows = torch.arange(num_rows, device=frame_offsets.device, dtype=torch.int32)
    alive = rows < frame_offsets[-1]
    clip = torch.searchsorted(frame_offsets, rows, right=True) - 1
    clip = clip.clamp_(max=frame_shift.shape[0] - 1)
    start = sample_offsets[clip] + (rows - frame_offsets[clip]).long() * frame_shift[clip]
    return torch.where(alive, start, 0), alive


def _check_frames_fit(
    sample_offsets: Tensor,
    frame_shift: Tensor,
    frame_offsets: Tensor,
    window_length: int,
    num_samples: int,
    num_rows: int,
) -> None:
    counts = frame_offsets.diff().long()
    used = torch.where(counts > 0, (counts - 1) * frame_shift + window_length, 0)
    lengths = sample_offsets.diff()
    bad = ((used > lengths) | (counts < 0) | (lengths < 0)).nonzero()
    if len(bad):
        clip = int(bad[0])
        raise ValueError(
            f"frames gives clip {clip} {int(counts[clip])} frames, which at its frame_shift of "
            f"{int(frame_shift[clip])} take {int(used[clip])} samples, but it has "
            f"{int(lengths[clip])}; make frames with frame_segments from the same numbers"
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
