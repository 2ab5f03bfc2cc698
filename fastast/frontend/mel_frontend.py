"""From a batch's waveforms to what a model reads."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fastast.frontend.augment import gain_jitter, spec_augment
from fastast.nn.mel_filterbank import MelFilterbank
from fastast.segments import Spectrograms

if TYPE_CHECKING:
    from fastast.data import Batch

_SHARE = 1024  # denominator of time_mask


class MelFrontend(nn.Module):
    """Gain, filterbank and SpecAugment, on the device, inside the step.

    In evaluation mode nothing is random.

    Args:
        filterbank: with the normalisation of the data set.
        gain_db: gain jitter within plus or minus this.
        freq_mask: mel bins of SpecAugment's widest frequency mask.
        time_mask: share of a clip that its widest time mask covers, in [0, 1). AST on AudioSet:
            192 of 1,024 frames, 0.1875.
        seed: of the draws.
    """

    def __init__(
        self,
        filterbank: MelFilterbank,
        *,
        gain_db: float = 0.0,
        freq_mask: int = 0,
        time_mask: float = 0.0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if not 0 <= time_mask < 1:
            raise ValueError(f"time_mask is a share of the clip in [0, 1), got {time_mask}")
        self.filterbank = filterbank
        self.gain_db = gain_db
        self.freq_mask = freq_mask
        self.time_mask = round(time_mask * _SHARE)
        self.seed = seed
        self.fill = filterbank.plan.normalized(0.0)

    @torch.no_grad()
    def forward(self, batch: Batch) -> Spectrograms | Tensor:
        """Spectrograms of the batch's clips; ``[clips, frames, num_mels]`` of a fixed length if
        the batch asks for one."""
        waveforms = batch.waveforms
        keys = {"seed": self.seed, "epoch": batch.epoch}
        if self.training and self.gain_db:
            waveforms = gain_jitter(
                waveforms, batch.sample_offsets, batch.clip_ids, max_db=self.gain_db, **keys
            )
        spectrograms = self.filterbank(
            waveforms, batch.sample_offsets, batch.frame_shift, batch.frames, batch.frame_rows
        )
        if self.training and (self.freq_mask or self.time_mask):
            spectrograms = spec_augment(
                spectrograms,
                batch.clip_ids,
                freq_mask=self.freq_mask,
                time_mask=self.time_mask,
                reference_frames=_SHARE,
                fill=self.fill,
                **keys,
            )
        if batch.dense_frames is None:
            return spectrograms
        return pad_or_cut(spectrograms, batch.dense_frames, self.fill)


def pad_or_cut(spectrograms: Spectrograms, length: int, fill: float) -> Tensor:
    """Clips of one length: what is missing is filled, what is too much is cut off.

    Args:
        spectrograms: of any lengths.
        length: in frames.
        fill: value of the frames that are missing. AST pads with zeros before it normalises.

    Returns:
        ``[segments, length, num_mels]``.
    """
    frames, segments = spectrograms.frames, spectrograms.segments
    place = torch.arange(length, device=frames.device)
    row = segments.offsets[:-1, None] + place
    exists = place < segments.lengths[:, None]
    # Rows of another clip or of none are read at most to be overwritten.
    clips = frames[torch.where(exists, row, 0)]
    return torch.where(exists[..., None], clips, fill)
