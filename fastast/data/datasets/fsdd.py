"""The Free Spoken Digit Dataset: 3,000 recordings of ten digits by six speakers, 8 kHz.

Source: github.com/Jakobovski/free-spoken-digit-dataset (CC BY-SA 4.0).
"""

from __future__ import annotations

from os import PathLike
from pathlib import Path
from typing import Literal

from fastast.data.manifest import Manifest

_OFFICIAL_TEST = range(5)


def fsdd(
    root: str | PathLike,
    *,
    task: Literal["digit", "speaker"] = "digit",
    leave_out: str | None = None,
) -> dict[str, Manifest]:
    """Reads ``{digit}_{speaker}_{index}.wav`` from ``root`` or ``root/recordings``.

    The official split: index 0 to 4 is the test set (300 clips), 5 to 49 the training set (2,700).

    Args:
        root: folder of the data set.
        task: what the classes are, ten digits or six speakers.
        leave_out: a speaker. The test set is then all that they said (500 clips), and the
            training set all that the others said (2,500).

    Raises:
        ValueError: an unknown task or speaker, a speaker left out of speaker identification, or
            no recordings in ``root``.
    """
    if task not in ("digit", "speaker"):
        raise ValueError(f"task must be 'digit' or 'speaker', got {task!r}")
    if leave_out is not None and task == "speaker":
        raise ValueError("leave_out needs task='digit': a speaker never heard cannot be named")
    root = Path(root)
    folder = root / "recordings" if (root / "recordings").is_dir() else root
    paths = sorted(folder.glob("[0-9]_*_*.wav"))
    if not paths:
        raise ValueError(f"{folder} has no files {{digit}}_{{speaker}}_{{index}}.wav")

    digits, speakers, takes = zip(*(path.stem.split("_") for path in paths), strict=True)
    if leave_out is not None and leave_out not in speakers:
        raise ValueError(f"leave_out must be one of {sorted(set(speakers))}, got {leave_out!r}")
    spoken = digits if task == "digit" else speakers
    names = sorted(set(spoken))
    files = [path.relative_to(root).as_posix() for path in paths]
    everything = Manifest(files, [(names.index(name),) for name in spoken], names, root)
    is_test = [
        int(take) in _OFFICIAL_TEST if leave_out is None else speaker == leave_out
        for speaker, take in zip(speakers, takes, strict=True)
    ]
    return {
        "train": everything.subset(row for row, test in enumerate(is_test) if not test),
        "test": everything.subset(row for row, test in enumerate(is_test) if test),
    }
