"""Several data sets as one, without labels: for self-supervision."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from fastast.data.manifest import Manifest

_SETTINGS = {"kind", "root", "options"}


def joint(root: str | PathLike, *, parts: Sequence[Mapping[str, Any]]) -> dict[str, Manifest]:
    """Puts several data sets together: the splits that all of them have.

    Labels are dropped, since those of different data sets mean different things. A clip's name is
    its name in its own data set, after that one's folder.

    Args:
        root: folder that the parts' relative roots start from.
        parts: one mapping for each: its ``kind``, its ``root`` and its ``options`` if any, such as
            ``{"kind": "librispeech", "root": "LibriSpeech"}``.

    Raises:
        ValueError: no parts, a part without kind or root or with other settings, or HDF5 sources of
            different rates.
    """
    from fastast.data.datasets import load_manifests  # of which this function is a part

    if not parts:
        raise ValueError("parts is empty: name at least one data set")
    splits: dict[str, list[tuple[str, Manifest]]] = {}
    for part in parts:
        if not isinstance(part, Mapping) or not {"kind", "root"} <= part.keys() <= _SETTINGS:
            raise ValueError(f"parts must have kind and root, and may have options; got {part}")
        folder = os.path.join(root, part["root"])
        manifests = load_manifests(part["kind"], folder, part.get("options"))
        for split, manifest in manifests.items():
            splits.setdefault(split, []).append((str(part["root"]), manifest))
    return {
        split: _concatenate(found, Path(root))
        for split, found in splits.items()
        if len(found) == len(parts)
    }


def _concatenate(parts: Sequence[tuple[str, Manifest]], root: Path) -> Manifest:
    rates = {part.source_rate for _, part in parts if part.source_rate is not None}
    if len(rates) > 1:
        raise ValueError(f"parts have HDF5 sources of different rates: {sorted(rates)}")
    files = [
        os.path.relpath(os.path.join(part.root or "", file), root)
        for _, part in parts
        for file in part.files
    ]
    begin = end = None
    if any(part.begin is not None for _, part in parts):
        begin = np.concatenate(
            [np.zeros(len(part)) if part.begin is None else part.begin for _, part in parts]
        )
        end = np.concatenate(
            [np.full(len(part), np.inf) if part.end is None else part.end for _, part in parts]
        )
    return Manifest(
        files,
        [()] * len(files),
        [],
        root,
        False,
        begin,
        end,
        [f"{folder}/{name}" for folder, part in parts for name in part.names],
        rates.pop() if rates else None,
        [clip for _, part in parts for clip in part.left_out],
    )
