"""Swin's way to attention within windows: roll the grid, partition it, mask, undo both.

For grids of one size that the window divides. Index and mask are made once, as Swin's buffers are.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.peers.attention import sdpa_attention

BiasedAttention = Callable[[Tensor, Tensor, Tensor, Tensor, float], Tensor]
"""``(q, k, v, bias, scale) -> out``, where the bias broadcasts to the scores."""


def explicit_biased(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float) -> Tensor:
    """Matmul, add, softmax, matmul: what Swin's code does."""
    return ((scale * q @ k.mT + bias).softmax(-1)).to(v.dtype) @ v


class RolledWindows:
    """Grids of ``height x width`` patches, one after the other in a stream.

    Args:
        height, width: multiples of ``window``.
        window: patches along the side of a window.
        shift: of the windows along height and width.
        device: of the streams.
    """

    def __init__(
        self,
        height: int,
        width: int,
        window: int,
        shift: tuple[int, int],
        device: torch.device | str = "cpu",
    ) -> None:
        self.size, self.window, self.shift = (height, width), window, shift
        y, x = torch.arange(window**2) // window, torch.arange(window**2) % window
        dy, dx = (axis[:, None] - axis + window - 1 for axis in (y, x))
        self.offsets = (dy * (2 * window - 1) + dx).to(device)
        self.mask = None
        if any(shift):
            # Patches from different places, which the roll has brought together, get -100.
            region = torch.zeros(height, width)
            edges = [
                [slice(0, n - window), slice(n - window, n - s), slice(n - s, n)]
                for n, s in zip(self.size, shift, strict=True)
            ]
            for index, (rows, columns) in enumerate(product(*edges)):
                region[rows, columns] = index
            region = self._cut(region[None]).squeeze(-1)
            self.mask = -100.0 * (region[:, :, None] != region[:, None]).float().to(device)

    def _cut(self, grid: Tensor) -> Tensor:
        """``[clips, height, width, ...] -> [windows, patches, ...]``."""
        side = self.window
        x = grid.unflatten(1, (-1, side)).unflatten(3, (-1, side)).transpose(2, 3)
        return x.flatten(3, 4).flatten(0, 2)

    def partition(self, stream: Tensor) -> Tensor:
        """``[rows, ...] -> [windows, patches, ...]``."""
        grid = stream.unflatten(0, (-1, *self.size))
        if any(self.shift):
            grid = grid.roll((-self.shift[0], -self.shift[1]), (1, 2))
        return self._cut(grid)

    def merge(self, windows: Tensor) -> Tensor:
        """The inverse of :meth:`partition`."""
        side, (height, width) = self.window, self.size
        x = windows.unflatten(1, (side, side)).unflatten(0, (-1, height // side, width // side))
        grid = x.transpose(2, 3).flatten(3, 4).flatten(1, 2)
        return (grid.roll(self.shift, (1, 2)) if any(self.shift) else grid).flatten(0, 2)

    def bias(self, table: Tensor, windows: int, dtype: torch.dtype) -> Tensor:
        """What is added to scores ``[windows, heads, patches, patches]``, or broadcasts to it."""
        bias = table[:, self.offsets]
        if self.mask is None:
            return bias.to(dtype)[None]
        masked = (bias + self.mask[:, None]).to(dtype)
        return masked.repeat(windows // len(self.mask), 1, 1, 1)

    def attend(
        self, qkv: Tensor, table: Tensor, logit_scale: Tensor | None, attention: BiasedAttention
    ) -> Tensor:
        """``qkv [windows, patches, 3, heads, head_dim] -> [windows, patches, heads, head_dim]``."""
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        scale = q.shape[-1] ** -0.5
        if logit_scale is not None:
            q = (F.normalize(q, dim=-1) * logit_scale[:, None, None]).to(v.dtype)
            k, scale = F.normalize(k, dim=-1), 1.0
        bias = self.bias(table, q.shape[0], v.dtype)
        return attention(q, k, v, bias, scale).transpose(1, 2)


WAYS: dict[str, tuple[str, BiasedAttention]] = {
    "roll, SDPA": (
        "the grid rolled and partitioned, PyTorch's fused attention with bias and mask added up "
        "beforehand, both undone",
        sdpa_attention,
    ),
    "roll, explicit": ("Swin's code: the same with explicit scores and softmax", explicit_biased),
}
"""By name: what a way stands for, and its attention."""
