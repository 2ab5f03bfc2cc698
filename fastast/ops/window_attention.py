r"""Attention within windows of a ragged batch's patch grids, with a relative position bias.

For the patches :math:`i, j` of one window (:mod:`fastast.ops.window_grids`) at :math:`(y_i, x_i)`
and :math:`(y_j, x_j)`, and each head with its row :math:`B` of the bias table,

.. math::
    b_{ij} = B_{(y_i - y_j + w - 1)(2w - 1) + x_i - x_j + w - 1}, \quad
    P_{ij} = \mathrm{softmax}_j(s_{ij} + b_{ij}), \quad
    o_i = \sum_j P_{ij} v_j

with scaled scores :math:`s_{ij} = s\, q_i \cdot k_j` (Swin: Liu et al., 2021, equation 4) or
cosine scores :math:`s_{ij} = \tau^{-1}\, \hat q_i \cdot \hat k_j` (Swin v2: Liu et al., 2022,
equation 2), where :math:`\hat x = x / |x|`; a vector shorter than :math:`10^{-12}` has no
direction, and its cosines are 0.

The forward keeps its inputs alone. A window is small, so the backward computes :math:`P` again
from them, and needs neither the output nor log-sum-exps:

.. math::
    dV_j = \sum_i P_{ij}\, dO_i, \quad
    dP_{ij} = dO_i \cdot v_j, \quad
    dS_{ij} = P_{ij} \bigl(dP_{ij} - \sum_j P_{ij}\, dP_{ij}\bigr), \quad
    dB_t = \sum_{b_{ij} = B_t} dS_{ij}

    \text{scaled:} \quad dQ_i = s \sum_j dS_{ij} k_j, \quad dK_j = s \sum_i dS_{ij} q_i

and for cosine scores, with :math:`r_i = 1 / |q_i|`, :math:`r_j = 1 / |k_j|` and
:math:`G_{ij} = \tau^{-1} r_i r_j\, dS_{ij}`,

.. math::
    dQ'_i = \sum_j G_{ij} k_j, \quad dQ_i = dQ'_i - r_i^2 (q_i \cdot dQ'_i)\, q_i, \quad
    d\tau^{-1} = \tau \sum_i q_i \cdot dQ'_i

and likewise :math:`dK_j` from :math:`dK'_j = \sum_i G_{ij} q_i`.

Norms are factors of the scores, not of stored queries and keys: a normalised copy of ``qkv`` would
cost more memory traffic than the attention itself.

Layouts: ``qkv [rows, 3, heads, head_dim]``; ``out [rows, heads, head_dim]``; ``bias_table
[heads, (2 window - 1)**2]``; ``logit_scale [heads]``. Nothing is rolled or partitioned. Dead rows
are zero in the output and in the gradient of ``qkv``, and never read.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from types import ModuleType
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from fastast.ops._library import (
    ANY_DEVICE,
    LIBRARY,
    check_choice,
    dense_channels,
    once_differentiable,
    triton_kernels,
)
from fastast.ops.window_grids import WindowGrids

BACKENDS = ("auto", "reference")
SHORTEST = 1e-12
"""Norm of a vector that has a direction. Smaller ones would have gradients of any size."""


def window_attention(
    qkv: Tensor,
    bias_table: Tensor,
    grids: WindowGrids,
    *,
    scale: float | None = None,
    logit_scale: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Softmax attention within each window, with a bias for the offset between two patches.

    Args:
        qkv: ``[rows, 3, heads, head_dim]``, as a fused projection writes it. Any strides.
        bias_table: ``[heads, (2 * window - 1)**2]``, floating point; float32 beside a ``qkv`` of
            lower precision is kept as it is. Entry ``(dy + window - 1) * (2 * window - 1) + dx +
            window - 1`` is added to the score of a query ``(dy, dx)`` patches after the key.
        grids: the windows of the stream.
        scale: of scaled scores; default ``head_dim ** -0.5``.
        logit_scale: ``[heads]``, positive; makes the scores cosines times this. Swin v2's is
            ``1 / max(tau, 0.01)``.
        backend: ``"auto"`` or ``"reference"`` (explicit matmul and softmax, any dtype).

    Returns:
        ``[rows, heads, head_dim]``, contiguous, in the dtype of ``qkv``.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit together, or both scales.
    """
    check_choice("backend", backend, BACKENDS)
    if qkv.ndim != 4 or qkv.shape[1] != 3:
        raise ValueError(f"qkv must be [rows, 3, heads, head_dim], got {tuple(qkv.shape)}")
    heads, head_dim = qkv.shape[2:]
    if scale is not None and logit_scale is not None:
        raise ValueError("scale is of scaled scores, logit_scale of cosine scores: give one")
    parameters = [("bias_table", bias_table, (heads, grids.num_offsets))]
    if logit_scale is not None:
        parameters.append(("logit_scale", logit_scale, (heads,)))
    for name, x, shape in parameters:
        if x.shape != shape or x.device != qkv.device:
            raise ValueError(
                f"{name} must be {list(shape)} on {qkv.device} for {heads} heads and windows of "
                f"{grids.window}, got {list(x.shape)} on {x.device}"
            )
    for name, x in [("qkv", qkv)] + [entry[:2] for entry in parameters]:
        if not x.is_floating_point():
            raise ValueError(f"{name} must be floating point, got {x.dtype}")
    if qkv.device != grids.windows.device:
        raise ValueError(
            f"qkv is on {qkv.device} but grids are on {grids.windows.device}: "
            "move them with grids.to(device)"
        )
    scale = head_dim**-0.5 if scale is None else float(scale)
    if backend == "reference":
        return window_attention_reference(
            qkv, bias_table, logit_scale, grids.host_windows, grids.window, scale
        )
    return torch.ops.fastast.window_attention(
        qkv, bias_table, logit_scale, grids.windows, grids.host_windows, grids.window, scale
    )


