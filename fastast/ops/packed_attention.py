r"""Attention within each segment of a packed stream.

For the rows :math:`i, j` of one segment and each head, with :math:`s` the scale,

.. math::
    P_{ij} = \mathrm{softmax}_j(s\, q_i \cdot k_j), \qquad
    o_i = \sum_j P_{ij} v_j, \qquad
    \ell_i = \log \sum_j e^{s\, q_i \cdot k_j}

which is the block-diagonal masked attention of ElasticAST (Feng et al., 2024, section 2.2) without
the mask: scores between clips are never computed. The forward keeps the inputs, :math:`o` and
:math:`\ell`; the backward recomputes :math:`P_{ij} = e^{s\, q_i \cdot k_j - \ell_i}`
(FlashAttention, Dao et al., 2022):

.. math::
    dV_j = \sum_i P_{ij}\, dO_i, \quad
    dS_{ij} = P_{ij}\,(dO_i \cdot v_j - dO_i \cdot o_i), \quad
    dQ_i = s \sum_j dS_{ij} k_j, \quad
    dK_j = s \sum_i dS_{ij} q_i

Layouts: ``q, k, v, out [rows, heads, head_dim]``; ``lse [heads, rows]``, natural logarithm. Dead
rows are zero in the output and in all gradients, and never read.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from fastast.ops._library import (
    ANY_DEVICE,
    LIBRARY,
    SEGMENTS_SCHEMA,
    Run,
    check_choice,
    check_rows,
    check_stream,
    dense_channels,
    equal_runs,
    once_differentiable,
    triton_kernels,
)
from fastast.segments import TILE_ROWS, Segments

BACKENDS = ("auto", "reference")


def packed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segments: Segments,
    *,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Bidirectional softmax attention within each segment of a packed stream.

    Args:
        q, k, v: ``[rows, heads, head_dim]``, of one floating dtype and device. Any strides.
        segments: of the stream; rows past the last segment yield zeros.
        scale: of the scores; default ``head_dim ** -0.5``. ElasticAST's published models use 1.
        backend: ``"auto"`` or ``"reference"`` (explicit matmul and softmax, any dtype).

    Returns:
        ``[rows, heads, head_dim]``, contiguous, in the dtype of ``q``.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit together.
    """
    check_choice("backend", backend, BACKENDS)
    check_stream("q", q, segments)
    if q.ndim != 3:
        raise ValueError(f"q must be [rows, heads, head_dim], got {tuple(q.shape)}")
    for name, x in (("k", k), ("v", v)):
        if x.shape != q.shape or x.dtype != q.dtype or x.device != q.device:
            raise ValueError(
                f"{name} must match q ({tuple(q.shape)}, {q.dtype}, {q.device}), "
                f"got ({tuple(x.shape)}, {x.dtype}, {x.device})"
            )
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    if backend == "reference":
        return packed_attention_reference(q, k, v, segments.host_offsets, scale)
    return torch.ops.fastast.packed_attention(q, k, v, *_tables(segments), scale)[0]


