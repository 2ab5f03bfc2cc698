"""Audio files to int16 waveforms.

int16 is what most files hold and half of what float32 takes in memory and over the bus; the
filterbank reads it as it is. Decoding is libsndfile's (WAV, FLAC, Ogg, MP3), resampling soxr's HQ
(alias at -140 dB, where torchaudio's default leaks at -11 dB).

A mono 16-bit file at the wanted rate is read as it is. Everything else goes through float32 and
is rounded once, at the end, because the short cuts are not safe: libsndfile's int16 reads do not
scale float files and wrap around where a Vorbis file overshoots full scale, and soxr's int16
output is dithered.

soundfile and soxr are imported where they are used, so that batches can also be built on machines
that do not have them.
"""

from __future__ import annotations

from os import PathLike
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

_FULL_SCALE = 32768


class AudioError(ValueError):
    """An audio file that cannot be used: which one, what is wrong, and what to do about it."""

    def __init__(self, path: str | PathLike, what: str, fix: str) -> None:
        super().__init__(path, what, fix)
        self.path, self.what, self.fix = path, what, fix

    def __str__(self) -> str:
        return f"{self.path}: {self.what}; {self.fix}"


def audio_info(path: str | PathLike) -> tuple[int, int]:
    """Frames (samples per channel) and sample rate in Hz, from the file's header.

    Raises:
        AudioError: the file is missing, is not audio that libsndfile reads, or has no samples.
    """
    import soundfile

    try:
        info = soundfile.info(path)
    except (OSError, soundfile.SoundFileError) as error:
        raise _unreadable(path, error) from error
    if info.frames == 0:
        raise _empty(path)
    return info.frames, info.samplerate


def resampled_length(frames: int, rate: int, sample_rate: int) -> int:
    """Samples that :func:`read_audio` returns for a file of so many frames at ``rate`` Hz.

    Rounds half up, as soxr does.
    """
    return (2 * frames * sample_rate + rate) // (2 * rate)


def read_audio(path: str | PathLike, sample_rate: int) -> Tensor:
    """Decodes a file to one channel at ``sample_rate``.

    Channels are averaged, other rates resampled, values beyond full scale clipped.

    Args:
        path: WAV, FLAC, Ogg, MP3 or whatever else libsndfile reads.
        sample_rate: wanted, in Hz.

    Returns:
        int16 ``[samples]``, full scale 32768; exactly ``resampled_length(*audio_info(path), ...)``
        samples.

    Raises:
        AudioError: the file is missing, damaged or empty, holds NaN or infinity, or decodes to
            another length than its header says.
    """
    import soundfile
    import soxr

    try:
        with soundfile.SoundFile(path) as file:
            rate, frames = file.samplerate, file.frames
            as_is = (file.subtype, file.channels, rate) == ("PCM_16", 1, sample_rate)
            samples = file.read(dtype="int16" if as_is else "float32")
    except (OSError, soundfile.SoundFileError) as error:
        raise _unreadable(path, error) from error
    if frames == 0:
        raise _empty(path)
    if len(samples) != frames:
        raise AudioError(
            path,
            f"the header announces {frames} frames but {len(samples)} could be decoded",
            "the file is cut off or damaged: fetch it again, or leave it out",
        )
    if as_is:
        return torch.from_numpy(samples)

    if not np.isfinite(samples).all():
        raise AudioError(path, "holds NaN or infinite samples", "write it again, or leave it out")
    if samples.ndim == 2:
        samples = samples.mean(axis=1)
    if rate != sample_rate:
        samples = soxr.resample(samples, rate, sample_rate, quality="HQ")
    return to_int16(samples)


def to_int16(samples: np.ndarray) -> Tensor:
    """Rounds float samples, full scale 1, to int16 and clips what is beyond."""
    scaled = np.rint(samples * _FULL_SCALE).clip(-_FULL_SCALE, _FULL_SCALE - 1)
    return torch.from_numpy(scaled.astype(np.int16))


def write_wav(path: str | PathLike, samples: Tensor, sample_rate: int) -> None:
    """Writes int16 ``[samples]`` to a mono 16-bit WAV file."""
    import soundfile

    soundfile.write(path, samples.numpy(), sample_rate, subtype="PCM_16", format="WAV")


def _unreadable(path: str | PathLike, error: Exception) -> AudioError:
    if not Path(path).is_file():
        return AudioError(path, "there is no such file", "check the path")
    return AudioError(
        path,
        f"cannot be decoded ({error})",
        "it is damaged or of a format that libsndfile does not read: convert it to WAV or FLAC",
    )


def _empty(path: str | PathLike) -> AudioError:
    return AudioError(path, "has no samples", "leave it out")
