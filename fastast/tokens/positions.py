"""Positions of patches, for clips of any length.

Every table gives a row per token from its place ``(freq, time)`` in its clip's own grid. A clip
longer than the table is laid over it by linear interpolation along time (half-pixel centres, as
bilinear resizing of the table to the clip's width would do), so that no length is out of range.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastast.tokens.grid import PatchGrid
from fastast.tokens.resizing import bilinear_weights


def _time_taps(grid: PatchGrid, width: int, shorter: str) -> tuple[Tensor, Tensor, Tensor]:
    """The two neighbouring table columns of each token and the weight of the second.

    A clip wider than the table is laid over it. One that is narrower is, too (``"stretch"``), or
    uses as many columns as it has patches, as they are: the ``"first"`` or the ``"middle"`` ones.
    """
    time = grid.time.to(torch.float32)
    scale = width / grid.clip_width.clamp(min=1).to(torch.float32)
    if shorter != "stretch":
        scale = scale.clamp(max=1)
    place = ((time + 0.5) * scale - 0.5).clamp(0, width - 1)
    if shorter == "middle":
        place = place + (width // 2 - grid.clip_width // 2).clamp(min=0)
    first = place.floor()
    second = (first + 1).clamp(max=width - 1)
    return first.to(torch.int64), second.to(torch.int64), place - first


def _interpolate(table: Tensor, first: Tensor, second: Tensor, weight: Tensor) -> Tensor:
    # F.embedding rather than indexing: its eager backward is deterministic on every device.
    return torch.lerp(
        F.embedding(first, table), F.embedding(second, table), weight.to(table)[:, None]
    )


class FactorisedPositions(nn.Module):
    """A learned row per frequency plus a learned row per time (ElasticAST, section 3.2).

    Args:
        freq_patches, time_patches: sizes of the two tables. Clips with more time patches are
            interpolated (the original fails on them).
        dim: of the rows.

    Shape:
        :class:`~fastast.tokens.PatchGrid` ``-> [rows, dim]``.
    """

    def __init__(self, freq_patches: int, time_patches: int, dim: int) -> None:
        super().__init__()
        self.freq = nn.Parameter(torch.empty(freq_patches, dim))
        self.time = nn.Parameter(torch.empty(time_patches, dim))
        nn.init.trunc_normal_(self.freq, std=0.02)
        nn.init.trunc_normal_(self.time, std=0.02)

    def forward(self, grid: PatchGrid) -> Tensor:
        first, second, weight = _time_taps(grid, self.time.shape[0], "first")
        return F.embedding(grid.freq, self.freq) + _interpolate(self.time, first, second, weight)


class GridPositions(nn.Module):
    """One learned row per prefix token and per patch of a fixed grid, as in ViT and AST.

    Clips of another width than the grid's are laid over it, which is what resizing the table
    bilinearly for that length does. Narrower ones may use columns of it instead, as they are.

    Args:
        prefix: number of prefix rows.
        freq_patches, time_patches: the grid.
        dim: of the rows.
        shorter: ``"stretch"`` lays narrower clips over all columns, ``"middle"`` takes as many of
            those in the middle (SSAST).

    Shape:
        :class:`~fastast.tokens.PatchGrid` ``-> [rows, dim]``.

    Raises:
        ValueError: an unknown ``shorter``.
    """

    def __init__(
        self,
        prefix: int,
        freq_patches: int,
        time_patches: int,
        dim: int,
        *,
        shorter: str = "stretch",
    ) -> None:
        super().__init__()
        if shorter not in ("stretch", "middle"):
            raise ValueError(f"shorter must be 'stretch' or 'middle', got {shorter!r}")
        self.prefix, self.grid, self.shorter = prefix, (freq_patches, time_patches), shorter
        self.table = nn.Parameter(torch.empty(prefix + freq_patches * time_patches, dim))
        nn.init.trunc_normal_(self.table, std=0.02)

    def forward(self, grid: PatchGrid) -> Tensor:
        width = self.grid[1]
        first, second, weight = _time_taps(grid, width, self.shorter)
        row = self.prefix + grid.freq * width
        is_prefix = grid.prefix_id >= 0
        first = torch.where(is_prefix, grid.prefix_id, row + first)
        second = torch.where(is_prefix, grid.prefix_id, row + second)
        return _interpolate(self.table, first, second, weight)


class ResizedPositions(nn.Module):
    """The table of a fixed grid, resized to each clip's own in both directions, as in FlexiAST.

    Other patch sizes give other grids. Where a grid is coarser than the table, the table is
    averaged (:func:`~fastast.tokens.resize_positions` with ``shrink="antialias"``, for clips of
    any width at once). A row is the product of a row of weights, one for each of the table's, and
    the table: for 8 x 64 patches a two-hundredth of the work of ViT-B.

    Args:
        prefix: number of prefix rows.
        freq_patches, time_patches: the grid of the table.
        dim: of the rows.

    Shape:
        :class:`~fastast.tokens.PatchGrid` ``-> [rows, dim]`` in the dtype of the table.
    """

    def __init__(self, prefix: int, freq_patches: int, time_patches: int, dim: int) -> None:
        super().__init__()
        self.prefix, self.grid = prefix, (freq_patches, time_patches)
        self.table = nn.Parameter(torch.empty(prefix + freq_patches * time_patches, dim))
        nn.init.trunc_normal_(self.table, std=0.02)

    def forward(self, grid: PatchGrid) -> Tensor:
        height, width = self.grid
        dtype = torch.promote_types(self.table.dtype, torch.float32)
        freq, time = grid.freq.to(dtype), grid.time.to(dtype)
        freq_scale = torch.full_like(freq, height / grid.geometry.freq_patches)
        time_scale = width / grid.clip_width.clamp(min=1).to(dtype)
        by_freq = bilinear_weights(freq, freq_scale, height, antialias=True)
        by_time = bilinear_weights(time, time_scale, width, antialias=True)
        patch = (by_freq[:, :, None] * by_time[:, None]).flatten(1)
        patch = torch.where((grid.prefix_id < 0)[:, None], patch, 0)
        prefix = grid.prefix_id[:, None] == torch.arange(self.prefix, device=freq.device)
        weights = torch.cat([prefix.to(dtype), patch], 1).to(self.table.dtype)
        return (weights @ self.table).to(self.table.dtype)  # autocast makes it another


class SinCosPositions(nn.Module):
    """Fixed sines and cosines: half the channels for frequency, half for time. Any length.

    Channel ``c`` of a half with ``n`` frequencies is ``sin(p * w_c)``, and ``n + c`` is
    ``cos(p * w_c)``, with ``w_c = 10000 ** (-c / n)`` (Vaswani et al., 2017; in two dimensions as
    in MAE, He et al., 2022). Class tokens have zeros. Angles are float64: with float32 ones the
    rows of the first 64 places would be off by up to 3e-6.

    Args:
        dim: of the rows; a multiple of 4.
        wrap: compute them as Audio-MAE's published code does, which takes its grid for the
            transposed one: with patches counted in order of time, ``k = time * freq_patches +
            freq``, the halves are of ``k % wrap`` and ``k // wrap``. ``wrap`` is the number of time
            patches that the weights were trained with, 64 in the published ones. Places differ
            from each other at any length, but neighbours in time are not neighbours.

    Shape:
        :class:`~fastast.tokens.PatchGrid` ``-> [rows, dim]`` float32.

    Raises:
        ValueError: ``dim`` is not a multiple of 4, or ``wrap`` is not positive.
    """

    def __init__(self, dim: int, *, wrap: int | None = None) -> None:
        super().__init__()
        if dim % 4:
            raise ValueError(f"dim ({dim}) must be a multiple of 4")
        if wrap is not None and wrap < 1:
            raise ValueError(f"wrap must be at least 1 time patch, got {wrap}")
        self.dim, self.wrap = dim, wrap

    def forward(self, grid: PatchGrid) -> Tensor:
        places = grid.freq, grid.time
        if self.wrap is not None:
            count = grid.time * grid.geometry.freq_patches + grid.freq
            places = count % self.wrap, count // self.wrap
        # No buffer, which a model in half precision would round.
        channel = torch.arange(self.dim // 4, dtype=torch.float64, device=grid.freq.device)
        rates = 10000.0 ** -(channel / (self.dim // 4))
        halves = []
        for place in places:
            angle = place[:, None] * rates
            halves += [angle.sin(), angle.cos()]
        rows = torch.cat(halves, 1).to(torch.float32)
        return torch.where((grid.prefix_id < 0)[:, None], rows, 0)
