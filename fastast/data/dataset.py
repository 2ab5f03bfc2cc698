"""A list of labelled audio files."""

from __future__ import annotations

import hashlib
import itertools
import json
import zlib
from collections.abc import Sequence
from os import PathLike
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastast.data.audio import AudioError, audio_info, read_audio, resampled_length
from fastast.random import random_bits

AUDIO_SUFFIXES = (".wav", ".flac", ".ogg", ".mp3")
CACHE_BYTES = 2**30
"""Decoded size up to which a data set is kept in memory unless told otherwise."""


class AudioDataset:
    """Audio files with one class each.

    Every header is read at once, so a missing or unreadable file is found before training starts
    and all lengths are known without decoding.

    Args:
        paths: of the files.
        labels: class of each, an index into ``class_names``.
        class_names: of all classes.
        sample_rate: in Hz, to which clips are resampled.
        root: folder of the data set. A clip is known by its path below it.
        cache: keep decoded clips in memory. Default: if all of them take less than
            :data:`CACHE_BYTES`.

    Attributes:
        paths: list of ``Path``.
        labels: int64 array ``[clips]``.
        class_names: list of str.
        sample_rate: in Hz.
        lengths: int64 array ``[clips]``, samples of each clip after resampling. Exact.
        names: list of str, the paths relative to ``root``.
        clip_ids: int64 array ``[clips]``. Random numbers are keyed by them; a clip keeps its
            number in every subset.

    Raises:
        ValueError: no files, or labels that do not fit them.
        AudioError: a file is missing, unreadable or empty.
    """

    def __init__(
        self,
        paths: Sequence[str | PathLike],
        labels: Sequence[int] | np.ndarray,
        class_names: Sequence[str],
        sample_rate: int,
        *,
        root: str | PathLike | None = None,
        cache: bool | None = None,
    ) -> None:
        self.paths = [Path(path) for path in paths]
        self.names = [
            (path.relative_to(root) if root is not None else path).as_posix() for path in self.paths
        ]
        self.labels = np.asarray(labels, np.int64)
        self.class_names = list(class_names)
        self.sample_rate = sample_rate
        if not self.paths:
            raise ValueError("paths is empty: a data set needs at least one file")
        if self.labels.shape != (len(self.paths),):
            raise ValueError(
                f"labels must name one class per file: {len(self.paths)} files, "
                f"labels of shape {self.labels.shape}"
            )
        if self.labels.min() < 0 or self.labels.max() >= len(self.class_names):
            raise ValueError(
                f"labels must lie in [0, {len(self.class_names)}) (class_names), "
                f"got {self.labels.min()} to {self.labels.max()}"
            )
        headers = [audio_info(path) for path in self.paths]
        self.lengths = np.array(
            [resampled_length(frames, rate, sample_rate) for frames, rate in headers], np.int64
        )
        self.clip_ids = np.arange(len(self.paths))
        if cache is None:
            cache = self.lengths.sum() * 2 <= CACHE_BYTES
        self._cache: dict[int, Tensor] | None = {} if cache else None

    @classmethod
    def from_folder(
        cls, root: str | PathLike, sample_rate: int, *, cache: bool | None = None
    ) -> AudioDataset:
        """Reads ``root/<class>/**/*.{wav,flac,ogg,mp3}``; classes are the sorted folder names.

        Raises:
            ValueError: ``root`` is not a folder, has no class folders, or one of them has no
                audio files.
        """
        root = Path(root)
        if not root.is_dir():
            raise ValueError(f"{root} is not a folder; pass one that has a folder per class")
        folders = sorted(
            entry for entry in root.iterdir() if entry.is_dir() and entry.name[0] != "."
        )
        if not folders:
            raise ValueError(
                f"{root} has no folders; put the clips of each class into one of its own"
            )
        files = [
            sorted(
                path
                for path in folder.rglob("[!.]*")
                if path.suffix.lower() in AUDIO_SUFFIXES and path.is_file()
            )
            for folder in folders
        ]
        for folder, found in zip(folders, files, strict=True):
            if not found:
                raise ValueError(
                    f"{folder} has no audio files ({', '.join(AUDIO_SUFFIXES)}); "
                    "add some or remove the folder"
                )
        labels = np.repeat(np.arange(len(folders)), [len(found) for found in files])
        names = [folder.name for folder in folders]
        return cls(
            list(itertools.chain(*files)), labels, names, sample_rate, root=root, cache=cache
        )

    def __len__(self) -> int:
        return len(self.paths)

    def waveform(self, index: int) -> Tensor:
        """The decoded clip, int16 ``[samples]``. May be the cached tensor: do not write to it.

        Raises:
            AudioError: the file cannot be decoded, or changed since its header was read.
        """
        clip = int(self.clip_ids[index])
        if self._cache is not None and clip in self._cache:
            return self._cache[clip]
        waveform = read_audio(self.paths[index], self.sample_rate)
        if len(waveform) != self.lengths[index]:
            raise AudioError(
                self.paths[index],
                f"had {self.lengths[index]} samples when the data set was made, "
                f"now has {len(waveform)}",
                "make the data set again",
            )
        if self._cache is not None:
            self._cache[clip] = waveform
        return waveform

    def subset(self, indices: Sequence[int] | np.ndarray) -> AudioDataset:
        """Some of the clips, with the class names, clip ids and cache of the whole."""
        indices = np.asarray(indices, np.int64)
        if not len(indices):
            raise ValueError("indices is empty: a data set needs at least one file")
        part = object.__new__(AudioDataset)  # the headers are known; do not read them again
        part.__dict__.update(self.__dict__)
        part.paths = [self.paths[index] for index in indices]
        part.names = [self.names[index] for index in indices]
        part.labels = self.labels[indices]
        part.lengths = self.lengths[indices]
        part.clip_ids = self.clip_ids[indices]
        return part

    def digest(self) -> str:
        """A short name for just these clips, labels and lengths, for telling data sets apart."""
        listing = [self.class_names, self.names, self.labels.tolist(), self.lengths.tolist()]
        return hashlib.sha256(json.dumps(listing).encode()).hexdigest()[:16]

    def split(self, fraction: float, seed: int = 0) -> tuple[AudioDataset, AudioDataset]:
        """Cuts a part off: ``(rest, part)``, deterministic in ``seed``.

        Stratified: each class gives the share ``fraction``, rounded, but keeps at least one clip.
        Which side a clip falls on hangs on its name, so that files that are added or removed do
        not reshuffle the others (but for a few, where the rounding shifts).

        Raises:
            ValueError: ``fraction`` is not in (0, 1), or no class has a clip to give.
        """
        if not 0 < fraction < 1:
            raise ValueError(f"fraction must lie between 0 and 1, got {fraction}")
        hashes = torch.tensor([zlib.crc32(name.encode()) for name in self.names])
        keys = random_bits(seed, 0, hashes, "split", 1)[:, 0]
        shuffled = np.argsort(keys.numpy(), kind="stable")
        held_out = np.zeros(len(self), bool)
        for label in np.unique(self.labels):
            members = shuffled[self.labels[shuffled] == label]
            held_out[members[: min(int(fraction * len(members) + 0.5), len(members) - 1)]] = True
        if not held_out.any():
            raise ValueError(f"fraction ({fraction}) of every class is less than one clip")
        return self.subset(np.flatnonzero(~held_out)), self.subset(np.flatnonzero(held_out))
