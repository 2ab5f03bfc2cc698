"""What the converters share."""

from __future__ import annotations

from collections.abc import Iterable


def count_blocks(keys: Iterable[str], prefix: str) -> int:
    """Number of trunk blocks whose keys are ``{prefix}{block}.*``.

    Raises:
        KeyError: there is none.
    """
    blocks = {int(key.removeprefix(prefix).split(".")[0]) for key in keys if key.startswith(prefix)}
    if not blocks:
        raise KeyError(f"{prefix}0")
    return 1 + max(blocks)
