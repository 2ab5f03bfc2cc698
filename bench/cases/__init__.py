"""The benchmarks. Importing this package registers them."""

from bench.cases import (
    distillation,
    elastic_ast,
    info_nce,
    masking,
    mel_filterbank,
    mel_memory,
    memory,
    packed_attention,
    patchify,
    segment_pool,
    window_attention,
)
from fastast.models.vit import TRUNK_SIZES

__all__ = [
    "TRUNK_SIZES",
    "distillation",
    "elastic_ast",
    "info_nce",
    "masking",
    "mel_filterbank",
    "mel_memory",
    "memory",
    "packed_attention",
    "patchify",
    "segment_pool",
    "window_attention",
]
