"""AudioSet: 2.1 million segments of YouTube videos, mostly of 10 s, with 527 classes.

Gemmeke et al., "Audio Set: An ontology and human-labeled dataset for audio events", ICASSP 2017;
lists from research.google.com/audioset/download.html (CC BY 4.0). The audio is YouTube's, and
some of it is always gone by the time it is fetched.
"""

from __future__ import annotations

from os import PathLike
from pathlib import Path
from typing import Literal

from fastast.data.datasets.clips import (
    ClipList,
    audio_by_stem,
    check_choice,
    existing,
    field,
    find_segment,
)
from fastast.data.files import read_class_table, read_rows
from fastast.data.manifest import Manifest

_COLUMNS = ("YTID", "start_seconds", "end_seconds", "positive_labels")


def audioset(
    root: str | PathLike, *, subset: Literal["balanced", "full"] = "balanced"
) -> dict[str, Manifest]:
    """Reads the official lists and finds a file for each segment anywhere below ``root``.

    ``balanced_train_segments.csv``, ``unbalanced_train_segments.csv`` (for ``full``),
    ``eval_segments.csv`` and ``class_labels_indices.csv`` lie in ``root`` or in a folder
    ``metadata`` or ``csv`` of it. A file may be called ``<YTID>``, ``Y<YTID>``,
    ``<YTID>_<start>_<end>`` in seconds or milliseconds, and so on; segments without one are left
    out. Splits: ``train`` (22,160 segments balanced, 2,063,949 full) and ``test`` (20,371; papers
    call it the evaluation set). Several labels per clip.

    Args:
        root: folder of lists and audio.
        subset: train on the balanced list alone, or on both lists (AS-20K, AS-2M).

    Raises:
        ValueError: a list is missing or damaged, names an unknown label, or no segment of it has
            a file.
    """
    check_choice("subset", subset, ("balanced", "full"))
    root = Path(root)
    lists = existing(
        root, "eval_segments.csv", "metadata/eval_segments.csv", "csv/eval_segments.csv"
    )
    folder = lists.parent
    class_of, class_names = read_class_table(existing(folder, "class_labels_indices.csv"))
    by_stem = audio_by_stem(root)
    sets: dict[str, tuple[int, ...]] = {}  # equal sets of labels share one tuple

    def read(*files: str) -> Manifest:
        clips = ClipList()
        for file in files:
            path = existing(folder, file)
            for line, row in read_rows(path, _COLUMNS):
                mids = row["positive_labels"]
                if mids not in sets:
                    try:
                        sets[mids] = tuple(sorted({class_of[mid] for mid in mids.split(",")}))
                    except KeyError as error:
                        raise ValueError(f"{path}, line {line}: no such class: {error}") from error
                video = row["YTID"]
                start, end = (field(path, line, row, name, float) for name in _COLUMNS[1:3])
                clips.add(video, find_segment(by_stem, video, start, end), sets[mids])
        return clips.manifest(" and ".join(files), class_names, root, multi_label=True)

    train = ["balanced_train_segments.csv"]
    if subset == "full":
        train.insert(0, "unbalanced_train_segments.csv")
    return {"train": read(*train), "test": read("eval_segments.csv")}
