"""Published data sets, and layouts of one's own, as manifests by split.

Each reader takes the folder that holds the data and options of its own, and returns manifests
under ``train``, ``validation`` and ``test``, as many as the data set's authors made. Nothing is
downloaded, and no audio is opened.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from os import PathLike
from typing import Any

from fastast.data.datasets.audioset import audioset
from fastast.data.datasets.epic_sounds import epic_sounds
from fastast.data.datasets.esc50 import esc50
from fastast.data.datasets.fsdd import fsdd
from fastast.data.datasets.joint import joint
from fastast.data.datasets.kinetics_sounds import KINETICS_SOUNDS_CLASSES, kinetics_sounds
from fastast.data.datasets.librispeech import librispeech
from fastast.data.datasets.plain import ast_json, csv_table, folder
from fastast.data.datasets.speech_commands import speech_commands
from fastast.data.datasets.vggsound import vggsound
from fastast.data.datasets.voxceleb1 import voxceleb1
from fastast.data.manifest import Manifest

DATASETS: dict[str, Callable[..., dict[str, Manifest]]] = {
    "folder": folder,
    "csv": csv_table,
    "ast_json": ast_json,
    "audioset": audioset,
    "epic_sounds": epic_sounds,
    "esc50": esc50,
    "fsdd": fsdd,
    "joint": joint,
    "kinetics_sounds": kinetics_sounds,
    "librispeech": librispeech,
    "speech_commands": speech_commands,
    "vggsound": vggsound,
    "voxceleb1": voxceleb1,
}
"""Readers by the name that a recipe gives as ``data.kind``."""


def load_manifests(
    kind: str, root: str | PathLike, options: Mapping[str, Any] | None = None
) -> dict[str, Manifest]:
    """Reads a data set by name.

    Args:
        kind: one of :data:`DATASETS`.
        root: where it lies.
        options: of its reader.

    Returns:
        Manifests under ``train``, ``validation`` and ``test``, as far as the data set has them.

    Raises:
        ValueError: no such data set or option, an option that is missing, or files that are not
            as the reader expects.
    """
    if kind not in DATASETS:
        raise ValueError(f"kind must be one of {', '.join(DATASETS)}, got {kind!r}")
    options = dict(options or {})
    _, *known = inspect.signature(DATASETS[kind]).parameters.values()
    unknown = sorted(options.keys() - {option.name for option in known})
    if unknown:
        names = ", ".join(option.name for option in known) or "none"
        raise ValueError(f"{kind} has no option {', '.join(unknown)}; its options: {names}")
    needed = [option.name for option in known if option.default is option.empty]
    if missing := [name for name in needed if name not in options]:
        raise ValueError(f"{kind} needs the option {', '.join(missing)}")
    return DATASETS[kind](root, **options)


__all__ = [
    "DATASETS",
    "KINETICS_SOUNDS_CLASSES",
    "ast_json",
    "audioset",
    "csv_table",
    "epic_sounds",
    "esc50",
    "folder",
    "fsdd",
    "joint",
    "kinetics_sounds",
    "librispeech",
    "load_manifests",
    "speech_commands",
    "vggsound",
    "voxceleb1",
]
