"""Filterbanks as tables and numbers: windows, mel triangles, where frames lie, the usual settings.

A :class:`MelPlan` says all there is to say about a filterbank but the frame shift, which every
clip has for itself. Three front ends have a name:

- ``kaldi``, of AST, SSAST, Audio-MAE, ASiT and ElasticAST: the numbers of Kaldi's
  ``compute-fbank-feats`` (Povey et al., "The Kaldi speech recognition toolkit", 2011) and of
  ``torchaudio.compliance.kaldi.fbank``;
- ``htsat``, of HTS-AT (Chen et al., 2022) and PANNs: torchlibrosa's, in decibels;
- ``epic_sounds``, of EPIC-SOUNDS (Huh et al., 2023): librosa's, from magnitudes.

All tables are computed in float64 and rounded to float32 once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fastast.ops._library import check_choice
from fastast.segments import Segments, TokenBudget

ENERGY_FLOOR = 2.0**-23
"""Kaldi raises mel energies below this to it before the logarithm."""

WINDOWS = ("hanning", "povey", "hamming", "rectangular", "blackman")
"""Kaldi's window types."""


class Padding(IntEnum):
    """Where the frames of ``L`` samples lie, and what a window that sticks out of them finds.

    With windows of ``N`` samples and a shift of ``h``, all divisions rounding down:

    ===========  ==============================  ====================  ==========================
    padding      frames                          frame ``t`` begins    outside the clip
    ===========  ==============================  ====================  ==========================
    ``NONE``     ``1 + (L - N) / h`` if L >= N   ``t h``               nothing is read there
    ``KALDI``    ``(L + h / 2) / h``             ``t h + h/2 - N/2``   mirrored: ``.. 1 0 0 1 ..``
    ``REFLECT``  ``1 + L / h`` if L > 0          ``t h - N/2``         mirrored: ``.. 2 1 0 1 2 ..``
    ``ZEROS``    ``1 + L / h`` if L > 0          ``t h - N/2``         zeros
    ===========  ==============================  ====================  ==========================

    ``NONE`` and ``KALDI`` are Kaldi's ``snip_edges`` true and false, the others librosa's
    ``center=True`` with ``pad_mode`` "reflect" and "constant". The mirror images are repeated as
    often as a short clip needs, where librosa and torchaudio refuse. A clip without samples has no
    frames.
    """

    NONE = 0
    KALDI = 1
    REFLECT = 2
    ZEROS = 3


