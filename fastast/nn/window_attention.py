"""Self-attention within windows, with the parameter layouts of Swin and of Audio-MAE's decoder."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastast.ops import window_attention
from fastast.ops.window_grids import WindowGrids

MIN_TAU = 0.01


class ContinuousPositionBias(nn.Module):
    """A network that makes a bias table from the offsets between patches.

    Swin v2 (Liu et al., 2022, section 3.3): for the offset ``d`` of a query from a key, two layers
    on ``sign(d) * log(1 + |d|)`` along both axes. Learned for one window, it serves any other.

    Parameters are named as in Audio-MAE's decoder (``fc1``, ``fc2``). Its code drops hidden units
    and outputs in training with probability 0.1, for each pair of patches; here for each offset.
    Swin v2's own code differs from its paper: offsets scaled to +-8, and 16 times a sigmoid at the
    end, for which weights do not carry over.

    Args:
        num_heads: attention heads.
        window: patches along the side of a window.
        hidden: width of the hidden layer.
        dropout: probability, in training.

    Shape:
        ``() -> [num_heads, (2 * window - 1)**2]``, in float32 or more also under autocast.
    """

    def __init__(
        self, num_heads: int, window: int, *, hidden: int = 384, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.fc1 = nn.Linear(2, hidden)
        self.fc2 = nn.Linear(hidden, num_heads)
        self.dropout = nn.Dropout(dropout)
        offset = torch.arange(1 - window, window, dtype=torch.float64)
        offset = offset.sign() * offset.abs().log1p()
        self.register_buffer("offsets", torch.cartesian_prod(offset, offset), persistent=False)

    def forward(self) -> Tensor:
        # A few small products that all windows hang on: in full precision under autocast too.
        with torch.autocast(self.offsets.device.type, enabled=False):
            hidden = self.fc1(self.offsets.to(self.fc1.weight.dtype)).relu()
            return self.dropout(self.fc2(self.dropout(hidden))).t()


class WindowAttention(nn.Module):
    """Self-attention in which each patch attends to those of its window.

    Parameters are named as in Swin and HTS-AT (``qkv``, ``proj``,
    ``relative_position_bias_table``), so that published weights load; their buffers
    ``relative_position_index`` and ``attn_mask`` have no use here. With ``cosine`` and ``meta_mlp``
    they are those of Audio-MAE's decoder (``tau``, ``meta_mlp.fc1``, ``meta_mlp.fc2``).

    Args:
        dim: of the rows; a multiple of ``num_heads``.
        num_heads: attention heads.
        window: patches along the side of a window.
        cosine: scores are cosines over a learned ``tau`` per head, at least 0.01 (Swin v2, equation
            2), instead of scaled products. Swin v2's code keeps ``logit_scale = -log(tau)``.
        meta_mlp: makes the bias table, instead of a learned one.

    Shape:
        ``x [rows, dim], grids -> [rows, dim]``.

    Raises:
        ValueError: ``dim`` is not a multiple of ``num_heads``.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window: int = 8,
        *,
        cosine: bool = False,
        meta_mlp: ContinuousPositionBias | None = None,
    ) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"dim ({dim}) must be a multiple of num_heads ({num_heads})")
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.tau = nn.Parameter(torch.ones(num_heads)) if cosine else None
        self.meta_mlp = meta_mlp
        if meta_mlp is None:
            table = torch.empty((2 * window - 1) ** 2, num_heads)
            self.relative_position_bias_table = nn.Parameter(nn.init.trunc_normal_(table, std=0.02))

    def forward(self, x: Tensor, grids: WindowGrids) -> Tensor:
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))
        if self.meta_mlp is None:
            table = self.relative_position_bias_table.t()
        else:
            table = self.meta_mlp()
        logit_scale = None if self.tau is None else self.tau.clamp_min(MIN_TAU).reciprocal()
        return self.proj(window_attention(qkv, table, grids, logit_scale=logit_scale).flatten(1))
