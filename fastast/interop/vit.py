"""ImageNet weights of ViT and DeiT, with the keys of timm, which DeiT's authors use as well."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastast.interop.keys import count_blocks
from fastast.models.grid_vit import GridViT


def from_state_dict(weights: dict[str, Tensor], config: dict) -> GridViT:
    """Converts patch embedding, class tokens, positions and blocks; classifiers are left out.

    The result is an encoder for spectrograms as large as the images, to start an AST, an SSAST or
    an ElasticAST from. Its ``forward_features`` equal the original's on an image whose channels
    are all the spectrogram, so its kernel is the sum over channels (AST, section 2.2, has their
    mean; its code and its descendants' sum them up). Heads are 64 channels wide.

    ``config`` has no settings.
    """
    kernel = weights["patch_embed.proj.weight"].sum(1)  # [dim, height, width]
    dim, height, width = kernel.shape
    tokens = [weights[key] for key in ("cls_token", "dist_token") if key in weights]
    patches = weights["pos_embed"].shape[1] - len(tokens)
    side = math.isqrt(patches)
    if side**2 != patches or "cls_token" not in weights:
        raise ValueError(
            f"pos_embed has {patches} patches, but these are weights of square images with a class "
            "token: choose a ViT or DeiT of that kind, such as timm's vit_base_patch16_224"
        )
    model = GridViT(
        input_frames=side * width,
        num_mels=side * height,
        patch_size=(height, width),
        stride=(height, width),
        distilled=len(tokens) == 2,
        dim=dim,
        depth=count_blocks(weights, "blocks."),
        num_heads=dim // 64,
        mlp_ratio=weights["blocks.0.mlp.fc1.weight"].shape[0] / dim,
    ).to(kernel.dtype)
    converted = {
        "patch_embed.proj.weight": kernel.flatten(1),
        "patch_embed.proj.bias": weights["patch_embed.proj.bias"],
        "prefix": torch.cat(tokens, 1)[0],
        "positions.table": weights["pos_embed"][0],
    }
    others = ("patch_embed.", "pos_embed", "cls_token", "dist_token")
    for key, value in weights.items():
        if not key.startswith((*others, "head.", "head_dist.", "pre_logits.")):
            converted[f"trunk.{key}"] = value
    model.load_state_dict(converted)
    return model