def packed_attention_qkv(
    qkv: Tensor, segments: Segments, *, scale: float | None = None, backend: str = "auto"
) -> Tensor:
    """:func:`packed_attention` on one projection's output, with one tensor of gradients.

    Args:
        qkv: ``[rows, 3, heads, head_dim]``, as a fused projection writes it.
        segments, scale, backend: as for :func:`packed_attention`.

    Returns:
        ``[rows, heads, head_dim]``.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit together.
    """
    check_choice("backend", backend, BACKENDS)
    check_stream("qkv", qkv, segments)
    if qkv.ndim != 4 or qkv.shape[1] != 3:
        raise ValueError(f"qkv must be [rows, 3, heads, head_dim], got {tuple(qkv.shape)}")
    scale = qkv.shape[-1] ** -0.5 if scale is None else float(scale)
    if backend == "reference":
        return packed_attention_reference(*qkv.unbind(1), segments.host_offsets, scale)
    return torch.ops.fastast.packed_attention_qkv(qkv, *_tables(segments), scale)[0]


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = True,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
) -> Tensor:
    """:func:`packed_attention` with the signature of flash-attn's function of this name.

    For trying it in code that exists: the tables of :class:`~fastast.Segments` are computed on
    the device at every call, which :func:`packed_attention` saves.

    Args:
        q, k, v: ``[total, heads, head_dim]``, with equally many heads.
        cu_seqlens_q, cu_seqlens_k: int32 ``[S + 1]`` on the device, one tensor given twice. Two
            tensors are compared, which waits for the device.
        max_seqlen_q, max_seqlen_k: bounds on the rows of a segment.
        softmax_scale: of the scores; default ``head_dim ** -0.5``.
        deterministic: the result is so in any case.

    Returns:
        ``[total, heads, head_dim]``.

    Raises:
        ValueError: what bidirectional self-attention has no use for: dropout, causal or windowed
            masks, soft caps, slopes, block tables, returned probabilities, keys of other segments.
    """
    for name, value, plain in (
        ("dropout_p", dropout_p, 0.0),
        ("causal", causal, False),
        ("window_size", tuple(window_size), (-1, -1)),
        ("softcap", softcap, 0.0),
        ("alibi_slopes", alibi_slopes, None),
        ("return_attn_probs", return_attn_probs, False),
        ("block_table", block_table, None),
    ):
        if value is not plain and value != plain:
            raise ValueError(f"{name} must be {plain} for bidirectional attention, got {value}")
    if cu_seqlens_k is not cu_seqlens_q and not torch.equal(cu_seqlens_q, cu_seqlens_k):
        raise ValueError("cu_seqlens_k must equal cu_seqlens_q: keys are those of the queries")
    if cu_seqlens_q.dtype != torch.int32:
        raise ValueError(f"cu_seqlens_q must be int32, got {cu_seqlens_q.dtype}")
    longest = max(max_seqlen_q, max_seqlen_k)
    segments = Segments(
        cu_seqlens_q,
        cu_seqlens_q,  # on the device: read only where no kernel takes the input
        _tiles_of(cu_seqlens_q, q.shape[0]),
        max(16, 1 << (longest - 1).bit_length()),
    )
    return packed_attention(q, k, v, segments, scale=softmax_scale)


