"""VGGSound: 200,000 segments of 10 s of YouTube videos, with 309 classes.

Chen et al., "VGGSound: A large-scale audio-visual dataset", ICASSP 2020; list from
www.robots.ox.ac.uk/~vgg/data/vggsound (CC BY 4.0).
"""

from __future__ import annotations

from os import PathLike
from pathlib import Path

from fastast.data.datasets.clips import (
    ClipList,
    audio_by_stem,
    check_choice,
    existing,
    field,
    find_segment,
)
from fastast.data.files import read_rows
from fastast.data.manifest import Manifest

_COLUMNS = ("YTID", "start", "label", "split")


def vggsound(root: str | PathLike) -> dict[str, Manifest]:
    """Reads ``vggsound.csv`` and finds a file for each segment anywhere below ``root``.

    The list has lines ``---g-f_I2yQ,1,people marching,test`` and no header. A file may be called
    ``<YTID>_<000001>``, ``<YTID>_1``, ``<YTID>``, and so on; segments without one are left out.
    Splits: ``train`` (about 184,000) and ``test`` (about 15,000). Classes are sorted by name.

    Raises:
        ValueError: the list is missing or damaged, or no segment of a split has a file.
    """
    root = Path(root)
    path = existing(root, "vggsound.csv", "data/vggsound.csv", "metadata/vggsound.csv")
    class_names = sorted({row["label"] for _, row in read_rows(path, _COLUMNS)})
    class_of = {name: (label,) for label, name in enumerate(class_names)}
    by_stem = audio_by_stem(root)
    splits = {"train": ClipList(), "test": ClipList()}
    for line, row in read_rows(path, _COLUMNS):
        check_choice(f"{path}, line {line}: split", row["split"], splits)
        video, start = row["YTID"], field(path, line, row, "start", int)
        file = find_segment(by_stem, video, start)
        splits[row["split"]].add(f"{video}_{start:06}", file, class_of[row["label"]])
    return {name: clips.manifest(path, class_names, root) for name, clips in splits.items()}
