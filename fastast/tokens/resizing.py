r"""Resizing what a patch size or a grid has shaped: patch kernels and tables of positions.

Bilinear resizing acts on frequency and time apart. Along an axis of ``n`` places it is a matrix
``B`` of ``m`` rows: with half-pixel centres, place ``i`` of the new axis lies at
:math:`c_i = (i + \tfrac12)\, n / m` of the old one, and

.. math:: B_{ij} \propto \max\big(0,\; 1 - |j + \tfrac12 - c_i| / s\big), \qquad \sum_j B_{ij} = 1

with :math:`s = 1`, or, to average where the new axis is coarser (antialiasing),
:math:`s = \max(1, n / m)`. In two dimensions the matrix is :math:`B_f \otimes B_t`.

PI-resize (FlexiViT: Beyer et al., CVPR 2023, section 3.4; FlexiAST: Feng et al., Interspeech 2023)
asks of the new kernel :math:`\hat w` that on a resized patch it gives what :math:`w` gives on the
patch, :math:`\langle Bx, \hat w\rangle = \langle x, w\rangle`, in the least squares:
:math:`\hat w = (B^\top)^+ w`, with ``B`` not antialiased. The pseudo-inverse of a Kronecker product
is that of its factors, so this, too, is a small matrix for each axis:

.. math:: (B^\top)^+ = (B_f^\top)^+ \otimes (B_t^\top)^+

A kernel that grows keeps its responses exactly; one that shrinks keeps what the resized patch still
tells.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from fastast.ops._library import ANY_DEVICE, LIBRARY

METHODS = ("bilinear", "pi")


def bilinear_weights(place: Tensor, scale: Tensor, size: int, *, antialias: bool) -> Tensor:
    """Rows of the matrix ``B``, of any number of resizings at once.

    Args:
        place: floating-point ``[rows]``, places on the new axis.
        scale: places of the old axis to one of the new, ``n / m``: ``[rows]``, or one for all.
        size: places of the old axis, ``n``.
        antialias: whether a coarser axis averages.

    Returns:
        ``[rows, size]`` in the dtype of ``place``; the rows add up to 1.
    """
    centre = (place + 0.5) * scale
    reach = scale.clamp(min=1) if antialias else torch.ones_like(scale)
    old = torch.arange(size, device=place.device, dtype=place.dtype) + 0.5
    weights = (1 - (old - centre[:, None]).abs() / reach[..., None]).clamp(min=0)
    return weights / weights.sum(1, keepdim=True)


def resize_patch_kernel(
    weight: Tensor, size: tuple[int, int], method: Literal["bilinear", "pi"] = "bilinear"
) -> Tensor:
    """The patch embedding's kernel for patches of another size.

    The bias of a patch embedding needs no change. A bilinear kernel is not rescaled, so its
    responses grow with the number of the patch's pixels.

    Args:
        weight: ``[dim, 1, height, width]``, mel bins by frames, as a convolution holds it.
            :class:`~fastast.models.vit.PatchEmbed` holds ``[dim, height * width]``, flattened in
            this order: give it ``proj.weight.unflatten(1, (1, height, width))`` and flatten the
            result again. Any leading axes will do.
        size: new height and width.
        method: ``"bilinear"``, antialiased, as FlexiAST's code does it; or ``"pi"``.

    Returns:
        ``[dim, 1, *size]`` in the dtype of ``weight``, in full precision under autocast. A gradient
        flows to ``weight``. The matrices are computed in float64, once for each pair of sizes,
        dtype and device.

    Raises:
        ValueError: an unknown method, a size below 1, or a weight of fewer than two axes.
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {METHODS}, got {method!r}")
    if weight.ndim < 2:
        raise ValueError(
            f"weight must be [dim, 1, height, width], got {tuple(weight.shape)}: unflatten it"
        )
    height, width = size
    if min(height, width) < 1:
        raise ValueError(f"size must be positive, got {tuple(size)}")
    if weight.shape[-2:] == (height, width):
        return weight
    matrices = [
        _matrix(weight, old, new, method)
        for old, new in zip(weight.shape[-2:], (height, width), strict=True)
    ]
    with torch.autocast(_autocast_type(weight), enabled=False):
        return matrices[0] @ weight @ matrices[1].T


