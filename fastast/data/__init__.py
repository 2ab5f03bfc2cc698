"""From audio files to packed batches."""

from fastast.data.audio import AudioError, AudioInfo, audio_info, read_audio, write_wav
from fastast.data.batch import IGNORED_TARGET, Batch, BatchBudget, Clip, collate, padded_samples
from fastast.data.dataset import AudioDataset
from fastast.data.frames import (
    COMPRESSION_RATES,
    mixed_frame_shifts,
    samples_in,
)
from fastast.data.loader import PackedLoader
from fastast.data.manifest import LeftOut, Manifest
from fastast.data.packing import STRATEGIES, pack
from fastast.data.plan import BatchPlan, EpochPlan, Packing, Planner
from fastast.data.sampling import Crop, Mixup, Sampler
from fastast.data.synthetic import generate_sounds
from fastast.data.usage import token_usage

__all__ = [
    "COMPRESSION_RATES",
    "IGNORED_TARGET",
    "STRATEGIES",
    "AudioDataset",
    "AudioError",
    "AudioInfo",
    "Batch",
    "BatchBudget",
    "BatchPlan",
    "Clip",
    "Crop",
    "EpochPlan",
    "LeftOut",
    "Manifest",
    "Mixup",
    "PackedLoader",
    "Packing",
    "Planner",
    "Sampler",
    "audio_info",
    "collate",
    "generate_sounds",
    "mixed_frame_shifts",
    "pack",
    "padded_samples",
    "read_audio",
    "samples_in",
    "token_usage",
    "write_wav",
]
