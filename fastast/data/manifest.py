"""What clips a data set has: their files, labels and parts, before any file is opened.

A manifest is what every way of describing a data set comes to: a folder per class, a CSV file,
the JSON of AST's code, the official lists of a published data set
(:mod:`fastast.data.datasets`). :class:`~fastast.data.AudioDataset` opens the files.
"""

from __future__ import annotations

import csv
import json
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fastast.data.audio import AUDIO_SUFFIXES
from fastast.data.files import find_audio, missing_file, read_class_table, read_rows

_COLUMNS = ("path", "label", "labels", "begin", "end", "name", "split", "source_rate")


class LeftOut(NamedTuple):
    """A clip that is not used, and why."""

    path: str
    reason: str


@dataclass(eq=False, repr=False)
class Manifest:
    """The clips of a data set.

    Attributes:
        files: of each clip, below ``root`` if that is given. ``"audio.hdf5:KEY"`` names a dataset
            in an HDF5 file.
        labels: indices into ``class_names`` of each clip's classes; () if it is unlabelled.
        class_names: of all classes, also of those that no clip has.
        root: folder of the files.
        multi_label: clips have any number of labels. Otherwise all have one, or none has any.
        begin, end: float64 ``[clips]`` in seconds, where clips are parts of their files; infinity
            in ``end`` stands for the file's end. Both or neither.
        names: key of each clip, unique. Default: its file, and the part of it.
        source_rate: in Hz, of HDF5 sources that do not state theirs.
        left_out: clips that the data set should have had.

    Raises:
        ValueError: fields that do not fit each other; the message names the clip.
    """

    files: list[str]
    labels: list[tuple[int, ...]]
    class_names: list[str]
    root: Path | None = None
    multi_label: bool = False
    begin: np.ndarray | None = None
    end: np.ndarray | None = None
    names: list[str] | None = None
    source_rate: int | None = None
    left_out: list[LeftOut] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.root = None if self.root is None else Path(self.root)
        count = len(self.files)
        if (self.begin is None) != (self.end is None):
            raise ValueError("begin and end must be given together; infinity is the file's end")
        if self.begin is not None:
            self.begin = np.asarray(self.begin, np.float64)
            self.end = np.asarray(self.end, np.float64)
        for name in ("labels", "begin", "end", "names"):
            values = getattr(self, name)
            if values is not None and len(values) != count:
                raise ValueError(f"{name} must be of {count} clips, as files is, got {len(values)}")
        if self.names is None:
            self.names = _default_names(self.files, self.begin, self.end)
        self._check_labels()
        if self.begin is not None:
            wrong = np.flatnonzero(~((self.begin >= 0) & (self.begin < self.end)))
            if len(wrong):
                first = wrong[0]
                raise ValueError(
                    f"begin and end must fulfil 0 <= begin < end, but {self.files[first]} has "
                    f"{self.begin[first]:g} and {self.end[first]:g}"
                )
        for key, values in (("names", self.names), ("class_names", self.class_names)):
            if len(set(values)) != len(values):
                twice = Counter(values).most_common(1)[0][0]
                raise ValueError(f"{key} must be unique, but {twice!r} is there more than once")

    def _check_labels(self) -> None:
        if not all(isinstance(labels, tuple) for labels in self.labels):
            raise ValueError("labels must be tuples of indices into class_names, such as (3,)")
        classes, labelled = len(self.class_names), self.labelled
        for labels in dict.fromkeys(self.labels):  # of which there are far fewer than clips
            if labels and not 0 <= min(labels) <= max(labels) < classes:
                problem = f"must lie in [0, {classes}) (class_names)"
            elif not self.multi_label and len(labels) != int(labelled):
                problem = "must be exactly one per clip, or none at all (multi_label is False)"
            else:
                continue
            clip = self.names[self.labels.index(labels)]
            raise ValueError(f"labels {problem}, but {clip} has {labels}")

    def __len__(self) -> int:
        return len(self.files)

    def __repr__(self) -> str:
        return f"Manifest({len(self)} clips, {len(self.class_names)} classes, root={self.root})"

    @property
    def labelled(self) -> bool:
        """Whether any clip has a label."""
        return any(self.labels)

    def subset(self, rows: Iterable[int]) -> Manifest:
        """Some of the clips, with the class names of all."""
        rows = list(rows)
        return Manifest(
            [self.files[row] for row in rows],
            [self.labels[row] for row in rows],
            self.class_names,
            self.root,
            self.multi_label,
            None if self.begin is None else self.begin[rows],
            None if self.end is None else self.end[rows],
            [self.names[row] for row in rows],
            self.source_rate,
        )

    @classmethod
    def from_folder(cls, root: str | PathLike) -> Manifest:
        """Reads ``root/<class>/**/*.{wav,flac,ogg,opus,mp3}``; classes are the sorted folders.

        Raises:
            ValueError: ``root`` is not a folder, has no class folders, or one of them has no
                audio files.
        """
        root = Path(root)
        if not root.is_dir():
            raise ValueError(f"{root} is not a folder; pass one that has a folder per class")
        folders = sorted(entry.name for entry in root.iterdir() if _is_open_folder(entry))
        if not folders:
            raise ValueError(
                f"{root} has no folders; put the clips of each class into one of its own"
            )
        files, labels = [], []
        for label, folder in enumerate(folders):
            found = [f"{folder}/{file}" for file in find_audio(root / folder)]
            if not found:
                raise ValueError(
                    f"{root / folder} has no audio files ({', '.join(AUDIO_SUFFIXES)}); "
                    "add some or remove the folder"
                )
            files += found
            labels += [(label,)] * len(found)
        return cls(files, labels, folders, root)

    @classmethod
    def from_files(cls, files: Sequence[str | PathLike]) -> Manifest:
        """Unlabelled clips, one per file."""
        files = [Path(file).as_posix() for file in files]
        return cls(files, [()] * len(files), [])

    @classmethod
    def from_csv(
        cls,
        path: str | PathLike,
        *,
        root: str | PathLike | None = None,
        class_names: Sequence[str] | None = None,
    ) -> Manifest:
        """Reads a table with a line per clip; see :func:`read_csv`, whose split is not heeded."""
        return read_csv(path, root=root, class_names=class_names)[0]

    @classmethod
    def from_ast_json(
        cls,
        path: str | PathLike,
        label_csv: str | PathLike,
        *,
        root: str | PathLike | None = None,
        multi_label: bool = True,
    ) -> Manifest:
        """Reads the lists of AST's code and its descendants (SSAST, Audio-MAE, ElasticAST).

        ``{"data": [{"wav": "/data/a.wav", "labels": "/m/09x0r,/m/05zppz"}, ...]}``, and a table
        ``index,mid,display_name`` of the classes.

        Args:
            path: the JSON file.
            label_csv: the table.
            root: folder that relative paths start from. Default: the JSON file's.
            multi_label: clips have any number of labels; otherwise exactly one.

        Raises:
            ValueError: a file that is not of this form, or a label that the table lacks.
        """
        path = Path(path)
        class_of, class_names = read_class_table(label_csv)
        try:
            entries = json.loads(path.read_bytes())["data"]
        except OSError as error:
            raise missing_file(path, error) from error
        except ValueError as error:  # which knows the line
            raise ValueError(f"{path}: not JSON: {error}") from error
        except (KeyError, TypeError) as error:
            raise ValueError(f'{path}: must be of the form {{"data": [...]}}') from error
        files, labels = [], []
        sets: dict[str, tuple[int, ...]] = {}  # equal sets of labels share one tuple
        for number, entry in enumerate(entries, 1):
            try:
                file, mids = entry["wav"], entry["labels"]
            except (KeyError, TypeError) as error:
                raise ValueError(
                    f"{path}, entry {number} of data: must have 'wav' and 'labels', got {entry}"
                ) from error
            if mids not in sets:
                parts = _split(mids, ",")
                for unknown in (mid for mid in parts if mid not in class_of):
                    raise ValueError(
                        f"{path}, entry {number} of data: label {unknown!r} is not in {label_csv}"
                    )
                sets[mids] = tuple(sorted({class_of[mid] for mid in parts}))
            files.append(file)
            labels.append(sets[mids])
        try:
            return cls(files, labels, class_names, Path(root or path.parent), multi_label)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    def write_csv(self, path: str | PathLike) -> None:
        """Writes a table for :meth:`from_csv`; give that ``class_names`` to keep their order.

        Raises:
            ValueError: a class name holds a separator of labels.
        """
        path = Path(path)
        root, files = (self.root or Path()).resolve(), self.files
        if root != path.parent.resolve():
            files = [os.path.join(root, file) for file in files]
        columns = {"path": files}
        if self.multi_label:
            wrong = [name for name in self.class_names if "|" in name or ";" in name]
            if wrong:
                raise ValueError(f"class_names must not hold ';' or '|', got {wrong[0]!r}")
            columns["labels"] = [
                "|".join(self.class_names[label] for label in labels) for labels in self.labels
            ]
        elif self.labelled:
            columns["label"] = [self.class_names[label] for (label,) in self.labels]
        if self.begin is not None:
            columns["begin"] = [repr(seconds) for seconds in self.begin.tolist()]
            columns["end"] = [
                "" if seconds == np.inf else repr(seconds) for seconds in self.end.tolist()
            ]
        if self.names != _default_names(files, self.begin, self.end):
            columns["name"] = self.names
        if self.source_rate is not None:
            columns["source_rate"] = [str(self.source_rate)] * len(self)
        with open(path, "w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(columns)
            writer.writerows(zip(*columns.values(), strict=True))


def read_csv(
    path: str | PathLike,
    *,
    root: str | PathLike | None = None,
    class_names: Sequence[str] | None = None,
) -> tuple[Manifest, list[str]]:
    """Reads a table with a line per clip and the names of its columns in the first line.

    ``path`` must be there. ``label`` holds one class, ``labels`` any number of them, separated by
    ``;`` or ``|``; with neither, the clips are unlabelled. ``begin`` and ``end`` in seconds make
    clips of parts of files (empty: the file's own), ``name`` gives a clip its key, ``source_rate``
    is the rate of HDF5 sources that do not state theirs. Other columns are passed over.

    Args:
        path: of the table.
        root: folder that relative paths start from. Default: the table's.
        class_names: in the order to number them. Default: those that occur, sorted.

    Returns:
        The clips, and what stands in the column ``split`` for each ("" without one).

    Raises:
        ValueError: a field that cannot be used, or a label that is not in ``class_names``; the
            message names file and line.
    """
    path = Path(path)
    lines, columns = _read_columns(path)
    if not lines:
        raise ValueError(f"{path}: lists no clips")
    if {"label", "labels"} <= columns.keys():
        raise ValueError(f"{path}: has both a column 'label' and 'labels'; remove one")

    def check(wrong: Iterable[int], what: str) -> None:
        row = next(iter(wrong), None)
        if row is not None:
            raise ValueError(f"{path}, line {lines[row]}: {what}")

    nothing = [""] * len(lines)
    check((row for row, file in enumerate(columns["path"]) if not file), "path is empty")
    texts = columns.get("labels", columns.get("label", nothing))
    classes = {
        text: _split(text.replace(";", "|"), "|") if "labels" in columns else [text] * bool(text)
        for text in set(texts)
    }
    used = sorted(set().union(*classes.values()))
    class_names = used if class_names is None else list(class_names)
    class_of = {name: label for label, name in enumerate(class_names)}
    for unknown in sorted(set(used) - class_of.keys())[:1]:
        rows = (row for row, text in enumerate(texts) if unknown in classes[text])
        check(rows, f"no such class: {unknown!r}")
    if used and "label" in columns:
        rows = (row for row, text in enumerate(texts) if not text)
        check(rows, "label is empty, but other lines have one")
    labels = {text: tuple(sorted({class_of[name] for name in classes[text]})) for text in classes}

    begin = end = None
    if columns.keys() & {"begin", "end"}:
        begin = _seconds(path, lines, columns.get("begin", nothing), 0.0)
        end = _seconds(path, lines, columns.get("end", nothing), np.inf)
        wrong = np.flatnonzero(~((begin >= 0) & (begin < end)))
        check(wrong, "begin and end must fulfil 0 <= begin < end")
    rates = set(columns.get("source_rate", nothing))
    if len(rates) > 1 or not all(rate.isdecimal() for rate in rates if rate):
        raise ValueError(f"{path}: source_rate must be one number of Hz, got {sorted(rates)}")
    try:
        manifest = Manifest(
            columns["path"],
            [labels[text] for text in texts],
            class_names,
            Path(root or path.parent),
            "labels" in columns,
            begin,
            end,
            columns.get("name"),
            int(rates.pop() or 0) or None,
        )
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return manifest, columns.get("split", nothing)


def _read_columns(path: Path) -> tuple[list[int], dict[str, list[str]]]:
    """The columns of a table that mean something, and the line number of each row."""
    lines: list[int] = []
    columns: dict[str, list[str]] = {}
    shared: dict[str, str] = {}  # few labels stand in many lines
    for line, row in read_rows(path):
        if not lines:
            columns = {name: [] for name in row if name in _COLUMNS}
            if "path" not in columns:
                raise ValueError(f"{path}: has no column 'path', only {', '.join(row)}")
        lines.append(line)
        for name, values in columns.items():
            text = row[name]
            values.append(text if name in ("path", "name") else shared.setdefault(text, text))
    return lines, columns


def _seconds(path: Path, lines: list[int], texts: list[str], empty: float) -> np.ndarray:
    found = np.full(len(texts), empty)
    for row, text in enumerate(texts):
        if text:
            try:
                found[row] = float(text)
            except ValueError as error:
                raise ValueError(
                    f"{path}, line {lines[row]}: begin and end must be seconds, got {text!r}"
                ) from error
    return found


def _is_open_folder(entry: Path) -> bool:
    return entry.name[0] != "." and entry.is_dir()


def _default_names(files: list[str], begin: np.ndarray | None, end: np.ndarray | None) -> list[str]:
    if begin is None:
        return files
    return [
        file if (first, last) == (0, np.inf) else f"{file}@{first:.3f}-{last:.3f}"
        for file, first, last in zip(files, begin.tolist(), end.tolist(), strict=True)
    ]


def _split(text: str, separator: str) -> list[str]:
    return [part.strip() for part in text.split(separator) if part.strip()]
