"""EPIC-SOUNDS: 79,000 labelled sounds in 700 kitchen recordings, 44 classes, 24 kHz.

Huh et al., "EPIC-SOUNDS: A large-scale dataset of actions that sound", ICASSP 2023; lists from
github.com/epic-kitchens/epic-sounds-annotations, audio from the videos of EPIC-KITCHENS-100
(CC BY-NC 4.0).
"""

from __future__ import annotations

from os import PathLike
from pathlib import Path

from fastast.data.audio import open_hdf5
from fastast.data.datasets.clips import ClipList, audio_by_stem, existing, field
from fastast.data.files import read_rows
from fastast.data.manifest import Manifest

_RATE = 24000
_LISTS = {"train": "EPIC_Sounds_train.csv", "validation": "EPIC_Sounds_validation.csv"}


def epic_sounds(root: str | PathLike) -> dict[str, Manifest]:
    """Reads the official lists; clips are parts of recordings.

    ``EPIC_Sounds_train.csv`` and ``EPIC_Sounds_validation.csv`` lie in ``root`` or in a folder
    ``epic-sounds-annotations`` of it, with columns ``annotation_id``, ``video_id``,
    ``start_sample``, ``stop_sample`` (at 24 kHz), ``class``, ``class_id`` and others. The
    recordings are the datasets of ``EPIC_audio.hdf5`` by video id, as the annotations' authors
    pack them, or loose files ``<video_id>.wav`` of any rate anywhere below ``root``; clips
    without one are left out. Splits: ``train`` and ``validation``, on which papers report; the
    test list has no labels.

    Raises:
        ValueError: a list is missing or damaged, or no clip of it has a recording.
    """
    root = Path(root)
    lists = existing(root, _LISTS["train"], f"epic-sounds-annotations/{_LISTS['train']}").parent
    source_of = _recordings(root)
    name_of: dict[int, str] = {}
    splits = {}
    for split, name in _LISTS.items():
        path = existing(lists, name)
        clips = splits[split] = ClipList()
        for line, row in read_rows(path):
            label, name = field(path, line, row, "class_id", int), field(path, line, row, "class")
            if name_of.setdefault(label, name) != name:
                raise ValueError(
                    f"{path}, line {line}: class_id {label} is {name!r} here but "
                    f"{name_of[label]!r} before"
                )
            begin = field(path, line, row, "start_sample", int) / _RATE
            end = field(path, line, row, "stop_sample", int) / _RATE
            source = source_of.get(field(path, line, row, "video_id"))
            clips.add(field(path, line, row, "annotation_id"), source, (label,), (begin, end))
    if sorted(name_of) != list(range(len(name_of))):
        raise ValueError(f"{lists}: class_id must be 0, 1, 2, ..., got {sorted(name_of)}")
    class_names = [name for _, name in sorted(name_of.items())]
    return {
        split: clips.manifest(_LISTS[split], class_names, root, source_rate=_RATE)
        for split, clips in splits.items()
    }


def _recordings(root: Path) -> dict[str, str]:
    """Where the audio of each video is, below ``root``."""
    if not (root / "EPIC_audio.hdf5").exists():
        return audio_by_stem(root)
    with open_hdf5(root / "EPIC_audio.hdf5") as file:
        return {video: f"EPIC_audio.hdf5:{video}" for video in file}
