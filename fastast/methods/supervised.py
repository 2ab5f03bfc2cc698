"""Supervised classification of clips."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from fastast.data import Batch


class Supervised(nn.Module):
    """A model, and how far its logits are from the classes of the clips.

    Args:
        model: takes ``(spectrograms, grid)`` and returns logits ``[segments, classes]``.
        frontend: turns a batch's waveforms into spectrograms; it augments in training mode.
        loss: ``"cross_entropy"``, between the softmax and one class per clip (or, where clips are
            mixed, their shares); or ``"binary_cross_entropy"``, between the sigmoids and any
            number of classes, averaged over the classes (AST on AudioSet).
        label_smoothing: of the cross-entropy.

    The loss is the sum over the clips of the batch, divided by ``batch.loss_denominator``: their
    number, unless a step has several batches. Clips without a class, and empty segments, add
    nothing.

    Raises:
        ValueError: an unknown loss, or label smoothing of the binary cross-entropy.
    """

    def __init__(
        self,
        model: nn.Module,
        frontend: nn.Module,
        *,
        loss: Literal["cross_entropy", "binary_cross_entropy"] = "cross_entropy",
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__()
        if loss not in ("cross_entropy", "binary_cross_entropy"):
            raise ValueError(
                f"loss must be 'cross_entropy' or 'binary_cross_entropy', got {loss!r}"
            )
        if label_smoothing and loss == "binary_cross_entropy":
            raise ValueError("label_smoothing is for loss='cross_entropy'; set it to 0")
        self.model = model
        self.frontend = frontend
        self.loss = loss
        self.label_smoothing = label_smoothing

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """``loss`` (a scalar) and ``logits`` ``[segments, classes]``, float32."""
        logits = self.model(self.frontend(batch), batch.grid).float()
        targets = batch.targets
        if self.loss == "cross_entropy":
            smoothing = self.label_smoothing
            losses = F.cross_entropy(logits, targets, reduction="none", label_smoothing=smoothing)
        else:
            losses = binary_cross_entropy(logits, targets)
        counted = losses.where(batch.clip_ids >= 0, 0.0)
        return {"loss": counted.sum() / batch.loss_denominator, "logits": logits}

    def flops(self, batch: Batch) -> int:
        """Of a training step on a batch, filterbank and optimiser apart; see
        :mod:`fastast.models.flops`."""
        return self.model.flops(batch.grid.segments.host_offsets.diff().numpy()).training


def binary_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean over the classes of each clip: ``[segments]``.

    Args:
        logits: ``[segments, classes]``.
        targets: of the same shape, or int64 ``[segments]``; clips with a negative class give 0.
    """
    labelled = None
    if targets.ndim == 1:
        labelled = targets >= 0
        targets = F.one_hot(targets.clamp(min=0), logits.shape[1]).to(logits.dtype)
    losses = F.binary_cross_entropy_with_logits(logits, targets, reduction="none").mean(1)
    return losses if labelled is None else losses.where(labelled, 0.0)