def _tiles_of(offsets: Tensor, rows: int) -> Tensor:
    """:attr:`Segments.tiles` of offsets on any device, without tiles for the dead rows."""
    num_segments = offsets.shape[0] - 1
    counts = (offsets.diff() + TILE_ROWS - 1) // TILE_ROWS
    ends = counts.cumsum(0, dtype=torch.int32)
    tile = torch.arange(-(-rows // TILE_ROWS) + num_segments + 1, device=offsets.device)
    owner = torch.searchsorted(ends, tile, right=True).clamp(max=num_segments - 1)
    first, last = offsets[owner], offsets[owner + 1]
    begin = first + (tile - (ends - counts)[owner]) * TILE_ROWS
    end = torch.minimum(begin + TILE_ROWS, last)
    alive = begin < last
    return (torch.stack([begin, end, first, last], 1) * alive[:, None]).to(torch.int32)


def packed_attention_reference(
    q: Tensor, k: Tensor, v: Tensor, host_offsets: Tensor, scale: float
) -> Tensor:
    """The specification: explicit scores and softmax, segment by segment, differentiable."""
    offsets = host_offsets.tolist()
    parts = []
    for begin, end in zip(offsets[:-1], offsets[1:], strict=True):
        qs, ks, vs = (x[begin:end].transpose(0, 1) for x in (q, k, v))  # [heads, length, dim]
        scores = scale * (qs @ ks.transpose(1, 2))
        parts.append((scores.softmax(-1) @ vs).transpose(0, 1))
    dead = q.new_zeros(q.shape[0] - offsets[-1], *q.shape[1:])
    return torch.cat([*parts, dead])


def attention_flops(host_offsets: Tensor, heads: int, head_dim: int) -> int:
    """Floating-point operations of the two forward matmuls, summed over segments."""
    lengths = host_offsets.to(torch.int64).diff()
    return 4 * heads * head_dim * int((lengths * lengths).sum())


# The operators --------------------------------------------------------------------------------

LIBRARY.define(
    f"packed_attention(Tensor q, Tensor k, Tensor v, {SEGMENTS_SCHEMA}, float scale)"
    " -> (Tensor out, Tensor lse)"
)
LIBRARY.define(
    "packed_attention_backward(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor out,"
    f" Tensor lse, {SEGMENTS_SCHEMA}, float scale) -> (Tensor, Tensor, Tensor)"
)
LIBRARY.define(
    f"packed_attention_qkv(Tensor qkv, {SEGMENTS_SCHEMA}, float scale) -> (Tensor out, Tensor lse)"
)
LIBRARY.define(
    "packed_attention_qkv_backward(Tensor grad_out, Tensor qkv, Tensor out, Tensor lse,"
    f" {SEGMENTS_SCHEMA}, float scale) -> Tensor"
)


def _tables(segments: Segments) -> tuple[Tensor, Tensor, Tensor, int]:
    return segments.offsets, segments.host_offsets, segments.tiles, segments.max_length


def _as_run(x: Tensor, run: Run) -> Tensor:
    """Rows of a run as a view ``[count, heads, length, head_dim]``."""
    return x[run.rows].unflatten(0, (run.count, run.length)).transpose(1, 2)


def _is_dense(runs: list[Run], rows: int) -> bool:
    """Whether the stream is one dense batch."""
    return len(runs) == 1 and runs[0].count * runs[0].length == rows


def _lse_run(lse: Tensor, run: Run) -> Tensor:
    """The run's log-sum-exps as a view ``[count, heads, length]``."""
    return lse[:, run.rows].unflatten(1, (run.count, run.length)).transpose(0, 1)


def _dense_forward(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    if q.device.type == "cpu":
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, False, scale=scale
        )
    scores = scale * (q @ k.transpose(-1, -2)).to(_lse_dtype(q))
    lse = scores.logsumexp(-1)
    return (scores - lse[..., None]).exp().to(v.dtype) @ v, lse


def _dense_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    if q.device.type == "cpu":
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, q, k, v, out, lse, 0.0, False, scale=scale
        )
    scores = scale * (q @ k.transpose(-1, -2)).to(_lse_dtype(q))
    p = (scores - lse[..., None]).exp()
    delta = (grad * out).sum(-1, keepdim=True, dtype=p.dtype)
    ds = (scale * p * ((grad @ v.transpose(-1, -2)) - delta)).to(q.dtype)
    return ds @ k, ds.transpose(-1, -2) @ q, p.to(grad.dtype).transpose(-1, -2) @ grad


def _lse_dtype(q: Tensor) -> torch.dtype:
    return torch.promote_types(q.dtype, torch.float32)


def _forward(
    q: Tensor, k: Tensor, v: Tensor, host_offsets: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    rows, heads, dim = q.shape
    q, k, v = (dense_channels(x) for x in (q, k, v))
    runs = equal_runs(host_offsets)
    if _is_dense(runs, rows):
        # As of a model of fixed input size: its result is ours, uncopied.
        out, lse = _dense_forward(*(_as_run(x, runs[0]) for x in (q, k, v)), scale)
        return out.transpose(1, 2).flatten(0, 1).contiguous(), lse.transpose(0, 1).flatten(1)
    out = q.new_empty(rows, heads, dim)
    lse = q.new_empty(heads, rows, dtype=_lse_dtype(q))
    for run in runs:
        run_out, run_lse = _dense_forward(*(_as_run(x, run) for x in (q, k, v)), scale)
        _as_run(out, run).copy_(run_out)
        _lse_run(lse, run).copy_(run_lse)
    end = int(host_offsets[-1])
    out[end:].zero_()
    lse[:, end:].zero_()
    return out, lse


def _run_gradients(
    run: Run, inputs: tuple[Tensor, ...], lse: Tensor, scale: float
) -> Iterator[Tensor]:
    """Of the queries, keys and values of a run ``[count * length, heads, head_dim]``, for
    ``inputs``: grad_out, q, k, v, out, with dense channels."""
    views = (_as_run(x, run) for x in inputs)
    grads = _dense_backward(*views, _lse_run(lse, run).contiguous(), scale)
    return (grad.transpose(1, 2).flatten(0, 1) for grad in grads)


def _backward(
    grads: tuple[Tensor, Tensor, Tensor],
    inputs: tuple[Tensor, ...],
    lse: Tensor,
    runs: list[Run],
    scale: float,
) -> None:
    """Writes dq, dk and dv into ``grads``."""
    end = 0
    for run in runs:
        for grad, run_grad in zip(grads, _run_gradients(run, inputs, lse, scale), strict=True):
            grad[run.rows] = run_grad
        end = run.rows.stop
    for grad in grads:
        grad[end:].zero_()


@torch.library.impl(LIBRARY, "packed_attention", ANY_DEVICE)
def _attention(q, k, v, offsets, host_offsets, tiles, max_length, scale):
    check_rows("q", q, host_offsets)
    return _forward(q, k, v, host_offsets, scale)


@torch.library.impl(LIBRARY, "packed_attention_backward", ANY_DEVICE)
def _attention_backward(
    grad_out, q, k, v, out, lse, offsets, host_offsets, tiles, max_length, scale
):
    inputs = tuple(dense_channels(x) for x in (grad_out, q, k, v, out))
    runs = equal_runs(host_offsets)
    if _is_dense(runs, q.shape[0]):
        return tuple(x.contiguous() for x in _run_gradients(runs[0], inputs, lse, scale))
    grads = tuple(q.new_empty(q.shape) for _ in range(3))
    _backward(grads, inputs, lse, runs, scale)
    return grads


@torch.library.impl(LIBRARY, "packed_attention_qkv", ANY_DEVICE)
def _attention_qkv(qkv, offsets, host_offsets, tiles, max_length, scale):
    check_rows("qkv", qkv, host_offsets)
    return _forward(*qkv.unbind(1), host_offsets, scale)


@torch.library.impl(LIBRARY, "packed_attention_qkv_backward", ANY_DEVICE)
def _attention_qkv_backward(
    grad_out, qkv, out, lse, offsets, host_offsets, tiles, max_length, scale
):
    grad = qkv.new_empty(qkv.shape)
    inputs = tuple(dense_channels(x) for x in (grad_out, *qkv.unbind(1), out))
    _backward(grad.unbind(1), inputs, lse, equal_runs(host_offsets), scale)
    return grad


# The implementation in Triton. It reads the geometry on the device, and never `host_offsets`.


def _kernels_for(q: Tensor, scale: float) -> ModuleType | None:
    kernels = triton_kernels("packed_attention")
    return kernels if kernels is not None and kernels.supports(q, scale) else None


@torch.library.impl(LIBRARY, "packed_attention", "CUDA")
def _attention_cuda(q, k, v, offsets, host_offsets, tiles, max_length, scale):
    if kernels := _kernels_for(q, scale):
        return kernels.forward(q, k, v, offsets, tiles, max_length, scale)
    return _attention(q, k, v, offsets, host_offsets, tiles, max_length, scale)


@torch.library.impl(LIBRARY, "packed_attention_backward", "CUDA")
def _attention_backward_cuda(
    grad_out, q, k, v, out, lse, offsets, host_offsets, tiles, max_length, scale
):
    inputs, table = (grad_out, q, k, v, out, lse), (offsets, tiles, max_length, scale)
    if kernels := _kernels_for(q, scale):
        grads = tuple(q.new_empty(q.shape) for _ in range(3))
        kernels.backward(grads, *inputs, *table)
        return grads
    return _attention_backward(*inputs, offsets, host_offsets, tiles, max_length, scale)


@torch.library.impl(LIBRARY, "packed_attention_qkv", "CUDA")
def _attention_qkv_cuda(qkv, offsets, host_offsets, tiles, max_length, scale):
    if kernels := _kernels_for(qkv, scale):
        return kernels.forward(*qkv.unbind(1), offsets, tiles, max_length, scale)
    return _attention_qkv(qkv, offsets, host_offsets, tiles, max_length, scale)


@torch.library.impl(LIBRARY, "packed_attention_qkv_backward", "CUDA")
def _attention_qkv_backward_cuda(
    grad_out, qkv, out, lse, offsets, host_offsets, tiles, max_length, scale
):
    if kernels := _kernels_for(qkv, scale):
        grad = qkv.new_empty(qkv.shape)
        inputs = (grad_out, *qkv.unbind(1), out, lse)
        kernels.backward(grad.unbind(1), *inputs, offsets, tiles, max_length, scale)
        return grad
    return _attention_qkv_backward(
        grad_out, qkv, out, lse, offsets, host_offsets, tiles, max_length, scale
    )


# Shapes for tracing ---------------------------------------------------------------------------


@torch.library.register_fake("fastast::packed_attention", lib=LIBRARY)
def _(q, k, v, offsets, host_offsets, tiles, max_length, scale):
    rows, heads, dim = q.shape
    return q.new_empty(rows, heads, dim), q.new_empty(heads, rows, dtype=_lse_dtype(q))


@torch.library.register_fake("fastast::packed_attention_backward", lib=LIBRARY)
def _(grad_out, q, k, v, out, lse, offsets, host_offsets, tiles, max_length, scale):
    return tuple(q.new_empty(q.shape) for _ in range(3))


@torch.library.register_fake("fastast::packed_attention_qkv", lib=LIBRARY)
def _(qkv, offsets, host_offsets, tiles, max_length, scale):
    rows, _, heads, dim = qkv.shape
    return qkv.new_empty(rows, heads, dim), qkv.new_empty(heads, rows, dtype=_lse_dtype(qkv))


@torch.library.register_fake("fastast::packed_attention_qkv_backward", lib=LIBRARY)
def _(grad_out, qkv, out, lse, offsets, host_offsets, tiles, max_length, scale):
    return qkv.new_empty(qkv.shape)


# Autograd -------------------------------------------------------------------------------------


def _save(ctx, inputs, output):
    *tensors, offsets, host_offsets, tiles, max_length, scale = inputs
    ctx.save_for_backward(*tensors, *output, offsets, host_offsets, tiles)
    ctx.max_length, ctx.scale = max_length, scale
    ctx.mark_non_differentiable(output[1])


def _attention_vjp(ctx, grad_out, _):
    grads = torch.ops.fastast.packed_attention_backward(
        grad_out, *ctx.saved_tensors, ctx.max_length, ctx.scale
    )
    return *grads, None, None, None, None, None


def _attention_qkv_vjp(ctx, grad_out, _):
    grad = torch.ops.fastast.packed_attention_qkv_backward(
        grad_out, *ctx.saved_tensors, ctx.max_length, ctx.scale
    )
    return grad, None, None, None, None, None


torch.library.register_autograd(
    "fastast::packed_attention", _attention_vjp, setup_context=_save, lib=LIBRARY
)
torch.library.register_autograd(
    "fastast::packed_attention_qkv", _attention_qkv_vjp, setup_context=_save, lib=LIBRARY
)
once_differentiable("fastast::packed_attention_backward")
once_differentiable("fastast::packed_attention_qkv_backward")


# Cost -----------------------------------------------------------------------------------------


@register_flop_formula(torch.ops.fastast.packed_attention, get_raw=True)
def _(q, k, v, offsets, host_offsets, *args, **kwargs) -> int:
    return attention_flops(host_offsets, *q.shape[1:])


@register_flop_formula(torch.ops.fastast.packed_attention_qkv, get_raw=True)
def _(qkv, offsets, host_offsets, *args, **kwargs) -> int:
    return attention_flops(host_offsets, *qkv.shape[2:])


@register_flop_formula(torch.ops.fastast.packed_attention_backward, get_raw=True)
def _(grad_out, q, k, v, out, lse, offsets, host_offsets, *args, **kwargs) -> int:
    # Five matmuls (the scores again, dV, dP, dQ, dK) to the forward's two.
    return attention_flops(host_offsets, *q.shape[1:]) * 5 // 2


@register_flop_formula(torch.ops.fastast.packed_attention_qkv_backward, get_raw=True)
def _(grad_out, qkv, out, lse, offsets, host_offsets, *args, **kwargs) -> int:
    return attention_flops(host_offsets, *qkv.shape[2:]) * 5 // 2
