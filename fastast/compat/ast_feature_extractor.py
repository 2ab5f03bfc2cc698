"""The feature extractor of transformers' AST models, by the same name and call.

What transformers computes clip by clip on the CPU (Kaldi's filterbank, padding or cutting to
``max_length`` frames, normalisation) is one call here, on the device of the waveforms.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastast.compat.kaldi import kaldi_plan
from fastast.frontend import pad_or_cut
from fastast.ops.mel_filterbank import mel_filterbank
from fastast.ops.mel_plan import frame_counts, hop_from_ms
from fastast.segments import Segments, Spectrograms

RETURN_TENSORS = (None, "pt", "np", "ragged")


class Features(dict):
    """A dict whose entries are attributes as well, for ``model(**features)``."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None

    def to(self, *args: Any, **kwargs: Any) -> Features:
        """The features on another device, or of another dtype; see :meth:`torch.Tensor.to`."""
        return Features({name: value.to(*args, **kwargs) for name, value in self.items()})


class ASTFeatureExtractor:
    """Waveforms to AST's normalised log-mel spectrograms of one length.

    Attributes have the arguments' names and may be changed, as when the normalisation of a data
    set is measured. Settings of a checkpoint: ``ASTFeatureExtractor(**config)`` with the contents
    of its ``preprocessor_config.json``.

    Args:
        feature_size: kept, without effect.
        sampling_rate: of the waveforms, in Hz.
        num_mel_bins: mel bins.
        max_length: frames of the result.
        padding_value: kept, without effect: missing frames are zeros before the normalisation, as
            in transformers.
        do_normalize: ``(x - mean) / (2 std)``.
        mean: of the log-mel values; default AudioSet's.
        std: their standard deviation; default AudioSet's.
        return_attention_mask: kept, without effect, as in transformers.
        kwargs: kept as attributes.
    """

    model_input_names = ("input_values",)

    def __init__(
        self,
        feature_size: int = 1,
        sampling_rate: int = 16000,
        num_mel_bins: int = 128,
        max_length: int = 1024,
        padding_value: float = 0.0,
        do_normalize: bool = True,
        mean: float = -4.2677393,
        std: float = 4.5689974,
        return_attention_mask: bool = False,
        **kwargs: Any,
    ) -> None:
        self.feature_size = feature_size
        self.sampling_rate = sampling_rate
        self.num_mel_bins = num_mel_bins
        self.max_length = max_length
        self.padding_value = padding_value
        self.do_normalize = do_normalize
        self.mean = mean
        self.std = std
        self.return_attention_mask = return_attention_mask
        self.padding_side = "right"
        self.__dict__.update(kwargs)

    def __call__(
        self,
        raw_speech: Tensor | np.ndarray | Sequence,
        sampling_rate: int | None = None,
        return_tensors: str | None = None,
        **kwargs: Any,
    ) -> Features:
        """Features of one clip or of several.

        Args:
            raw_speech: mono, in [-1, 1], of any length: a clip ``[L]`` or clips ``[B, L]`` as an
                array or a tensor on any device, a list of clips, or of numbers.
            sampling_rate: of the clips, for a check against the extractor's.
            return_tensors: ``"pt"`` for a tensor on the clips' device, ``"np"`` for an array,
                None for a list of arrays, or ``"ragged"`` for :class:`~fastast.Spectrograms` of
                whole clips, neither padded nor cut.
            kwargs: without effect, as in transformers.

        Returns:
            ``{"input_values": ...}``: float32 ``[B, max_length, num_mel_bins]``, or as above.
            A clip shorter than a frame (25 ms) is padding alone.

        Raises:
            ValueError: another ``sampling_rate`` than the extractor's, clips that are not mono
                or not floating point, no clips, or an unknown ``return_tensors``.
        """
        if return_tensors not in RETURN_TENSORS:
            raise ValueError(
                f"return_tensors must be one of {RETURN_TENSORS}, got {return_tensors}"
            )
        if sampling_rate is None:
            warnings.warn(
                "pass sampling_rate with the clips, so that a wrong one is noticed", stacklevel=2
            )
        elif sampling_rate != self.sampling_rate:
            raise ValueError(
                f"sampling_rate={sampling_rate}, but the features are of {self.sampling_rate} Hz; "
                "resample the clips"
            )
        spectrograms, fill = self._filterbank(_clips(raw_speech), cut=return_tensors != "ragged")
        if return_tensors == "ragged":
            return Features(input_values=spectrograms)
        values = pad_or_cut(spectrograms, self.max_length, fill)
        if return_tensors != "pt":
            values = values.detach().cpu().numpy()
        return Features(input_values=list(values) if return_tensors is None else values)

    def _filterbank(self, clips: list[Tensor], cut: bool) -> tuple[Spectrograms, float]:
        """Frames, and the value of padding among them."""
        lengths, device = [len(clip) for clip in clips], clips[0].device
        plan = kaldi_plan(
            device,
            sample_rate=self.sampling_rate,
            num_mels=self.num_mel_bins,
            mean=self.mean if self.do_normalize else None,
            std=self.std if self.do_normalize else None,
        )
        hop = hop_from_ms(10.0, self.sampling_rate)
        counts = frame_counts(np.array(lengths), plan.window_length, hop)
        frames = Segments.from_lengths(np.minimum(counts, self.max_length) if cut else counts)
        num_rows = max(int(frames.host_offsets[-1]), 1)  # padding is chosen from among rows
        frames = frames.to(device)
        rows = mel_filterbank(
            torch.cat(clips),
            torch.tensor([0, *lengths]).cumsum(0).to(device),
            torch.full((len(clips),), hop, dtype=torch.int32, device=device),
            frames,
            plan,
            num_rows,
        )
        return Spectrograms(rows, frames), plan.normalized(0.0)


def _clips(raw_speech: Tensor | np.ndarray | Sequence) -> list[Tensor]:
    several = raw_speech
    if isinstance(raw_speech, Tensor | np.ndarray):
        several = raw_speech if raw_speech.ndim > 1 else [raw_speech]
    elif len(raw_speech) and np.ndim(raw_speech[0]) == 0:
        several = [raw_speech]
    if len(several) == 0:
        raise ValueError("raw_speech is empty: pass at least one clip")
    return [_clip(clip) for clip in several]


def _clip(clip: Tensor | np.ndarray | Sequence[float]) -> Tensor:
    if isinstance(clip, np.ndarray):
        clip = torch.tensor(np.ascontiguousarray(clip))
    elif not isinstance(clip, Tensor):
        clip = torch.tensor(clip, dtype=torch.float32)
    if clip.ndim != 1:
        raise ValueError(f"raw_speech must be mono clips, got one of shape {list(clip.shape)}")
    if not clip.is_floating_point():
        raise ValueError(
            f"raw_speech must be floating point in [-1, 1], got {clip.dtype}; divide 16-bit "
            "samples by 32768"
        )
    return clip.float()
