"""What becomes of a data set's tokens: how many are computed for nothing, how many are lost.

ElasticAST, section 3.6 and table 1. A model of fixed length pads short clips and cuts long ones.
ElasticAST lays the clips of a batch into rows of up to 2,048 tokens, one after the other, and pads
all rows to the longest. The flat stream has no rows; where its shapes are fixed, for a captured or
compiled graph, what a batch leaves of its budget is padding too.

Tokens are those of patches; class tokens are not counted. Shares are the paper's: of padding among
the tokens that are computed, of cut ones among those that the clips have.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fastast.data.packing import pack

ROW = 2048
"""Tokens of a row (section 2.2)."""


@dataclass(frozen=True)
class Usage:
    """Tokens of one pass over a data set.

    Attributes:
        available: of all clips.
        computed: by the model, padding included.
        cut: of the clips, but not computed.
    """

    available: int
    computed: int
    cut: int = 0

    @property
    def padding(self) -> int:
        """Tokens that are computed and are no clip's."""
        return self.computed - (self.available - self.cut)

    @property
    def padding_share(self) -> float:
        """Of the tokens that are computed."""
        return self.padding / self.computed

    @property
    def cut_share(self) -> float:
        """Of the tokens that the clips have."""
        return self.cut / self.available


def fixed_usage(tokens: Sequence[int] | np.ndarray, length: int) -> Usage:
    """Of a model whose clips are all cut and padded to ``length`` tokens.

    Args:
        tokens: of each clip, ``[clips]``.
        length: of the model's input.
    """
    tokens = _checked(tokens)
    cut = np.maximum(tokens - length, 0).sum()
    return Usage(int(tokens.sum()), len(tokens) * length, int(cut))


def row_usage(
    tokens: Sequence[int] | np.ndarray, batch_clips: int, *, row: int = ROW, seed: int = 0
) -> Usage:
    """Of ElasticAST's rows: batches of a number of clips, in random order.

    A row takes clips until the next would exceed it. The rows of a batch are as long as its
    longest.

    Args:
        tokens: of each clip, ``[clips]``.
        batch_clips: clips of a batch; the last may have fewer.
        row: tokens of a row at most.
        seed: of the order.

    Raises:
        ValueError: a clip is longer than a row.
    """
    tokens = _checked(tokens)
    if tokens.max() > row:
        raise ValueError(f"a clip has {tokens.max()} tokens, more than a row ({row}): raise row")
    order = np.random.default_rng(seed).permutation(tokens)
    computed = 0
    for begin in range(0, len(order), batch_clips):
        rows = [0]
        for count in order[begin : begin + batch_clips].tolist():
            if rows[-1] + count > row:
                rows.append(0)
            rows[-1] += count
        computed += len(rows) * max(rows)
    return Usage(int(tokens.sum()), computed)


def stream_usage(
    tokens: Sequence[int] | np.ndarray, batch_tokens: int | None = None, *, seed: int = 0
) -> Usage:
    """Of the flat stream, whose batches have just the tokens of their clips.

    Args:
        tokens: of each clip, ``[clips]``.
        batch_tokens: if shapes are fixed, the tokens that each batch has room for; clips are then
            packed first-fit, as in training.
        seed: of the order.

    Raises:
        ValueError: a clip is longer than ``batch_tokens``.
    """
    tokens = _checked(tokens)
    computed = total = int(tokens.sum())
    if batch_tokens is not None:
        order = np.random.default_rng(seed).permutation(tokens)
        computed = (int(pack(order, batch_tokens, len(order)).max()) + 1) * batch_tokens
    return Usage(total, computed)


def token_usage(
    tokens: Sequence[int] | np.ndarray,
    *,
    fixed: Sequence[int] = (512,),
    batches: Sequence[int] = (12, 24, 48, 96),
    row: int = ROW,
    seed: int = 0,
) -> list[dict]:
    """All of them, as a table.

    Args:
        tokens: of each clip, ``[clips]``.
        fixed: lengths of models of fixed length, in tokens.
        batches: clips of a batch; of fixed shapes, as many on average.
        row, seed: see :func:`row_usage`.

    Returns:
        Rows with ``input``, ``batch`` (None: it does not matter), ``computed``, ``padding`` and
        ``cut``, the latter as shares.

    Raises:
        ValueError: no clips, or a clip that is longer than a row.
    """
    tokens = _checked(tokens)
    found: list[tuple[str, int | None, Usage]] = [
        (f"fixed, {length} tokens", None, fixed_usage(tokens, length)) for length in fixed
    ]
    for batch in batches:
        found.append((f"rows of {row}", batch, row_usage(tokens, batch, row=row, seed=seed)))
    found.append(("stream", None, stream_usage(tokens)))
    for batch in batches:
        budget = max(round(batch * tokens.mean()), int(tokens.max()))
        found.append(("stream, fixed shapes", batch, stream_usage(tokens, budget, seed=seed)))
    return [
        {
            "input": name,
            "batch": batch,
            "computed": usage.computed,
            "padding": usage.padding_share,
            "cut": usage.cut_share,
        }
        for name, batch, usage in found
    ]


def _checked(tokens: Sequence[int] | np.ndarray) -> np.ndarray:
    tokens = np.asarray(tokens, np.int64)
    if not len(tokens) or tokens.min() < 1:
        raise ValueError("tokens must list at least one clip, and one token for each")
    return tokens
