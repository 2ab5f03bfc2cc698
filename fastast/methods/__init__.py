"""Objectives: what a model is trained for."""

from fastast.methods.asit import MaskedDistillation
from fastast.methods.audio_mae import MaskedReconstruction
from fastast.methods.ssast import MaskedSpectrogramModeling
from fastast.methods.supervised import Supervised

__all__ = ["MaskedDistillation", "MaskedReconstruction", "MaskedSpectrogramModeling", "Supervised"]
