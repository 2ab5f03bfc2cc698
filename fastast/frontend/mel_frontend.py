"""From a batch's waveforms to what a model reads."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fastast.frontend.spectrogram import add_noise, check_time_mask, roll_frames, spec_augment
from fastast.frontend.waveform import circular_roll, gain_jitter, mix_waveforms
from fastast.nn.mel_filterbank import MelFilterbank
from fastast.ops.mel_filterbank import dither_keys
from fastast.segments import Spectrograms

if TYPE_CHECKING:
    from fastast.data import Batch


class MelFrontend(nn.Module):
    """Augmentation and filterbank, on the device, inside the step.

    In this order, which is AST's where AST has the step:

    1. roll: each clip by itself; its partner in a mix stays as it is;
    2. mix, where the batch has partners;
    3. gain, of clip and partner together;
    4. filterbank, with its dither, and normalisation;
    5. SpecAugment, with what 0 becomes in the normalisation;
    6. noise, on masked bins too, and roll of the frames.

    In evaluation mode nothing is random. A batch that has partners is mixed nevertheless, as its
    targets are.

    Args:
        filterbank: with the normalisation of the data set. If it has dither, its noise is drawn
            from (seed, epoch, clip), as all else.
        dither_in_evaluation: dither in evaluation mode as well, as Kaldi does. A clip gets the same
            noise in every evaluation.
        roll: let clips begin anywhere, see :func:`~fastast.frontend.circular_roll`.
        gain_db: gain jitter within plus or minus this.
        freq_mask: mel bins of SpecAugment's widest frequency mask.
        time_mask: frames of its widest time mask; below 1 the share of the clip that it covers.
            AST on AudioSet: 192 of 1,024 frames, 0.1875.
        noise: highest level of noise, in units of the normalised spectrogram. AST on Speech
            Commands: 0.1.
        roll_frames: move frames up to so many later or earlier. AST on Speech Commands: 10.
        seed: of the draws.

    Raises:
        ValueError: a negative setting, or a ``time_mask`` that is neither a share nor whole.
    """

    def __init__(
        self,
        filterbank: MelFilterbank,
        *,
        dither_in_evaluation: bool = False,
        roll: bool = False,
        gain_db: float = 0.0,
        freq_mask: int = 0,
        time_mask: float = 0.0,
        noise: float = 0.0,
        roll_frames: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        settings = {
            "gain_db": gain_db,
            "freq_mask": freq_mask,
            "noise": noise,
            "roll_frames": roll_frames,
        }
        for name, value in settings.items():
            if value < 0:
                raise ValueError(f"{name} must not be negative, got {value}")
        check_time_mask(time_mask)
        self.filterbank = filterbank
        self.dither_in_evaluation = dither_in_evaluation
        self.roll = roll
        self.gain_db = gain_db
        self.freq_mask = freq_mask
        self.time_mask = time_mask
        self.noise = noise
        self.roll_frames = roll_frames
        self.seed = seed
        self.fill = filterbank.plan.normalized(0.0)

    @torch.no_grad()
    def forward(self, batch: Batch) -> Spectrograms | Tensor:
        """Spectrograms of the batch's clips; ``[clips, frames, num_mels]`` of a fixed length if
        the batch asks for one."""
        noise = None
        if self.filterbank.plan.dither and (self.training or self.dither_in_evaluation):
            noise = dither_keys(self.seed, batch.epoch, batch.clip_ids)
        spectrograms = self.filterbank(
            self._waveforms(batch),
            batch.sample_offsets,
            batch.frame_shift,
            batch.frames,
            batch.frame_rows,
            noise,
        )
        if self.training:
            spectrograms = self._augmented(spectrograms, batch)
        if batch.dense_frames is None:
            return spectrograms
        return pad_or_cut(spectrograms, batch.dense_frames, self.fill)

    def _waveforms(self, batch: Batch) -> Tensor:
        waveforms, offsets = batch.waveforms, batch.sample_offsets
        keys = {"seed": self.seed, "epoch": batch.epoch}
        if self.training and self.roll:
            waveforms = circular_roll(waveforms, offsets, batch.clip_ids, **keys)
        if batch.mix_weight is not None:
            waveforms = mix_waveforms(
                waveforms,
                offsets,
                batch.partner_waveforms,
                batch.partner_offsets,
                batch.mix_weight,
            )
        if self.training and self.gain_db:
            waveforms = gain_jitter(waveforms, offsets, batch.clip_ids, max_db=self.gain_db, **keys)
        return waveforms

    def _augmented(self, spectrograms: Spectrograms, batch: Batch) -> Spectrograms:
        clip_ids, keys = batch.clip_ids, {"seed": self.seed, "epoch": batch.epoch}
        if self.freq_mask or self.time_mask:
            spectrograms = spec_augment(
                spectrograms,
                clip_ids,
                freq_mask=self.freq_mask,
                time_mask=self.time_mask,
                fill=self.fill,
                **keys,
            )
        if self.noise:
            spectrograms = add_noise(spectrograms, clip_ids, max_level=self.noise, **keys)
        if self.roll_frames:
            spectrograms = roll_frames(spectrograms, clip_ids, max_frames=self.roll_frames, **keys)
        return spectrograms


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
