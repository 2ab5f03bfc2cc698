"""The functional API: every operation on a packed stream, for any device."""

from fastast.ops import _native
from fastast.ops.distillation import distillation_cross_entropy
from fastast.ops.info_nce import InfoNCE, info_nce
from fastast.ops.mel_filterbank import (
    MelPlan,
    dither_keys,
    frame_segments,
    hop_from_ms,
    mel_filterbank,
    mel_filterbank_reference,
)
from fastast.ops.mel_plan import Framing, Padding
from fastast.ops.packed_attention import (
    flash_attn_varlen_func,
    packed_attention,
    packed_attention_qkv,
)
from fastast.ops.segment_pool import segment_pool
from fastast.ops.window_attention import window_attention
from fastast.ops.window_grids import WindowBudget, WindowGrids

__all__ = [
    "Framing",
    "InfoNCE",
    "MelPlan",
    "Padding",
    "WindowBudget",
    "WindowGrids",
    "distillation_cross_entropy",
    "dither_keys",
    "flash_attn_varlen_func",
    "frame_segments",
    "hop_from_ms",
    "info_nce",
    "mel_filterbank",
    "mel_filterbank_reference",
    "packed_attention",
    "packed_attention_qkv",
    "segment_pool",
    "window_attention",
]

_native.load()
