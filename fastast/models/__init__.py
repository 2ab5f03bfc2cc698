"""Audio spectrogram transformers over packed streams."""

from fastast.models.ast import AST
from fastast.models.elastic_ast import ElasticAST
from fastast.models.flexi_ast import FlexiAST
from fastast.models.hts_at import HTSAT, resize_windows
from fastast.models.registry import create_model, list_models

__all__ = [
    "AST",
    "HTSAT",
    "ElasticAST",
    "FlexiAST",
    "create_model",
    "list_models",
    "resize_windows",
]
