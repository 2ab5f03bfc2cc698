"""Objectives: what a model is trained for."""

from fastast.methods.supervised import Supervised

__all__ = ["Supervised"]
