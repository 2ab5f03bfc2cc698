"""Supervised classification of clips."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from fastast.data import Batch


class Supervised(nn.Module):
    """Cross-entropy between a model's logits and one class per clip.

    Args:
        model: takes ``(spectrograms, grid)`` and returns logits ``[segments, classes]``.
        frontend: turns a batch's waveforms into spectrograms; it augments in training mode.
        label_smoothing: of the cross-entropy.

    The loss is the mean over the clips of the batch; empty segments count for nothing.
    """

    def __init__(
        self, model: nn.Module, frontend: nn.Module, *, label_smoothing: float = 0.0
    ) -> None:
        super().__init__()
        self.model = model
        self.frontend = frontend
        self.label_smoothing = label_smoothing

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """``loss`` (a scalar) and ``logits`` ``[segments, classes]``, float32."""
        logits = self.model(self.frontend(batch), batch.grid).float()
        loss = F.cross_entropy(logits, batch.targets, label_smoothing=self.label_smoothing)
        return {"loss": loss, "logits": logits}
