"""Class probabilities of audio files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from os import PathLike

import torch
from torch import Tensor

from fastast.data import AudioDataset
from fastast.methods import Supervised
from fastast.train.recipe import Recipe, make_loader


@torch.inference_mode()
def predict_files(
    method: Supervised,
    recipe: Recipe,
    files: Sequence[str | PathLike],
    device: torch.device | str,
) -> list[Tensor]:
    """Softmax probabilities ``[classes]`` of each file, on the CPU, in the order of ``files``.

    Args:
        method, recipe: from :func:`~fastast.train.load_model`.
        files: of any lengths, formats and sample rates; they share batches. A file counts whole,
            whatever ``data.max_seconds`` was in training; a model of fixed input size reads the
            beginning of it.
        device: of the method.

    Raises:
        AudioError: a file is missing or cannot be decoded.
    """
    recipe = replace(recipe, data=replace(recipe.data, max_seconds=None))
    dataset = AudioDataset(files, [0] * len(files), ["?"], recipe.data.sample_rate)
    found: list[Tensor] = [torch.empty(0)] * len(files)
    for batch in make_loader(recipe, dataset, method.model.geometry).epoch(0):
        logits = method(batch.to(device))["logits"][: batch.num_clips]
        order = batch.clip_ids[: batch.num_clips].tolist()
        for clip, probabilities in zip(order, logits.softmax(1).cpu(), strict=True):
            found[clip] = probabilities
    return found
