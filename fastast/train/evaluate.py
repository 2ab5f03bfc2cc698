"""Accuracy of a trained model, also over lengths and time resolutions it was not trained at."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fastast.data import AudioDataset, PackedLoader
from fastast.methods import Supervised
from fastast.train.recipe import Recipe, make_loader


@dataclass(frozen=True)
class Score:
    """What one pass over a data set gave.

    Attributes:
        accuracy: share of the clips whose most likely class is theirs, in [0, 1].
        loss: mean over the clips.
        clips: number of clips evaluated.
        tokens: number of tokens computed.
    """

    accuracy: float
    loss: float
    clips: int
    tokens: int


@torch.inference_mode()
def evaluate(method: Supervised, loader: PackedLoader, device: torch.device | str) -> Score:
    """Runs every clip of the loader once, without augmentation."""
    training = method.training
    method.eval()
    correct = loss = torch.zeros((), device=device)
    clips = tokens = 0
    for batch in loader.epoch(0):
        clips += batch.num_clips
        tokens += batch.num_tokens
        batch = batch.to(device, non_blocking=True)
        out = method(batch)
        correct = correct + (out["logits"].argmax(1) == batch.targets).sum()
        loss = loss + out["loss"] * batch.num_clips
    method.train(training)
    return Score(correct.item() / clips, loss.item() / clips, clips, tokens)


def evaluate_over(
    method: Supervised,
    recipe: Recipe,
    dataset: AudioDataset,
    *,
    lengths: Sequence[float] = (),
    compression: Sequence[float] = (),
    device: torch.device | str = "cpu",
) -> dict[str, list[dict]]:
    """Evaluates at several lengths and at several frame shifts.

    A model of fixed input size is given clips cut and padded to each length, as in the
    ElasticAST paper (section 3.3); other models are given clips cut to it, never padded.

    Args:
        method, recipe: from :func:`~fastast.train.load_model`.
        dataset: the clips.
        lengths: in seconds.
        compression: factors on ``frontend.frame_shift_ms``.
        device: of the method.

    Returns:
        ``{"lengths": [...], "compression": [...]}`` of rows with ``at`` (the length or factor),
        ``accuracy``, ``loss``, ``clips`` and ``tokens``.
    """
    rows: dict[str, list[dict]] = {"lengths": [], "compression": []}
    for seconds in lengths:
        loader = make_loader(recipe, dataset, method.model.geometry, seconds=seconds)
        rows["lengths"].append({"at": seconds} | vars(evaluate(method, loader, device)))
    for factor in compression:
        loader = make_loader(recipe, dataset, method.model.geometry, compression=factor)
        rows["compression"].append({"at": factor} | vars(evaluate(method, loader, device)))
    return rows
