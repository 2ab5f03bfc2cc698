"""From spectrograms to tokens: patches, positions, and which patches are kept."""

from fastast.tokens.gmml import GMML, Corrupted, corrupted_share
from fastast.tokens.grid import PatchGeometry, PatchGrid, kept_patches, random_keep
from fastast.tokens.masking import ClusteredMask, Mask, StructuredMask, UnstructuredMask
from fastast.tokens.patchify import patchify
from fastast.tokens.positions import (
    FactorisedPositions,
    GridPositions,
    ResizedPositions,
    SinCosPositions,
)
from fastast.tokens.resizing import resize_patch_kernel, resize_positions

__all__ = [
    "GMML",
    "Corrupted",
    "ClusteredMask",
    "FactorisedPositions",
    "GridPositions",
    "Mask",
    "PatchGeometry",
    "PatchGrid",
    "ResizedPositions",
    "SinCosPositions",
    "StructuredMask",
    "UnstructuredMask",
    "corrupted_share",
    "kept_patches",
    "patchify",
    "random_keep",
    "resize_patch_kernel",
    "resize_positions",
]
