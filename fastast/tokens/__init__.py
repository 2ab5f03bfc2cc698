"""From spectrograms to tokens: patches, positions, and which patches are kept."""

from fastast.tokens.gmml import GMML, Corrupted, corrupted_share
from fastast.tokens.grid import PatchGeometry, PatchGrid, kept_patches, random_keep
from fastast.tokens.masking import ClusteredMask, Mask, StructuredMask, UnstructuredMask
from fastast.tokens.patchify import patchify
from fastast.tokens.positions import (
    FactorisedPositions,
    GridPositions,
    SinCosPositions,
    cut_or_resize,
)

__all__ = [
    "GMML",
    "Corrupted",
    "ClusteredMask",
    "FactorisedPositions",
    "GridPositions",
    "Mask",
    "PatchGeometry",
    "PatchGrid",
    "SinCosPositions",
    "StructuredMask",
    "UnstructuredMask",
    "corrupted_share",
    "cut_or_resize",
    "kept_patches",
    "patchify",
    "random_keep",
]
