"""ESC-50: 2,000 environmental sounds of 5 s, 50 classes, 44.1 kHz.

Piczak, "ESC: Dataset for environmental sound classification", ACM Multimedia 2015;
github.com/karolpiczak/ESC-50 (CC BY-NC 3.0).
"""

from __future__ import annotations

from os import PathLike
from pathlib import Path

from fastast.data.datasets.clips import ClipList, check_choice, existing, field
from fastast.data.files import read_rows
from fastast.data.manifest import Manifest

_FOLDS = range(1, 6)


def esc50(root: str | PathLike, *, fold: int = 1) -> dict[str, Manifest]:
    """Reads ``meta/esc50.csv`` and ``audio``, one fold of five.

    The protocol is cross-validation: five models, one for each ``fold`` of 400 clips that is
    ``test`` while the others are ``train``, and the mean of their accuracies.

    Args:
        root: folder with ``meta`` and ``audio``.
        fold: 1 to 5.

    Raises:
        ValueError: the list is missing or damaged, or there is no such fold.
    """
    check_choice("fold", fold, _FOLDS)
    root = Path(root)
    path = existing(root, "meta/esc50.csv")
    name_of: dict[int, str] = {}
    splits = {"train": ClipList(), "test": ClipList()}
    for line, row in read_rows(path):
        label, its_fold = (field(path, line, row, name, int) for name in ("target", "fold"))
        check_choice(f"{path}, line {line}: fold", its_fold, _FOLDS)
        name_of[label] = field(path, line, row, "category")
        file = field(path, line, row, "filename")
        splits["test" if its_fold == fold else "train"].add(file, f"audio/{file}", (label,))
    class_names = [name for _, name in sorted(name_of.items())]
    return {name: clips.manifest(path, class_names, root) for name, clips in splits.items()}
