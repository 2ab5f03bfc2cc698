"""From spectrograms to tokens: patches, positions, and which patches are kept."""

from fastast.tokens.grid import PatchGeometry, PatchGrid, kept_patches, random_keep
from fastast.tokens.patchify import patchify
from fastast.tokens.positions import (
    FactorisedPositions,
    GridPositions,
    ResizedPositions,
    SinCosPositions,
)
from fastast.tokens.resizing import resize_patch_kernel, resize_positions

__all__ = [
    "FactorisedPositions",
    "GridPositions",
    "PatchGeometry",
    "PatchGrid",
    "ResizedPositions",
    "SinCosPositions",
    "kept_patches",
    "patchify",
    "random_keep",
    "resize_patch_kernel",
    "resize_positions",
]
