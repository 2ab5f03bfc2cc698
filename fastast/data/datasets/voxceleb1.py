"""VoxCeleb1: 153,516 utterances of 1,251 speakers, from YouTube interviews, 16 kHz.

Nagrani, Chung and Zisserman, "VoxCeleb: A large-scale speaker identification dataset",
Interspeech 2017; www.robots.ox.ac.uk/~vgg/data/voxceleb. Speaker identification: all speakers are
in all splits.
"""

from __future__ import annotations

from os import PathLike
from pathlib import Path

from fastast.data.datasets.clips import ClipList, existing
from fastast.data.manifest import Manifest

_SPLITS = {"1": "train", "2": "validation", "3": "test"}
_FOLDERS = ("wav", "dev/wav", "test/wav", "dev", "test", "")


def voxceleb1(root: str | PathLike) -> dict[str, Manifest]:
    """Reads ``iden_split.txt``, whose lines are ``1 id10001/1zcIwhmdeo4/00001.wav``.

    1 is ``train`` (138,361 utterances), 2 ``validation`` (6,904), 3 ``test`` (8,251). The
    speakers' folders lie in ``wav``, in ``dev/wav`` and ``test/wav`` as they are unpacked (the
    folders part the speakers for another task, verification), or in ``root`` itself; utterances
    of speakers that have none are left out. Classes are the speakers, in order of their names.

    Raises:
        ValueError: the list is missing or damaged, or there is no speaker's folder.
    """
    root = Path(root)
    path = existing(root, "iden_split.txt")
    lines = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        fields = line.split()
        if not fields:
            continue
        if len(fields) != 2 or fields[0] not in _SPLITS or "/" not in fields[1]:
            raise ValueError(
                f"{path}, line {number}: must be of the form "
                f"'1 id10001/1zcIwhmdeo4/00001.wav' (1, 2 or 3), got {line!r}"
            )
        lines.append(fields)

    speakers = sorted({file.split("/")[0] for _, file in lines})
    class_of = {speaker: (label,) for label, speaker in enumerate(speakers)}
    folder_of = {}
    for speaker in speakers:
        below = (Path(folder, speaker) for folder in _FOLDERS)
        folder_of[speaker] = next((path for path in below if (root / path).is_dir()), None)
    splits = {name: ClipList() for name in _SPLITS.values()}
    for number, file in lines:
        speaker, rest = file.split("/", 1)
        folder = folder_of[speaker]
        found = None if folder is None else f"{folder.as_posix()}/{rest}"
        splits[_SPLITS[number]].add(file, found, class_of[speaker])
    return {name: clips.manifest(path, speakers, root) for name, clips in splits.items()}
