"""What the readers of published data sets share."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from os import PathLike
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from fastast.data.files import find_audio
from fastast.data.manifest import LeftOut, Manifest

NO_FILE = "there is no audio file for it"


class ClipList:
    """Collects the clips of a split, and those without a file."""

    def __init__(self) -> None:
        self.files: list[str] = []
        self.labels: list[tuple[int, ...]] = []
        self.names: list[str] = []
        self.begin: list[float] = []
        self.end: list[float] = []
        self.left_out: list[LeftOut] = []

    def add(
        self,
        name: str,
        file: str | None,
        labels: tuple[int, ...],
        part: tuple[float, float] | None = None,
    ) -> None:
        """Adds a clip; ``file`` is None where there is none."""
        if file is None:
            self.left_out.append(LeftOut(name, NO_FILE))
            return
        self.names.append(name)
        self.files.append(file)
        self.labels.append(labels)
        if part is not None:
            self.begin.append(part[0])
            self.end.append(part[1])

    def manifest(
        self,
        source: str | PathLike,
        class_names: Sequence[str],
        root: Path,
        *,
        multi_label: bool = False,
        source_rate: int | None = None,
    ) -> Manifest:
        """The split.

        Raises:
            ValueError: no clip of ``source`` has a file, or a clip is listed twice.
        """
        if not self.files:
            raise ValueError(
                f"none of the {len(self.left_out)} clips of {source} has an audio file below "
                f"{root}; the first is {self.left_out[0].path if self.left_out else '(none)'}"
            )
        try:
            return Manifest(
                self.files,
                self.labels,
                list(class_names),
                root,
                multi_label,
                np.array(self.begin) if self.begin else None,
                np.array(self.end) if self.end else None,
                self.names,
                source_rate,
                self.left_out,
            )
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from error


def audio_by_stem(root: Path) -> dict[str, str]:
    """All audio files below a folder by their names without suffix; of equal ones the first."""
    found: dict[str, str] = {}
    for file in find_audio(root):
        found.setdefault(PurePosixPath(file).stem, file)
    return found


def find_segment(
    by_stem: dict[str, str], video: str, start: float, end: float | None = None
) -> str | None:
    """The file of a segment of a YouTube video, under any of the names that downloaders give it.

    ``ID_000030_000040``, ``ID_000030``, ``ID_30_40``, ``ID_30.000_40.000``, ``ID_30000_40000``
    (milliseconds), ``ID_30``, ``ID``, or ``YID``, for seconds 30 to 40.
    """
    for stem in _segment_stems(video, start, start + 10 if end is None else end):
        if stem in by_stem:
            return by_stem[stem]
    return None


def _segment_stems(video: str, start: float, end: float) -> Iterator[str]:
    yield video
    yield f"Y{video}"
    yield f"{video}_{int(start):06}_{int(end):06}"
    yield f"{video}_{int(start):06}"
    yield f"{video}_{start:g}_{end:g}"
    yield f"{video}_{start:.3f}_{end:.3f}"
    yield f"{video}_{round(1000 * start)}_{round(1000 * end)}"
    yield f"{video}_{start:g}"


def field(path: Path, line: int, row: dict[str, str], column: str, kind: type = str) -> Any:
    """A field of a table's line, as a number if ``kind`` says so.

    Raises:
        ValueError: there is no such column, or the field is no number.
    """
    if column not in row:
        raise ValueError(f"{path}: has no column {column!r}, only {', '.join(row)}")
    try:
        return kind(row[column])
    except ValueError as error:
        raise ValueError(
            f"{path}, line {line}: {column} must be a number, got {row[column]!r}"
        ) from error


def existing(root: str | PathLike, *names: str) -> Path:
    """The first of several paths below ``root`` that exists.

    Raises:
        ValueError: none does.
    """
    for name in names:
        if (Path(root) / name).exists():
            return Path(root) / name
    raise ValueError(f"{root} has no {' or '.join(names)}")


def check_choice(name: str, value: object, choices: Iterable[object]) -> None:
    """Raises a ValueError that names the option and its choices."""
    choices = list(choices)
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")
