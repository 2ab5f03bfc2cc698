"""The clips of a manifest with their lengths, ready to be decoded."""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from os import PathLike
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from fastast.data.audio import (
    AudioError,
    AudioInfo,
    audio_info,
    no_part,
    part_frames,
    read_audio,
    resampled_length,
)
from fastast.data.batch import IGNORED_TARGET
from fastast.data.manifest import LeftOut, Manifest
from fastast.random import random_bits

CACHE_BYTES = 2**30
"""Decoded size up to which a data set is kept in memory unless told otherwise."""

_HEADER_THREADS = 16  # they wait for the disk most of the time
_HEADERS_PER_TASK = 256
_SHOW_PROGRESS_FROM = 20_000


class AudioDataset:
    """Audio clips, their lengths and their labels.

    Every header is read at once, so a missing or unreadable file is found before training starts
    and all lengths are known without decoding. Beyond names, what is kept per clip lies in
    arrays: two million clips are no burden.

    Args:
        manifest: the clips.
        sample_rate: in Hz, to which clips are resampled.
        cache: keep decoded clips in memory. Default: if all of them take less than
            :data:`CACHE_BYTES`.
        bad_files: what to do with files that are missing, damaged or empty: ``"stop"`` with an
            error, or ``"skip"`` them.
        min_seconds: leave shorter clips out.

    Attributes:
        class_names: list of str.
        multi_label: whether clips have any number of labels.
        sample_rate: in Hz.
        lengths: int64 array ``[clips]``, samples of each clip after resampling. Exact.
        names: list of str, unique, as in the manifest.
        paths: sequence of ``Path``, the file of each clip.
        clip_ids: int64 array ``[clips]``: its number in the manifest. Random numbers are keyed by
            them; a clip keeps its number in every subset.
        left_out: list of :class:`~fastast.data.LeftOut`: the manifest's, then those left out
            here.

    Raises:
        ValueError: an argument out of range, or no clip to use.
        AudioError: a file is missing, unreadable or empty, and ``bad_files`` is ``"stop"``.
    """

    def __init__(
        self,
        manifest: Manifest,
        sample_rate: int,
        *,
        cache: bool | None = None,
        bad_files: Literal["stop", "skip"] = "stop",
        min_seconds: float = 0.0,
    ) -> None:
        if bad_files not in ("stop", "skip"):
            raise ValueError(f"bad_files must be 'stop' or 'skip', got {bad_files!r}")
        if sample_rate < 1:
            raise ValueError(f"sample_rate must be positive, got {sample_rate}")
        if not len(manifest):
            raise ValueError("the manifest is empty: a data set needs at least one clip")
        self.class_names = list(manifest.class_names)
        self.multi_label = manifest.multi_label
        self.sample_rate = sample_rate
        self.names = manifest.names
        self.clip_ids = np.arange(len(manifest))
        self._root, self._files = manifest.root, manifest.files
        self._source_rate = manifest.source_rate
        self._begin, self._end = manifest.begin, manifest.end
        self._labels = _Ragged.from_rows(manifest.labels)
        self._first_label = self._labels.first(IGNORED_TARGET)

        frames, self._rates, self._channels, errors = self._read_headers(bad_files == "stop")
        start, stop = np.int64(0), frames
        if self._begin is not None:
            start, stop = part_frames(frames, self._rates, self._begin, self._end)
        self.lengths = resampled_length(stop - start, self._rates, sample_rate)
        for row in np.flatnonzero(self.lengths == 0).tolist():
            if row not in errors:
                errors[row] = self._nothing_in(row, frames[row] / self._rates[row])
        if errors and bad_files == "stop":
            raise errors[min(errors)]
        reasons = {row: error.what for row, error in errors.items()}
        for row in np.flatnonzero(self.lengths < min_seconds * sample_rate).tolist():
            seconds = self.lengths[row] / sample_rate
            reasons.setdefault(row, f"lasts {seconds:.3g} s, less than min_seconds ({min_seconds})")
        self.left_out = [
            *manifest.left_out,
            *(LeftOut(self._source(row), reasons[row]) for row in sorted(reasons)),
        ]
        if reasons:
            kept = np.ones(len(self), bool)
            kept[list(reasons)] = False
            if not kept.any():
                raise ValueError(
                    f"none of {len(self)} clips can be used; the first is "
                    f"{self._source(0)}: {reasons[0]}"
                )
            self._keep(np.flatnonzero(kept))
        if cache is None:
            cache = self.lengths.sum() * 2 <= CACHE_BYTES
        self._cache: dict[int, Tensor] | None = {} if cache else None

    @classmethod
    def from_folder(
        cls,
        root: str | PathLike,
        sample_rate: int,
        *,
        cache: bool | None = None,
        bad_files: Literal["stop", "skip"] = "stop",
    ) -> AudioDataset:
        """The clips of :meth:`Manifest.from_folder <fastast.data.Manifest.from_folder>`."""
        manifest = Manifest.from_folder(root)
        return cls(manifest, sample_rate, cache=cache, bad_files=bad_files)

    def __len__(self) -> int:
        return len(self._files)

    @property
    def paths(self) -> Sequence[Path]:
        return _Paths(self._root, self._files)

    @property
    def labels(self) -> np.ndarray:
        """Class of each clip, int64 ``[clips]``; ``IGNORED_TARGET`` where there is none.

        Raises:
            ValueError: clips have any number of labels.
        """
        if self.multi_label:
            raise ValueError("clips of this data set have several labels each: use targets(rows)")
        return self._first_label

    def targets(self, rows: Sequence[int] | np.ndarray) -> Tensor:
        """What to learn about some of the clips.

        Returns:
            int64 ``[rows]`` of classes (``IGNORED_TARGET`` where there is none), or, with several
            labels per clip, float32 ``[rows, classes]`` of zeros and ones.
        """
        rows = np.asarray(rows, np.int64)
        if not self.multi_label:
            return torch.from_numpy(self._first_label[rows])
        labels = self._labels.take(rows)
        hot = torch.zeros(len(rows), len(self.class_names))
        hot[np.repeat(np.arange(len(rows)), labels.counts), labels.values] = 1.0
        return hot

    def label_counts(self) -> np.ndarray:
        """Clips of each class, int64 ``[classes]``."""
        return np.bincount(self._labels.values, minlength=len(self.class_names))

    def sum_over_labels(self, values: np.ndarray) -> np.ndarray:
        """Sums up ``values [classes]`` over the classes of each clip: float64 ``[clips]``."""
        clip = np.repeat(np.arange(len(self)), self._labels.counts)
        return np.bincount(clip, weights=values[self._labels.values], minlength=len(self))

    def waveform(self, index: int) -> Tensor:
        """The decoded clip, int16 ``[samples]``. May be the cached tensor: do not write to it.

        Raises:
            AudioError: the file cannot be decoded, or changed since its header was read.
        """
        clip = int(self.clip_ids[index])
        if self._cache is not None and clip in self._cache:
            return self._cache[clip]
        part = () if self._begin is None else (float(self._begin[index]), float(self._end[index]))
        source = self._source(index)
        waveform = read_audio(source, self.sample_rate, *part, source_rate=self._source_rate)
        if len(waveform) != self.lengths[index]:
            raise AudioError(
                source,
                f"had {self.lengths[index]} samples when the data set was made, "
                f"now has {len(waveform)}",
                "make the data set again",
            )
        if self._cache is not None:
            self._cache[clip] = waveform
        return waveform

    def forget(self) -> None:
        """Drops the decoded clips and keeps none from now on."""
        self._cache = None

    def subset(self, indices: Sequence[int] | np.ndarray) -> AudioDataset:
        """Some of the clips, with the class names, clip ids and cache of the whole.

        What was left out stays with the whole.
        """
        indices = np.asarray(indices, np.int64)
        if not len(indices):
            raise ValueError("indices is empty: a data set needs at least one clip")
        part = object.__new__(AudioDataset)  # the headers are known; do not read them again
        part.__dict__.update(self.__dict__)
        part.left_out = []
        part._keep(indices)
        return part

    def split(self, fraction: float, seed: int = 0) -> tuple[AudioDataset, AudioDataset]:
        """Cuts a part off: ``(rest, part)``, deterministic in ``seed``.

        Stratified: each class gives the share ``fraction``, rounded, but keeps at least one clip;
        of clips with several labels, the first class counts, and those without any are a class of
        their own. Which side a clip falls on hangs on its name, so that files that are added or
        removed do not reshuffle the others (but for a few, where the rounding shifts).

        Raises:
            ValueError: ``fraction`` is not in (0, 1), or no class has a clip to give.
        """
        if not 0 < fraction < 1:
            raise ValueError(f"fraction must lie between 0 and 1, got {fraction}")
        hashes = torch.tensor([zlib.crc32(name.encode()) for name in self.names])
        keys = random_bits(seed, 0, hashes, "split", 1)[:, 0].numpy()
        classes = np.maximum(self._first_label, -1) + 1
        counts = np.bincount(classes)
        quota = np.minimum((fraction * counts + 0.5).astype(np.int64), counts - 1)
        order = np.lexsort((keys, classes))
        rank = np.arange(len(self)) - np.repeat(np.cumsum(counts) - counts, counts)
        held_out = np.zeros(len(self), bool)
        held_out[order] = rank < quota[classes[order]]
        if not held_out.any():
            raise ValueError(f"fraction ({fraction}) of every class is less than one clip")
        return self.subset(np.flatnonzero(~held_out)), self.subset(np.flatnonzero(held_out))

    def digest(self) -> str:
        """A short name for just these clips with their ids, labels and lengths."""
        found = hashlib.sha256(json.dumps([self.class_names, self.names]).encode())
        for values in (self.clip_ids, self._labels.counts, self._labels.values, self.lengths):
            found.update(values.astype("<i8").tobytes())
        return found.hexdigest()[:16]

    def summary(self) -> str:
        """What is in it and what had to be done about it, in one line."""
        hours = self.lengths.sum() / self.sample_rate / 3600
        said = [f"{len(self):,} clips", f"{hours:,.2f} h", f"{len(self.class_names)} classes"]
        rates, counts = np.unique(self._rates, return_counts=True)
        other = [
            f"{rate} Hz ({count:,})"
            for rate, count in zip(rates.tolist(), counts.tolist(), strict=True)
            if rate != self.sample_rate
        ]
        if other:
            said.append(f"resampled to {self.sample_rate} Hz from {' and '.join(other)}")
        several = int((self._channels > 1).sum())
        if several:
            said.append(f"{several:,} mixed down from several channels")
        if self.left_out:
            said.append(f"{len(self.left_out):,} left out")
        return ", ".join(said)

    def _read_headers(
        self, stop: bool
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, dict[int, AudioError]]:
        """Frames, rate and channels of each clip's file, ``[clips]``, and errors by clip.

        A file that several clips are part of is opened once.
        """
        number: dict[str, int] = {}
        file_of = np.fromiter(
            (number.setdefault(file, len(number)) for file in self._files), np.int64, len(self)
        )
        files = list(number)
        info = np.ones((3, len(files)), np.int64)
        errors: dict[int, AudioError] = {}

        def read(first: int) -> None:
            for row in range(first, min(first + _HEADERS_PER_TASK, len(files))):
                try:
                    found = audio_info(self._below_root(files[row]), self._source_rate)
                except AudioError as error:
                    if stop:
                        raise
                    errors[row] = error
                    found = AudioInfo(0, 1, 1)
                info[:, row] = found.frames, found.sample_rate, found.channels

        tasks = range(0, len(files), _HEADERS_PER_TASK)
        with ThreadPoolExecutor(_HEADER_THREADS, "fastast-headers") as pool:
            for _ in _with_progress(pool.map(read, tasks), len(files)):
                pass
        frames, rates, channels = info[:, file_of]
        bad = np.flatnonzero(frames == 0).tolist()
        return frames, rates, channels, {row: errors[int(file_of[row])] for row in bad}

    def _nothing_in(self, row: int, seconds: float) -> AudioError:
        if self._begin is None:
            what = f"lasts less than one sample at {self.sample_rate} Hz"
            return AudioError(self._source(row), what, "leave it out")
        return no_part(self._source(row), self._begin[row], self._end[row], seconds)

    def _keep(self, rows: np.ndarray) -> None:
        self.names = [self.names[row] for row in rows]
        self._files = [self._files[row] for row in rows]
        for name in (
            "lengths",
            "clip_ids",
            "_first_label",
            "_rates",
            "_channels",
            "_begin",
            "_end",
        ):
            values = getattr(self, name)
            setattr(self, name, None if values is None else values[rows])
        self._labels = self._labels.take(rows)

    def _below_root(self, file: str) -> str:
        return file if self._root is None else os.path.join(self._root, file)

    def _source(self, row: int) -> str:
        return self._below_root(self._files[row])


