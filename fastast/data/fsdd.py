"""The Free Spoken Digit Dataset: 3,000 recordings of ten digits by six speakers, 8 kHz.

Source: github.com/Jakobovski/free-spoken-digit-dataset (CC BY-SA 4.0).
"""

from __future__ import annotations

from os import PathLike
from pathlib import Path
from typing import Literal

import numpy as np

from fastast.data.dataset import AudioDataset

_OFFICIAL_TEST = range(5)


def fsdd(
    root: str | PathLike,
    task: Literal["digit", "speaker"] = "digit",
    split: Literal["train", "test", "all"] = "train",
    leave_out: str | None = None,
    *,
    sample_rate: int = 8000,
    cache: bool | None = None,
) -> AudioDataset:
    """Reads ``{digit}_{speaker}_{index}.wav`` from ``root`` or ``root/recordings``.

    Args:
        root: folder of the data set.
        task: what the classes are, ten digits or six speakers.
        split: by default the official one, where index 0 to 4 is the test set (300 clips) and
            5 to 49 the training set (2,700). Clip ids are the same in every split.
        leave_out: a speaker. The test set is then all that they said (500 clips), and the
            training set all that the others said (2,500).
        sample_rate: in Hz. The recordings' own is 8000.
        cache: as in :class:`AudioDataset`.

    Raises:
        ValueError: an unknown task, split or speaker, a speaker left out of speaker
            identification, or no recordings in ``root``.
    """
    if task not in ("digit", "speaker"):
        raise ValueError(f"task must be 'digit' or 'speaker', got {task!r}")
    if split not in ("train", "test", "all"):
        raise ValueError(f"split must be 'train', 'test' or 'all', got {split!r}")
    if leave_out is not None and task == "speaker":
        raise ValueError("leave_out needs task='digit': a speaker never heard cannot be named")
    root = Path(root)
    folder = root / "recordings" if (root / "recordings").is_dir() else root
    paths = sorted(folder.glob("[0-9]_*_*.wav"))
    if not paths:
        raise ValueError(f"{folder} has no files {{digit}}_{{speaker}}_{{index}}.wav")

    digits, speakers, takes = zip(*(path.stem.split("_") for path in paths), strict=True)
    names = sorted(set(digits if task == "digit" else speakers))
    labels = [names.index(name) for name in (digits if task == "digit" else speakers)]
    if leave_out is None:
        is_test = np.array([int(take) in _OFFICIAL_TEST for take in takes])
    elif leave_out in speakers:
        is_test = np.array(speakers) == leave_out
    else:
        raise ValueError(f"leave_out must be one of {sorted(set(speakers))}, got {leave_out!r}")

    everything = AudioDataset(paths, labels, names, sample_rate, root=root, cache=cache)
    if split == "all":
        return everything
    return everything.subset(np.flatnonzero(is_test if split == "test" else ~is_test))
