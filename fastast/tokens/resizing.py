"""Patch kernels for another patch size.

A patch that is shown at another size should give the same token. *Bilinear* resizing treats the
kernel as an image. *PI-resize* solves for it: with ``B`` the matrix of bilinear resizing, the
kernel ``pinv(B^T) w`` gives ``<B x, w'> = <x, w>`` for all patches x if they grow, and the least
squared error over white noise if they shrink (Beyer et al., "FlexiViT", 2023; FlexiAST, section 2).
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor


def resize_patch_kernel(
    weight: Tensor, size: tuple[int, int], method: Literal["bilinear", "pi"] = "bilinear"
) -> Tensor:
    """A kernel for patches of another size.

    Args:
        weight: ``[out, in, height, width]``.
        size: the new height and width.
        method: ``"bilinear"`` (antialiased, half-pixel centres) or ``"pi"``.

    Returns:
        ``[out, in, *size]`` in the dtype of ``weight``.

    Raises:
        ValueError: an unknown ``method``.
    """
    if method not in ("bilinear", "pi"):
        raise ValueError(f"method must be 'bilinear' or 'pi', got {method!r}")
    if tuple(weight.shape[2:]) == tuple(size):
        return weight
    if method == "bilinear":
        return F.interpolate(weight, size, mode="bilinear", antialias=True)
    # B is a Kronecker product, and so is its pseudo-inverse: one small matrix for each axis.
    rows, columns = (
        torch.linalg.pinv(_resizing(old, new).T).to(weight)
        for old, new in zip(weight.shape[2:], size, strict=True)
    )
    return rows @ weight @ columns.T


def _resizing(old: int, new: int) -> Tensor:
    """Linear resizing without antialiasing as a matrix, float64 ``[new, old]``."""
    basis = torch.eye(old, dtype=torch.float64)[:, None]
    return F.interpolate(basis, new, mode="linear")[:, 0].T
