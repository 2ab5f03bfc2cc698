"""Front ends in NumPy, frame by frame in float64, written from their formulas alone."""

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

KALDI_FLOOR = 2.0**-23


def hann(length: int, periodic: bool) -> np.ndarray:
    span = length if periodic else length - 1
    return 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(length) / span)


def triangles(points: np.ndarray, at: np.ndarray) -> np.ndarray:
    """Triangles between each three neighbouring points, evaluated somewhere."""
    corners = [points[i : i + 3] for i in range(len(points) - 2)]
    return np.stack([np.interp(at, three, [0, 1, 0], left=0, right=0) for three in corners])


def htk_mel(freq):
    return 2595 * np.log10(1 + np.asarray(freq) / 700)


def kaldi_bank(rate, num_mels, fft_size, low, high) -> np.ndarray:
    freq = np.arange(fft_size // 2 + 1) * rate / fft_size
    points = np.linspace(htk_mel(low), htk_mel(high), num_mels + 2)
    bank = triangles(points, htk_mel(freq))
    bank[:, -1] = 0
    return bank


def htk_bank(rate, num_mels, fft_size, low, high) -> np.ndarray:
    freq = np.arange(fft_size // 2 + 1) * rate / fft_size
    points = np.linspace(htk_mel(low), htk_mel(high), num_mels + 2)
    return triangles(700 * (10 ** (points / 2595) - 1), freq)


def slaney_bank(rate, num_mels, fft_size, low, high) -> np.ndarray:
    def to_mel(freq):
        return 3 * freq / 200 if freq < 1000 else 15 + 27 * np.log(freq / 1000) / np.log(6.4)

    def to_hertz(mel):
        return 200 * mel / 3 if mel < 15 else 1000 * 6.4 ** ((mel - 15) / 27)

    freq = np.arange(fft_size // 2 + 1) * rate / fft_size
    points = [to_hertz(mel) for mel in np.linspace(to_mel(low), to_mel(high), num_mels + 2)]
    bank = triangles(np.array(points), freq)
    return np.stack([2 / (points[m + 2] - points[m]) * bank[m] for m in range(num_mels)])


def kaldi(
    clip, hop, bank, window, *, preemphasis=0.97, remove_dc=True, snip_edges=True, power=2
) -> np.ndarray:
    """Kaldi's log-mel frames."""
    length, fft_size = len(window), 2 * (bank.shape[1] - 1)
    if snip_edges:
        starts = range(0, len(clip) - length + 1, hop)
    else:
        count = (len(clip) + hop // 2) // hop
        starts = [length + t * hop + hop // 2 - length // 2 for t in range(count)]
        clip = np.pad(clip, length, mode="symmetric") if len(clip) else clip
    out = np.empty((len(starts), len(bank)))
    for row, start in zip(out, starts, strict=True):
        x = clip[start : start + length]
        x = x - x.mean() if remove_dc else x
        x = x - preemphasis * np.concatenate([x[:1], x[:-1]])
        energy = bank @ np.abs(np.fft.rfft(x * window, fft_size)) ** power
        row[:] = np.log(np.maximum(energy, KALDI_FLOOR))
    return out


def librosa(clip, hop, bank, window, pad_mode, power) -> np.ndarray:
    """Mel sums of librosa's centred short-time spectrum, ``[frames, num_mels]``.

    The window stands in the middle of the transform, whose reach decides the padding.
    """
    if len(clip) == 0:
        return np.empty((0, len(bank)))
    fft_size = 2 * (bank.shape[1] - 1)
    centred = np.zeros(fft_size)
    before = (fft_size - len(window)) // 2
    centred[before : before + len(window)] = window
    padded = np.pad(clip, fft_size // 2, mode=pad_mode)
    frames = sliding_window_view(padded, fft_size)[::hop]
    return np.abs(np.fft.rfft(frames * centred)) ** power @ bank.T


def htsat(clip, hop, rate=32000, num_mels=64, fft_size=1024, low=50, high=14000) -> np.ndarray:
    """HTS-AT's decibels."""
    bank = slaney_bank(rate, num_mels, fft_size, low, high)
    energy = librosa(clip, hop, bank, hann(fft_size, True), "reflect", 2)
    return 10 * np.log10(np.maximum(energy, 1e-10))


def epic_sounds(clip, hop, rate=24000, num_mels=128, fft_size=2048, length=240) -> np.ndarray:
    """EPIC-SOUNDS' logarithms."""
    bank = htk_bank(rate, num_mels, fft_size, 0, rate / 2)
    return np.log(librosa(clip, hop, bank, hann(length, True), "constant", 1) + 1e-6)