class _Paths(Sequence[Path]):
    """Paths made when asked for: two million of them would take a gigabyte."""

    def __init__(self, root: Path | None, files: list[str]) -> None:
        self.root, self.files = root or Path(), files

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int | slice) -> Path | list[Path]:
        if isinstance(index, slice):
            return [self.root / file for file in self.files[index]]
        return self.root / self.files[index]


class _Ragged:
    """Rows of different lengths, as all values and the count of each row."""

    def __init__(self, values: np.ndarray, counts: np.ndarray) -> None:
        self.values, self.counts = values, counts
        self._offsets = np.cumsum(counts) - counts

    @classmethod
    def from_rows(cls, rows: Sequence[Sequence[int]]) -> _Ragged:
        counts = np.fromiter(map(len, rows), np.int64, len(rows))
        values = (value for row in rows for value in row)
        return cls(np.fromiter(values, np.int64, counts.sum()), counts)

    def take(self, rows: np.ndarray) -> _Ragged:
        counts = self.counts[rows]
        ends = np.cumsum(counts)
        within = np.arange(ends[-1] if len(ends) else 0) - np.repeat(ends - counts, counts)
        return _Ragged(self.values[np.repeat(self._offsets[rows], counts) + within], counts)

    def first(self, none: int) -> np.ndarray:
        """The first value of each row, or ``none`` where a row is empty: int64 ``[rows]``."""
        found = np.full(len(self.counts), none, np.int64)
        filled = self.counts > 0
        found[filled] = self.values[self._offsets[filled]]
        return found


def _with_progress(tasks: Iterable[None], files: int) -> Iterator[None]:
    """Shows a bar where many headers have to be read and somebody watches."""
    if files < _SHOW_PROGRESS_FROM:
        yield from tasks
        return
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    steps = -(-files // _HEADERS_PER_TASK)
    yield from track(
        tasks,
        f"Reading {files:,} headers",
        total=steps,
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
