"""Audio files to int16 waveforms.

int16 is what most files hold and half of what float32 takes in memory and over the bus; the
filterbank reads it as it is. Decoding is libsndfile's (WAV, FLAC, Ogg, MP3), resampling soxr's HQ
(alias at -140 dB, where torchaudio's default leaks at -11 dB).

A source is a path, or ``"audio.hdf5:KEY"`` for a dataset in an HDF5 file: ``[samples]`` of int16
or floats of full scale 1, mono. Its rate is the attribute ``sample_rate`` of the dataset or the
file, or else the caller's to state.

A mono 16-bit file at the wanted rate is read as it is. Everything else goes through float32 and
is rounded once, at the end, because the short cuts are not safe: libsndfile's int16 reads do not
scale float files and wrap around where a Vorbis file overshoots full scale, and soxr's int16
output is dithered.

soundfile, soxr and h5py are imported where they are used, so that batches can also be built on
machines that do not have them. No file stays open between calls: worker processes may fork at any
time.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from os import PathLike, fspath
from pathlib import Path
from types import TracebackType

import numpy as np
import torch
from torch import Tensor

AUDIO_SUFFIXES = (".wav", ".flac", ".ogg", ".opus", ".mp3")
"""Of the files that are taken for audio where a folder is searched."""

_FULL_SCALE = 32768
_HDF5_SOURCE = re.compile(r"(.+\.(?:hdf5|h5)):(.+)")


class AudioError(ValueError):
    """An audio file that cannot be used: which one, what is wrong, and what to do about it."""

    def __init__(self, path: str | PathLike, what: str, fix: str) -> None:
        super().__init__(path, what, fix)
        self.path, self.what, self.fix = path, what, fix

    def __str__(self) -> str:
        return f"{self.path}: {self.what}; {self.fix}"


@dataclass(frozen=True)
class AudioInfo:
    """What a header says: samples per channel, their rate in Hz, and the channels."""

    frames: int
    sample_rate: int
    channels: int


def audio_info(source: str | PathLike, source_rate: int | None = None) -> AudioInfo:
    """Reads a header.

    Args:
        source: file or ``"audio.hdf5:KEY"``.
        source_rate: in Hz, of HDF5 sources that do not state theirs.

    Raises:
        AudioError: the file is missing, is not audio that libsndfile or h5py reads, or has no
            samples.
    """
    with _open(source, source_rate) as sound:
        return AudioInfo(sound.frames, sound.samplerate, sound.channels)


def part_frames(
    frames: int | np.ndarray,
    rate: int | np.ndarray,
    begin: float | np.ndarray,
    end: float | np.ndarray | None,
) -> tuple[int | np.ndarray, int | np.ndarray]:
    """First frame, and the one after the last, of the part from ``begin`` to ``end`` in seconds.

    Both are rounded half up and cut off at the file's end; equal if nothing lies between. ``end``
    None or infinite is the file's end.
    """
    start = np.floor(np.minimum(np.multiply(begin, rate, dtype=np.float64), frames) + 0.5)
    if end is None:
        return start.astype(np.int64), frames
    stop = np.floor(np.minimum(np.multiply(end, rate, dtype=np.float64), frames) + 0.5)
    return start.astype(np.int64), stop.astype(np.int64)


def resampled_length(
    frames: int | np.ndarray, rate: int | np.ndarray, sample_rate: int
) -> int | np.ndarray:
    """Samples that :func:`read_audio` returns for so many frames at ``rate`` Hz.

    Rounds half up, as soxr does.
    """
    return (2 * frames * sample_rate + rate) // (2 * rate)


def read_audio(
    source: str | PathLike,
    sample_rate: int,
    begin: float = 0.0,
    end: float | None = None,
    *,
    source_rate: int | None = None,
) -> Tensor:
    """Decodes a file, or a part of it, to one channel at ``sample_rate``.

    Channels are averaged, other rates resampled, values beyond full scale clipped. A part is
    sought, and cut out at the file's own rate before it is resampled. (libvorbis finds a place in
    the last second or so of an Ogg Vorbis file only to within some 50 samples.)

    Args:
        source: WAV, FLAC, Ogg, MP3 or whatever else libsndfile reads, or ``"audio.hdf5:KEY"``.
        sample_rate: wanted, in Hz.
        begin, end: of the part, in seconds; ``end`` may lie beyond the file's. Default: all of it.
        source_rate: in Hz, of HDF5 sources that do not state theirs.

    Returns:
        int16 ``[samples]``, full scale 32768; exactly as many as :func:`part_frames` and
        :func:`resampled_length` say.

    Raises:
        AudioError: the file is missing, damaged or empty, holds NaN or infinity, decodes to
            another length than its header says, or ends before the part begins.
    """
    import soundfile
    import soxr

    with _open(source, source_rate) as sound:
        rate, frames = sound.samplerate, sound.frames
        start, stop = (int(frame) for frame in part_frames(frames, rate, begin, end))
        if start >= stop:
            raise no_part(source, begin, end, frames / rate)
        as_is = (sound.subtype, sound.channels, rate) == ("PCM_16", 1, sample_rate)
        try:
            if start:
                sound.seek(start)
            samples = sound.read(stop - start, dtype="int16" if as_is else "float32")
        except (OSError, soundfile.SoundFileError) as error:
            raise _unreadable(source, error) from error
    if len(samples) != stop - start:
        raise AudioError(
            source,
            f"the header announces {frames} frames but {start + len(samples)} could be decoded",
            "the file is cut off or damaged: fetch it again, or leave it out",
        )
    if as_is:
        return torch.from_numpy(samples)

    if not np.isfinite(samples).all():
        raise AudioError(source, "holds NaN or infinite samples", "write it again, or leave it out")
    if samples.ndim == 2:
        samples = samples.mean(axis=1)
    if rate != sample_rate:
        samples = soxr.resample(samples, rate, sample_rate, quality="HQ")
    return to_int16(samples)


def open_hdf5(path: str | PathLike):  # h5py.File, a type not imported here
    """Opens an HDF5 file to be read, and asks for no lock, which shared disks often refuse."""
    try:
        import h5py
    except ImportError as error:
        raise ImportError(f"reading {path} needs h5py: pip install h5py") from error
    return h5py.File(path, "r", locking=False)


def to_int16(samples: np.ndarray) -> Tensor:
    """Rounds float samples, full scale 1, to int16 and clips what is beyond."""
    scaled = np.rint(samples * _FULL_SCALE).clip(-_FULL_SCALE, _FULL_SCALE - 1)
    return torch.from_numpy(scaled.astype(np.int16))


def write_wav(path: str | PathLike, samples: Tensor, sample_rate: int) -> None:
    """Writes int16 ``[samples]`` to a mono 16-bit WAV file."""
    import soundfile

    soundfile.write(path, samples.numpy(), sample_rate, subtype="PCM_16", format="WAV")


class _Hdf5Sound:
    """A dataset of an HDF5 file, with as much of ``soundfile.SoundFile`` as is used here."""

    channels = 1

    def __init__(self, path: str, key: str, source_rate: int | None) -> None:
        source = f"{path}:{key}"
        self._file = open_hdf5(path)
        try:
            samples = self._file.get(key)
            if not hasattr(samples, "dtype"):  # None, or a group
                raise AudioError(source, f"{path} has no dataset {key}", "check the key")
            if samples.ndim != 1 or not (samples.dtype == np.int16 or samples.dtype.kind == "f"):
                raise AudioError(
                    source,
                    f"is {samples.dtype} of shape {samples.shape}",
                    "write it as int16 or floats of shape [samples]",
                )
            rate = samples.attrs.get("sample_rate", self._file.attrs.get("sample_rate"))
            rate = source_rate if rate is None else rate
            if rate is None:
                raise AudioError(
                    source,
                    "does not say its sample rate",
                    "state it as source_rate, or give it an attribute sample_rate",
                )
        except BaseException:
            self._file.close()
            raise
        self._samples, self._position = samples, 0
        self.frames, self.samplerate = len(samples), int(rate)
        self.subtype = "PCM_16" if samples.dtype == np.int16 else "FLOAT"

    def __enter__(self) -> _Hdf5Sound:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()

    def seek(self, frame: int) -> None:
        self._position = frame

    def read(self, frames: int, dtype: str) -> np.ndarray:
        samples = self._samples[self._position : self._position + frames]
        if dtype == "float32" and samples.dtype == np.int16:
            return samples.astype(np.float32) / _FULL_SCALE
        return samples.astype(dtype, copy=False)


def _open(source: str | PathLike, source_rate: int | None):  # SoundFile, a type not imported here
    import soundfile

    hdf5 = _HDF5_SOURCE.fullmatch(fspath(source))
    try:
        sound = _Hdf5Sound(*hdf5.groups(), source_rate) if hdf5 else soundfile.SoundFile(source)
    except (OSError, soundfile.SoundFileError) as error:
        raise _unreadable(source, error) from error
    if sound.frames == 0:
        with sound:
            raise AudioError(source, "has no samples", "leave it out")
    return sound


def _unreadable(source: str | PathLike, error: Exception) -> AudioError:
    hdf5 = _HDF5_SOURCE.fullmatch(fspath(source))
    if not Path(hdf5[1] if hdf5 else source).is_file():
        return AudioError(source, "there is no such file", "check the path")
    return AudioError(
        source,
        f"cannot be decoded ({error})",
        "it is damaged or of a format that libsndfile does not read: convert it to WAV or FLAC",
    )


def no_part(source: str | PathLike, begin: float, end: float | None, seconds: float) -> AudioError:
    """The error of a part that holds nothing."""
    part = "the end" if end is None or np.isinf(end) else f"{end:g} s"
    return AudioError(
        source,
        f"has no samples from {begin:g} s to {part}: it is {seconds:g} s long",
        "correct begin and end, or leave it out",
    )
