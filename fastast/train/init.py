"""Weights to start from: what an earlier run, or another project, has learnt."""

from __future__ import annotations

import os
import pickle
from collections.abc import Collection, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from fastast.interop import from_reference
from fastast.train.run import load_model


def start_from(model: nn.Module, name: str, path: str | os.PathLike) -> None:
    """Fills a new model with pre-trained weights; its classifier stays as it is.

    Nothing in the file is executed.

    Args:
        model: with a method ``start_from``, which adapts what depends on the input's size.
        name: of the model, such as ``ssast_patch_base``.
        path: a run directory, a ``model.safetensors`` of this library, or weights as others publish
            them (``.pth``, ``.pt``, ``.bin``, ``.safetensors``): of SSAST, AST, or an ImageNet ViT
            or DeiT with timm's keys.

    Raises:
        ValueError: a model that cannot start from others, no such file, a damaged one, or
            weights that do not fit.
    """
    if not hasattr(model, "start_from"):
        raise ValueError(f"model.init: {name} does not start from other models; leave it out")
    path = Path(path)
    weights = _published(path)
    if weights is None:
        source = load_model(path)[0].model
    else:
        try:
            source = from_reference(weights, _family(weights))
        except ValueError as error:
            raise ValueError(f"model.init: {path}: {error}") from error
    try:
        model.start_from(source)
    except ValueError as error:
        raise ValueError(f"model.init: {path} does not fit {name}: {error}") from error


def _published(path: Path) -> Mapping[str, Tensor] | None:
    """The state dict in a file that is not this library's."""
    if path.suffix not in (".pth", ".pt", ".bin", ".safetensors"):
        return None
    try:
        if path.suffix != ".safetensors":
            weights = torch.load(path, map_location="cpu", weights_only=True)
            return weights.get("model", weights)  # as DeiT's authors pack it
        with safe_open(path, "pt") as file:
            if "recipe" in (file.metadata() or {}):
                return None
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (
        OSError,
        RuntimeError,
        EOFError,
        AttributeError,
        pickle.UnpicklingError,
        SafetensorError,
    ) as error:
        raise ValueError(f"model.init: {path} cannot be read: {error}") from error


def _family(keys: Collection[str]) -> str:
    """Whose weights have these keys, see :func:`fastast.from_reference`."""
    keys = {key.removeprefix("module.") for key in keys}
    if "mask_embed" in keys:
        return "ssast"
    return "ast" if any(key.startswith("v.") for key in keys) else "vit"