def window_attention_reference(
    qkv: Tensor,
    bias_table: Tensor,
    logit_scale: Tensor | None,
    host_windows: Tensor,
    window: int,
    scale: float,
) -> Tensor:
    """The specification: explicit scores and softmax, window by window, differentiable."""
    rows, parts = [], []
    for first, pitch, height, width in host_windows.tolist():
        y = torch.arange(height, device=qkv.device).repeat_interleave(width)
        x = torch.arange(width, device=qkv.device).repeat(height)
        rows.append(first + y * pitch + x)
        q, k, v = qkv[rows[-1]].permute(1, 2, 0, 3)  # [heads, patches, head_dim]
        if logit_scale is None:
            scores = scale * (q @ k.mT)
        else:
            scores = logit_scale[:, None, None] * (_unit(q) @ _unit(k).mT)
        dy, dx = (axis[:, None] - axis + window - 1 for axis in (y, x))
        scores = scores + bias_table[:, dy * (2 * window - 1) + dx]
        parts.append((scores.softmax(-1).to(v.dtype) @ v).transpose(0, 1))
    out = qkv.new_zeros(qkv.shape[0], *qkv.shape[2:])
    return out.index_copy(0, torch.cat(rows), torch.cat(parts))


def _unit(x: Tensor) -> Tensor:
    """Vectors of length one in the directions of ``x``; zeros where there is none."""
    norm = x.norm(dim=-1, keepdim=True)
    return x / norm.masked_fill(norm <= SHORTEST, torch.inf)


def window_attention_flops(host_windows: Tensor, heads: int, head_dim: int) -> int:
    """Floating-point operations of the two forward matmuls, summed over windows."""
    patches = host_windows[:, 2:].to(torch.int64).prod(1)
    return 4 * heads * head_dim * int((patches * patches).sum())


# The operators --------------------------------------------------------------------------------

