"""fastast: fast, lean training of audio spectrogram transformers.

A batch is one flat stream of real tokens: clips of any length and any time resolution lie end to
end, and :class:`Segments` says where each begins. See ``docs/concepts.md``.
"""

from fastast.interop import from_reference, to_reference
from fastast.models import (
    AST,
    HTSAT,
    SSAST,
    ASiT,
    ASiTPretraining,
    AudioMAE,
    AudioMAEPretraining,
    ElasticAST,
    FlexiAST,
    SSASTPretraining,
    create_model,
    create_pretraining_model,
    list_models,
)
from fastast.nn import AttentionPool, MelFilterbank, PackedAttention, WindowAttention
from fastast.ops import WindowBudget, WindowGrids
from fastast.segments import Segments, Spectrograms, TokenBudget

__version__ = "0.1.0"

__all__ = [
    "AST",
    "HTSAT",
    "SSAST",
    "ASiT",
    "ASiTPretraining",
    "AttentionPool",
    "AudioMAE",
    "AudioMAEPretraining",
    "ElasticAST",
    "FlexiAST",
    "MelFilterbank",
    "PackedAttention",
    "SSASTPretraining",
    "Segments",
    "Spectrograms",
    "TokenBudget",
    "WindowAttention",
    "WindowBudget",
    "WindowGrids",
    "create_model",
    "create_pretraining_model",
    "from_reference",
    "list_models",
    "to_reference",
]
