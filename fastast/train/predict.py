"""Class probabilities of audio files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from os import PathLike

import torch
from torch import Tensor

from fastast.data import AudioDataset, Manifest
from fastast.methods import Supervised
from fastast.train.bar import progress_bar
from fastast.train.build import learns_classes, make_loader
from fastast.train.recipe import Recipe


def predict_files(
    method: Supervised,
    recipe: Recipe,
    files: Sequence[str | PathLike],
    device: torch.device | str,
    *,
    title: str | None = None,
) -> list[Tensor]:
    """Probabilities ``[classes]`` of each file, on the CPU, in the order of ``files``.

    They add up to one if the method learnt one class per clip (cross-entropy); if it learnt any
    number of them (binary cross-entropy), each stands for itself.

    Args:
        method, recipe: from :func:`~fastast.train.load_model`.
        files: of any lengths, formats and sample rates; they share batches. A file counts whole,
            whatever ``data.max_seconds`` was in training; a model of fixed input size reads the
            beginning of it.
        device: of the method.
        title: of a progress bar, where the output is a terminal. Default: none.

    Raises:
        ValueError: the method learns no classes.
        AudioError: a file is missing or cannot be decoded.
    """
    names = [str(number) for number in range(len(files))]  # a file may be asked for twice
    manifest = Manifest([str(file) for file in files], [()] * len(files), [], names=names)
    return predict_clips(method, recipe, manifest, device, title=title, unit="files")


@torch.inference_mode()
def predict_clips(
    method: Supervised,
    recipe: Recipe,
    manifest: Manifest,
    device: torch.device | str,
    *,
    title: str | None = None,
    unit: str = "clips",
) -> list[Tensor]:
    """As :func:`predict_files`, of clips that may be parts of files.

    Args:
        method, recipe: from :func:`~fastast.train.load_model`.
        manifest: the clips; labels are not looked at.
        device: of the method.
        title: of a progress bar, where the output is a terminal. Default: none.
        unit: what the bar counts.

    Raises:
        ValueError: the method learns no classes.
        AudioError: a file is missing or cannot be decoded.
    """
    if not learns_classes(recipe):
        raise ValueError(
            f"the model was pre-trained without labels (train.method {recipe.train.method}) and "
            "knows no classes: fine-tune it first, with model.init"
        )
    recipe = replace(recipe, data=replace(recipe.data, max_seconds=None, bad_files="stop"))
    dataset = AudioDataset(manifest, recipe.data.sample_rate, cache=False)
    found: list[Tensor] = [torch.empty(0)] * len(manifest)
    with progress_bar(title, len(manifest), unit) as advance:
        for batch in make_loader(recipe, dataset, method.model.geometry).epoch(0):
            logits = method(batch.to(device))["logits"]
            single = method.loss == "cross_entropy"
            probabilities = (logits.softmax(1) if single else logits.sigmoid()).cpu()
            for clip, row in zip(batch.clip_ids.tolist(), probabilities, strict=True):
                if clip >= 0:
                    found[clip] = row
            advance(batch.num_clips)
    return found
