"""How well a trained model does, also over lengths and time resolutions it was not trained at."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from fastast.data import AudioDataset, Batch, LeftOut, PackedLoader
from fastast.frontend.stream import roll_segments
from fastast.tokens import PatchGeometry
from fastast.train.bar import progress_bar
from fastast.train.build import flexible, make_loader, size_pairs
from fastast.train.distributed import joined
from fastast.train.metrics import ClassScore, measure
from fastast.train.recipe import Recipe

ROLL = 100
"""Samples by which HTS-AT's code rolls a clip the first time, and that much further each time."""


@dataclass(frozen=True)
class Score:
    """What one pass over a data set gave.

    Attributes:
        metrics: ``accuracy`` (single-label data alone), ``mAP``, ``mAUC`` and ``d_prime``, as
            :mod:`fastast.train.metrics` defines them; None where one is undefined. Of a method
            without classes, its parts of the loss and the like, means over the clips.
        loss: the method's, mean over the clips.
        clips: number of clips evaluated.
        tokens: number of tokens computed.
        left_out: the clips that should have been evaluated but could not be read.
        per_class: of each class, in the order of the logits; of a method without, empty.
    """

    metrics: dict[str, float | None]
    loss: float
    clips: int
    tokens: int
    left_out: tuple[LeftOut, ...] = ()
    per_class: list[ClassScore] = field(default_factory=list, repr=False)

    @property
    def accuracy(self) -> float | None:
        """Top-1 accuracy in [0, 1], of SSAST's pre-training that of its patches; else None."""
        return self.metrics.get("accuracy")

    @property
    def absent_classes(self) -> int:
        """Classes that no clip has; they take no part in mAP and mAUC."""
        return sum(score.positives == 0 for score in self.per_class)

    def to_dict(self) -> dict[str, float | int | None]:
        """The metrics, loss and counts as one flat dictionary that JSON can hold."""
        return self.metrics | {
            "loss": self.loss if math.isfinite(self.loss) else None,
            "clips": self.clips,
            "left_out": len(self.left_out),
            "absent_classes": self.absent_classes,
            "tokens": self.tokens,
        }


class _Part(NamedTuple):
    """What one rank has computed: a row of ids, logits and targets per clip, and sums.

    Without classes, there are no logits; ``sums`` are over what ``weight`` counts, which is clips
    unless the method says otherwise.
    """

    ids: Tensor
    logits: Tensor
    targets: Tensor
    sums: dict[str, float]
    weight: int
    tokens: int
    left_out: tuple[LeftOut, ...]


@torch.inference_mode()
def evaluate(
    method: nn.Module,
    loader: PackedLoader,
    device: torch.device | str,
    *,
    rolls: int = 1,
    title: str | None = None,
) -> Score:
    """Runs every clip of the loader once, without augmentation.

    In a process group each rank runs the batches that ``loader.epoch(0)`` deals to it, and all
    ranks return the score of all clips. Ranks may have unequal numbers of batches or none, so
    ``method`` must not communicate: pass what DDP wraps, not the wrapper.

    Args:
        method: ``method(batch)`` gives ``logits`` ``[segments, classes]`` and ``loss``, such as
            :class:`~fastast.methods.Supervised`; or, if it learns no classes, ``loss`` and other
            scalars.
        loader: of the clips, unshuffled.
        device: of the method.
        rolls: beginnings that each clip is heard from, of whose probabilities the mean is taken;
            what comes before a beginning follows at the clip's end. HTS-AT's code takes 10 on
            AudioSet: 0, 100, 300, 600, ... samples in. The loss is the mean, too.
        title: of a progress bar, where the output is a terminal. Default: none.

    Raises:
        ValueError: there is no clip to evaluate, clips have no label, or ``rolls`` is less than 1,
            or more where no classes are learnt.
    """
    if rolls < 1:
        raise ValueError(f"rolls must be at least 1, got {rolls}")
    training = method.training
    method.eval()
    try:
        part = _run(method, loader, device, rolls, title)
    finally:
        method.train(training)
    with joined() as ranks:
        return _score(ranks.gather(part), tuple(loader.dataset.left_out))


def loss_weight_of(method: nn.Module) -> Callable[[Batch], int]:
    """What a batch counts for in a mean of the method's loss: its clips, unless the method says
    otherwise."""
    return getattr(method, "loss_weight", lambda batch: batch.num_clips)


def _run(
    method: nn.Module,
    loader: PackedLoader,
    device: torch.device | str,
    rolls: int,
    title: str | None,
) -> _Part:
    ids, logits, targets = [torch.empty(0, dtype=torch.int64)], [], []
    sums: dict[str, Tensor] = {}
    tokens, weight, left_out = 0, 0, ()
    weigh = loss_weight_of(method)
    with progress_bar(title, loader.num_batches(0), "batches") as advance:
        for batch in loader.epoch(0):
            real = (batch.clip_ids >= 0).nonzero()[:, 0]
            tokens += batch.num_tokens
            left_out += tuple(batch.left_out)
            ids.append(batch.clip_ids[real])
            targets.append(batch.targets[real])
            weight += weigh(batch)
            batch = batch.to(device, non_blocking=True)
            out = method(batch) if rolls == 1 else _rolled(method, batch, rolls)
            # The logits stay on the device until the end, so that no batch waits for it.
            if "logits" in out:
                logits.append(out["logits"][real.to(device, non_blocking=True)].float())
            if len(real):
                for name, value in out.items():
                    if value.ndim == 0:
                        sums[name] = sums.get(name, 0) + value * batch.loss_denominator
            advance(1)
    return _Part(
        torch.cat(ids),
        torch.cat(logits).cpu() if logits else torch.empty(0),
        torch.cat(targets) if targets else torch.empty(0),
        {name: value.item() for name, value in sums.items()},
        weight,
        tokens,
        left_out,
    )


