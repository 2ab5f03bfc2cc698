"""Weights of a model for the same model at another time resolution.

From Coarse to Fine (Feng, Erol, Chung and Senocak, ICASSP 2024), section 2.2: what depends on the
number of tokens, or on the size of a patch, is resized; all else is taken as it is. Every
resizing is a linear map, so the same functions serve weights and the optimiser's running means.

A module whose parameters depend on the time resolution says what becomes of them by registering a
function with :func:`adapt_module`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import singledispatch
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastast.models.vit import PatchEmbed
from fastast.tokens import FactorisedPositions, GridPositions
from fastast.tokens.resizing import resize_patch_kernel

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Change:
    """How the models' inputs differ.

    Args:
        time_scale: time from one patch to the next, after over before: 1/4 when four patches take
            the place of one.
        kernel: how patch kernels are resized, ``"bilinear"`` or ``"pi"``, see
            :func:`~fastast.tokens.resizing.resize_patch_kernel`.
    """

    time_scale: float = 1.0
    kernel: Literal["bilinear", "pi"] = "bilinear"

    def __post_init__(self) -> None:
        if not self.time_scale > 0:
            raise ValueError(f"time_scale must be positive, got {self.time_scale}")
        if self.kernel not in ("bilinear", "pi"):
            raise ValueError(f"kernel must be 'bilinear' or 'pi', got {self.kernel!r}")


def adapt_state_dict(
    state: Mapping[str, Tensor], before: nn.Module, after: nn.Module, change: Change | None = None
) -> Tensors:
    """Weights of ``before`` for ``after``, the same model built for another time resolution.

    Nothing is changed in place, and of the models only structure and shapes are read: both may lie
    on the meta device.

    Args:
        state: of ``before``, or other tensors by the names of its parameters, such as the
            optimiser's running means. Names may be missing.
        before, after: the models.
        change: how their inputs differ.

    Returns:
        Tensors of the names in ``state``, of the shapes in ``after``.

    Raises:
        ValueError: a tensor has another shape in ``after`` and no module knows what to do about it.
    """
    change = change or Change()
    adapted = dict(state)
    for name, module in after.named_modules():
        start = f"{name}." if name else ""
        own = {
            key.removeprefix(start): value
            for key, value in adapted.items()
            if key.startswith(start)
        }
        if own:
            found = adapt_module(module, before.get_submodule(name), own, change)
            adapted |= {start + key: value for key, value in found.items()}
    shapes = {name: value.shape for name, value in after.state_dict().items()}
    for name, value in adapted.items():
        if name not in shapes or value.shape != shapes[name]:
            raise ValueError(
                f"{name} is {tuple(value.shape)}, and {tuple(shapes.get(name, ()))} at the other "
                "time resolution: register what becomes of it with "
                "fastast.models.adapt.adapt_module, or keep its size the same"
            )
    return adapted


@singledispatch
def adapt_module(after: nn.Module, before: nn.Module, tensors: Tensors, change: Change) -> Tensors:
    """Those of a module's tensors that change; most modules have none.

    Args:
        after: the module that is to have them. Functions are registered for its type.
        before: the module that had them.
        tensors: of ``before``, by their names in it, those of its children included.
        change: how the models' inputs differ.
    """
    return {}


@adapt_module.register
def _(after: GridPositions, before: nn.Module, tensors: Tensors, change: Change) -> Tensors:
    """The grid as an image, resized bilinearly (as AST does where it grows); prefix rows stay.

    AST cuts the middle out of a grid that is too long for its clips; here both grids cover the same
    time, so a shorter one is resized as well.
    """
    if before.grid == after.grid:
        return {}
    table = tensors["table"]
    prefix, grid = table[: before.prefix], table[before.prefix :]
    image = grid.T.unflatten(1, before.grid)[None]
    resized = F.interpolate(image, after.grid, mode="bilinear", align_corners=False)
    return {"table": torch.cat([prefix, resized[0].flatten(1).T])}


@adapt_module.register
def _(after: FactorisedPositions, before: nn.Module, tensors: Tensors, change: Change) -> Tensors:
    """The time table, read where each of its new columns lies in time.

    Clips use its first columns, however many the table has, so the number of columns does not say
    what a column stands for; the time from one patch to the next does.
    """
    table, columns = tensors["time"], after.time.shape[0]
    if change.time_scale == 1 and columns == len(table):
        return {}
    place = (torch.arange(columns, dtype=torch.float64) + 0.5) * change.time_scale - 0.5
    place = place.clamp(0, len(table) - 1)
    first = place.floor().long()
    second = (first + 1).clamp(max=len(table) - 1)
    return {"time": torch.lerp(table[first], table[second], (place - first).to(table)[:, None])}


@adapt_module.register
def _(after: PatchEmbed, before: nn.Module, tensors: Tensors, change: Change) -> Tensors:
    """The kernel, for patches of another size."""
    old, new = before.geometry.patch_size, after.geometry.patch_size
    if old == new:
        return {}
    kernel = tensors["proj.weight"].unflatten(1, (1, *old))
    return {"proj.weight": resize_patch_kernel(kernel, new, change.kernel).flatten(1)}
