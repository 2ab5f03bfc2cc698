"""The benchmarks. Importing this package registers them."""

from bench.cases import (
    distillation,
    elastic_ast,
    masking,
    mel_filterbank,
    memory,
    packed_attention,
    segment_pool,
)
from fastast.models.vit import TRUNK_SIZES

__all__ = [
    "TRUNK_SIZES",
    "distillation",
    "elastic_ast",
    "masking",
    "mel_filterbank",
    "memory",
    "packed_attention",
    "segment_pool",
]
