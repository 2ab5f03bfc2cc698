r"""Which of many rectangles covers a cell first, without a loop over rectangles.

Masks that grow block by block until enough is covered (SSAST, GMML) ask for the blocks in the
order in which they were drawn. A rectangle is a product of two intervals: block :math:`k` covers
the cell :math:`(i, j)` if :math:`r_{ki} c_{kj} = 1`, with indicators of its rows and columns. Then

.. math::
    s_{ij} = \sum_k 4^{-k}\, r_{ki}\, c_{kj}, \qquad
    4^{-f} \le s_{ij} \le \tfrac{4}{3}\, 4^{-f}
    \quad\text{for the first } f \text{ that covers } (i, j)

so one batched matrix product, and the exponents of its results, give the first cover of all cells
of all clips. This is exact in any floating-point format with enough exponents, whatever its
precision and the order of the sum, since no rounding carries :math:`\tfrac{4}{3}` up to 4. Float32
has exponents for 120 rectangles; more are taken in groups of that many.
"""

from __future__ import annotations

import torch
from torch import Tensor

GROUP = 120
"""Rectangles of one product: their weights are ``4**60`` down to ``4**-59``."""
NEVER = 2**15 - 1
"""The first cover of a cell that nothing covers."""


def first_cover(
    rows: tuple[Tensor, Tensor], cols: tuple[Tensor, Tensor], size: tuple[int, int]
) -> Tensor:
    """The first rectangle that covers each cell.

    Args:
        rows: begins and ends of the rectangles' rows, integers ``[clips, K]`` each, with fewer than
            2**15 rectangles; empty where an end is not above its begin.
        cols: the same of their columns.
        size: rows and columns of the grid.

    Returns:
        int16 ``[clips, *size]``, :data:`NEVER` where nothing covers the cell.
    """
    clips, count = rows[0].shape
    device = rows[0].device
    first = torch.full((clips, *size), NEVER, dtype=torch.int16, device=device)
    exponents = 2 * (60 - torch.arange(GROUP, dtype=torch.int32, device=device))
    weight = (exponents + 127 << 23).view(torch.float32)  # 2**exponents, made of their bits
    with torch.autocast(device.type, enabled=False):
        for begin in range(0, count, GROUP):
            part = slice(begin, begin + GROUP)
            inside_rows = _inside(rows, part, size[0])
            inside_cols = _inside(cols, part, size[1])
            left = inside_rows * weight[: inside_rows.shape[1], None]
            sums = left.mT @ inside_cols.to(torch.float32)
            # All exponents are even, so that the highest eight bits, of which the first is no
            # number's that is not negative, are half of them: 63 more, or 0 where the sum is.
            half = (sums.view(torch.int32) >> 24).to(torch.int16)
            found = torch.where(half > 0, 123 + begin - half, NEVER)
            first = torch.minimum(first, found)
    return first


def _inside(interval: tuple[Tensor, Tensor], part: slice, size: int) -> Tensor:
    """Whether a place lies in the interval: bool ``[clips, K, size]``."""
    place = torch.arange(size, device=interval[0].device)
    begin, end = (bound[:, part, None] for bound in interval)
    return (begin <= place) & (place < end)
