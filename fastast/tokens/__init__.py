"""From spectrograms to tokens: patches, positions, and which patches are kept."""

from fastast.tokens.fold import FoldGeometry, FoldGrid, fold_frames, fold_patches
from fastast.tokens.grid import PatchGeometry, PatchGrid, kept_patches, random_keep
from fastast.tokens.patchify import patchify
from fastast.tokens.positions import FactorisedPositions, GridPositions, SinCosPositions

__all__ = [
    "FactorisedPositions",
    "FoldGeometry",
    "FoldGrid",
    "GridPositions",
    "PatchGeometry",
    "PatchGrid",
    "SinCosPositions",
    "fold_frames",
    "fold_patches",
    "kept_patches",
    "patchify",
    "random_keep",
]
