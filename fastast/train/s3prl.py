"""The upstream that s3prl imports (SUPERB): a run as its checkpoint.

In a folder of s3prl's ``upstream``, ``from fastast.train.s3prl import UpstreamExpert``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastast.train.encoder import Encoder


class UpstreamExpert(nn.Module):
    """Frame embeddings of waveforms at 16 kHz.

    Args:
        ckpt: run directory or ``model.safetensors``.
        model_config: without effect.

    Raises:
        ValueError: a model for another sample rate.
    """

    def __init__(self, ckpt: str, model_config: str | None = None, **_: object) -> None:
        super().__init__()
        self.encoder = Encoder.load(ckpt)
        if self.encoder.sample_rate != 16000:
            raise ValueError(
                f"s3prl has sounds at 16,000 Hz, the model is for {self.encoder.sample_rate} Hz"
            )

    def get_downsample_rates(self, key: str) -> int:
        """Samples from one frame embedding to the next, whatever the ``key``."""
        return round(self.encoder.hop_ms * 16)

    def forward(self, wavs: Sequence[Tensor]) -> dict[str, tuple[Tensor, ...]]:
        """``{"hidden_states": (embeddings,)}``, ``[clips, steps, dim]``."""
        with torch.set_grad_enabled(self.training):
            return {"hidden_states": (self.encoder(wavs),)}
