r"""SSAST's pre-training: masked patches are to be recognised and to be restored.

Gong, Lai, Chung and Glass, "SSAST: Self-Supervised Audio Spectrogram Transformer", AAAI 2022,
equation 1 and algorithm 1. Of each clip some patches :math:`x_i, i \in I` are masked. From
the tokens at their places, one head predicts :math:`c_i`, which is to match its own patch better
than the clip's other masked ones, and another :math:`r_i`, which is to equal it:

.. math::
    \mathcal{L}_d = -\frac{1}{|I|} \sum_{i \in I}
    \log \frac{e^{c_i \cdot x_i}}{\sum_{j \in I} e^{c_i \cdot x_j}}, \qquad
    \mathcal{L}_g = \frac{1}{|I|} \sum_{i \in I} \mathrm{mean}\,(r_i - x_i)^2, \qquad
    \mathcal{L} = \mathcal{L}_d + \lambda \mathcal{L}_g

Clips of any lengths share a batch: the sum over :math:`j` stays within the clip, and each clip
counts alike.

The published code differs from the paper in three ways, each an option here: its softmax runs over
the predictions, for a given patch (``negatives="predictions"``); the two losses have masks, and so
forward passes, of their own (``separate_masks``); and its clusters are drawn differently
(:class:`~fastast.tokens.ClusteredMask`, ``as_code``).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np
import torch.nn.functional as F
from torch import Tensor, nn

from fastast.methods.shares import row_shares
from fastast.models.flops import Flops, linear, pairs
from fastast.ops import info_nce
from fastast.random import purpose_key
from fastast.tokens import Mask

if TYPE_CHECKING:
    from fastast.data import Batch
    from fastast.models import SSASTPretraining

_SECOND_MASK = purpose_key("ssast generative mask")


class MaskedSpectrogramModeling(nn.Module):
    """Joint discriminative and generative masked spectrogram patch modelling.

    Args:
        model: takes ``(spectrograms, masked, grid)`` and has the two heads.
        frontend: turns a batch's waveforms into spectrograms; it augments in training mode.
        mask: which patches are masked. SSAST: 400 of 512, in clusters where patches are square
            (:class:`~fastast.tokens.ClusteredMask`), else one by one
            (:class:`~fastast.tokens.UnstructuredMask`).
        generative_weight: :math:`\\lambda`.
        negatives: what the masked patch, or its prediction, is contrasted with: the clip's other
            ``"targets"`` for a given prediction (the paper's equation 1), or its other
            ``"predictions"`` for a given target (its code).
        separate_masks: mask anew, and encode again, for the generative loss.
        seed: of the masks, which also depend on clip and epoch. Validation is masked alike in
            every epoch, since its batches are of epoch 0.

    The loss is the sum over the clips of the batch, divided by ``batch.loss_denominator``: their
    number, unless a step has several batches. Labels are not looked at. A clip of a single patch
    has none masked and adds nothing.

    Raises:
        ValueError: an unknown ``negatives``, or a negative weight.
    """

    def __init__(
        self,
        model: SSASTPretraining,
        frontend: nn.Module,
        mask: Mask,
        *,
        generative_weight: float = 10.0,
        negatives: Literal["targets", "predictions"] = "targets",
        separate_masks: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if negatives not in ("targets", "predictions"):
            raise ValueError(f"negatives must be 'targets' or 'predictions', got {negatives!r}")
        if generative_weight < 0:
            raise ValueError(f"generative_weight must not be negative, got {generative_weight}")
        self.model = model
        self.frontend = frontend
        self.mask = mask
        self.generative_weight = generative_weight
        self.negatives = negatives
        self.separate_masks = separate_masks
        self.seed = seed

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Scalars, each the mean over the clips.

        ``loss``; its parts ``discriminative`` and ``generative``; and ``accuracy``, the share of
        the masked patches that are the most probable for their own predictions.
        """
        spectrograms, grid = self.frontend(batch), batch.grid
        masked = self._draw_mask(batch, self.seed)
        restored = self.model(spectrograms, masked, grid)

        predictions = self.model.discriminate(restored.features).float()
        targets = restored.patches.float()
        if self.negatives == "targets":
            contrast = info_nce(predictions, targets, grid.segments, masked)
            found = contrast.found_key
        else:
            contrast = info_nce(targets, predictions, grid.segments, masked)
            found = contrast.found_query
        weight = row_shares(batch, masked)
        discriminative = (contrast.loss * weight).sum()
        accuracy = (found * weight).sum()

        if self.separate_masks:
            masked = self._draw_mask(batch, self.seed ^ _SECOND_MASK)
            restored = self.model(spectrograms, masked, grid)
        generated = self.model.generate(restored.features).float()
        errors = F.mse_loss(generated, restored.patches.float(), reduction="none").mean(1)
        generative = (errors * row_shares(batch, masked)).sum()
        return {
            "loss": discriminative + self.generative_weight * generative,
            "discriminative": discriminative.detach(),
            "generative": generative.detach(),
            "accuracy": accuracy,
        }

    def flops(self, batch: Batch) -> int:
        """Of a training step on a batch, filterbank and optimiser apart; see
        :mod:`fastast.models.flops`.

        Heads and losses are counted at the masked patches, whose results alone are used.
        """
        lengths = batch.grid.segments.host_offsets.diff().numpy().astype(np.int64)
        lengths = lengths[lengths > 0]
        geometry, model = self.model.geometry, self.model
        times = (lengths - geometry.prefix) // geometry.freq_patches
        kept = self.mask.num_kept(geometry.freq_patches, times)
        masked = geometry.freq_patches * times - kept
        rows, pixels = int(masked.sum()), geometry.patch_size[0] * geometry.patch_size[1]
        total = model.encoding_flops(lengths)
        if self.separate_masks:
            total = total + total
        scores = linear(pairs(masked), pixels, 1)  # of predictions with patches, which are given
        total += model.head_flops(rows) + model.head_flops(rows) + Flops(scores, scores)
        return total.training

    def _draw_mask(self, batch: Batch, seed: int) -> Tensor:
        return self.mask(
            batch.grid, self.model.geometry, batch.clip_ids, seed=seed, epoch=batch.epoch
        )
