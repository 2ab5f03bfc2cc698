"""Which clips an epoch visits, in which order, and which part of each.

Everything is a function of (seed, epoch, clip), see :mod:`fastast.random`: it does not depend on
how the clips are dealt out to batches, workers or ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from fastast.data.dataset import AudioDataset
from fastast.random import random_below, random_beta, random_bits, random_uniform

OCCURRENCE = 1 << 40
"""A clip that is visited k times in an epoch draws as clip_id, clip_id + OCCURRENCE, ..."""

VIEW = 1 << 50
"""The first, second, ... view of a visit draws as its key, its key + VIEW, ..."""

Balance = Literal["none", "with_replacement", "without_replacement"]


@dataclass(frozen=True)
class Visits:
    """What an epoch visits, in order; both ``[visits]``.

    Attributes:
        rows: of the data set.
        keys: of the visits' random numbers; the clip ids, unless a clip comes several times.
    """

    rows: np.ndarray
    keys: np.ndarray

    def views(self, count: int) -> Visits:
        """The same with so many views of each, side by side."""
        keys = self.keys[:, None] + VIEW * np.arange(count)
        return Visits(np.repeat(self.rows, count), keys.flatten())


@dataclass(frozen=True)
class Sampler:
    """How an epoch draws its clips.

    Args:
        shuffle: draw the order. Otherwise it is the data set's, and every clip comes once.
        balance: ``"none"`` visits every clip once. The others draw clips with weights
            (:func:`class_balanced_weights`), as AST does on AudioSet with replacement and
            Audio-MAE without (its paper; its script draws with replacement as well).
        clips: visits of an epoch. Default: as many as there are clips. Audio-MAE fine-tunes on
            AudioSet-2M with epochs of 200,000.

    Raises:
        ValueError: arguments that exclude each other.
    """

    shuffle: bool = True
    balance: Balance = "none"
    clips: int | None = None

    def __post_init__(self) -> None:
        if self.balance not in Balance.__args__:
            raise ValueError(f"balance must be one of {Balance.__args__}, got {self.balance!r}")
        if self.clips is not None and self.clips < 1:
            raise ValueError(f"clips must be at least 1, got {self.clips}")
        if self.balance == "without_replacement" and self.clips is None:
            raise ValueError(
                "balance='without_replacement' visits every clip once, unless clips says how many "
                "to draw: set clips (data.clips_per_epoch), or balance='with_replacement'"
            )
        if not self.shuffle and (self.balance != "none" or self.clips is not None):
            raise ValueError("shuffle=False visits every clip once: leave balance and clips out")

    def draw(self, dataset: AudioDataset, seed: int, epoch: int) -> Visits:
        """The visits of an epoch.

        Raises:
            ValueError: more clips are to be drawn without replacement than there are.
        """
        count = self.clips or len(dataset)
        if self.balance == "with_replacement":
            rows = _weighted_with_replacement(class_balanced_weights(dataset), count, seed, epoch)
            return Visits(rows, _number_occurrences(dataset.clip_ids, rows))
        if count > len(dataset):
            raise ValueError(
                f"an epoch of {count} clips cannot be drawn from {len(dataset)} without "
                "replacement: lower clips, or set balance='with_replacement'"
            )
        rows = np.arange(len(dataset))
        if self.balance == "without_replacement":
            rows = _weighted_without_replacement(dataset, count, seed, epoch)
        if self.shuffle:
            ids = torch.from_numpy(dataset.clip_ids[rows])
            order = random_bits(seed, epoch, ids, "order", 1)[:, 0]
            rows = rows[np.argsort(order.numpy(), kind="stable")][:count]
        return Visits(rows, dataset.clip_ids[rows])


def class_balanced_weights(dataset: AudioDataset) -> np.ndarray:
    """AST's sampling weights: the sum of ``1000 / (count + 0.01)`` over a clip's classes.

    Returns:
        float64 ``[clips]``.

    Raises:
        ValueError: a clip without a label, which would never be drawn.
    """
    per_class = 1000.0 / (dataset.label_counts() + 0.01)
    weights = dataset.sum_over_labels(per_class)
    if (weights <= 0).any():
        raise ValueError(
            f"{dataset.names[int(weights.argmin())]} has no label: balanced sampling needs one of "
            "every clip"
        )
    return weights


def _weighted_with_replacement(
    weights: np.ndarray, count: int, seed: int, epoch: int
) -> np.ndarray:
    """Inverts the cumulated weights at ``count`` uniform points."""
    cumulated = np.cumsum(weights)
    points = _fine_uniform(seed, epoch, torch.arange(count), "balance")
    rows = np.searchsorted(cumulated, points * cumulated[-1], side="right")
    return np.minimum(rows, len(weights) - 1)


def _weighted_without_replacement(
    dataset: AudioDataset, count: int, seed: int, epoch: int
) -> np.ndarray:
    """Rows of the least ``-log(u) / weight`` (Efraimidis and Spirakis, 2006), u from the clip.

    That is the same in distribution as drawing one after the other without putting back.
    """
    weights = class_balanced_weights(dataset)
    draw = _fine_uniform(seed, epoch, torch.from_numpy(dataset.clip_ids), "balance")
    waiting = -np.log1p(-draw) / weights
    return np.sort(np.argsort(waiting, kind="stable")[:count])


def _fine_uniform(seed: int, epoch: int, keys: torch.Tensor, purpose: str) -> np.ndarray:
    """float64 in [0, 1) with 53 random bits; float32's 24 would skip clips among millions."""
    bits = random_bits(seed, epoch, keys, purpose, 1)[:, 0].numpy().view(np.uint64)
    return (bits >> np.uint64(11)) * 2.0**-53