GRIDS_SCHEMA = "Tensor windows, Tensor host_windows, int window"
LIBRARY.define(
    f"window_attention(Tensor qkv, Tensor bias_table, Tensor? logit_scale, {GRIDS_SCHEMA},"
    " float scale) -> Tensor"
)
# The last result is empty without a logit_scale.
LIBRARY.define(
    "window_attention_backward(Tensor grad_out, Tensor qkv, Tensor bias_table,"
    f" Tensor? logit_scale, {GRIDS_SCHEMA}, float scale)"
    " -> (Tensor grad_qkv, Tensor grad_bias_table, Tensor grad_logit_scale)"
)

CHUNK = 1 << 19
"""Numbers worked on at a time, in rows that are gathered and their scores: about the second-level
cache."""


class Shape(NamedTuple):
    """The windows of ``height x width`` patches, which are neighbours in the table."""

    windows: slice
    height: int
    width: int

    @property
    def patches(self) -> int:
        return self.height * self.width

    def stretch(self, host_windows: Tensor) -> slice | None:
        """The rows of all windows, if they are neighbours in the stream: where each is a clip."""
        row, pitch = host_windows[self.windows, :2].numpy().T
        if (row[1:] - row[:-1] != self.patches).any():
            return None
        whole = self.height == 1 or (pitch == self.width).all()
        return slice(int(row[0]), int(row[-1]) + self.patches) if whole else None

    def chunks(
        self, windows: Tensor, host_windows: Tensor, heads: int, head_dim: int
    ) -> Sequence[Tensor | slice]:
        """Rows ``[windows * patches]`` of the stream, in parts: slices where possible, elsewhere
        indices on the table's device."""
        step = max(1, CHUNK // (heads * self.patches * (self.patches + 3 * head_dim)))
        step *= self.patches
        if rows := self.stretch(host_windows):
            begins = range(rows.start, rows.stop, step)
            return [slice(begin, min(begin + step, rows.stop)) for begin in begins]
        first, pitch = windows[self.windows, :2].to(torch.int64)[..., None].unbind(1)
        return self._patches(first, pitch).flatten().split(step)

    def bias(self, table: Tensor, window: int) -> Tensor:
        """The biases between the patches of a window: ``[heads, patches, patches]``."""
        # With patches numbered so, two of them differ by their entry of the table, but for the
        # entry of no offset.
        place = self._patches(table.new_zeros(1, dtype=torch.int64), 2 * window - 1).flatten()
        index = place[:, None] - place + 2 * window * (window - 1)
        return table.index_select(1, index.flatten()).unflatten(1, index.shape)

    def _patches(self, first: Tensor, pitch: Tensor | int) -> Tensor:
        """Numbers ``[..., height, width]`` of the patches, where the first has ``first [..., 1]``
        and the rows are ``pitch`` apart."""
        y, x = (torch.arange(n, device=first.device) for n in (self.height, self.width))
        return (first + pitch * y)[..., None] + x


def _shapes(host_windows: Tensor) -> Iterator[Shape]:
    """The windows with patches, by shape."""
    sizes = host_windows[:, 2:].tolist()
    begin = 0
    for (height, width), windows in groupby(sizes):
        end = begin + len(list(windows))
        if height * width:
            yield Shape(slice(begin, end), height, width)
        begin = end


def _add_offsets(total: Tensor, grad: Tensor, shape: Shape) -> None:
    """Adds gradients of pairs ``[heads, patches, patches]`` to those of their offsets ``total
    [heads, 2 window - 1, 2 window - 1]``, in a fixed order on every device."""
    _, height, width = shape
    pairs = grad.unflatten(2, (height, width)).unflatten(1, (height, width))
    by_x = _sum_diagonals(pairs.transpose(2, 3))  # [heads, y, y', 2 width - 1]
    by_offset = _sum_diagonals(by_x.permute(0, 3, 1, 2)).transpose(1, 2)
    margin_y, margin_x = (total.shape[1] + 1) // 2 - height, (total.shape[2] + 1) // 2 - width
    total[:, margin_y:, margin_x:][:, : 2 * height - 1, : 2 * width - 1] += by_offset


def _sum_diagonals(x: Tensor) -> Tensor:
    """``[..., n, n] -> [..., 2 n - 1]``: sums over pairs ``i, j`` of equal ``i - j``.

    With the columns reversed and the rows padded to ``2 n``, reading the same numbers in rows of
    ``2 n - 1`` moves row ``i`` to the right by ``i``, which puts equal differences in a column.
    """
    n = x.shape[-1]
    skewed = F.pad(x.flip(-1), (0, n)).flatten(-2)[..., : n * (2 * n - 1)]
    return skewed.unflatten(-1, (n, 2 * n - 1)).sum(-2)


def _gather(x: Tensor, rows: Tensor | slice, patches: int) -> Tensor:
    """Rows ``[..., heads, dim]`` of a stream as ``[..., windows, heads, patches, dim]``."""
    x = x[rows] if isinstance(rows, slice) else x.index_select(0, rows)
    return x.unflatten(0, (-1, patches)).movedim((0, 1), (-4, -2))


def _as_stream(values: Tensor) -> Tensor:
    """``[..., windows, heads, patches, dim]`` as rows ``[..., heads, dim]``, in this order."""
    return values.movedim((-4, -2), (0, 1)).flatten(0, 1)


def _scatter(x: Tensor, rows: Tensor | slice, values: Tensor) -> None:
    """Writes what :func:`_gather` reads."""
    values = _as_stream(values)
    if isinstance(rows, slice):
        x[rows] = values
    else:
        x.index_copy_(0, rows, values)


def _matmul(a: Tensor, b: Tensor, scale: float = 1.0, out: Tensor | None = None) -> Tensor:
    """``scale * a @ b`` for each window and head; the scale costs no pass of its own."""
    if out is None:
        out = a.new_empty(*a.shape[:-1], b.shape[-1])
    flat = out.flatten(0, 1)
    torch.baddbmm(flat, a.flatten(0, 1), b.flatten(0, 1), beta=0, alpha=scale, out=flat)
    return out


def _inverse_norm(x: Tensor, dtype: torch.dtype) -> Tensor:
    """``1 / |x|`` over the last dimension, which stays; zero for vectors without direction."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=dtype)
    return norm.masked_fill_(norm <= SHORTEST, torch.inf).reciprocal_()


def _sum_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _check_rows(qkv: Tensor, host_windows: Tensor) -> None:
    """Reads values: for kernels, not for tracing."""
    if qkv.shape[0] < (rows := int(host_windows[-1, 0])):
        raise ValueError(f"qkv has {qkv.shape[0]} rows but the clips of its grids have {rows}")


@torch.library.impl(LIBRARY, "window_attention", ANY_DEVICE)
def _window_attention(qkv, bias_table, logit_scale, windows, host_windows, window, scale):
    _check_rows(qkv, host_windows)
    rows, _, heads, dim = qkv.shape
    bias_table = bias_table.to(_sum_dtype(qkv))
    shapes = list(_shapes(host_windows))
    if len(shapes) == 1 and _has_flash(qkv) and shapes[0].stretch(host_windows) == slice(0, rows):
        # Nothing to gather: the result is ours, uncopied.
        q, k, v = _gather(qkv, slice(0, rows), shapes[0].patches)
        out = _attend(q, k, v, shapes[0].bias(bias_table, window), logit_scale, scale)
        return _as_stream(out).contiguous()
    out = qkv.new_empty(rows, heads, dim)
    for shape in shapes:
        bias = shape.bias(bias_table, window)
        for chunk in shape.chunks(windows, host_windows, heads, dim):
            q, k, v = _gather(qkv, chunk, shape.patches)
            _scatter(out, chunk, _attend(q, k, v, bias, logit_scale, scale))
    out[int(host_windows[-1, 0]) :].zero_()
    return out


def _has_flash(x: Tensor) -> bool:
    """Whether PyTorch's flash attention for CPUs takes it, and not slowly, as in low precision."""
    return x.device.type == "cpu" and x.dtype.itemsize >= 4


def _attend(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor, logit_scale: Tensor | None, scale: float
) -> Tensor:
    """The output of windows ``[windows, heads, patches, dim]``, in some layout."""
    if not _has_flash(q):
        q, k, v = (x.contiguous() for x in (q, k, v))
        return _weights(q, k, bias, logit_scale, scale)[0].to(v.dtype) @ v
    if logit_scale is not None:
        q = q * (_inverse_norm(q, q.dtype) * logit_scale.to(q.dtype)[:, None, None])
        k, scale = k * _inverse_norm(k, k.dtype), 1.0
    q, k, v = (dense_channels(x) for x in (q, k, v))
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return flash(q, k, v, 0.0, False, attn_mask=bias[None], scale=scale)[0]


def _weights(
    q: Tensor, k: Tensor, bias: Tensor, logit_scale: Tensor | None, scale: float
) -> tuple[Tensor, Tensor | None]:
    """Softmax weights ``[windows, heads, patches, patches]``; of cosines, also what multiplies the
    products of queries and keys."""
    if logit_scale is None:
        return _matmul(q, k.mT, scale).to(bias.dtype).add_(bias).softmax(-1), None
    norms = _inverse_norm(q, bias.dtype), _inverse_norm(k, bias.dtype)
    factor = logit_scale.to(bias.dtype)[:, None, None] * norms[0] * norms[1].mT
    return torch.addcmul(bias, (q @ k.mT).to(bias.dtype), factor).softmax(-1), factor


def _subtract_along(grad: Tensor, x: Tensor) -> Tensor:
    """Takes the part along each ``x`` out of a gradient, in place; returns their products, summed
    over windows and patches: the gradient ``[heads]`` of a factor of ``x``."""
    dtype = _sum_dtype(x)
    product = (grad.to(dtype) * x).sum(-1, keepdim=True)
    grad -= x * (product * _inverse_norm(x, dtype).square_())
    return product.sum((0, 2, 3))


@torch.library.impl(LIBRARY, "window_attention_backward", ANY_DEVICE)
def _window_attention_backward(
    grad_out, qkv, bias_table, logit_scale, windows, host_windows, window, scale
):
    (heads, dim), dtype = qkv.shape[2:], _sum_dtype(qkv)
    grad_qkv = qkv.new_empty(qkv.shape)
    grad_bias = qkv.new_zeros(heads, 2 * window - 1, 2 * window - 1, dtype=dtype)
    grad_logit = qkv.new_zeros(0 if logit_scale is None else heads, dtype=dtype)
    for shape in _shapes(host_windows):
        bias = shape.bias(bias_table.to(dtype), window)
        pairs = torch.zeros_like(bias)
        for chunk in shape.chunks(windows, host_windows, heads, dim):
            # Dense, for matmuls would copy an operand each time that it is used.
            parts = _gather(qkv, chunk, shape.patches).contiguous()
            q, k, v = parts
            grad = _gather(grad_out, chunk, shape.patches).contiguous()
            weights, factor = _weights(q, k, bias, logit_scale, scale)
            ds = torch._softmax_backward_data((grad @ v.mT).to(dtype), weights, -1, dtype)
            pairs += ds.sum(0)
            grads = torch.empty_like(parts)
            dq, dk, dv = grads
            _matmul(weights.to(grad.dtype).mT, grad, out=dv)
            if factor is None:
                g, of_g = ds.to(q.dtype), scale
            else:
                g, of_g = ds.mul_(factor).to(q.dtype), 1.0
            _matmul(g, k, of_g, out=dq)
            _matmul(g.mT, q, of_g, out=dk)
            if factor is not None:
                grad_logit += _subtract_along(dq, q)
                _subtract_along(dk, k)
            _scatter(grad_qkv, chunk, grads)
        _add_offsets(grad_bias, pairs, shape)
    grad_qkv[int(host_windows[-1, 0]) :].zero_()
    if logit_scale is not None:
        grad_logit = (grad_logit / logit_scale).to(logit_scale.dtype)
    return grad_qkv, grad_bias.flatten(1).to(bias_table.dtype), grad_logit


# The implementation in Triton. It reads the geometry on the device, and never `host_windows`.


def _kernels_for(*inputs: Tensor | int | None) -> ModuleType | None:
    """For a qkv, bias table, logit scale and window."""
    kernels = triton_kernels("window_attention")
    return kernels if kernels is not None and kernels.supports(*inputs) else None


@torch.library.impl(LIBRARY, "window_attention", "CUDA")
def _window_attention_cuda(qkv, bias_table, logit_scale, windows, host_windows, window, scale):
    if kernels := _kernels_for(qkv, bias_table, logit_scale, window):
        return kernels.forward(qkv, bias_table, logit_scale, windows, window, scale)
    return _window_attention(qkv, bias_table, logit_scale, windows, host_windows, window, scale)


@torch.library.impl(LIBRARY, "window_attention_backward", "CUDA")
def _window_attention_backward_cuda(
    grad_out, qkv, bias_table, logit_scale, windows, host_windows, window, scale
):
    inputs = (grad_out, qkv, bias_table, logit_scale, windows)
    if kernels := _kernels_for(qkv, bias_table, logit_scale, window):
        return kernels.backward(*inputs, window, scale)
    return _window_attention_backward(*inputs, host_windows, window, scale)


# Shapes for tracing ---------------------------------------------------------------------------


@torch.library.register_fake("fastast::window_attention", lib=LIBRARY)
def _(qkv, bias_table, logit_scale, windows, host_windows, window, scale):
    rows, _, heads, dim = qkv.shape
    return qkv.new_empty(rows, heads, dim)


@torch.library.register_fake("fastast::window_attention_backward", lib=LIBRARY)
def _(grad_out, qkv, bias_table, logit_scale, windows, host_windows, window, scale):
    grad_logit = (
        qkv.new_empty(0, dtype=_sum_dtype(qkv))
        if logit_scale is None
        else logit_scale.new_empty(logit_scale.shape)
    )
    return qkv.new_empty(qkv.shape), bias_table.new_empty(bias_table.shape), grad_logit


# Autograd -------------------------------------------------------------------------------------


def _save(ctx, inputs, output):
    *tensors, ctx.window, ctx.scale = inputs
    ctx.save_for_backward(*tensors)


def _vjp(ctx, grad_out):
    tensors = ctx.saved_tensors
    grad_qkv, grad_bias, grad_logit = torch.ops.fastast.window_attention_backward(
        grad_out, *tensors, ctx.window, ctx.scale
    )
    return grad_qkv, grad_bias, None if tensors[2] is None else grad_logit, None, None, None, None


torch.library.register_autograd("fastast::window_attention", _vjp, setup_context=_save, lib=LIBRARY)
once_differentiable("fastast::window_attention_backward")


# Cost -----------------------------------------------------------------------------------------


@register_flop_formula(torch.ops.fastast.window_attention, get_raw=True)
def _(qkv, bias_table, logit_scale, windows, host_windows, *args, **kwargs) -> int:
    return window_attention_flops(host_windows, *qkv.shape[2:])


@register_flop_formula(torch.ops.fastast.window_attention_backward, get_raw=True)
def _(grad_out, qkv, bias_table, logit_scale, windows, host_windows, *args, **kwargs) -> int:
    # Five matmuls (the scores again, dV, dP, dQ, dK) to the forward's two.
    return window_attention_flops(host_windows, *qkv.shape[2:]) * 5 // 2
