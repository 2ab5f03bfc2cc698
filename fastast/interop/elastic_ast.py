"""ElasticAST's published weights (JiuFengSC/ElasticAST, which states no licence)."""

from __future__ import annotations

import torch
from torch import Tensor

from fastast.interop.keys import count_blocks
from fastast.models import ElasticAST
from fastast.nn import AttentionPool


def from_state_dict(weights: dict[str, Tensor], config: dict) -> ElasticAST:
    """Converts the original's separate query and key-value projections to our fused one.

    The original scales attention nowhere, so the model has ``attention_scale=1``. Its key bias
    in the pooling cancels and is left out. ``config``: ``pool`` (``"attention"``, or ``"mean"``
    for models trained with ``avg_pool_tk``) and ``patch_size`` (default square).
    """
    patch = weights["patch_embed.0.weight"]  # [dim, height * width]
    dim = patch.shape[0]
    side = round(patch.shape[1] ** 0.5)
    patch_size = tuple(config.get("patch_size", (side, side)))
    pool = config.get("pool", "attention")
    freq = weights["pos_embed_freq"]
    blocks = "blocks.modules_list."
    model = ElasticAST(
        weights["head.weight"].shape[0],
        num_mels=freq.shape[0] * patch_size[0],
        patch_size=patch_size,
        max_time_patches=weights["pos_embed_time"].shape[0],
        dim=dim,
        depth=count_blocks(weights, blocks),
        num_heads=dim // 64,
        pool=pool,
        attention_scale=1.0,
    ).to(patch.dtype)
    converted = {
        "patch_embed.proj.weight": patch,
        "patch_embed.proj.bias": weights["patch_embed.0.bias"],
        "positions.freq": freq,
        "positions.time": weights["pos_embed_time"],
    }
    for part in ("weight", "bias"):
        converted[f"trunk.norm.{part}"] = weights[f"norm.{part}"]
        converted[f"norm.{part}"] = weights[f"mlp_norm.{part}"]
        converted[f"head.{part}"] = weights[f"head.{part}"]
    for key, value in weights.items():
        if not key.startswith(blocks) or ".attn.to_kv." in key:
            continue
        name = "trunk.blocks." + key.removeprefix(blocks)
        if ".attn.to_q." in key:
            name = name.replace("to_q", "qkv")
            value = torch.cat([value, weights[key.replace("to_q", "to_kv")]])
        converted[name] = value
    if pool == "attention":
        converted["pool.query"] = weights["attn_pool_queries"]
        converted["pool.k.weight"] = weights["attn_pool.to_kv.weight"][:dim]
        for part in ("weight", "bias"):
            converted[f"pool.q.{part}"] = weights[f"attn_pool.to_q.{part}"]
            converted[f"pool.v.{part}"] = weights[f"attn_pool.to_kv.{part}"][dim:]
            converted[f"pool.proj.{part}"] = weights[f"attn_pool.proj.{part}"]
    model.load_state_dict(converted)
    return model


def to_state_dict(model: ElasticAST) -> dict[str, Tensor]:
    """The inverse. What scales attention here goes into the queries there, and the key bias of the
    pooling, which cancels, is zero."""
    weights = model.state_dict()
    dim = weights["positions.freq"].shape[1]
    converted = {
        "patch_embed.0.weight": weights["patch_embed.proj.weight"],
        "patch_embed.0.bias": weights["patch_embed.proj.bias"],
        "pos_embed_freq": weights["positions.freq"],
        "pos_embed_time": weights["positions.time"],
    }
    for part in ("weight", "bias"):
        converted[f"norm.{part}"] = weights[f"trunk.norm.{part}"]
        converted[f"mlp_norm.{part}"] = weights[f"norm.{part}"]
        converted[f"head.{part}"] = weights[f"head.{part}"]
    attention = model.trunk.blocks[0].attn
    scale = attention.scale or (dim // attention.num_heads) ** -0.5
    for key, value in weights.items():
        if not key.startswith("trunk.blocks."):
            continue
        name = "blocks.modules_list." + key.removeprefix("trunk.blocks.")
        if ".attn.qkv." in key:
            converted[name.replace("qkv", "to_q")] = scale * value[:dim]
            converted[name.replace("qkv", "to_kv")] = value[dim:]
        else:
            converted[name] = value
    if isinstance(model.pool, AttentionPool):
        converted["attn_pool_queries"] = weights["pool.query"]
        key_bias = torch.zeros_like(weights["pool.v.bias"])
        for part, of_keys in (("weight", weights["pool.k.weight"]), ("bias", key_bias)):
            converted[f"attn_pool.to_q.{part}"] = model.pool.scale * weights[f"pool.q.{part}"]
            converted[f"attn_pool.to_kv.{part}"] = torch.cat([of_keys, weights[f"pool.v.{part}"]])
            converted[f"attn_pool.proj.{part}"] = weights[f"pool.proj.{part}"]
    return converted
