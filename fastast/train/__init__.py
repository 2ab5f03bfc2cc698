"""Training and evaluation."""

from fastast.train.build import build_method, load_data, make_loader
from fastast.train.encoder import Encoder
from fastast.train.evaluate import Score, evaluate, evaluate_over
from fastast.train.loop import fit
from fastast.train.optim import OptimConfig
from fastast.train.recipe import (
    ASiTConfig,
    AugmentConfig,
    DataConfig,
    FrontendConfig,
    ModelConfig,
    PhaseConfig,
    Recipe,
    SSASTConfig,
    TrainConfig,
)
from fastast.train.run import RunDirectory, load_model

__all__ = [
    "ASiTConfig",
    "AugmentConfig",
    "DataConfig",
    "Encoder",
    "FrontendConfig",
    "ModelConfig",
    "OptimConfig",
    "PhaseConfig",
    "Recipe",
    "RunDirectory",
    "SSASTConfig",
    "Score",
    "TrainConfig",
    "build_method",
    "evaluate",
    "evaluate_over",
    "fit",
    "load_data",
    "load_model",
    "make_loader",
]
