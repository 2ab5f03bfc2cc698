"""What the published weights of AST, FlexiAST and SSAST share: a timm 0.4.5 ViT in ``v.*``."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn

from fastast.interop.keys import count_blocks
from fastast.models import AST, SSAST

Classifier = TypeVar("Classifier", AST, SSAST)


def classifier(
    kind: Callable[..., Classifier],
    weights: dict[str, Tensor],
    stride: tuple[int, int],
    config: dict,
) -> Classifier:
    """Converts ``v.*`` and ``mlp_head.*``; the unused ImageNet heads are left out.

    ``config``: ``num_mels`` (default 128) and ``input_frames``. The default of the latter is the
    shortest length that gives the number of columns of the position table.
    """
    height, width = weights["v.patch_embed.proj.weight"].shape[2:]
    num_mels = config.get("num_mels", 128)
    freq_patches = (num_mels - height) // stride[0] + 1
    patches = weights["v.pos_embed"].shape[1] - 2
    time_patches, rest = divmod(patches, freq_patches)
    if rest:
        raise ValueError(
            f"v.pos_embed has {patches} patches, which do not fill {freq_patches} rows of "
            f"frequency: config['stride'] {tuple(stride)} or config['num_mels'] {num_mels} is "
            "not the model's"
        )
    model = kind(
        weights["mlp_head.1.weight"].shape[0],
        input_frames=config.get("input_frames", (time_patches - 1) * stride[1] + width),
        num_mels=num_mels,
        patch_size=(height, width),
        stride=stride,
        **trunk_size(weights),
    ).to(weights["v.cls_token"].dtype)
    model.load_state_dict(encoder(weights) | head(weights))
    return model


def trunk_size(weights: dict[str, Tensor]) -> dict[str, int]:
    """Width, depth and heads; heads are 64 channels wide at every size."""
    dim = weights["v.cls_token"].shape[2]
    return {"dim": dim, "depth": count_blocks(weights, "v.blocks."), "num_heads": dim // 64}


def encoder(
    weights: dict[str, Tensor],
    patch_embed: str = "v.patch_embed.proj",
    table: str = "v.pos_embed",
) -> dict[str, Tensor]:
    """Patch embedding, class tokens, positions and trunk under our names.

    Args:
        weights: as published.
        patch_embed: key of the patch embedding, without ``.weight`` and ``.bias``.
        table: key of the position table, ``[1, prefix + patches, dim]``.
    """
    tokens = [weights[key] for key in ("v.cls_token", "v.dist_token") if key in weights]
    converted = {
        # [dim, 1, height, width]
        "patch_embed.proj.weight": weights[f"{patch_embed}.weight"].flatten(1),
        "patch_embed.proj.bias": weights[f"{patch_embed}.bias"],
        "prefix": torch.cat(tokens, 1)[0],
        "positions.table": weights[table][0],
    }
    for key, value in weights.items():
        if key.startswith(("v.blocks.", "v.norm.")):
            converted[key.replace("v.", "trunk.", 1)] = value
    return converted


def head(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Last norm and classifier under our names."""
    return {
        f"{ours}.{part}": weights[f"mlp_head.{theirs}.{part}"]
        for theirs, ours in enumerate(("norm", "head"))
        for part in ("weight", "bias")
    }


def to_encoder(
    model: nn.Module,
    patch_embed: str = "v.patch_embed.proj",
    table: str = "v.pos_embed",
) -> dict[str, Tensor]:
    """The inverse of :func:`encoder`."""
    weights = model.state_dict()
    kernel = weights["patch_embed.proj.weight"].unflatten(1, (1, *model.geometry.patch_size))
    converted = {
        f"{patch_embed}.weight": kernel,
        f"{patch_embed}.bias": weights["patch_embed.proj.bias"],
        table: weights["positions.table"][None],
    }
    for row, key in zip(weights["prefix"], ("v.cls_token", "v.dist_token"), strict=False):
        converted[key] = row[None, None]
    for key, value in weights.items():
        if key.startswith("trunk."):
            converted[key.replace("trunk.", "v.", 1)] = value
    return converted


def to_classifier(model: nn.Module) -> dict[str, Tensor]:
    """The inverse of :func:`classifier`."""
    return to_encoder(model) | to_head(model)


def to_head(model: nn.Module) -> dict[str, Tensor]:
    """The inverse of :func:`head`."""
    weights = model.state_dict()
    return {
        f"mlp_head.{theirs}.{part}": weights[f"{ours}.{part}"]
        for theirs, ours in enumerate(("norm", "head"))
        for part in ("weight", "bias")
    }
