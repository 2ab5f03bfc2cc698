"""Speech Commands: single words of 1 s by thousands of speakers, 16 kHz.

Warden, "Speech Commands: A dataset for limited-vocabulary speech recognition", 2018,
arXiv:1804.03209 (CC BY 4.0). Version 1 has 64,721 clips of 30 words, version 2 has 105,829 of 35.
"""

from __future__ import annotations

from os import PathLike
from pathlib import Path

from fastast.data.datasets.clips import NO_FILE, existing
from fastast.data.files import find_audio
from fastast.data.manifest import LeftOut, Manifest

_LISTS = {"validation": "validation_list.txt", "test": "testing_list.txt"}


def speech_commands(root: str | PathLike) -> dict[str, Manifest]:
    """Reads ``<word>/*.wav``; what the lists do not name is for training.

    ``validation_list.txt`` and ``testing_list.txt`` hold lines ``right/a69b9b3e_nohash_0.wav``.
    Classes are the words, sorted: 30 or 35, as the version has. The background noises are no
    class. Splits of version 2: ``train`` (84,843), ``validation`` (9,981), ``test`` (11,005).

    Raises:
        ValueError: a list is missing or names a word that has no folder, or a word has no clips.
    """
    root = Path(root)
    split_of, left_out = {}, {name: [] for name in ("train", *_LISTS)}
    for split, name in _LISTS.items():
        lines = existing(root, name).read_text().split()
        split_of |= dict.fromkeys(lines, split)
    words = sorted(
        entry.name for entry in root.iterdir() if entry.is_dir() and entry.name[0] not in "._"
    )
    files = [f"{word}/{file}" for word in words for file in find_audio(root / word)]
    class_of = {word: (label,) for label, word in enumerate(words)}
    for file in sorted(split_of.keys() - set(files)):
        left_out[split_of[file]].append(LeftOut(file, NO_FILE))
    everything = Manifest(files, [class_of[file.split("/")[0]] for file in files], words, root)
    manifests = {}
    for split in left_out:
        rows = (row for row, file in enumerate(files) if split_of.get(file, "train") == split)
        manifests[split] = everything.subset(rows)
        manifests[split].left_out = left_out[split]
    return manifests
