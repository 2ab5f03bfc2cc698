"""From audio files to packed batches."""

from fastast.data.audio import AudioError, audio_info, read_audio, write_wav
from fastast.data.batch import IGNORED_TARGET, Batch, BatchBudget, Clip, collate
from fastast.data.dataset import AudioDataset
from fastast.data.frames import (
    COMPRESSION_RATES,
    mixed_frame_shifts,
)
from fastast.data.fsdd import fsdd
from fastast.data.loader import PackedLoader
from fastast.data.packing import next_fit
from fastast.data.synthetic import generate_sounds

__all__ = [
    "COMPRESSION_RATES",
    "IGNORED_TARGET",
    "AudioDataset",
    "AudioError",
    "Batch",
    "BatchBudget",
    "Clip",
    "PackedLoader",
    "audio_info",
    "collate",
    "fsdd",
    "generate_sounds",
    "mixed_frame_shifts",
    "next_fit",
    "read_audio",
    "write_wav",
]
