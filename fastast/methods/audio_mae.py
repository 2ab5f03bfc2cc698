r"""Audio-MAE's pre-training: hidden patches are to be restored.

Huang et al., "Masked Autoencoders that Listen", NeurIPS 2022, section 3, "Objective". Of each clip
some patches :math:`x_i, i \in I` of :math:`d` pixels are hidden, and restored as :math:`y_i` from
the others:

.. math::
    \ell_i = \frac{1}{d} |y_i - \hat x_i|^2, \qquad
    \mathcal{L} = \frac{1}{S} \sum_{s=1}^S \frac{1}{|I_s|} \sum_{i \in I_s} \ell_i

where :math:`\hat x_i` is the patch itself, or the patch less its mean over its deviation: with
:math:`\bar x_i` and :math:`\sigma_i^2` (unbiased) over its pixels,
:math:`(x_i - \bar x_i) / \sqrt{\sigma_i^2 + 10^{-6}}`.

Clips of any lengths share a batch. The mean is over clips; or it is over all hidden patches alike,
:math:`\sum_i \ell_i / \sum_s |I_s|`, where longer clips count for more. For clips of equal length,
which the original has, the two are the same. Either is exact over all batches and processes of a
step.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastast.methods.shares import clip_shares

if TYPE_CHECKING:
    from fastast.data import Batch
    from fastast.models import AudioMAEPretraining

AVERAGES = ("clips", "patches")


class MaskedReconstruction(nn.Module):
    """A masked autoencoder, and how far what it restores is from what was there.

    Args:
        model: takes ``(spectrograms, masked, grid)``; its geometry has the mask.
        frontend: turns a batch's waveforms into spectrograms; it augments in training mode.
        normalise: compare with patches of mean 0 and deviation 1, each by itself.
        average: what the loss is the mean over, ``"clips"`` or hidden ``"patches"``.
        seed: of the masks, which also depend on clip and epoch. Validation is masked alike in
            every epoch, since its batches are of epoch 0.

    The loss is a sum divided by ``batch.loss_denominator``: the :meth:`loss_weight` of a step,
    however many batches it has. Labels are not looked at. A clip of a single patch has none hidden
    and adds nothing.

    Raises:
        ValueError: an unknown ``average``.
    """

    def __init__(
        self,
        model: AudioMAEPretraining,
        frontend: nn.Module,
        *,
        normalise: bool = True,
        average: Literal["clips", "patches"] = "clips",
        seed: int = 0,
    ) -> None:
        super().__init__()
        if average not in AVERAGES:
            raise ValueError(f"average must be one of {AVERAGES}, got {average!r}")
        self.model = model
        self.frontend = frontend
        self.normalise = normalise
        self.average = average
        self.seed = seed

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """``loss``, a scalar."""
        spectrograms, grid = self.frontend(batch), batch.grid
        masked = self.draw_mask(batch)
        restored = self.model(spectrograms, masked, grid)
        errors = patch_errors(restored.prediction, restored.patches, self.normalise)
        return {"loss": (errors * self._row_weights(batch)).sum()}

    def draw_mask(self, batch: Batch) -> Tensor:
        """Which patches are hidden: bool ``[batch.grid.num_rows]``."""
        geometry = self.model.geometry
        keys = {"seed": self.seed, "epoch": batch.epoch}
        return geometry.mask(batch.grid, geometry, batch.clip_ids, **keys)

    def loss_weight(self, batch: Batch) -> int:
        """What the batch counts for in a mean over several: its clips, or its hidden patches."""
        if self.average == "clips" or not batch.num_clips:
            return batch.num_clips
        return int(batch.grid.hidden.host_offsets[-1])

    def flops(self, batch: Batch) -> int:
        """Of a training step on a batch, filterbank and optimiser apart; see
        :mod:`fastast.models.flops`."""
        return self.model.flops(batch.grid.segments.host_offsets.diff().numpy()).training

    def _row_weights(self, batch: Batch) -> Tensor:
        """What each hidden patch counts for: ``[hidden_rows]``; dead rows for nothing."""
        hidden = batch.grid.hidden
        share = clip_shares(batch)
        if self.average == "clips":
            share = share / hidden.lengths.clamp(min=1)
        return F.pad(share, (0, 1))[hidden.row_ids(batch.grid.hidden_rows)]


def patch_errors(prediction: Tensor, patches: Tensor, normalise: bool) -> Tensor:
    """Mean squared error of each patch: ``[rows]``, in float32 or more.

    Keeps one tensor of their size for the backward, the difference.

    Args:
        prediction: ``[rows, pixels]``.
        patches: of the same shape.
        normalise: compare with each patch less its mean, over its deviation.
    """
    target = patches.to(torch.promote_types(patches.dtype, torch.float32))
    if normalise:
        variance, mean = torch.var_mean(target, 1, keepdim=True)
        target = (target - mean) * (variance + 1e-6).rsqrt()
    return (prediction.to(target.dtype) - target).square().mean(1)