def resize_positions(
    table: Tensor,
    grid: tuple[int, int],
    size: tuple[int, int],
    *,
    prefix: int = 0,
    shrink: Literal["bilinear", "antialias", "cut"] = "bilinear",
) -> Tensor:
    """A table of positions for another grid of patches.

    An axis that becomes longer is interpolated bilinearly. How one becomes shorter differs:

    - ``"bilinear"`` interpolates there, too, and skips places where it shrinks to less than half;
    - ``"antialias"`` averages them (FlexiAST; the ASTs that ElasticAST is compared with);
    - ``"cut"`` keeps the middle of the axis (AST, section 2.2, for weights from images; its code
      and SSAST's for other input lengths).

    Args:
        table: ``[prefix + f * t, dim]``, rows of the grid frequency-major.
        grid: its patches along frequency and time.
        size: of the new grid.
        prefix: rows of class tokens, which stay as they are.
        shrink: see above.

    Returns:
        ``[prefix + size[0] * size[1], dim]`` in the dtype of ``table``; a gradient flows to it.

    Raises:
        ValueError: an unknown ``shrink``, or a table that does not have ``grid``'s rows.
    """
    if shrink not in ("bilinear", "antialias", "cut"):
        raise ValueError(f"shrink must be 'bilinear', 'antialias' or 'cut', got {shrink!r}")
    if table.ndim != 2 or table.shape[0] != prefix + grid[0] * grid[1]:
        raise ValueError(
            f"table must be [{prefix} + {grid[0]} * {grid[1]}, dim] (prefix and grid), got "
            f"{tuple(table.shape)}"
        )
    if min(size) < 1:
        raise ValueError(f"size must be positive, got {tuple(size)}")
    head, patches = table[:prefix], table[prefix:].unflatten(0, tuple(grid))
    for axis, (old, new) in enumerate(zip(grid, size, strict=True)):
        if new < old and shrink == "cut":
            patches = patches.narrow(axis, old // 2 - new // 2, new)
        elif new != old:
            kind = "bilinear" if shrink == "antialias" else "sampled"
            matrix = _matrix(table, old, new, kind)
            with torch.autocast(_autocast_type(table), enabled=False):
                patches = torch.tensordot(matrix, patches, ([1], [axis])).movedim(0, axis)
    return torch.cat([head, patches.flatten(0, 1)])


def _autocast_type(x: Tensor) -> str:
    """The device type whose autocast concerns ``x``; shapes alone, on ``meta``, have none."""
    return "cpu" if x.is_meta else x.device.type


# An operator, so that compiled code takes the matrix from the cache instead of computing it, whose
# pseudo-inverse would make a GPU wait.
LIBRARY.define("resize_matrix(Tensor like, int old, int new, str kind) -> Tensor")


@torch.library.impl(LIBRARY, "resize_matrix", ANY_DEVICE)
def _resize_matrix(like: Tensor, old: int, new: int, kind: str) -> Tensor:
    return _matrix_on(old, new, kind, like.dtype, like.device).clone()


@torch.library.register_fake("fastast::resize_matrix", lib=LIBRARY)
def _(like: Tensor, old: int, new: int, kind: str) -> Tensor:
    return like.new_empty(new, old)


def _matrix(like: Tensor, old: int, new: int, kind: str) -> Tensor:
    """What resizes an axis: ``[new, old]``, of the dtype and device of ``like``."""
    return torch.ops.fastast.resize_matrix(like.detach(), old, new, kind)


@lru_cache(maxsize=512)
def _matrix_on(old: int, new: int, kind: str, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.from_numpy(_matrix_of(old, new, kind)).to(device, dtype)


@lru_cache(maxsize=512)
def _matrix_of(old: int, new: int, kind: str) -> np.ndarray:
    """``"bilinear"`` (antialiased), ``"sampled"`` (not) or ``"pi"``, in float64."""
    place, scale = torch.arange(new).double(), torch.tensor(old / new, dtype=torch.float64)
    matrix = bilinear_weights(place, scale, old, antialias=kind == "bilinear").numpy()
    return np.linalg.pinv(matrix.T) if kind == "pi" else matrix
