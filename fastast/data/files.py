"""Finding audio files, and reading tables line by line."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator, Sequence
from os import PathLike
from pathlib import Path

from fastast.data.audio import AUDIO_SUFFIXES


def find_audio(folder: str | PathLike) -> list[str]:
    """All audio files below a folder, relative to it, sorted; hidden ones are passed over."""
    folder = os.fspath(folder)
    found, seen = [], set()
    for where, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(where)
        if real in seen:  # a link to a folder above would lead in circles
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if name[0] != ".")
        below = Path(where).relative_to(folder).as_posix()
        prefix = "" if below == "." else f"{below}/"
        found += [
            prefix + name
            for name in files
            if name[0] != "." and name.lower().endswith(AUDIO_SUFFIXES)
        ]
    return sorted(found)


def read_rows(
    path: str | PathLike, columns: Sequence[str] | None = None
) -> Iterator[tuple[int, dict[str, str]]]:
    """The lines of a CSV file as (line number, fields by column), spaces around fields removed.

    Args:
        path: of the file. Lines that are empty or begin with "# " are passed over.
        columns: their names, if the first line does not hold them.

    Raises:
        ValueError: there is no such file, or a line has more or fewer fields than columns.
    """
    try:
        file = open(path, encoding="utf-8-sig", newline="")
    except OSError as error:
        raise missing_file(path, error) from error
    with file:
        reader = csv.reader(file, skipinitialspace=True)
        for fields in reader:
            fields = [value.strip() for value in fields]
            if not any(fields) or fields[0].startswith("# "):
                continue
            if columns is None:
                columns = fields
                continue
            if len(fields) != len(columns):
                raise ValueError(
                    f"{path}, line {reader.line_num}: has {len(fields)} fields instead of "
                    f"{len(columns)} ({', '.join(columns)})"
                )
            yield reader.line_num, dict(zip(columns, fields, strict=True))


def read_class_table(path: str | PathLike) -> tuple[dict[str, int], list[str]]:
    """A table ``index,mid,display_name``, as AudioSet's: class by mid, and the display names.

    Raises:
        ValueError: columns are missing, or the indices are not 0, 1, 2, ...
    """
    class_of, class_names = {}, []
    for line, row in read_rows(path):
        try:
            index, mid, name = row["index"], row["mid"], row["display_name"]
        except KeyError as error:
            raise ValueError(f"{path}: has no column {error}") from error
        if index != str(len(class_names)):
            raise ValueError(
                f"{path}, line {line}: index must be {len(class_names)}, got {index!r}"
            )
        class_of[mid] = len(class_names)
        class_names.append(name)
    return class_of, class_names


def missing_file(path: str | PathLike, error: OSError) -> ValueError:
    """The error of a table or list that cannot be opened."""
    return ValueError(f"{path}: cannot be read ({error.strerror}); check the path")
