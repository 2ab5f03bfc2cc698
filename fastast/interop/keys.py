"""What the converters share."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


def count_blocks(keys: Iterable[str], prefix: str) -> int:
    """Number of trunk blocks whose keys are ``{prefix}{block}.*``.

    Raises:
        KeyError: there is none.
    """
    blocks = {int(key.removeprefix(prefix).split(".")[0]) for key in keys if key.startswith(prefix)}
    if not blocks:
        raise KeyError(f"{prefix}0")
    return 1 + max(blocks)


def ast_entries(weights: dict[str, Tensor], patch_embed: str, table: str) -> dict[str, Tensor]:
    """The state dict of an :class:`~fastast.AST`, from a timm ViT ``v`` and its ``mlp_head``.

    Args:
        weights: as published.
        patch_embed: key of the patch embedding, without ``.weight`` and ``.bias``.
        table: key of the position table, ``[1, prefix + patches, dim]``.
    """
    tokens = [weights[key] for key in ("v.cls_token", "v.dist_token") if key in weights]
    entries = {
        "patch_embed.proj.weight": weights[f"{patch_embed}.weight"].flatten(1),
        "patch_embed.proj.bias": weights[f"{patch_embed}.bias"],
        "prefix": torch.cat(tokens, 1)[0],
        "positions.table": weights[table][0],
    }
    for part in ("weight", "bias"):
        entries[f"norm.{part}"] = weights[f"mlp_head.0.{part}"]
        entries[f"head.{part}"] = weights[f"mlp_head.1.{part}"]
    for key, value in weights.items():
        if key.startswith(("v.blocks.", "v.norm.")):
            entries[key.replace("v.", "trunk.", 1)] = value
    return entries
