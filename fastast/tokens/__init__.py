"""From spectrograms to tokens: patches, positions, and which patches are kept."""

from fastast.tokens.fold import FoldGeometry, FoldGrid, fold_frames, fold_patches
from fastast.tokens.gmml import GMML, Corrupted, corrupted_share
from fastast.tokens.grid import PatchGeometry, PatchGrid, kept_patches
from fastast.tokens.masked import MaskedGeometry, MaskedGrid, Split
from fastast.tokens.masking import (
    ClusteredMask,
    Mask,
    StructuredMask,
    UnstructuredMask,
    kept_lists,
)
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
    "FoldGeometry",
    "FoldGrid",
    "GridPositions",
    "Mask",
    "MaskedGeometry",
    "MaskedGrid",
    "PatchGeometry",
    "PatchGrid",
    "ResizedPositions",
    "SinCosPositions",
    "Split",
    "StructuredMask",
    "UnstructuredMask",
    "corrupted_share",
    "fold_frames",
    "fold_patches",
    "kept_lists",
    "kept_patches",
    "patchify",
    "resize_patch_kernel",
    "resize_positions",
]
