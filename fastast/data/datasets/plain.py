"""Data sets of one's own: a folder per class, a table, or the lists of AST's code."""

from __future__ import annotations

from os import PathLike
from pathlib import Path

from fastast.data.datasets.clips import existing
from fastast.data.manifest import Manifest, read_csv

_ALIASES = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_SPLIT_OF = {alias: split for split, aliases in _ALIASES.items() for alias in aliases}


def folder(root: str | PathLike) -> dict[str, Manifest]:
    """Reads ``root/<class>/**``, or splits of such folders: ``root/{train,validation,test}/...``.

    A split may be called ``valid``, ``val``, ``dev``, ``eval`` and the like as well. A folder
    ``train`` among others that are no splits is a class. Without splits, all is ``train``.

    Raises:
        ValueError: there is no such folder, a class has no audio, there is no ``train`` beside
            other splits, or they differ in their classes.
    """
    root = Path(root)
    inside = sorted(entry.name for entry in root.iterdir()) if root.is_dir() else []
    folders = [name for name in inside if name[0] != "." and (root / name).is_dir()]
    found = {_SPLIT_OF[name]: name for name in folders if name in _SPLIT_OF}
    if len(found) < 2 and folders != [found.get("train")]:
        return {"train": Manifest.from_folder(root)}
    if "train" not in found:
        raise ValueError(f"{root} has {' and '.join(found.values())}, but no folder train")
    manifests = {
        split: Manifest.from_folder(root / found[split]) for split in _ALIASES if split in found
    }
    for split, manifest in manifests.items():
        if manifest.class_names != manifests["train"].class_names:
            differing = set(manifest.class_names) ^ set(manifests["train"].class_names)
            raise ValueError(
                f"{root}: train and {split} have different classes: {sorted(differing)}"
            )
    return manifests


def csv_table(root: str | PathLike, *, audio: str | None = None) -> dict[str, Manifest]:
    """Reads a table, or a folder of ``train.csv``, ``validation.csv`` and ``test.csv``.

    Columns: ``path``, ``label`` or ``labels`` (separated by ``;`` or ``|``), ``begin``, ``end``,
    ``name``, and in a single table ``split``; see :func:`fastast.data.manifest.read_csv`.
    Without that, all is ``train``.

    Args:
        root: the table, or the folder.
        audio: folder that relative paths start from, itself relative to the table's, which is the
            default.

    Raises:
        ValueError: a field that cannot be used; the message names file and line.
    """
    root = Path(root)
    below = (root if root.is_dir() else root.parent) / (audio or "")
    if root.is_dir():
        paths = {
            split: root / f"{alias}.csv"
            for split, aliases in _ALIASES.items()
            for alias in aliases
            if (root / f"{alias}.csv").exists()
        }
        if "train" not in paths:
            raise ValueError(f"{root} has no train.csv")
        tables = {split: read_csv(path, root=below)[0] for split, path in paths.items()}
        names = sorted(set().union(*(table.class_names for table in tables.values())))
        return {
            split: read_csv(path, root=below, class_names=names)[0] for split, path in paths.items()
        }

    table, splits = read_csv(root, root=below)
    if not any(splits):
        return {"train": table}
    rows: dict[str, list[int]] = {split: [] for split in _ALIASES}
    for row, name in enumerate(splits):
        if name not in _SPLIT_OF:
            raise ValueError(
                f"{root}: split of {table.names[row]} must be train, validation or test, "
                f"got {name!r}"
            )
        rows[_SPLIT_OF[name]].append(row)
    return {split: table.subset(found) for split, found in rows.items() if found}


def ast_json(
    root: str | PathLike,
    *,
    labels: str,
    train: str,
    validation: str | None = None,
    test: str | None = None,
    multi_label: bool = True,
) -> dict[str, Manifest]:
    """Reads the lists of AST's code; see :meth:`fastast.data.Manifest.from_ast_json`.

    Args:
        root: folder that all paths start from, also relative ones in the lists.
        labels: table ``index,mid,display_name``, such as ``class_labels_indices.csv``.
        train, validation, test: JSON files.
        multi_label: clips have any number of labels; otherwise exactly one.

    Raises:
        ValueError: a file is missing or damaged, or names a label that the table lacks.
    """
    root = Path(root)
    given = {"train": train, "validation": validation, "test": test}
    table = existing(root, labels)
    return {
        split: Manifest.from_ast_json(
            existing(root, name), table, root=root, multi_label=multi_label
        )
        for split, name in given.items()
        if name is not None
    }
