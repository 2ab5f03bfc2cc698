"""Floating-point operations of the contenders, counted from the shapes.

Two per multiply-add, of the matmuls alone, over the rows that a contender computes, padding
included. A training step is three forwards (the backward multiplies by each operand's transpose),
less the gradient of the input. Work done twice, such as the scores that a fused backward
recomputes, is counted once: it is a price of the implementation, not a part of the result.
"""

from __future__ import annotations

from collections.abc import Sequence

from fastast import ElasticAST


def linear(rows: int, inputs: int, outputs: int) -> int:
    """A linear layer's forward."""
    return 2 * rows * inputs * outputs


def attention(pairs: int, dim: int) -> int:
    """Forward of all heads, ``dim`` channels together, over so many (query, key) pairs."""
    return 4 * pairs * dim


def pairs(lengths: Sequence[int]) -> int:
    """(query, key) pairs of full attention within each of the lengths."""
    return sum(length * length for length in lengths)


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


def pool_folded(dim: int, heads: int, tokens: int, segments: int) -> int:
    """Our attention pooling: query times key projection, pooled rows times value projection."""
    query = linear(1, dim, dim) + linear(1, dim, dim)
    scores_and_sums = 2 * linear(tokens, dim, heads)
    return query + scores_and_sums + 2 * linear(segments, dim, dim)


def elastic_step(model: ElasticAST, tokens: int, scored: int, pooling: int, clips: int) -> int:
    """A training step of ElasticAST.

    Args:
        model: gives the sizes.
        tokens: rows through the trunk.
        scored: (query, key) pairs of each self-attention.
        pooling: FLOPs of the pooling's forward.
        clips: rows of the head.
    """
    embedding, head = model.patch_embed.proj, model.head
    dim = embedding.out_features
    embed = linear(tokens, embedding.in_features, dim)
    blocks = sum(
        linear(tokens, dim, 4 * dim)
        + attention(scored, dim)
        + 2 * linear(tokens, dim, block.mlp.fc1.out_features)
        for block in model.trunk.blocks
    )
    forward = embed + blocks + pooling + linear(clips, dim, head.out_features)
    return 3 * forward - embed
