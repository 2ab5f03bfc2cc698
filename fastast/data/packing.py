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


def next_fit(lengths: np.ndarray, max_tokens: int, max_items: int) -> np.ndarray:
    """Fills batches in order: a clip that does not fit any more opens the next batch.

    This is ElasticAST's packing (section 2, "Sequence Packing"). It keeps the clips' order, so
    the batches of a shuffled epoch are as random as the shuffle.

    Args:
        lengths: int64 ``[clips]``, tokens of each, at most ``max_tokens``.
        max_tokens: of a batch.
        max_items: clips of a batch.

    Returns:
        int64 ``[clips]``, the batch of each clip: 0, 1, ... in order.

    Raises:
        ValueError: a clip that no batch can hold.
    """
    return _packing.next_fit(np.ascontiguousarray(lengths, np.int64), max_tokens, max_items)
