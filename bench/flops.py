"""Floating-point operations of the contenders, counted from the shapes.

As :mod:`fastast.models.flops` counts them, but over the rows that a contender computes, padding
included.
"""

from __future__ import annotations

from fastast import ElasticAST
from fastast.models.flops import attention, blocks, embedding, linear, pairs, pool_folded

__all__ = ["attention", "elastic_step", "linear", "pairs", "pool_folded", "pool_projected"]


def pool_projected(dim: int, tokens: int, queries: int, outputs: int, scored: int) -> int:
    """Attention pooling that projects every token to a key and a value.

    Args:
        dim: of the rows.
        tokens: rows that become keys and values.
        queries: rows that the query projection sees, repeats of the learned query included.
        outputs: rows that the output projection sees.
        scored: (query, key) pairs.
    """
    projections = linear(queries + outputs + 2 * tokens, dim, dim)
    return projections + attention(scored, dim)


def elastic_step(model: ElasticAST, tokens: int, scored: int, pooling: int, clips: int) -> int:
    """A training step of ElasticAST.

    Args:
        model: gives the sizes.
        tokens: rows through the trunk.
        scored: (query, key) pairs of each self-attention.
        pooling: FLOPs of the pooling's forward.
        clips: rows of the head.
    """
    first, head = embedding(model.patch_embed, tokens), model.head
    forward = first + blocks(model.trunk, tokens, scored) + pooling
    return 3 * (forward + linear(clips, head.in_features, head.out_features)) - first
