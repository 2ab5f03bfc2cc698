"""The benchmarks. Importing this package registers them."""

from bench.cases import (
    elastic_ast,
    mel_filterbank,
    memory,
    packed_attention,
    segment_pool,
    window_attention,
)
from fastast.models.vit import TRUNK_SIZES

__all__ = [
    "TRUNK_SIZES",
    "elastic_ast",
    "mel_filterbank",
    "memory",
    "packed_attention",
    "segment_pool",
    "window_attention",
]
