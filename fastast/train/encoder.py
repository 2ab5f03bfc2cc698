"""One face of every trained model for evaluation suites: waveforms in, embeddings out.

HEAR, X-ARES and s3prl each ask for embeddings in their own words; :class:`Encoder` has them all,
and :mod:`fastast.train.hear` and :mod:`fastast.train.s3prl` are the modules that two of them
import.
"""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastast.models import HTSAT
from fastast.ops import hop_from_ms
from fastast.segments import Spectrograms
from fastast.train.build import build_filterbank, finest_shift, fixed_frames, framing_of
from fastast.train.recipe import Recipe
from fastast.train.run import load_model


class FrameEmbeddings(NamedTuple):
    """Embeddings over time.

    Attributes:
        vectors: float32 ``[clips, steps, dim]``, zeros after a clip's end.
        lengths: steps of each clip.
        times_ms: ``[steps]``, the middle of each step.
    """

    vectors: Tensor
    lengths: list[int]
    times_ms: Tensor


class Encoder(nn.Module):
    """Embeddings of waveforms of any length.

    A model of fixed input size reads longer clips in parts of that size, one after the other, the
    last one filled up with silence; any other reads them whole.

    Args:
        method, recipe: from :func:`~fastast.train.load_model`; also of models that were pre-trained
            without labels.

    Attributes:
        sample_rate: of the waveforms, in Hz; ``sampling_rate`` in X-ARES.
        output_dim: numbers of an embedding; ``scene_embedding_size`` and
            ``timestamp_embedding_size`` in HEAR.
        hop_ms: from one frame embedding to the next; ``hop_size_in_ms`` in X-ARES.
    """

    def __init__(self, method: nn.Module, recipe: Recipe) -> None:
        super().__init__()
        self.model = method.model
        self.filterbank = build_filterbank(recipe).eval()
        self.sample_rate = self.sampling_rate = recipe.data.sample_rate
        shift = finest_shift(recipe)
        self._shift = hop_from_ms(shift, self.sample_rate)
        self._framing = framing_of(recipe)
        geometry = self.model.geometry
        if isinstance(self.model, HTSAT):
            steps = geometry.chunk_frames // self.model.last_grid[1]
        else:
            steps = geometry.stride_frames
        self._step = steps
        self.hop_ms = self.hop_size_in_ms = 1000 * steps * self._shift / self.sample_rate
        seconds = recipe.frontend.fixed_seconds
        self._fixed = None if seconds is None else fixed_frames(recipe, seconds, shift)
        with torch.no_grad():
            dim = self.clips(torch.zeros(1, self.sample_rate)).shape[1]
        self.output_dim = self.scene_embedding_size = self.timestamp_embedding_size = dim

    @classmethod
    def load(cls, run: str | PathLike, device: torch.device | str = "cpu") -> Encoder:
        """Opens a run directory or ``model.safetensors``, for inference."""
        method, recipe, _ = load_model(run)
        return cls(method, recipe).to(device).eval()

    @property
    def device(self) -> torch.device:
        """Of the model."""
        return next(self.model.parameters()).device

    def forward(self, waveforms: Tensor | Sequence[Tensor]) -> Tensor:
        """Frame embeddings ``[clips, steps, dim]``, see :meth:`frames`."""
        return self.frames(waveforms).vectors

    def clips(self, waveforms: Tensor | Sequence[Tensor]) -> Tensor:
        """An embedding of each clip, what a classifier reads: float32 ``[clips, dim]``.

        Args:
            waveforms: ``[clips, samples]`` or a list of ``[samples]``, float in [-1, 1] or int16,
                at ``sample_rate``, on any device.
        """
        inputs, parts = self._spectrograms(waveforms)
        vectors = self.model.embed(inputs).float()
        return torch.stack([part.mean(0) for part in vectors.split(parts)])

    def frames(self, waveforms: Tensor | Sequence[Tensor]) -> FrameEmbeddings:
        """Embeddings over time: the mean over frequency of what the trunk makes of the patches.

        Args:
            waveforms: as of :meth:`clips`.
        """
        inputs, parts = self._spectrograms(waveforms)
        features, grid = self.model.forward_features(inputs)
        lengths = inputs.segments.host_offsets.diff().tolist()
        if isinstance(self.model, HTSAT):
            counts = grid.columns.host_offsets.diff().tolist()
            pieces = list(features.mean(1).float().split(counts))
            # A chunk is as long as it is, and the clip may end within.
            pieces = [
                piece[: -(-frames // self._step)]
                for piece, frames in zip(pieces, lengths, strict=True)
            ]
        else:
            geometry = self.model.geometry
            counts = grid.segments.host_offsets.diff().tolist()
            pieces = [
                clip[geometry.prefix :].float().unflatten(0, (geometry.freq_patches, -1)).mean(0)
                for clip in features[: sum(counts)].split(counts)
            ]
        clips, at = [], 0
        for count in parts:
            clips.append(torch.cat(pieces[at : at + count]))
            at += count
        most = max(len(clip) for clip in clips)
        vectors = torch.stack([F.pad(clip, (0, 0, 0, most - len(clip))) for clip in clips])
        return FrameEmbeddings(vectors, [len(clip) for clip in clips], self._times(most))

    def _times(self, steps: int) -> Tensor:
        width = self._step if isinstance(self.model, HTSAT) else self.model.geometry.patch_frames
        window = self._framing.window_length if self._framing.padding == 0 else 0
        middle = ((width - 1) * self._shift + window) / 2 / self.sample_rate
        return 1000 * middle + self.hop_ms * torch.arange(steps, dtype=torch.float64)

    def _cut(self, clip: Tensor) -> list[Tensor]:
        """Parts of as many frames as the model reads, which go on where the one before ended."""
        total = int(self._framing.num_frames(len(clip), self._shift))
        most = int(self._framing.least_samples(self._fixed, self._shift))
        begins = range(0, max(total, 1) * self._shift, self._fixed * self._shift)
        return [clip[begin : begin + most] for begin in begins]

    def _spectrograms(self, waveforms: Tensor | Sequence[Tensor]) -> tuple[Spectrograms, list[int]]:
        """What the model reads, and of how many parts each clip consists."""
        framing, shift = self._framing, self._shift
        least = int(framing.least_samples(self.model.geometry.min_frames(), shift))
        pieces, parts = [], []
        for clip in waveforms:
            if clip.ndim != 1:
                raise ValueError(f"waveforms must be [samples] each, got {tuple(clip.shape)}")
            clip = clip.to(self.device)
            cut = [clip] if self._fixed is None else self._cut(clip)
            pieces += [F.pad(piece, (0, max(least - len(piece), 0))) for piece in cut]
            parts.append(len(cut))
        if not pieces:
            raise ValueError("waveforms is empty: pass at least one clip")
        inputs = self.filterbank(pieces, frame_shift=shift)
        if self._fixed is not None:
            lengths = inputs.segments.host_offsets.diff().tolist()
            fill = self.filterbank.plan.normalized(0.0)
            padded = [
                F.pad(
                    frames[: self._fixed], (0, 0, 0, max(self._fixed - len(frames), 0)), value=fill
                )
                for frames in inputs.frames.split(lengths)
            ]
            inputs = Spectrograms.from_list(padded)
        return inputs, parts
