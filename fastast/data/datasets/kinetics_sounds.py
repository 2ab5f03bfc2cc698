"""Kinetics-Sounds: the classes of Kinetics-400 that can be told by ear, YouTube clips of 10 s.

Arandjelović and Zisserman, "Look, listen and learn", ICCV 2017, picked 34 classes of an early
Kinetics; 31 of them, under the names below, are in the Kinetics-400 that was released (Kay et al.,
"The Kinetics human action video dataset", 2017), and those are what later papers use.
"""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from pathlib import Path

from fastast.data.datasets.clips import ClipList, audio_by_stem, existing, field, find_segment
from fastast.data.files import read_rows
from fastast.data.manifest import Manifest

KINETICS_SOUNDS_CLASSES = (
    "blowing nose",
    "blowing out candles",
    "bowling",
    "chopping wood",
    "dribbling basketball",
    "laughing",
    "mowing lawn",
    "playing accordion",
    "playing bagpipes",
    "playing bass guitar",
    "playing clarinet",
    "playing drums",
    "playing guitar",
    "playing harmonica",
    "playing keyboard",
    "playing organ",
    "playing piano",
    "playing saxophone",
    "playing trombone",
    "playing trumpet",
    "playing violin",
    "playing xylophone",
    "ripping paper",
    "shoveling snow",
    "shuffling cards",
    "singing",
    "stomping grapes",
    "tap dancing",
    "tapping guitar",
    "tapping pen",
    "tickling",
)

_LISTS = {
    "train": ("train.csv",),
    "validation": ("validate.csv", "val.csv"),
    "test": ("test.csv",),
}


def kinetics_sounds(
    root: str | PathLike, *, classes: Sequence[str] = KINETICS_SOUNDS_CLASSES
) -> dict[str, Manifest]:
    """Reads the lists of Kinetics-400 and finds a file for each clip of these classes.

    ``train.csv``, ``validate.csv`` (or ``val.csv``) and ``test.csv`` lie in ``root`` or in a
    folder ``annotations`` of it, with columns ``label,youtube_id,time_start,time_end,split`` and
    maybe more. A list that is not there, or has no labels (as some copies of the test list), is
    no split. Audio, extracted from the videos, lies anywhere below ``root``, as
    ``<youtube_id>_<000030>_<000040>.wav`` or the like; clips without a file are left out. Splits:
    ``train`` (about 20,000 clips of 31 classes), ``validation``, ``test``.

    Args:
        root: folder of lists and audio.
        classes: of Kinetics-400 to take, in this order.

    Raises:
        ValueError: there is no training list, one is damaged or has none of a class, or no clip of
            it has a file.
    """
    root = Path(root)
    folder = existing(root, "train.csv", "annotations/train.csv").parent
    class_of = {name: (label,) for label, name in enumerate(classes)}
    by_stem = audio_by_stem(root)
    manifests = {}
    for split, names in _LISTS.items():
        paths = [folder / name for name in names if (folder / name).exists()]
        if not paths:
            continue
        clips, seen = ClipList(), set()
        for line, row in read_rows(paths[0]):
            if "label" not in row:
                break
            label = row["label"]
            if label in class_of:
                seen.add(label)
                video = field(paths[0], line, row, "youtube_id")
                start = field(paths[0], line, row, "time_start", int)
                end = field(paths[0], line, row, "time_end", int)
                file = find_segment(by_stem, video, start, end)
                clips.add(f"{video}_{start:06}", file, class_of[label])
        else:
            if absent := [name for name in classes if name not in seen]:
                raise ValueError(f"{paths[0]} has no clip of these classes: {', '.join(absent)}")
            manifests[split] = clips.manifest(paths[0], classes, root)
    return manifests
