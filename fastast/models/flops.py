"""Floating-point operations of models, counted from the shapes.

Two per multiply-add, of the matmuls alone. A training step is three forwards (the backward
multiplies by each operand's transpose), less the gradient of the input. Work done twice, such as
the scores that a fused backward recomputes, is counted once: it is a price of the implementation,
not a part of the result. Rows of a batch that belong to no clip are not counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from fastast.models.vit import PatchEmbed, Trunk


@dataclass(frozen=True)
class Flops:
    """Of one pass over some clips.

    Attributes:
        forward: of the forward.
        first: the part of it that is the first layer, or has another operand that needs no
            gradient.
    """

    forward: int
    first: int

    def __add__(self, other: Flops) -> Flops:
        return Flops(self.forward + other.forward, self.first + other.first)

    @property
    def training(self) -> int:
        """Of the forward and the backward."""
        return 3 * self.forward - self.first


def linear(rows: int, inputs: int, outputs: int) -> int:
    """A linear layer's forward."""
    return 2 * rows * inputs * outputs


def attention(pairs: int, dim: int) -> int:
    """Forward of all heads, ``dim`` channels together, over so many (query, key) pairs."""
    return 4 * pairs * dim


def pairs(lengths: Sequence[int] | np.ndarray) -> int:
    """(query, key) pairs of full attention within each of the lengths."""
    return int(np.square(np.asarray(lengths, np.int64)).sum())


def embedding(patch_embed: PatchEmbed, patches: int) -> int:
    """The forward of the patch embedding."""
    return linear(patches, patch_embed.proj.in_features, patch_embed.proj.out_features)


def blocks(trunk: Trunk, tokens: int, scored: int) -> int:
    """The forward of all blocks of a trunk.

    Args:
        trunk: gives the sizes.
        tokens: rows that go through it.
        scored: (query, key) pairs of each self-attention.
    """
    total = 0
    for block in trunk.blocks:
        dim, hidden = block.mlp.fc1.in_features, block.mlp.fc1.out_features
        total += linear(tokens, dim, 4 * dim) + 2 * linear(tokens, dim, hidden)
        total += attention(scored, dim)
    return total


def pool_folded(dim: int, heads: int, tokens: int, segments: int) -> int:
    """Our attention pooling: query times key projection, pooled rows times value projection."""
    query = linear(1, dim, dim) + linear(1, dim, dim)
    scores_and_sums = 2 * linear(tokens, dim, heads)
    return query + scores_and_sums + 2 * linear(segments, dim, dim)