def hop_from_ms(shift_ms: float, sample_rate: float) -> int:
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
    num_samples: int | np.ndarray,
    window_length: int,
    frame_shift: int | np.ndarray,
    padding: Padding = Padding.NONE,
) -> int | np.ndarray:
    """Frames of clips of so many samples; see :class:`Padding`."""
    # Arithmetic that a compiler can follow, for numbers and arrays alike.
    if padding == Padding.NONE:
        inside = num_samples - window_length
        return (inside >= 0) * (1 + inside // frame_shift)
    if padding == Padding.KALDI:
        return (num_samples + frame_shift // 2) // frame_shift
    return (num_samples > 0) * (1 + num_samples // frame_shift)


@dataclass(frozen=True)
class Framing:
    """What a filterbank's frame counts depend on, apart from the frame shift.

    All that is computed from lengths, before there is a sample, goes by it: which clips share a
    batch, how large buffers must be. Samples and frames below are numbers or arrays of them.

    Attributes:
        window_length: samples of a frame.
        padding: where frames lie.

    Raises:
        ValueError: no sample.
    """

    window_length: int
    padding: Padding = Padding.NONE

    def __post_init__(self) -> None:
        if self.window_length < 1:
            raise ValueError(f"window_length must be at least 1 sample, got {self.window_length}")

    def num_frames(
        self, num_samples: int | np.ndarray, frame_shift: int | np.ndarray
    ) -> int | np.ndarray:
        """Frames of a clip."""
        return frame_counts(num_samples, self.window_length, frame_shift, self.padding)

    def least_samples(self, num_frames: int, frame_shift: int | np.ndarray) -> int | np.ndarray:
        """The fewest samples that have so many frames (at least one).

        Centred frames one sample apart are two or none; two then have this for one.
        """
        if self.padding == Padding.NONE:
            return (num_frames - 1) * frame_shift + self.window_length
        if self.padding == Padding.KALDI:
            return num_frames * frame_shift - frame_shift // 2
        return np.maximum((num_frames - 1) * frame_shift, 1)[()]

    def spare_samples(self, frame_shift: int) -> int:
        """What is left of a clip when a frame shift is taken away for each of its frames, at
        most."""
        if self.padding == Padding.NONE:
            return self.window_length - 1
        return frame_shift - frame_shift // 2 - 1 if self.padding == Padding.KALDI else 0


def first_sample(window_length: int, frame_shift: Tensor, padding: Padding) -> Tensor | int:
    """Where a clip's first frame begins; before the clip if it is negative."""
    if padding == Padding.NONE:
        return 0
    centre = frame_shift // 2 if padding == Padding.KALDI else 0
    return centre - window_length // 2


def window_function(window_type: str, length: int, blackman_coeff: float = 0.42) -> Tensor:
    """A symmetric window: float64 ``[length]``.

    Args:
        window_type: one of :data:`WINDOWS`. ``hanning`` is zero at both ends; ``povey`` is its
            power of 0.85.
        length: in samples, at least 2. A periodic window of ``N`` samples is the symmetric one of
            ``N + 1`` without the last.
        blackman_coeff: of ``blackman``.

    Raises:
        ValueError: an unknown ``window_type``.
    """
    check_choice("window_type", window_type, WINDOWS)
    angle = _arange(0, length) * (2 * math.pi / (length - 1))
    if window_type == "rectangular":
        return torch.ones_like(angle)
    if window_type == "hamming":
        return 0.54 - 0.46 * angle.cos()
    if window_type == "blackman":
        double = (0.5 - blackman_coeff) * (2 * angle).cos()
        return blackman_coeff - 0.5 * angle.cos() + double
    hanning = (angle / 2).sin().square()
    return hanning**0.85 if window_type == "povey" else hanning


def mel_triangles(
    sample_rate: float, num_mels: int, fft_size: int, low_freq: float, high_freq: float
) -> Tensor:
    """Kaldi's mel bank: weights ``W[m, k]``, float64 ``[num_mels, fft_size / 2]``.

    The triangles have equal spacing in ``mel(f) = 1127 ln(1 + f / 700)`` and sides that are
    straight in mel. The FFT's last bin, at the Nyquist frequency, has no weight.
    """
    low, high = (1127.0 * math.log1p(freq / 700.0) for freq in (low_freq, high_freq))
    step = (high - low) / (num_mels + 1)
    center = low + step * _arange(1, num_mels + 1)
    freq = _arange(0, fft_size // 2) * (sample_rate / fft_size)
    mel = 1127.0 * torch.log1p(freq / 700.0)
    return (1.0 - (mel - center[:, None]).abs() / step).clamp(min=0.0)


def htk_triangles(
    sample_rate: float, num_mels: int, fft_size: int, low_freq: float, high_freq: float
) -> Tensor:
    """librosa's ``htk=True, norm=None``: spaced as :func:`mel_triangles`, but straight in Hz."""
    low, high = (math.log1p(freq / 700.0) for freq in (low_freq, high_freq))
    edges = 700.0 * torch.expm1(low + (high - low) / (num_mels + 1) * _arange(0, num_mels + 2))
    return _hertz_triangles(sample_rate, fft_size, edges)


def slaney_triangles(
    sample_rate: float, num_mels: int, fft_size: int, low_freq: float, high_freq: float
) -> Tensor:
    """librosa's default: Slaney's mel scale, straight in Hz, each triangle of area 1.

    The scale (Slaney, "Auditory Toolbox", 1998) has 3 mel per 200 Hz up to 1,000 Hz, and 27 mel
    per factor of 6.4 above.
    """
    step = math.log(6.4) / 27.0

    def mel(freq: float) -> float:
        return 3.0 * freq / 200.0 if freq < 1000.0 else 15.0 + math.log(freq / 1000.0) / step

    low, high = mel(low_freq), mel(high_freq)
    points = low + (high - low) / (num_mels + 1) * _arange(0, num_mels + 2)
    curved = 1000.0 * torch.exp(step * (points - 15.0))
    edges = torch.where(points < 15.0, 200.0 * points / 3.0, curved)
    area = 0.5 * (edges[2:] - edges[:-2])
    return _hertz_triangles(sample_rate, fft_size, edges) / area[:, None]


def _hertz_triangles(sample_rate: float, fft_size: int, edges: Tensor) -> Tensor:
    # The Nyquist bin is left out: nothing above `edges[-1]`, at most Nyquist, has a weight.
    freq = _arange(0, fft_size // 2) * (sample_rate / fft_size)
    left, center, right = (edges[i : len(edges) - 2 + i, None] for i in range(3))
    rising, falling = (freq - left) / (center - left), (right - freq) / (right - center)
    return torch.minimum(rising, falling).clamp(min=0.0)


def _arange(begin: int, end: int) -> Tensor:
    # On the CPU even where the default device is another, or "meta" while a model is laid out.
    return torch.arange(begin, end, dtype=torch.float64, device="cpu")


@dataclass(frozen=True, eq=False)
class MelPlan:
    """Settings of a filterbank and their tables. Make it with :meth:`kaldi`, :meth:`htsat` or
    :meth:`epic_sounds`.

    The mel weights are in compressed rows, as each FFT bin feeds two mel bins at most: mel bin
    ``m`` sums ``mel_taps[j] * P[mel_bins[j]]`` over ``mel_starts[m] <= j < mel_starts[m + 1]``.

    Attributes:
        sample_rate: of the waveforms, in Hz.
        low_freq: where the lowest triangle begins, in Hz.
        high_freq: where the highest triangle ends, in Hz.
        fft_size: points of the transform; a shorter window is followed by zeros.
        padding: where frames lie.
        dither: standard deviation of the noise that is added to the samples of each frame.
        remove_dc: whether a frame's mean is subtracted.
        preemphasis: 0 for none.
        magnitude: whether mel bins sum magnitudes, instead of powers.
        floor: mel energies ``E`` become ``log_scale * ln(max(E, floor) + offset)``.
        offset: see ``floor``.
        log_scale: see ``floor``.
        mean: of the log-mel values of the data set, or None for no normalisation.
        std: their standard deviation, or None.
        window: float32 ``[window_length]``.
        mel_bins: int64 ``[nnz]``, FFT bins.
        mel_taps: float32 ``[nnz]``, weights.
        mel_starts: int64 ``[num_mels + 1]``.
        exact_window: float64 ``[window_length]``; always on the CPU, like the next.
        exact_weights: float64 ``[num_mels, fft_size / 2]``.
    """

    sample_rate: float
    low_freq: float
    high_freq: float
    fft_size: int
    padding: Padding
    dither: float
    remove_dc: bool
    preemphasis: float
    magnitude: bool
    floor: float
    offset: float
    log_scale: float
    mean: float | None
    std: float | None
    window: Tensor
    mel_bins: Tensor
    mel_taps: Tensor
    mel_starts: Tensor
    exact_window: Tensor
    exact_weights: Tensor

    TABLES: ClassVar = ("window", "mel_bins", "mel_taps", "mel_starts")
    """Names of the tensors that the operator takes."""

    PRESETS: ClassVar = {"kaldi": 10.0, "htsat": 10.0, "epic_sounds": 5.0}
    """Names of the methods that make plans, and the frame shift in ms that goes with each."""

    @classmethod
    def kaldi(
        cls,
        sample_rate: float = 16000,
        num_mels: int = 128,
        *,
        frame_length_ms: float = 25.0,
        window_type: str = "hanning",
        blackman_coeff: float = 0.42,
        low_freq: float = 20.0,
        high_freq: float | None = None,
        preemphasis: float = 0.97,
        remove_dc_offset: bool = True,
        snip_edges: bool = True,
        dither: float = 0.0,
        use_power: bool = True,
        round_to_power_of_two: bool = True,
        mean: float | None = None,
        std: float | None = None,
    ) -> MelPlan:
        """Kaldi's filterbank; by default with the options of AST (Gong et al., 2021).

        Narrow triangles may miss all FFT bins: at 16 kHz, bin 3 of 128 is empty and always
        ``ln 2^-23``. AST was trained with it.

        Args:
            sample_rate: of the waveforms, in Hz.
            num_mels: mel bins.
            frame_length_ms: rounded down to whole samples.
            window_type: one of :data:`WINDOWS`.
            blackman_coeff: of the ``blackman`` window.
            low_freq: in Hz.
            high_freq: in Hz; counted from half the sample rate if it is 0 or negative. Default:
                half the sample rate.
            preemphasis: between 0 (none) and 1.
            remove_dc_offset: subtract each frame's mean.
            snip_edges: only frames that fit into the clip; else :attr:`Padding.KALDI`.
            dither: standard deviation of added noise, for samples in [-1, 1]; Kaldi's 1.0, for
                16-bit samples, is ``2**-15`` here. The operator then needs keys, see
                :func:`fastast.ops.mel_filterbank.dither_keys`.
            use_power: power, else magnitude.
            round_to_power_of_two: of the FFT's size; else it is the frame's.
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
        if round_to_power_of_two:
            fft_size = 1 << (window_length - 1).bit_length()
        else:
            fft_size = window_length
        band = _band(sample_rate, num_mels, fft_size, low_freq, high_freq)
        return cls._make(
            sample_rate,
            band,
            fft_size,
            Padding.NONE if snip_edges else Padding.KALDI,
            window_function(window_type, window_length, blackman_coeff),
            mel_triangles(sample_rate, num_mels, fft_size, *band),
            mean,
            std,
            dither=dither,
            remove_dc=remove_dc_offset,
            preemphasis=preemphasis,
            magnitude=not use_power,
            floor=ENERGY_FLOOR,
        )

    @classmethod
    def htsat(
        cls,
        sample_rate: float = 32000,
        num_mels: int = 64,
        *,
        window_length: int = 1024,
        low_freq: float = 50.0,
        high_freq: float | None = 14000.0,
        mean: float | None = None,
        std: float | None = None,
    ) -> MelPlan:
        """torchlibrosa's filterbank as HTS-AT has it: ``10 log10 max(E, 1e-10)``, decibels.

        Periodic Hann window as long as the FFT, centred frames with reflection, power, Slaney's
        mel bank. There is no bound below the loudest bin (``top_db=None``).

        Args:
            sample_rate: of the waveforms, in Hz.
            num_mels: mel bins.
            window_length: of a frame, in samples; an even number.
            low_freq: in Hz.
            high_freq: as in :meth:`kaldi`.
            mean: as in :meth:`kaldi`; HTS-AT itself has a batch normalisation instead.
            std: see ``mean``.

        Raises:
            ValueError: settings that contradict each other.
        """
        band = _band(sample_rate, num_mels, window_length, low_freq, high_freq)
        return cls._make(
            sample_rate,
            band,
            window_length,
            Padding.REFLECT,
            window_function("hanning", window_length + 1)[:-1],
            slaney_triangles(sample_rate, num_mels, window_length, *band),
            mean,
            std,
            floor=1e-10,
            log_scale=10.0 / math.log(10.0),
        )

    @classmethod
    def epic_sounds(
        cls,
        sample_rate: float = 24000,
        num_mels: int = 128,
        *,
        frame_length_ms: float = 10.0,
        fft_size: int = 2048,
        low_freq: float = 0.0,
        high_freq: float | None = None,
        mean: float | None = None,
        std: float | None = None,
    ) -> MelPlan:
        """librosa's filterbank as EPIC-SOUNDS has it: ``ln(E + 1e-6)`` of mel magnitudes.

        Periodic Hann window, centred frames with zeros around the clip, HTK's mel bank.

        Args:
            sample_rate: of the waveforms, in Hz.
            num_mels: mel bins.
            frame_length_ms: rounded down to whole samples, which must be an even number.
            fft_size: points of the transform, at least as many as a frame has samples.
            low_freq: in Hz.
            high_freq: as in :meth:`kaldi`.
            mean: as in :meth:`kaldi`.
            std: see ``mean``.

        Raises:
            ValueError: settings that contradict each other.
        """
        window_length = hop_from_ms(frame_length_ms, sample_rate)
        band = _band(sample_rate, num_mels, fft_size, low_freq, high_freq)
        return cls._make(
            sample_rate,
            band,
            fft_size,
            Padding.ZEROS,
            window_function("hanning", window_length + 1)[:-1],
            htk_triangles(sample_rate, num_mels, fft_size, *band),
            mean,
            std,
            magnitude=True,
            offset=1e-6,
        )

    @classmethod
    def _make(
        cls,
        sample_rate: float,
        band: tuple[float, float],
        fft_size: int,
        padding: Padding,
        window: Tensor,
        weights: Tensor,
        mean: float | None,
        std: float | None,
        *,
        dither: float = 0.0,
        remove_dc: bool = False,
        preemphasis: float = 0.0,
        magnitude: bool = False,
        floor: float = 0.0,
        offset: float = 0.0,
        log_scale: float = 1.0,
    ) -> MelPlan:
        length = len(window)
        if fft_size < length or fft_size % 2:
            raise ValueError(
                f"fft_size={fft_size} must be even and hold the {length} samples of a frame; "
                "change it, or the frame's length"
            )
        if padding in (Padding.REFLECT, Padding.ZEROS) and length % 2:
            raise ValueError(
                f"a frame of {length} samples has no middle; centred frames need an even number, "
                "change the frame's length"
            )
        if not 0.0 <= preemphasis <= 1.0:
            raise ValueError(f"preemphasis must lie between 0 and 1, got {preemphasis}")
        if dither < 0.0:
            raise ValueError(f"dither must not be negative, got {dither}")
        if (mean is None) != (std is None):
            raise ValueError(f"mean={mean} and std={std}: pass both, or neither")
        if std is not None and std <= 0:
            raise ValueError(f"std must be positive, got {std}")
        rows, bins = weights.nonzero(as_tuple=True)
        return cls(
            sample_rate,
            *band,
            fft_size,
            padding,
            dither,
            remove_dc,
            preemphasis,
            magnitude,
            floor,
            offset,
            log_scale,
            mean,
            std,
            window.float(),
            bins,
            weights[rows, bins].float(),
            F.pad((weights > 0).sum(dim=1).cumsum(dim=0), (1, 0)),
            window,
            weights,
        )

    @property
    def num_mels(self) -> int:
        """Mel bins."""
        return self.exact_weights.shape[0]

    @property
    def window_length(self) -> int:
        """Samples of a frame."""
        return self.exact_window.shape[0]

    def to(self, device: torch.device | str) -> MelPlan:
        """The same plan with the operator's tables on another device."""
        return replace(self, **{name: getattr(self, name).to(device) for name in self.TABLES})

    @property
    def framing(self) -> Framing:
        """What frame counts depend on, for a loader to plan with."""
        return Framing(self.window_length, self.padding)

    def num_frames(self, num_samples: int, frame_shift: int) -> int:
        """Frames of a clip."""
        return int(frame_counts(num_samples, self.window_length, frame_shift, self.padding))

    def normalized(self, value: float) -> float:
        """What an unnormalised log-mel value becomes in the output.

        ``normalized(0.0)`` is the value of AST's padding and SpecAugment masks, which are zeros
        written before the normalisation.
        """
        return value if self.mean is None else (value - self.mean) / (2 * self.std)


def _band(
    sample_rate: float, num_mels: int, fft_size: int, low_freq: float, high_freq: float | None
) -> tuple[float, float]:
    """The checked limits of the mel bank, in Hz."""
    nyquist = 0.5 * sample_rate
    top = high_freq or 0.0
    top = nyquist + top if top <= 0.0 else top
    if not 0.0 <= low_freq < top <= nyquist:
        raise ValueError(
            f"low_freq={low_freq} and high_freq={high_freq} must satisfy 0 <= low_freq < "
            f"high_freq <= {nyquist} (half of sample_rate={sample_rate}); is sample_rate "
            "that of the waveforms?"
        )
    if not 1 <= num_mels <= fft_size // 2:
        raise ValueError(
            f"num_mels={num_mels} must lie between 1 and {fft_size // 2}, the bins of the "
            f"{fft_size}-point FFT; lower num_mels or take longer frames"
        )
    return low_freq, top


def frame_segments(
    num_samples: Sequence[int],
    frame_shift: int | Sequence[int],
    plan: MelPlan,
    budget: TokenBudget | None = None,
) -> Segments:
    """The frame stream that clips of these lengths yield. Runs on the host, in the loader.

    Args:
        num_samples: of each clip; clips shorter than a frame yield none, unless they are padded.
        frame_shift: in samples, of all clips or of each.
        plan: says how long a frame is, and where frames lie.
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
    counts = frame_counts(num_samples, plan.window_length, frame_shift, plan.padding)
    return Segments.from_lengths(counts, budget)