def _number_occurrences(clip_ids: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Keys that tell the first, second, ... visit of a clip apart."""
    order = np.argsort(rows, kind="stable")
    begins = np.flatnonzero(np.diff(rows[order], prepend=-1))
    place = np.arange(len(rows))
    occurrence = np.empty_like(rows)
    occurrence[order] = place - np.repeat(begins, np.diff(begins, append=len(rows)))
    return clip_ids[rows] + occurrence * OCCURRENCE


@dataclass(frozen=True)
class Crop:
    """Which part of a clip is used, drawn anew for every visit.

    Args:
        seconds: shortest and longest length; each visit draws one, uniformly.
        place: ``"beginning"``; ``"random"``, anywhere inside the clip; or ``"cyclic"``, from
            anywhere and on past the end from the clip's beginning, over and over, which makes
            short clips as long as was drawn (Audio-MAE pretrains on 10 s, section 4.1).

    Raises:
        ValueError: lengths that are not positive or not in order, or an unknown place.
    """

    seconds: tuple[float, float]
    place: Literal["beginning", "random", "cyclic"] = "random"

    def __post_init__(self) -> None:
        object.__setattr__(self, "seconds", tuple(self.seconds))
        if len(self.seconds) != 2 or not 0 < self.seconds[0] <= self.seconds[1]:
            raise ValueError(f"seconds must be (shortest, longest), got {self.seconds}")
        if self.place not in ("beginning", "random", "cyclic"):
            raise ValueError(f"place must be 'beginning', 'random' or 'cyclic', got {self.place!r}")

    def longest(self, lengths: np.ndarray, sample_rate: int) -> np.ndarray:
        """Most samples that a visit of each clip takes."""
        most = int(self.seconds[1] * sample_rate)
        return np.full_like(lengths, most) if self.place == "cyclic" else np.minimum(lengths, most)

    def draw(
        self, lengths: np.ndarray, keys: np.ndarray, sample_rate: int, seed: int, epoch: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """First sample and number of samples of each visit, of clips of so many samples."""
        ids = torch.from_numpy(keys)
        draws = random_uniform(seed, epoch, ids, "crop length", 1)[:, 0].double().numpy()
        shortest, longest = (seconds * sample_rate for seconds in self.seconds)
        taken = (shortest + draws * (longest - shortest)).astype(np.int64)
        if self.place != "cyclic":
            taken = np.minimum(lengths, taken)
        if self.place == "beginning":
            return np.zeros_like(taken), taken
        places = lengths if self.place == "cyclic" else lengths - taken + 1
        begin = random_below(seed, epoch, ids, "crop place", torch.from_numpy(places)).numpy()
        return begin, taken


def cut(waveform: torch.Tensor, begin: int, samples: int) -> torch.Tensor:
    """``samples`` of a clip from ``begin`` on; past its end it goes on from its beginning."""
    if begin + samples <= len(waveform):
        return waveform[begin : begin + samples]
    whole, rest = divmod(begin + samples, len(waveform))
    return torch.cat([waveform[begin:], *[waveform] * (whole - 1), waveform[:rest]])


@dataclass(frozen=True)
class Mixup:
    """Which visits have another clip mixed in, and how much of it.

    Args:
        probability: of a visit to be mixed. AST and Audio-MAE on AudioSet: 0.5.
        alpha: the clip's share is drawn from Beta(alpha, alpha). AST and Audio-MAE: 10.
        targets: mix the targets too. Without, as in the code of HTS-AT, the clip keeps its own.

    Raises:
        ValueError: an argument out of range.
    """

    probability: float
    alpha: float = 10.0
    targets: bool = True

    def __post_init__(self) -> None:
        if not 0 < self.probability <= 1:
            raise ValueError(f"probability must lie in (0, 1], got {self.probability}")
        if self.alpha <= 0:
            raise ValueError(f"alpha must be positive, got {self.alpha}")

    def draw(
        self, keys: np.ndarray, num_clips: int, seed: int, epoch: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Row of the partner of each visit, -1 for none, and the visit's own share."""
        ids = torch.from_numpy(keys)
        draws = random_uniform(seed, epoch, ids, "mixup", 1)[:, 0].numpy()
        partner = random_below(seed, epoch, ids, "mixup partner", num_clips).numpy()
        share = random_beta(seed, epoch, ids, "mixup share", 1, self.alpha)[:, 0].numpy()
        mixed = draws < self.probability
        return np.where(mixed, partner, -1), np.where(mixed, share, 1.0).astype(np.float32)