def _rolled(method: nn.Module, batch: Batch, rolls: int) -> dict[str, Tensor]:
    """What a method says of a batch, probabilities instead of logits, as a mean over rolls."""
    lengths, several = batch.sample_offsets.diff(), batch.targets.ndim == 2
    found = []
    for roll in range(rolls):
        begin = ROLL * roll * (roll + 1) // 2
        shift = -begin % lengths.clamp(min=1)
        waveforms = roll_segments(batch.waveforms, batch.sample_offsets, shift)
        out = method(replace(batch, waveforms=waveforms))
        if "logits" not in out:
            raise ValueError("rolls are for methods that learn classes: leave rolls at 1")
        logits = out["logits"].float()
        found.append((logits.sigmoid() if several else logits.softmax(1), out["loss"]))
    probabilities, losses = (torch.stack(values).mean(0) for values in zip(*found, strict=True))
    return {"logits": probabilities, "loss": losses}


def _score(parts: Sequence[_Part], left_out: tuple[LeftOut, ...]) -> Score:
    """Puts the parts together; each clip counts once, whatever rank or order it came in."""
    left_out += tuple(clip for part in parts for clip in part.left_out)
    parts = [part for part in parts if len(part.ids)]
    if not parts:
        raise ValueError(f"there is no clip to evaluate; {len(left_out)} were left out")
    ids = torch.cat([part.ids for part in parts])
    order = torch.from_numpy(np.unique(ids.numpy(), return_index=True)[1])
    weight = sum(part.weight for part in parts)
    means = {
        name: math.fsum(part.sums[name] for part in parts) / max(weight, 1)
        for name in parts[0].sums
    }
    loss, metrics, per_class = means.pop("loss"), means, []
    if parts[0].logits.ndim == 2:
        logits = torch.cat([part.logits for part in parts])[order]
        targets = torch.cat([part.targets for part in parts])[order]
        metrics, per_class = measure(logits, targets)
    return Score(
        metrics,
        loss,
        len(order),
        sum(part.tokens for part in parts),
        left_out,
        per_class,
    )


def evaluate_over(
    method: nn.Module,
    recipe: Recipe,
    dataset: AudioDataset,
    *,
    lengths: Sequence[float] = (),
    compression: Sequence[float] = (),
    time_pools: Sequence[int] = (),
    patch_sizes: Sequence[int | tuple[int, int]] = (),
    device: torch.device | str = "cpu",
    workers: int = 0,
    title: str | None = None,
) -> dict[str, list[dict]]:
    """Evaluates at several lengths, frame shifts, poolings and patch sizes.

    A model of fixed input size is given clips cut and padded to each length, as in the
    ElasticAST paper (section 3.3); other models are given clips cut to it, never padded.

    Args:
        method, recipe: from :func:`~fastast.train.load_model`.
        dataset: the clips.
        lengths: in seconds.
        compression: factors on ``frontend.frame_shift_ms``.
        time_pools: numbers of frames that are pooled to one (ElasticAST, section 3.5).
        patch_sizes: mel bins and frames, or one number for both; for a FlexiAST.
        device: of the method.
        workers: processes that decode; 0 leaves it to a thread.
        title: of a progress bar, as for :func:`evaluate`.

    Returns:
        ``{"lengths": [...], "compression": [...], "time_pools": [...], "patch_sizes": [...]}`` of
        rows with ``at`` (the length, factor or number; mel bins and frames), for the factors
        ``frame_shift_ms``, and all of :meth:`Score.to_dict`.

    Raises:
        ValueError: ``patch_sizes`` for another model.
    """
    sizes = size_pairs(patch_sizes)
    geometries = [flexible(method.model).geometry_of(size) for size in sizes]

    def row(at: float | list, geometry: PatchGeometry | None = None, **setting: float) -> dict:
        geometry = geometry or method.model.geometry
        loader = make_loader(recipe, dataset, geometry, workers=workers, **setting)
        return {"at": at} | evaluate(method, loader, device, title=title).to_dict()

    shift = recipe.frontend.frame_shift_ms
    return {
        "lengths": [row(seconds, seconds=seconds) for seconds in lengths],
        "compression": [
            row(factor, compression=factor) | {"frame_shift_ms": round(factor * shift, 6)}
            for factor in compression
        ],
        "time_pools": [row(pool, time_pool=pool) for pool in time_pools],
        "patch_sizes": [row(list(each.patch_size), each) for each in geometries],
    }
