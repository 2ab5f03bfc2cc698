"""Audio spectrogram transformers over packed streams."""

from fastast.models.asit import ASiT, ASiTPretraining
from fastast.models.ast import AST
from fastast.models.audio_mae import AudioMAE, AudioMAEPretraining
from fastast.models.elastic_ast import ElasticAST
from fastast.models.flexi_ast import FlexiAST
from fastast.models.hts_at import HTSAT, resize_windows
from fastast.models.registry import create_model, create_pretraining_model, list_models
from fastast.models.ssast import SSAST, SSASTPretraining

__all__ = [
    "AST",
    "HTSAT",
    "SSAST",
    "ASiT",
    "ASiTPretraining",
    "AudioMAE",
    "AudioMAEPretraining",
    "ElasticAST",
    "FlexiAST",
    "SSASTPretraining",
    "create_model",
    "create_pretraining_model",
    "list_models",
    "resize_windows",
]
