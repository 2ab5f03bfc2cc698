"""LibriSpeech: 982 hours of read English by 2,484 speakers, 16 kHz.

Panayotov et al., "LibriSpeech: an ASR corpus based on public domain audio books", ICASSP 2015;
openslr.org/12 (CC BY 4.0).
"""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Literal

from fastast.data.datasets.clips import check_choice
from fastast.data.files import find_audio
from fastast.data.manifest import Manifest

_TRAIN = ("train-clean-100", "train-clean-360", "train-other-500")
_HELD_OUT = {"validation": ("dev-clean", "dev-other"), "test": ("test-clean", "test-other")}


def librispeech(
    root: str | PathLike,
    *,
    parts: Sequence[str] | None = None,
    label: Literal["none", "speaker"] = "none",
) -> dict[str, Manifest]:
    """Reads ``<part>/<speaker>/<chapter>/*.flac`` in ``root`` or ``root/LibriSpeech``.

    Unlabelled, for self-supervision, with the splits ``train``, ``validation`` (the ``dev``
    parts) and ``test``, as far as they are there. With speakers as labels there is ``train``
    alone: the other parts have other speakers, so cut validation and test clips off it.

    Args:
        root: folder of the parts.
        parts: to train on, such as ``["train-clean-100"]``. Default: those that are there.
        label: what the classes are.

    Raises:
        ValueError: an unknown option, or parts that are not there.
    """
    check_choice("label", label, ("none", "speaker"))
    root = Path(root)
    root = root / "LibriSpeech" if (root / "LibriSpeech").is_dir() else root
    if parts is None:
        parts = [part for part in _TRAIN if (root / part).is_dir()]
    for part in parts:
        check_choice("parts", part, _TRAIN)
    found = {"train": parts}
    if label == "none":
        for split, names in _HELD_OUT.items():
            found[split] = [part for part in names if (root / part).is_dir()]
    manifests = {}
    for split, names in found.items():
        files = [f"{name}/{file}" for name in names for file in find_audio(root / name)]
        if not files and (split == "train" or names):
            raise ValueError(f"{root} has no audio in {' or '.join(names or _TRAIN)}")
        if files:
            manifests[split] = _manifest(files, root, label)
    return manifests


def _manifest(files: list[str], root: Path, label: str) -> Manifest:
    if label == "none":
        return Manifest(files, [()] * len(files), [], root)
    speakers = [file.split("/")[1] for file in files]
    names = sorted(set(speakers), key=int)
    class_of = {name: (number,) for number, name in enumerate(names)}
    return Manifest(files, [class_of[speaker] for speaker in speakers], names, root)
