"""What all dense forms of ElasticAST share: the same parameters on ``[batch, length, dim]``."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from fastast import ElasticAST
from fastast.nn import AttentionPool

Attention = Callable[[Tensor, Tensor, Tensor, Tensor | None, float], Tensor]
"""``(q, k, v, mask, scale) -> out``, see :mod:`bench.peers.attention`."""


def split_heads(x: Tensor, heads: int) -> Tensor:
    """``[batch, length, dim] -> [batch, heads, length, head_dim]``, a view."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """The inverse of :func:`split_heads`."""
    return x.transpose(1, 2).flatten(2)


def embed(model: ElasticAST, patches: Tensor, freq: Tensor, time: Tensor) -> Tensor:
    """Linear patch embedding plus the two position tables (section 3.2).

    Args:
        patches: ``[batch, length, patch_freq * patch_time]``.
        freq, time: ``[batch, length]`` or ``[length]``, places in the clip's grid of patches.
    """
    positions = F.embedding(freq, model.positions.freq) + F.embedding(time, model.positions.time)
    return model.patch_embed.proj(patches) + positions


def encode(model: ElasticAST, x: Tensor, mask: Tensor | None, attention: Attention) -> Tensor:
    """The trunk on a dense batch: pre-norm blocks and the final LayerNorm."""
    for block in model.trunk.blocks:
        heads = block.attn.num_heads
        scale = (x.shape[-1] // heads) ** -0.5 if block.attn.scale is None else block.attn.scale
        q, k, v = (split_heads(y, heads) for y in block.attn.qkv(block.norm1(x)).chunk(3, -1))
        x = x + block.attn.proj(merge_heads(attention(q, k, v, mask, scale)))
        x = x + block.mlp.fc2(F.gelu(block.mlp.fc1(block.norm2(x))))
    return model.trunk.norm(x)


def pool(
    layer: AttentionPool, x: Tensor, query: Tensor, mask: Tensor | None, attention: Attention
) -> Tensor:
    """Masked attention pooling as the paper has it: keys and values of every token.

    Args:
        x: ``[batch, length, dim]``.
        query: ``[batch or 1, queries, dim]``, the learned query repeated.
        mask: broadcastable to ``[batch, heads, queries, length]``.

    Returns:
        ``[batch, queries, dim]``.
    """
    heads = layer.num_heads
    q = split_heads(layer.q(query), heads).expand(len(x), -1, -1, -1)
    k, v = split_heads(layer.k(x), heads), split_heads(layer.v(x), heads)
    return layer.proj(merge_heads(attention(q, k, v, mask, layer.scale)))


def clip_patches(clip: Tensor, patch_size: tuple[int, int]) -> Tensor:
    """Non-overlapping patches of a spectrogram, frequency-major, frequency first within each.

    Args:
        clip: ``[..., frames, num_mels]``; what is left over at either end is not used.

    Returns:
        ``[..., f' * t', patch_freq * patch_time]``.
    """
    height, width = patch_size
    frames, mels = clip.shape[-2] // width, clip.shape[-1] // height
    clip = clip[..., : frames * width, : mels * height]
    tiles = clip.unflatten(-1, (mels, height)).unflatten(-3, (frames, width))
    # [..., t', width, f', height] -> [..., f', t', height, width]
    return tiles.movedim((-2, -4, -1, -3), (-4, -3, -2, -1)).flatten(-2).flatten(-3, -2)
