r"""Attention pooling: one weighted mean of each segment's rows per query.

For a segment's rows :math:`x_t \in R^D` and queries :math:`u_h \in R^D`,

.. math::
    w_{th} = \mathrm{softmax}_t(x_t \cdot u_h), \qquad
    y_h = \sum_t w_{th} x_t, \qquad
    \ell_h = \log \sum_t e^{x_t \cdot u_h}

Masked attention pooling (ElasticAST, section 2.2) with a learned query :math:`q`, keys
:math:`W_k x + b_k` and values :math:`W_v x + b_v` is this with
:math:`u_h = s\, W_{k,h}^\top q_h`: the key bias adds the same to all scores of a segment and
cancels, and since the weights add up to one, head :math:`h` is :math:`W_{v,h}\, y_h + b_{v,h}`.
Keys and values are never computed. (The same regrouping serves the inference of multi-head
latent attention: DeepSeek-V2, 2024.)

The backward recomputes the weights from :math:`\ell`. With :math:`g_h = dy_h`,

.. math::
    dw_{th} = g_h \cdot x_t, \quad
    ds_{th} = w_{th}\Big(dw_{th} - \sum_r w_{rh}\, dw_{rh}\Big), \quad
    dx_t = \sum_h w_{th} g_h + ds_{th} u_h, \quad
    du_h = \sum_t ds_{th} x_t

Layouts: ``x [rows, dim]``, ``u [queries, dim]``, ``y [segments, queries, dim]``,
``lse [segments, queries]``. Empty segments yield zeros; dead rows get zero gradients and are
never read. Sums are accumulated in float32 at least.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from fastast.ops._library import (
    ANY_DEVICE,
    LIBRARY,
    SEGMENTS_SCHEMA,
    check_choice,
    check_rows,
    check_stream,
    equal_runs,
    once_differentiable,
    triton_kernels,
)
from fastast.segments import Segments

BACKENDS = ("auto", "reference")


def segment_pool(x: Tensor, u: Tensor, segments: Segments, *, backend: str = "auto") -> Tensor:
    """Softmax-weighted mean of each segment's rows, for each of a few queries.

    Args:
        x: ``[rows, dim]``, the stream.
        u: ``[queries, dim]``, floating point; any scale is already in it.
        segments: of the stream.
        backend: ``"auto"`` or ``"reference"`` (explicit softmax, any dtype).

    Returns:
        ``[segments.num_segments, queries, dim]`` in the dtype of ``x``; zeros for empty segments.

    Raises:
        ValueError: shapes or devices that do not fit together.
    """
    check_choice("backend", backend, BACKENDS)
    check_stream("x", x, segments)
    if x.ndim != 2 or u.ndim != 2 or u.shape[1] != x.shape[1]:
        raise ValueError(
            f"x must be [rows, dim] and u [queries, dim] with one dim, "
            f"got {tuple(x.shape)} and {tuple(u.shape)}"
        )
    if not u.is_floating_point():
        raise ValueError(f"u must be floating point, got {u.dtype}")
    if u.device != x.device:
        raise ValueError(f"u is on {u.device} but x is on {x.device}")
    if backend == "reference":
        return segment_pool_reference(x, u, segments.host_offsets)
    return torch.ops.fastast.segment_pool(
        x, u, segments.offsets, segments.host_offsets, segments.tiles, segments.max_length
    )[0]


def segment_pool_reference(x: Tensor, u: Tensor, host_offsets: Tensor) -> Tensor:
    """The specification: explicit scores and softmax, segment by segment, differentiable."""
    offsets = host_offsets.tolist()
    pooled = []
    for begin, end in zip(offsets[:-1], offsets[1:], strict=True):
        rows = x[begin:end].to(torch.promote_types(x.dtype, u.dtype))
        weights = (rows @ u.T.to(rows.dtype)).softmax(0)  # [length, queries]
        pooled.append(weights.T @ rows)
    if not pooled:
        return x.new_zeros(0, *u.shape)
    return torch.stack(pooled).to(x.dtype)


# The operators --------------------------------------------------------------------------------

LIBRARY.define(f"segment_pool(Tensor x, Tensor u, {SEGMENTS_SCHEMA}) -> (Tensor y, Tensor lse)")
LIBRARY.define(
    # With y, the kernels need not read x twice.
    f"segment_pool_backward(Tensor grad, Tensor x, Tensor u, Tensor lse, {SEGMENTS_SCHEMA},"
    " Tensor? y=None) -> (Tensor dx, Tensor du)"
)


def _compute_dtype(x: Tensor, u: Tensor) -> torch.dtype:
    return torch.promote_types(torch.promote_types(x.dtype, u.dtype), torch.float32)


@torch.library.impl(LIBRARY, "segment_pool", ANY_DEVICE)
def _pool(x, u, offsets, host_offsets, tiles, max_length):
    check_rows("x", x, host_offsets)
    dtype = _compute_dtype(x, u)
    queries = u.to(dtype)
    segments = host_offsets.shape[0] - 1
    y = x.new_zeros(segments, *u.shape)
    lse = x.new_full((segments, u.shape[0]), -torch.inf, dtype=dtype)
    for run in equal_runs(host_offsets):
        part = x[run.rows].to(dtype)
        scores = (part @ queries.T).unflatten(
            0, (run.count, run.length)
        )  # [count, length, queries]
        part_lse = scores.logsumexp(1)
        weights = (scores - part_lse[:, None]).exp()
        y[run.segments] = (weights.transpose(1, 2) @ part.unflatten(0, (run.count, run.length))).to(
            x.dtype
        )
        lse[run.segments] = part_lse
    return y, lse


@torch.library.impl(LIBRARY, "segment_pool_backward", ANY_DEVICE)
def _pool_backward(grad, x, u, lse, offsets, host_offsets, tiles, max_length, y=None):
    dtype = lse.dtype
    queries = u.to(dtype)
    dx = x.new_empty(x.shape)
    du = torch.zeros_like(queries)
    for run in equal_runs(host_offsets):
        part = x[run.rows].to(dtype)  # [count * length, dim]
        g = grad[run.segments].to(dtype)  # [count, queries, dim]
        scores = (part @ queries.T).unflatten(0, (run.count, run.length))
        weights = (scores - lse[run.segments][:, None]).exp()
        dw = part.unflatten(0, (run.count, run.length)) @ g.transpose(
            1, 2
        )  # [count, length, queries]
        ds = (weights * (dw - (weights * dw).sum(1, keepdim=True))).flatten(0, 1)
        dx[run.rows] = ((weights @ g).flatten(0, 1) + ds @ queries).to(x.dtype)
        du += ds.T @ part
    dx[int(host_offsets[-1]) :].zero_()
    return dx, du.to(u.dtype)


# The implementation in Triton.


def _kernels_for(x: Tensor, u: Tensor) -> ModuleType | None:
    kernels = triton_kernels("segment_pool")
    return kernels if kernels is not None and kernels.supports(x, u) else None


@torch.library.impl(LIBRARY, "segment_pool", "CUDA")
def _pool_cuda(x, u, offsets, host_offsets, tiles, max_length):
    kernels = _kernels_for(x, u)
    if kernels is None:
        return _pool(x, u, offsets, host_offsets, tiles, max_length)
    with torch.cuda.device(x.device):
        return kernels.segment_pool_forward(x, u, offsets)


@torch.library.impl(LIBRARY, "segment_pool_backward", "CUDA")
def _pool_backward_cuda(grad, x, u, lse, offsets, host_offsets, tiles, max_length, y=None):
    kernels = _kernels_for(x, u)
    if kernels is None:
        return _pool_backward(grad, x, u, lse, offsets, host_offsets, tiles, max_length)
    with torch.cuda.device(x.device):
        if y is None:
            y, lse = kernels.segment_pool_forward(x, u, offsets)
        return kernels.segment_pool_backward(grad, x, u, y, lse, offsets)


@torch.library.register_fake("fastast::segment_pool", lib=LIBRARY)
def _(x, u, offsets, host_offsets, tiles, max_length):
    segments = offsets.shape[0] - 1
    y = x.new_empty(segments, *u.shape)
    return y, x.new_empty(segments, u.shape[0], dtype=_compute_dtype(x, u))


@torch.library.register_fake("fastast::segment_pool_backward", lib=LIBRARY)
def _(grad, x, u, lse, offsets, host_offsets, tiles, max_length, y=None):
    return x.new_empty(x.shape), u.new_empty(u.shape)


def _save(ctx, inputs, output):
    x, u, offsets, host_offsets, tiles, max_length = inputs
    y, lse = output
    ctx.save_for_backward(x, u, lse, offsets, host_offsets, tiles, y)
    ctx.max_length = max_length
    ctx.mark_non_differentiable(lse)


def _pool_vjp(ctx, grad, _):
    *tensors, y = ctx.saved_tensors
    dx, du = torch.ops.fastast.segment_pool_backward(grad, *tensors, ctx.max_length, y)
    return dx, du, None, None, None, None


torch.library.register_autograd(
    "fastast::segment_pool", _pool_vjp, setup_context=_save, lib=LIBRARY
)
once_differentiable("fastast::segment_pool_backward")


@register_flop_formula(torch.ops.fastast.segment_pool, get_raw=True)
def _(x, u, offsets, host_offsets, *args, **kwargs) -> int:
    return 4 * int(host_offsets[-1]) * u.numel()


@register_flop_formula(torch.ops.fastast.segment_pool_backward, get_raw=True)
def _(grad, x, u, lse, offsets, host_offsets, *args, **kwargs) -> int:
    # Five products of rows, queries and dim: scores, dw, w g, ds u, ds^T x.
    return 10 * int(host_offsets[-1]) * u.numel()
