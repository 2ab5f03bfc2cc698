"""Moves a packed stream's rows into a padded batch and back."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Padding:
    """Rows of a stream laid out as ``[batch, longest]``, zeros after each entry's end.

    Args:
        lengths: rows of each entry, in the stream's order.
        device: of the streams to be laid out.

    Attributes:
        shape: ``(batch, longest)``.
        valid: bool ``[batch, longest]``, False on padding; ``None`` if there is none.
    """

    def __init__(self, lengths: Sequence[int], device: torch.device | str = "cpu") -> None:
        sizes = torch.tensor(lengths)
        self.shape = (len(lengths), max(lengths))
        valid = torch.arange(self.shape[1]) < sizes[:, None]
        self.place = valid.flatten().nonzero().squeeze(1).to(device)  # [total] in the flat batch
        self.valid = None if valid.all() else valid.to(device)

    @property
    def num_rows(self) -> int:
        """Rows of the batch, padding included."""
        return self.shape[0] * self.shape[1]

    def pad(self, stream: Tensor) -> Tensor:
        """``[total, ...] -> [batch, longest, ...]``."""
        batch = stream.new_zeros(self.num_rows, *stream.shape[1:])
        return batch.index_copy(0, self.place, stream).unflatten(0, self.shape)

    def unpad(self, batch: Tensor) -> Tensor:
        """``[batch, longest, ...] -> [total, ...]``."""
        return batch.flatten(0, 1)[self.place]

    def key_mask(self) -> Tensor | None:
        """Which keys may be attended to, for all heads and queries: ``[batch, 1, 1, longest]``."""
        return None if self.valid is None else self.valid[:, None, None]
