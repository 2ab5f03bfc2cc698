"""Weights to start from: what an earlier run, or another project, has learnt."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import torch
from torch import nn

from fastast.interop import from_reference
from fastast.train.run import load_model


def start_from(model: nn.Module, name: str, path: str | os.PathLike) -> None:
    """Fills a new model with pre-trained weights; its classifier stays as it is.

    Args:
        model: with a method ``start_from``, which adapts what depends on the input's size.
        name: of the model, such as ``ssast_patch_base``.
        path: a run directory, a ``model.safetensors``, or weights of the model's family as its
            authors publish them (``.pth``, ``.pt``).

    Raises:
        ValueError: a model that cannot start from others, no such file, a damaged one, or
            weights that do not fit.
    """
    if not hasattr(model, "start_from"):
        raise ValueError(f"model.init: {name} does not start from other models; leave it out")
    path = Path(path)
    if path.suffix in (".pth", ".pt"):
        try:
            weights = torch.load(path, map_location="cpu", weights_only=True)
        except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
            raise ValueError(f"model.init: {path} cannot be read: {error}") from error
        source = from_reference(weights, name.split("_")[0])
    else:
        source = load_model(path)[0].model
    try:
        model.start_from(source)
    except ValueError as error:
        raise ValueError(f"model.init: {path} does not fit {name}: {error}") from error
