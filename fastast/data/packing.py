"""Which clips share a batch. The packers are C++ (``csrc/packing``)."""

from __future__ import annotations

import numpy as np

try:
    from fastast import _packing
except ImportError as error:
    raise ImportError(
        "fastast._packing is not built, and fastast.data needs it: install fastast with "
        "`pip install -e .` (a C++ compiler and CMake are required)"
    ) from error

STRATEGIES: tuple[str, ...] = _packing.STRATEGIES
"""``next_fit``, ``first_fit`` and ``best_fit_decreasing``."""


def pack(
    lengths: np.ndarray,
    max_tokens: int,
    max_items: int,
    *,
    strategy: str = "first_fit",
    window: int = 1024,
    group: int = 1,
) -> np.ndarray:
    """Packs an epoch's clips, in its order, into batches for ``group`` ranks.

    The clips are looked at ``window`` at a time. The fullest batches are dealt out, ``group`` of
    about equally many tokens to a step; at most ``group`` that are less full stay open for the
    next window, once. Clips of the last step are spread evenly over the ranks. The rules in full
    are in ``csrc/packing/lookahead.h``.

    Strategies: ``"next_fit"`` fills one batch after the other in order (ElasticAST, section 2.2)
    and needs no window; ``"first_fit"`` puts each clip into the first batch that can hold it;
    ``"best_fit_decreasing"`` takes the longest clip first and the fullest batch that can hold it.

    Args:
        lengths: int64 ``[clips]``, tokens of each, at most ``max_tokens``.
        max_tokens: of a batch.
        max_items: clips of a batch.
        strategy: one of :data:`STRATEGIES`.
        window: clips that are looked at together.
        group: batches of an optimiser step, one per rank.

    Returns:
        int64 ``[clips]``, the batch of each clip. Rank ``r`` takes batch ``s * group + r`` in step
        ``s``. A batch is empty only in the last step, and only if fewer clips than ranks are left.

    Raises:
        ValueError: a clip that no batch can hold, an unknown strategy, or a number below 1.
    """
    lengths = np.ascontiguousarray(lengths, np.int64)
    return _packing.pack(lengths, max_tokens, max_items, strategy, window, group)
