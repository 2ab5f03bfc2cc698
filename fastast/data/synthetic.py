"""Sounds to learn from where no data set is at hand.

Eight classes that a model must tell apart by spectrum *and* by order in time: rising and falling
chirps, or rising and falling noise, have the same average spectrum. Whatever changes repeats 1.6 to
6 times a second, so a sound stays what it is from 0.3 to 6 s and at frame shifts up to 40 ms.
Pitch, rates, level, background noise and onset are random.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from os import PathLike
from pathlib import Path

import numpy as np

from fastast.data.audio import to_int16, write_wav

_Maker = Callable[[np.random.Generator, int, int], np.ndarray]
"""(generator, samples, sample rate) -> float32 waveform ``[samples]`` of any level."""


def generate_sounds(
    root: str | PathLike,
    clips_per_class: int = 50,
    test_clips_per_class: int = 20,
    seed: int = 0,
    *,
    sample_rate: int = 16000,
    seconds: tuple[float, float] = (0.3, 6.0),
) -> Path:
    """Writes ``root/{train,test}/<class>/<number>.wav``, mono and 16 bit.

    Clip k of a class is the same however many are made. Lengths are log-uniform in ``seconds``.
    ``root`` appears when everything is written, so that a run cut short leaves no half a data set.

    Returns:
        ``root``. Read the parts with ``AudioDataset.from_folder(root / "train", sample_rate)``.

    Raises:
        ValueError: an argument out of range.
        FileExistsError: ``root`` exists and is not an empty folder.
    """
    root = Path(root)
    if min(clips_per_class, test_clips_per_class) < 1:
        raise ValueError("clips_per_class and test_clips_per_class must be at least 1")
    if not 0 < seconds[0] <= seconds[1]:
        raise ValueError(f"seconds must be (shortest, longest), got {seconds}")
    if sample_rate < 8000:
        raise ValueError(f"sample_rate must be at least 8000 for these sounds, got {sample_rate}")
    if root.exists() and not (root.is_dir() and not any(root.iterdir())):
        raise FileExistsError(f"{root} is not an empty folder; choose another, or delete it")

    root.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{root.name}-", dir=root.parent) as scratch:
        finished = Path(scratch) / "sounds"
        for part, (part_name, count) in enumerate(
            (("train", clips_per_class), ("test", test_clips_per_class))
        ):
            for label, (class_name, maker) in enumerate(_CLASSES.items()):
                folder = finished / part_name / class_name
                folder.mkdir(parents=True)
                for number in range(count):
                    rng = np.random.default_rng([seed, part, label, number])
                    sound = _recording(maker, rng, sample_rate, seconds)
                    write_wav(folder / f"{number:05d}.wav", to_int16(sound), sample_rate)
        finished.replace(root)
    return root


def _recording(
    maker: _Maker, rng: np.random.Generator, sample_rate: int, seconds: tuple[float, float]
) -> np.ndarray:
    """A sound with its surroundings: onset, level, background. float32 ``[samples]`` in [-1, 1]."""
    total = int(np.exp(rng.uniform(*np.log(seconds))) * sample_rate)
    lead, tail = (int(total * rng.uniform(0, 0.15)) for _ in range(2))
    sound = maker(rng, total - lead - tail, sample_rate)
    sound *= _fade(len(sound), int(0.01 * sample_rate))
    sound /= np.sqrt(np.mean(sound**2))

    # Background noise whose spectrum falls by 0 to 6 dB per octave.
    spectrum = np.fft.rfft(rng.standard_normal(total, np.float32))
    spectrum /= np.maximum(1, np.arange(len(spectrum))) ** rng.uniform(0, 1)
    noise = np.fft.irfft(spectrum, total).astype(np.float32)
    noise *= 10 ** (-rng.uniform(10, 30) / 20) / np.sqrt(np.mean(noise**2))
    noise[lead : lead + len(sound)] += sound
    return noise * (10 ** (-rng.uniform(3, 25) / 20) / np.abs(noise).max())


def _fade(samples: int, edge: int) -> np.ndarray:
    """Raised-cosine edges, so that no class is told by the click where it begins."""
    envelope = np.ones(samples, np.float32)
    ramp = 0.5 - 0.5 * np.cos(np.pi * np.arange(edge, dtype=np.float32) / edge)
    envelope[:edge] = ramp
    envelope[-edge:] = ramp[::-1]
    return envelope


def _harmonics(rng: np.random.Generator, hertz: np.ndarray, sample_rate: int) -> np.ndarray:
    """A tone of 1 to 5 partials whose fundamental follows ``hertz [samples]``."""
    phase = (2 * np.pi / sample_rate) * np.cumsum(hertz) + rng.uniform(0, 2 * np.pi)
    slope = rng.uniform(0.5, 2)
    tone = np.zeros(len(hertz))
    for partial in range(1, rng.integers(1, 6) + 1):
        if partial * hertz.max() < sample_rate / 2:
            tone += partial**-slope * np.sin(partial * phase)
    return tone.astype(np.float32)


def _glide(rng: np.random.Generator, samples: int, sample_rate: int) -> np.ndarray:
    """A frequency in Hz that rises by 1.5 to 2.5 octaves, and again: ``[samples]``.

    Each rise takes 0.25 to 0.6 s, whatever the length of the clip.
    """
    lowest, octaves = rng.uniform(250, 500), rng.uniform(1.5, 2.5)
    turns = np.arange(samples) / (rng.uniform(0.25, 0.6) * sample_rate) + rng.uniform(0, 1)
    return lowest * 2 ** (octaves * (turns % 1))


def _pitch(rng: np.random.Generator, samples: int) -> np.ndarray:
    """A constant frequency in Hz: ``[samples]``."""
    return np.full(samples, rng.uniform(300, 1000))


def _noise_band(rng: np.random.Generator, centre: np.ndarray, sample_rate: int) -> np.ndarray:
    """Noise in a band around ``centre [samples]`` Hz: slow complex noise on a carrier."""
    samples, width = len(centre), rng.uniform(80, 300)
    spectrum = np.zeros(samples, np.complex64)
    inside = np.abs(np.fft.fftfreq(samples, 1 / sample_rate)) <= width / 2
    shape = (2, np.count_nonzero(inside))
    spectrum[inside] = np.array([1, 1j]) @ rng.standard_normal(shape)
    carrier = np.exp((2j * np.pi / sample_rate) * np.cumsum(centre))
    return (np.fft.ifft(spectrum) * carrier).real.astype(np.float32)


def _slow(rng: np.random.Generator, samples: int, sample_rate: int) -> np.ndarray:
    """The phase of something that repeats 3.5 to 6 times a second: ``[samples]``."""
    turns = np.arange(samples) * (rng.uniform(3.5, 6) / sample_rate) + rng.uniform(0, 1)
    return 2 * np.pi * turns


def _rising_chirp(rng: np.random.Generator, samples: int, rate: int) -> np.ndarray:
    return _harmonics(rng, _glide(rng, samples, rate), rate)


def _falling_chirp(rng: np.random.Generator, samples: int, rate: int) -> np.ndarray:
    return _harmonics(rng, _glide(rng, samples, rate)[::-1], rate)


def _rising_noise(rng: np.random.Generator, samples: int, rate: int) -> np.ndarray:
    return _noise_band(rng, _glide(rng, samples, rate), rate)


def _falling_noise(rng: np.random.Generator, samples: int, rate: int) -> np.ndarray:
    return _noise_band(rng, _glide(rng, samples, rate)[::-1], rate)


def _steady_tone(rng: np.random.Generator, samples: int, rate: int) -> np.ndarray:
    return _harmonics(rng, _pitch(rng, samples), rate)


def _vibrato_tone(rng: np.random.Generator, samples: int, rate: int) -> np.ndarray:
    swing = rng.uniform(0.12, 0.25) * np.sin(_slow(rng, samples, rate))
    return _harmonics(rng, _pitch(rng, samples) * (1 + swing), rate)


def _tremolo_tone(rng: np.random.Generator, samples: int, rate: int) -> np.ndarray:
    depth = rng.uniform(0.8, 1)
    envelope = 1 - depth * (0.5 + 0.5 * np.sin(_slow(rng, samples, rate)))
    return _harmonics(rng, _pitch(rng, samples), rate) * envelope.astype(np.float32)


def _clicks(rng: np.random.Generator, samples: int, rate: int) -> np.ndarray:
    """Short bursts of white noise, each dying away within 10 to 30 ms."""
    age = (_slow(rng, samples, rate) / (2 * np.pi)) % 1  # 0 at each click, growing to 1
    decay = np.exp(-age * rng.uniform(12, 30))
    return rng.standard_normal(samples, np.float32) * decay.astype(np.float32)


_CLASSES: dict[str, _Maker] = {
    "clicks": _clicks,
    "falling_chirp": _falling_chirp,
    "falling_noise": _falling_noise,
    "rising_chirp": _rising_chirp,
    "rising_noise": _rising_noise,
    "steady_tone": _steady_tone,
    "tremolo_tone": _tremolo_tone,
    "vibrato_tone": _vibrato_tone,
}
