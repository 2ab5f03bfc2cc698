"""The functional API: every operation on a packed stream, for any device."""

from fastast.ops.mel_filterbank import (
    MelPlan,
    frame_segments,
    hop_from_ms,
    mel_filterbank,
    mel_filterbank_reference,
)
from fastast.ops.packed_attention import packed_attention, packed_attention_qkv
from fastast.ops.segment_pool import segment_pool

__all__ = [
    "MelPlan",
    "frame_segments",
    "hop_from_ms",
    "mel_filterbank",
    "mel_filterbank_reference",
    "packed_attention",
    "packed_attention_qkv",
    "segment_pool",
]
