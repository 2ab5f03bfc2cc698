"""The module that HEAR's evaluation imports (Turian et al., 2022): a run as its weights.

python -m heareval.embeddings.runner fastast.train.hear --model runs/pretrained
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastast.train.encoder import Encoder


def load_model(model_file_path: str) -> Encoder:
    """Opens a run directory or ``model.safetensors``."""
    return Encoder.load(model_file_path)


@torch.no_grad()
def get_scene_embeddings(audio: Tensor, model: Encoder) -> Tensor:
    """Embeddings float32 ``[sounds, scene_embedding_size]`` of ``audio [sounds, samples]``."""
    return model.clips(audio)


@torch.no_grad()
def get_timestamp_embeddings(audio: Tensor, model: Encoder) -> tuple[Tensor, Tensor]:
    """Embeddings float32 ``[sounds, steps, timestamp_embedding_size]`` of ``audio [sounds,
    samples]``, and their times in milliseconds, ``[sounds, steps]``."""
    found = model.frames(audio)
    return found.vectors, found.times_ms.to(found.vectors.device).expand(len(audio), -1)
