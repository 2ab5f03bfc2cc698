"""Log-mel features of audio files, to look at and to use elsewhere."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

import numpy as np
import torch

from fastast.data import AudioError, LeftOut, read_audio
from fastast.ops import dither_keys, hop_from_ms
from fastast.train.build import build_filterbank, finest_shift
from fastast.train.recipe import Recipe


@dataclass(frozen=True)
class Features:
    """The spectrogram of a file.

    Attributes:
        path: of the audio file.
        frames: float32 ``[T, num_mels]``; normalised if the recipe says how.
        frame_shift_ms: from one frame to the next.
        sample_rate: in Hz, that the file was resampled to.
    """

    path: str
    frames: np.ndarray
    frame_shift_ms: float
    sample_rate: int

    def save(self, path: str | PathLike) -> None:
        """Writes a ``.npz`` file with these four fields."""
        np.savez_compressed(path, **vars(self))


def extract_features(
    files: Sequence[str | PathLike], recipe: Recipe
) -> Iterator[Features | LeftOut]:
    """The features of each file, in order, or why there are none.

    Files are read whole, one after the other.

    Args:
        files: of any formats, lengths and sample rates.
        recipe: whose front end is used, at its finest time resolution; with dither, if it asks for
            that in evaluation, and then with the same noise for every file.
    """
    rate = recipe.data.sample_rate
    filterbank, shift_ms = build_filterbank(recipe).eval(), finest_shift(recipe)
    shift, noise = hop_from_ms(shift_ms, rate), None
    if recipe.frontend.dither_in_evaluation:
        noise = dither_keys(recipe.train.seed, 0, torch.zeros(1, dtype=torch.int64))
    for path in map(str, files):
        try:
            waveform = read_audio(path, rate)
        except AudioError as error:
            yield LeftOut(path, error.what)
            continue
        if not filterbank.plan.num_frames(len(waveform), shift):
            seconds = len(waveform) / rate
            yield LeftOut(path, f"lasts {1000 * seconds:.3g} ms, less than a frame")
            continue
        frames = filterbank([waveform], frame_shift=shift, dither_keys=noise).frames
        yield Features(path, frames.numpy(), shift_ms, rate)


def output_names(files: Sequence[str | PathLike]) -> list[str]:
    """A name for what is made of each file: its path below the folder that all share, no suffix.

    Raises:
        ValueError: two files come to the same name.
    """
    absolute = [Path(os.path.abspath(file)) for file in files]
    shared = os.path.commonpath([path.parent for path in absolute])
    names: dict[str, Path] = {}
    for path in absolute:
        name = path.relative_to(shared).with_suffix("").as_posix()
        if name in names:
            raise ValueError(
                f"{names[name]} and {path} would both be written to {name!r}; pass one at a time"
            )
        names[name] = path
    return list(names)
