"""What is heard when in long recordings.

A recording of minutes or hours is cut into windows, which overlap or not. A window is a clip that
is a part of its file, so windows share batches like any other clips, are decoded as they are
needed, and memory does not grow with the recording but for the probabilities.

Each window speaks for the time around its middle, one hop long, and the first and the last also for
the recording's ends. So the timeline has one answer for every moment, whatever the overlap.
"""

from __future__ import annotations

import csv
import json
import math
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from fastast.data import Manifest
from fastast.data.audio import audio_info
from fastast.methods import Supervised
from fastast.train.predict import predict_clips
from fastast.train.recipe import Recipe
from fastast.train.run import write_atomically

_CLASSES_PER_WINDOW = 5
"""That the JSON file names."""


class Event(NamedTuple):
    """A class that is heard from ``begin`` to ``end``, in seconds.

    ``probability`` is the mean over the windows in between.
    """

    begin: float
    end: float
    label: str
    probability: float


@dataclass(frozen=True, eq=False)
class Timeline:
    """Classes over time.

    Attributes:
        path: of the recording.
        edges: float64 ``[windows + 1]``, in seconds: window ``i`` speaks for ``edges[i]`` to
            ``edges[i + 1]``.
        probabilities: float32 ``[windows, classes]``.
        class_names: of the classes.
        multi_label: several classes can be heard at once; otherwise the likeliest alone is.
    """

    path: str
    edges: np.ndarray
    probabilities: np.ndarray
    class_names: list[str]
    multi_label: bool

    def events(self, threshold: float = 0.5) -> list[Event]:
        """Stretches of time in which a class is heard, by their beginning.

        Args:
            threshold: least probability in each window.
        """
        heard = self.probabilities >= threshold
        if not self.multi_label:
            likeliest = self.probabilities.argmax(1)
            heard &= np.arange(heard.shape[1]) == likeliest[:, None]
        # The place before each stretch and that of its last window.
        steps = np.diff(np.pad(heard.astype(np.int8), ((1, 1), (0, 0))), axis=0)
        events = []
        for label in np.flatnonzero(heard.any(0)).tolist():
            starts, stops = (np.flatnonzero(steps[:, label] == step) for step in (1, -1))
            for start, stop in zip(starts.tolist(), stops.tolist(), strict=True):
                mean = float(self.probabilities[start:stop, label].mean())
                begin, end = float(self.edges[start]), float(self.edges[stop])
                events.append(Event(begin, end, self.class_names[label], mean))
        return sorted(events, key=lambda event: (event.begin, event.end, event.label))


def windows_of(seconds: float, window: float, hop: float) -> tuple[np.ndarray, np.ndarray]:
    """Begin and end of each window, and what each speaks for.

    All windows are equally long, unless the recording is shorter than one. The last one ends with
    the recording, so it may overlap more than the others.

    Args:
        seconds: length of the recording.
        window: of a window, in seconds.
        hop: from one window to the next, in seconds; at most ``window``.

    Returns:
        ``parts`` float64 ``[windows, 2]``, and ``edges`` float64 ``[windows + 1]``.

    Raises:
        ValueError: ``window`` or ``hop`` out of range.
    """
    if not window > 0:
        raise ValueError(f"window must be positive, in seconds, got {window}")
    if not 0 < hop <= window:
        raise ValueError(f"hop must be positive and at most window ({window}), got {hop}")
    # A remainder of rounding is no reason for one more window.
    count = 1 + max(math.ceil((seconds - window) / hop - 1e-6), 0)
    last = max(seconds - window, 0.0)
    begin = np.minimum(np.arange(count) * hop, last)
    parts = np.stack([begin, np.minimum(begin + window, seconds)], 1)
    middles = parts.mean(1)
    return parts, np.concatenate([[0.0], (middles[1:] + middles[:-1]) / 2, [seconds]])


def predict_timeline(
    method: Supervised,
    recipe: Recipe,
    file: str | PathLike,
    device: torch.device | str,
    *,
    window: float,
    hop: float | None = None,
    class_names: list[str],
    title: str | None = None,
) -> Timeline:
    """Classes of a recording of any length over time.

    Args:
        method, recipe, class_names: from :func:`~fastast.train.load_model`.
        file: of any length, format and sample rate.
        device: of the method.
        window: length of a window in seconds; about as long as the clips that the model learnt
            from.
        hop: from one window to the next, in seconds. Default: half a window.
        title: of a progress bar, where the output is a terminal. Default: none.

    Raises:
        ValueError: ``window`` or ``hop`` out of range, or a method that learns no classes.
        AudioError: the file is missing or cannot be decoded.
    """
    info = audio_info(file)
    parts, edges = windows_of(
        info.frames / info.sample_rate, window, window / 2 if hop is None else hop
    )
    count = len(parts)
    # The last one ends where the file does, which is not a matter of rounding.
    ends = np.append(parts[:-1, 1], np.inf)
    names = [str(number) for number in range(count)]
    manifest = Manifest(
        [str(file)] * count, [()] * count, [], None, False, parts[:, 0], ends, names
    )
    found = predict_clips(method, recipe, manifest, device, title=title, unit="windows")
    return Timeline(
        str(file),
        edges,
        torch.stack(found).numpy(),
        class_names,
        method.loss != "cross_entropy",
    )


def write_timeline(timeline: Timeline, folder: str | PathLike, name: str, threshold: float) -> None:
    """Writes ``NAME.csv``, ``NAME.json``, ``NAME.txt`` and ``NAME.png``.

    The table has the events; the text file has them as Audacity reads its labels; the JSON file
    has them and the likeliest classes of every window; and the picture shows the classes over time.

    Args:
        timeline: what to write.
        folder: for the files; it is made if it is missing.
        name: of the files, without suffix.
        threshold: of the events.
    """
    from fastast.train.figures import plot_timeline

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    events = timeline.events(threshold)

    def table(path: Path) -> None:
        with open(path, "w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(Event._fields)
            for event in events:
                span = (f"{event.begin:.3f}", f"{event.end:.3f}")
                writer.writerow([*span, event.label, f"{event.probability:.4f}"])

    def labels(path: Path) -> None:
        lines = (f"{e.begin:.3f}\t{e.end:.3f}\t{' '.join(e.label.split())}\n" for e in events)
        path.write_text("".join(lines), encoding="utf-8")

    def everything(path: Path) -> None:
        path.write_text(json.dumps(_to_dict(timeline, events, threshold), indent=1) + "\n")

    write_atomically(folder / f"{name}.csv", table)
    write_atomically(folder / f"{name}.txt", labels)
    write_atomically(folder / f"{name}.json", everything)
    plot_timeline(timeline, folder / f"{name}.png", threshold)


def _to_dict(timeline: Timeline, events: list[Event], threshold: float) -> dict:
    best = np.argsort(-timeline.probabilities, axis=1, kind="stable")[:, :_CLASSES_PER_WINDOW]
    windows = [
        {
            "begin": round(begin, 3),
            "end": round(end, 3),
            "classes": {timeline.class_names[k]: round(float(row[k]), 4) for k in order},
        }
        for begin, end, row, order in zip(
            timeline.edges[:-1].tolist(),
            timeline.edges[1:].tolist(),
            timeline.probabilities,
            best.tolist(),
            strict=True,
        )
    ]
    return {
        "file": timeline.path,
        "seconds": float(timeline.edges[-1]),
        "threshold": threshold,
        "events": [event._asdict() for event in events],
        "windows": windows,
    }
