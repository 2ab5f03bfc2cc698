"""Weights to start from: what an earlier run, or another project, has learnt."""

from __future__ import annotations

import os
from pathlib import Path

from torch import nn

from fastast.interop import from_reference
from fastast.interop.checkpoint import SUFFIXES, family_of, read_checkpoint
from fastast.train.run import load_model


def start_from(model: nn.Module, name: str, path: str | os.PathLike) -> None:
    """Fills a new model with pre-trained weights; its classifier stays as it is.

    Nothing in the file is executed.

    Args:
        model: with a method ``start_from``, which adapts what depends on the input's size.
        name: of the model, such as ``ssast_patch_base``.
        path: a run directory, a ``model.safetensors`` of this library, or weights as others publish
            them (:func:`~fastast.interop.checkpoint.read_checkpoint`): of SSAST, AST, or an
            ImageNet ViT or DeiT with timm's keys.

    Raises:
        ValueError: a model that cannot start from others, no such file, a damaged one, or
            weights that do not fit.
    """
    if not hasattr(model, "start_from"):
        raise ValueError(f"model.init: {name} does not start from other models; leave it out")
    path = Path(path)
    try:
        source = _open(path)
    except ValueError as error:
        raise ValueError(f"model.init: {error}") from error
    try:
        model.start_from(source)
    except ValueError as error:
        raise ValueError(f"model.init: {path} does not fit {name}: {error}") from error


def _open(path: Path) -> nn.Module:
    if path.suffix not in SUFFIXES:
        return load_model(path)[0].model
    checkpoint = read_checkpoint(path)
    if "recipe" in checkpoint.metadata:  # of this library
        return load_model(path)[0].model
    try:
        return from_reference(checkpoint.weights, family_of(checkpoint.weights))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
