r"""Attention pooling of ragged segments, forward and backward, reading ``x`` once each way.

For the rows :math:`x_t` of a segment and queries :math:`u_h` (``fastast/ops/segment_pool.py``),

.. math::
    s_{th} = x_t \cdot u_h, \quad w_{th} = e^{s_{th} - \ell_h}, \quad
    y_h = \sum_t w_{th} x_t, \quad \ell_h = \log \sum_t e^{s_{th}}

*Forward.* One pass with the online softmax: with :math:`m` the largest score so far, each tile
rescales what was summed by :math:`e^{m_{old} - m_{new}}`. A part of a segment that ends with
:math:`(y^i, \ell^i)` is one term of the whole, which gives the second stage:

.. math::
    \ell = \log \sum_i e^{\ell^i}, \qquad y = \sum_i e^{\ell^i - \ell} y^i

*Backward.* With :math:`g_h = dy_h` and :math:`\delta_h = \sum_t w_{th}\, g_h \cdot x_t
= g_h \cdot y_h`, known from the forward's result before any row is read,

.. math::
    ds_{th} = w_{th}\,(g_h \cdot x_t - \delta_h), \quad
    dx_t = \sum_h w_{th} g_h + ds_{th} u_h, \quad
    du_h = \sum_t ds_{th} x_t

so each row is read once, its gradient is written once, and :math:`du` is summed on chip over all
rows of a program; the programs' sums are added afterwards, in a fixed order. A rounding error
:math:`\epsilon` of :math:`\delta_h` shifts all :math:`ds_{th}` of the segment by
:math:`-\epsilon w_{th}` and so :math:`du_h` by :math:`-\epsilon y_h`. Since
:math:`\sum_t ds_{th} = 0` without it, the sum that is found tells :math:`\epsilon`, and that
shift is taken back.

*Shares.* Work is memory traffic, so it is rows that are shared out: a fixed number of programs
takes equal stretches of the stream, whatever the segments are. A long segment is spread over
several programs; a program walks through several short ones. An end that falls within a quarter
share of a segment's own end moves there, so short segments are never cut. Each program has two
places for parts of cut segments: 0 for one that began before its share, 1 for one that goes on
after it. Every program derives the shares from ``offsets`` alone: the host knows no lengths, one
compiled kernel and one captured graph serve all ragged batches, and the order of every sum is
fixed.

*On chip.* A product of a tile of rows with 16 queries is long and thin: its inner dimension is all
of ``dim``. Each warp takes a slice of the channels, as one matrix of a batched product, and the
slices' scores are added across warps; so a row's channels are read from shared memory by one warp
alone. Since 192, 384 and 768 are no powers of two, the channels come in parts that are (three of
256, for 768), unrolled at compile time. Where a tile does not fit on chip (float32, and backward of
wide models where shared memory is small) its second use reads it from the cache.

Products are taken in the dtype of ``x``, sums in float32. A float32 number is three bfloat16
numbers, exactly, and a product of two is the six largest of their products. Three TF32 products
would be cheaper but lose two of the 24 bits: on an H200 some results then erred by more than twice
as much as those of PyTorch's float32.

Names: ``b_`` blocks on chip, ``p_`` pointers, ``o_`` offsets, ``m_`` masks. ``W`` warps, ``C``
channels of a warp in one part, ``T`` rows of a tile, ``Q`` queries padded to 16.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastast.kernels.aot import AotCase

MAX_QUERIES = 16
PRECISION = "bf16x6"
"""Of products of float32; means nothing to those of 16 bits."""
MIN_SHARE = 64
"""Rows below which a share costs more to begin than to read."""

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
LOWEST = tl.constexpr(-1e30)  # a finite pivot: -inf - -inf is NaN


# Geometry --------------------------------------------------------------------------------------


@triton.jit
def _share_rows(p_offsets, num_segments, rows, programs, MIN_SHARE: tl.constexpr):
    """Rows that segments own, and rows of a share. int64: sums of these may pass 2**31."""
    used = tl.minimum(tl.load(p_offsets + num_segments).to(tl.int64), rows)
    return used, tl.maximum(tl.cdiv(used, programs), MIN_SHARE)


@triton.jit
def _boundary(p_offsets, num_segments, used, share, index):
    """Where share ``index`` begins: in which segment, at which row."""
    row = tl.minimum(index * share, used)
    o_block = tl.arange(0, 1024)
    b_ended = tl.zeros([1024], tl.int32)
    for block in range(0, num_segments, 1024):
        m_block = block + o_block < num_segments
        b_end = tl.load(p_offsets + 1 + block + o_block, mask=m_block, other=0)
        b_ended += (m_block & (b_end <= row)).to(tl.int32)
    segment = tl.where(row < used, tl.sum(b_ended, 0), num_segments)
    segment = tl.where(index > 0, segment, 0)
    inside = (index > 0) & (row < used)
    begin = tl.load(p_offsets + segment).to(tl.int64)
    end = tl.load(p_offsets + segment + 1, mask=inside, other=0).to(tl.int64)
    down = inside & (row - begin <= share // 4)
    up = inside & (end - row <= share // 4) & (row - begin > share // 4)
    row = tl.where(down, begin, tl.where(up, end, row))
    return segment + up.to(tl.int32), row


@triton.jit
def _walk(p_offsets, num_segments, rows, programs, MIN_SHARE: tl.constexpr):
    """The program's share: first row, end row, first segment, end of segments; and used rows.

    The empty segments between two shares belong to the first of them.
    """
    program = tl.program_id(0)
    used, share = _share_rows(p_offsets, num_segments, rows, programs, MIN_SHARE)
    first, begin = _boundary(p_offsets, num_segments, used, share, program)
    last, end = _boundary(p_offsets, num_segments, used, share, program + 1)
    cut = tl.load(p_offsets + last).to(tl.int64) < end
    return begin, end, first, last + cut.to(tl.int32), used


@triton.jit
def _channels(W: tl.constexpr, C: tl.constexpr):
    """Channels of a part: [W, 1, C]."""
    return (tl.arange(0, W) * C)[:, None, None] + tl.arange(0, C)[None, None, :]


@triton.jit
def _load_queries(p_matrix, o_channel, Q: tl.constexpr, H: tl.constexpr, D: tl.constexpr,
                  DTYPE: tl.constexpr, AGAIN: tl.constexpr):  # fmt: skip
    """A part of a [H, D] matrix: [W, Q, C], zeros outside. ``AGAIN`` keeps the compiler from
    keeping it in registers."""
    o_query = tl.arange(0, Q)[None, :, None]
    mask = (o_query < H) & (o_channel < D)
    b_part = tl.load(p_matrix + o_query * D + o_channel, mask=mask, other=0.0, volatile=AGAIN)
    return b_part.to(DTYPE)


@triton.jit
def _store_queries(p_matrix, o_channel, b_part, Q: tl.constexpr, H: tl.constexpr, D: tl.constexpr):
    """The counterpart."""
    o_query = tl.arange(0, Q)[None, :, None]
    mask = (o_query < H) & (o_channel < D)
    tl.store(p_matrix + o_query * D + o_channel, b_part.to(p_matrix.dtype.element_ty), mask=mask)


@triton.jit
def _load_kept(p_x, mask):
    """A part of a tile that will be read again."""
    return tl.load(p_x, mask=mask, other=0.0, eviction_policy="evict_last")


@triton.jit
def _load_again(p_x, mask):
    """The same, from the cache; volatile, or the compiler would keep the first copy on chip."""
    return tl.load(p_x, mask=mask, other=0.0, volatile=True)


# Forward ---------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["num_segments", "rows", "programs"])
def pool_forward(
    p_x,  # [rows, D]
    p_u,  # [H, D]
    p_offsets,  # int32 [num_segments + 1]
    p_y,  # [num_segments, H, D]
    p_lse,  # float32 [num_segments, H], natural logarithm
    p_part_y,  # float32 [programs, 2, H, D]
    p_part_lse,  # float32 [programs, 2, H], base 2
    x_stride,
    num_segments,
    rows,
    programs,
    H: tl.constexpr,
    D: tl.constexpr,
    PARTS: tl.constexpr,
    W: tl.constexpr,
    C: tl.constexpr,
    T: tl.constexpr,
    Q: tl.constexpr,
    MIN_SHARE: tl.constexpr,
    RESIDENT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    DTYPE: tl.constexpr = p_x.dtype.element_ty
    o_query = tl.arange(0, Q)
    o_channel = _channels(W, C)  # [W, 1, C]
    share_begin, share_end, first, last, used = _walk(
        p_offsets, num_segments, rows, programs, MIN_SHARE
    )
    b_u = ()  # PARTS x [W, Q, C]
    if RESIDENT:
        for i in tl.static_range(PARTS):
            b_u += (_load_queries(p_u, i * W * C + o_channel, Q, H, D, DTYPE, False),)

    for segment in range(first, last):
        segment_begin = tl.minimum(tl.load(p_offsets + segment).to(tl.int64), rows)
        segment_end = tl.minimum(tl.load(p_offsets + segment + 1).to(tl.int64), rows)
        begin = tl.maximum(segment_begin, share_begin)
        length = (tl.minimum(segment_end, share_end) - begin).to(tl.int32)

        b_max = tl.full([Q], LOWEST, tl.float32)
        b_sum = tl.zeros([Q], tl.float32)
        b_y = ()  # PARTS x [W, Q, C]
        for _i in tl.static_range(PARTS):
            b_y += (tl.zeros([W, Q, C], tl.float32),)
        for tile in range(0, length, T):
            o_row = tile + tl.arange(0, T)
            m_row = o_row < length
            p_row = p_x + (begin + o_row)[None, :, None] * x_stride  # [1, T, 1]
            b_x = ()  # PARTS x [W, T, C]
            b_scores = tl.zeros([W, T, Q], tl.float32)
            for i in tl.static_range(PARTS):
                o_part = i * W * C + o_channel
                m_x = m_row[None, :, None] & (o_part < D)
                if RESIDENT:
                    b_part = tl.load(p_row + o_part, mask=m_x, other=0.0)
                    b_queries = b_u[i]
                    b_x += (b_part,)
                else:
                    b_part = _load_kept(p_row + o_part, m_x)
                    b_queries = _load_queries(p_u, o_part, Q, H, D, DTYPE, True)
                b_keys = tl.permute(b_queries, (0, 2, 1))  # [W, C, Q]
                b_scores = tl.dot(b_part, b_keys, b_scores, input_precision=PRECISION)
            b_s = tl.sum(b_scores, 0) * LOG2_E  # [T, Q]
            b_s = tl.where(m_row[:, None], b_s, float("-inf"))
            b_new = tl.maximum(b_max, tl.max(b_s, 0))
            b_rescale = tl.exp2(b_max - b_new)
            b_w = tl.exp2(b_s - b_new[None, :])
            b_sum = b_sum * b_rescale + tl.sum(b_w, 0)
            b_max = b_new
            b_weights = tl.broadcast_to(tl.trans(b_w).to(DTYPE)[None], [W, Q, T])
            b_next = ()
            for i in tl.static_range(PARTS):
                if RESIDENT:
                    b_part = b_x[i]
                else:
                    o_part = i * W * C + o_channel
                    b_part = _load_again(p_row + o_part, m_row[None, :, None] & (o_part < D))
                b_old = b_y[i] * b_rescale[None, :, None]
                b_next += (tl.dot(b_weights, b_part, b_old, input_precision=PRECISION),)
            b_y = b_next

        b_lse = b_max + tl.log2(b_sum)  # -inf where there are no rows
        b_norm = 1.0 / tl.where(b_sum > 0, b_sum, 1.0)
        m_query = o_query < H
        if length == segment_end - segment_begin:
            p_out = p_y + segment * tl.full((), H * D, tl.int64)
            for i in tl.static_range(PARTS):
                b_out = b_y[i] * b_norm[None, :, None]
                _store_queries(p_out, i * W * C + o_channel, b_out, Q, H, D)
            tl.store(
                p_lse + segment * tl.full((), H, tl.int64) + o_query, b_lse * LN_2, mask=m_query
            )
        else:
            place = tl.program_id(0) * 2 + (begin == segment_begin).to(tl.int32)
            for i in tl.static_range(PARTS):
                b_out = b_y[i] * b_norm[None, :, None]
                _store_queries(p_part_y + place * (H * D), i * W * C + o_channel, b_out, Q, H, D)
            tl.store(p_part_lse + place * H + o_query, b_lse, mask=m_query)


@triton.jit(do_not_specialize=["num_segments", "rows", "programs"])
def pool_combine(
    p_offsets,
    p_part_y,
    p_part_lse,
    p_y,
    p_lse,
    num_segments,
    rows,
    programs,
    H: tl.constexpr,
    D: tl.constexpr,
    C: tl.constexpr,
    Q: tl.constexpr,
    MIN_SHARE: tl.constexpr,
):
    """Adds the parts of one segment, C channels of it; leaves segments that were not cut alone."""
    segment = tl.program_id(0)
    o_query = tl.arange(0, Q)
    o_channel = tl.program_id(1) * C + tl.arange(0, C)
    m_query = o_query < H
    m_y = m_query[:, None] & (o_channel < D)[None, :]
    o_y = o_query[:, None] * D + o_channel[None, :]  # [Q, C]

    used, share = _share_rows(p_offsets, num_segments, rows, programs, MIN_SHARE)
    begin = tl.minimum(tl.load(p_offsets + segment).to(tl.int64), rows)
    end = tl.minimum(tl.load(p_offsets + segment + 1).to(tl.int64), rows)
    # The shares that begin inside the segment, further than a quarter share from its ends.
    first = ((begin + share // 4) // share + 1).to(tl.int32)
    last = ((end - share // 4 - 1) // share).to(tl.int32)
    cut = first <= last

    b_max = tl.full([Q], LOWEST, tl.float32)
    b_sum = tl.zeros([Q], tl.float32)
    b_y = tl.zeros([Q, C], tl.float32)
    for program in range(tl.where(cut, first - 1, 0), tl.where(cut, last + 1, 0)):
        place = program * 2 + (program < first).to(tl.int32)
        b_part = tl.load(p_part_y + place * (H * D) + o_y, mask=m_y, other=0.0)
        b_lse = tl.load(p_part_lse + place * H + o_query, mask=m_query, other=0.0)
        b_new = tl.maximum(b_max, b_lse)
        b_rescale = tl.exp2(b_max - b_new)
        b_w = tl.exp2(b_lse - b_new)
        b_sum = b_sum * b_rescale + b_w
        b_y = b_y * b_rescale[:, None] + b_part * b_w[:, None]
        b_max = b_new

    b_y = (b_y / tl.where(cut, b_sum, 1.0)[:, None]).to(p_y.dtype.element_ty)
    tl.store(p_y + segment * tl.full((), H * D, tl.int64) + o_y, b_y, mask=m_y & cut)
    m_lse = m_query & cut & (tl.program_id(1) == 0)
    b_lse = (b_max + tl.log2(tl.where(cut, b_sum, 1.0))) * LN_2
    tl.store(p_lse + segment * tl.full((), H, tl.int64) + o_query, b_lse, mask=m_lse)


# Backward --------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["num_segments", "rows", "programs"])
def pool_backward(
    p_grad,  # [num_segments, H, D]
    p_x,  # [rows, D]
    p_u,  # [H, D]
    p_y,  # [num_segments, H, D]
    p_lse,  # float32 [num_segments, H], natural logarithm
    p_offsets,  # int32 [num_segments + 1]
    p_dx,  # [rows, D]
    p_part_du,  # float32 [programs, H, D]
    x_stride,
    num_segments,
    rows,
    programs,
    H: tl.constexpr,
    D: tl.constexpr,
    PARTS: tl.constexpr,
    W: tl.constexpr,
    C: tl.constexpr,
    T: tl.constexpr,
    Q: tl.constexpr,
    MIN_SHARE: tl.constexpr,
    RESIDENT: tl.constexpr,
    PRECISION: tl.constexpr,
    SUM_ON_CHIP: tl.constexpr,
):
    DTYPE: tl.constexpr = p_x.dtype.element_ty
    o_query = tl.arange(0, Q)
    o_channel = _channels(W, C)  # [W, 1, C]
    share_begin, share_end, first, last, used = _walk(
        p_offsets, num_segments, rows, programs, MIN_SHARE
    )
    program = tl.program_id(0)
    p_du = p_part_du + program.to(tl.int64) * (H * D)
    b_u = ()  # PARTS x [W, Q, C]
    b_du = ()
    for i in tl.static_range(PARTS):
        o_part = i * W * C + o_channel
        b_zero = tl.zeros([W, Q, C], tl.float32)
        if RESIDENT:
            b_u += (_load_queries(p_u, o_part, Q, H, D, DTYPE, False),)
        if SUM_ON_CHIP:
            b_du += (b_zero,)
        else:
            _store_queries(p_du, o_part, b_zero, Q, H, D)
    if not SUM_ON_CHIP:
        tl.debug_barrier()

    for segment in range(first, last):
        begin = tl.maximum(tl.load(p_offsets + segment).to(tl.int64), share_begin)
        end = tl.minimum(tl.load(p_offsets + segment + 1).to(tl.int64), share_end)
        length = (end - begin).to(tl.int32)
        p_grad_segment = p_grad + segment * tl.full((), H * D, tl.int64)
        p_y_segment = p_y + segment * tl.full((), H * D, tl.int64)
        b_g = ()  # PARTS x [W, Q, C]
        b_delta = tl.zeros([Q], tl.float32)
        for i in tl.static_range(PARTS):
            o_part = i * W * C + o_channel
            b_grad = _load_queries(p_grad_segment, o_part, Q, H, D, tl.float32, False)
            b_y = _load_queries(p_y_segment, o_part, Q, H, D, tl.float32, False)
            b_delta += tl.sum(tl.sum(b_grad * b_y, 2), 0)
            if RESIDENT:
                b_g += (b_grad.to(DTYPE),)
        p_lse_segment = p_lse + segment * tl.full((), H, tl.int64)
        b_lse = tl.load(p_lse_segment + o_query, mask=o_query < H, other=0.0) * LOG2_E

        b_shift = tl.zeros([Q], tl.float32)
        for tile in range(0, length, T):
            o_row = tile + tl.arange(0, T)
            m_row = o_row < length
            p_row = p_x + (begin + o_row)[None, :, None] * x_stride  # [1, T, 1]
            p_dx_row = p_dx + (begin + o_row)[None, :, None] * D
            b_x = ()  # PARTS x [W, T, C]
            b_scores = tl.zeros([W, T, Q], tl.float32)
            b_products = tl.zeros([W, T, Q], tl.float32)
            for i in tl.static_range(PARTS):
                o_part = i * W * C + o_channel
                m_x = m_row[None, :, None] & (o_part < D)
                if RESIDENT:
                    b_part = tl.load(p_row + o_part, mask=m_x, other=0.0)
                    b_queries = b_u[i]
                    b_grads = b_g[i]
                    b_x += (b_part,)
                else:
                    b_part = _load_kept(p_row + o_part, m_x)
                    b_queries = _load_queries(p_u, o_part, Q, H, D, DTYPE, True)
                    b_grads = _load_queries(p_grad_segment, o_part, Q, H, D, DTYPE, True)
                b_queries = tl.permute(b_queries, (0, 2, 1))  # [W, C, Q]
                b_grads = tl.permute(b_grads, (0, 2, 1))
                b_scores = tl.dot(b_part, b_queries, b_scores, input_precision=PRECISION)
                b_products = tl.dot(b_part, b_grads, b_products, input_precision=PRECISION)
            b_w = tl.exp2(tl.sum(b_scores, 0) * LOG2_E - b_lse[None, :])  # [T, Q]
            b_w = tl.where(m_row[:, None], b_w, 0.0)
            b_ds = b_w * (tl.sum(b_products, 0) - b_delta[None, :])
            b_shift += tl.sum(b_ds, 0)
            b_weights = tl.broadcast_to(b_w.to(DTYPE)[None], [W, T, Q])
            b_slopes = tl.broadcast_to(b_ds.to(DTYPE)[None], [W, T, Q])
            b_columns = tl.broadcast_to(tl.trans(b_ds).to(DTYPE)[None], [W, Q, T])
            b_next = ()
            for i in tl.static_range(PARTS):
                o_part = i * W * C + o_channel
                m_x = m_row[None, :, None] & (o_part < D)
                if RESIDENT:
                    b_part = b_x[i]
                    b_queries = b_u[i]
                    b_grads = b_g[i]
                else:
                    b_part = _load_again(p_row + o_part, m_x)
                    b_queries = _load_queries(p_u, o_part, Q, H, D, DTYPE, True)
                    b_grads = _load_queries(p_grad_segment, o_part, Q, H, D, DTYPE, True)
                b_dx = tl.dot(b_weights, b_grads, input_precision=PRECISION)
                b_dx = tl.dot(b_slopes, b_queries, b_dx, input_precision=PRECISION)
                tl.store(p_dx_row + o_part, b_dx.to(DTYPE), mask=m_x)
                if SUM_ON_CHIP:
                    b_next += (tl.dot(b_columns, b_part, b_du[i], input_precision=PRECISION),)
                else:
                    b_sum = _load_queries(p_du, o_part, Q, H, D, tl.float32, True)
                    b_sum = tl.dot(b_columns, b_part, b_sum, input_precision=PRECISION)
                    _store_queries(p_du, o_part, b_sum, Q, H, D)
            b_du = b_next
            if not SUM_ON_CHIP:
                tl.debug_barrier()  # other threads may read what these have written

        b_next = ()
        for i in tl.static_range(PARTS):
            o_part = i * W * C + o_channel
            b_y = _load_queries(p_y_segment, o_part, Q, H, D, tl.float32, True)
            if SUM_ON_CHIP:
                b_next += (b_du[i] - b_shift[None, :, None] * b_y,)
            else:
                b_sum = _load_queries(p_du, o_part, Q, H, D, tl.float32, True)
                b_sum -= b_shift[None, :, None] * b_y
                _store_queries(p_du, o_part, b_sum, Q, H, D)
        b_du = b_next
        if not SUM_ON_CHIP:
            tl.debug_barrier()

    if SUM_ON_CHIP:
        for i in tl.static_range(PARTS):
            _store_queries(p_du, i * W * C + o_channel, b_du[i], Q, H, D)
    for tile in range(used + program * T, rows, programs * T):
        o_row = (tile + tl.arange(0, T))[None, :, None].to(tl.int64)
        for i in tl.static_range(PARTS):
            o_part = i * W * C + o_channel
            b_rest = tl.zeros([W, T, C], DTYPE)
            tl.store(p_dx + o_row * D + o_part, b_rest, mask=(o_row < rows) & (o_part < D))


# Launches --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PoolConfig:
    """How a kernel is launched.

    Attributes:
        warps: of a program.
        stages: of the pipeline of loads.
        programs: per multiprocessor, about as many as fit.
        resident: whether queries and tile stay on chip between their uses. Where they do not fit,
            they are read again, from the caches.
        sum_on_chip: whether backward's sum for ``u`` does; else it is kept in the cache.
        width: channels of a warp in one part, at least the 16 of a matrix instruction. What is
            loaded at a time grows with it, and what is left over at the end of ``dim``.
        tile: rows on chip at a time. 16 fill a matrix instruction; more would only take registers.
        maxnreg: registers per thread that the assembler may use, where it would spill some to make
            room for another program.
    """

    warps: int
    stages: int
    programs: int
    width: int
    resident: bool = True
    sum_on_chip: bool = True
    tile: int = 16
    maxnreg: int | None = None


# By the most channels they serve. A program has few warps, so that several programs hide each
# other's waiting at the ends of segments, until its sums (16 queries of all channels) need more
# registers than that. Backward keeps two sets of queries and reaches the limits first.
_FORWARD = {
    256: PoolConfig(4, 3, programs=4, width=16),
    512: PoolConfig(4, 3, programs=2, width=32),
    768: PoolConfig(4, 2, programs=2, width=32),
    1024: PoolConfig(8, 2, programs=1, width=32),
}
_BACKWARD = {
    256: PoolConfig(4, 2, programs=4, width=16),
    512: PoolConfig(8, 2, programs=2, width=16),
    768: PoolConfig(8, 2, programs=1, width=32),
    1024: PoolConfig(8, 2, programs=1, width=32),  # 168 KiB of shared memory
}
# What does not fit on chip; in the widest case, the sum too.
_FROM_CACHE = PoolConfig(8, 1, programs=1, width=16, resident=False)
_ALL_FROM_CACHE = PoolConfig(8, 1, programs=1, width=32, resident=False, sum_on_chip=False)
# sm_80 has 163 KiB.
_BACKWARD_80 = {**_BACKWARD, 1024: _ALL_FROM_CACHE}
# sm_86, sm_89 and sm_120 have 99 KiB per program, 100 in all.
_FORWARD_SMALL = {**_FORWARD, 768: PoolConfig(8, 2, programs=1, width=32)}
_BACKWARD_SMALL = {
    256: replace(_BACKWARD[256], programs=2),
    512: replace(_BACKWARD[512], programs=1),
    768: _FROM_CACHE,
    1024: _ALL_FROM_CACHE,
}
# Six products of thirds of a float32 number need all three of them: no pipeline, and no wide models
# where backward would spill. What is there takes all registers of the multiprocessor.
_FORWARD_FLOAT32 = {384: replace(_FROM_CACHE, width=32), 768: _FROM_CACHE}
_BACKWARD_FLOAT32_SMALL = {384: replace(_ALL_FROM_CACHE, width=16, maxnreg=255)}
_BACKWARD_FLOAT32 = {**_BACKWARD_FLOAT32_SMALL, 768: replace(_ALL_FROM_CACHE, width=16)}
_BACKWARD_FLOAT32_120 = {
    **_BACKWARD_FLOAT32_SMALL,
    768: replace(_ALL_FROM_CACHE, width=16, maxnreg=240),
}


def max_dim(arch: int, dtype: torch.dtype) -> int:
    """Most channels of a stream; 0 where a type is not supported."""
    if dtype == torch.float32:
        return 768 if arch >= 90 else 384
    return 1024 if dtype in (torch.bfloat16, torch.float16) else 0


def pool_config(arch: int, dim: int, dtype: torch.dtype, *, backward: bool) -> PoolConfig:
    """The launch for an architecture (90 for sm_90), chosen by what the compiler reports to fit
    (docs/kernels.md), not by timing."""
    small = 86 <= arch < 90 or arch >= 120
    if dtype == torch.float32 and backward:
        wide = _BACKWARD_FLOAT32_120 if arch >= 120 else _BACKWARD_FLOAT32
        table = wide if arch >= 90 else _BACKWARD_FLOAT32_SMALL
    elif dtype == torch.float32:
        table = _FORWARD_FLOAT32
    elif backward:
        table = _BACKWARD_SMALL if small else _BACKWARD if arch >= 90 else _BACKWARD_80
    else:
        table = _FORWARD_SMALL if small else _FORWARD
    return next(config for widest, config in table.items() if dim <= widest)


COMBINE_CHANNELS = 64
COMBINE_WARPS = 4


def supports(x: Tensor, u: Tensor) -> bool:
    """Whether the kernels take these inputs."""
    arch = _device(x.device.index)[0]
    return (
        arch >= 80
        and 0 < u.shape[0] <= MAX_QUERIES
        and 0 < u.shape[1] <= max_dim(arch, x.dtype)
        and max_dim(arch, u.dtype) > 0
    )


def segment_pool_forward(
    x: Tensor, u: Tensor, offsets: Tensor, *, config: PoolConfig | None = None, programs: int = 0
) -> tuple[Tensor, Tensor]:
    """Pooled rows ``[S, H, D]`` and their log-sum-exps ``[S, H]``.

    Args:
        x: ``[rows, D]``.
        u: ``[H, D]``.
        offsets: int32 ``[S + 1]``, on the device.
        config, programs: of the launch, for tests; by default the device's.
    """
    segments, (queries, dim) = offsets.shape[0] - 1, u.shape
    x, u = _dense_channels(x), u.contiguous()
    y = x.new_empty(segments, queries, dim)
    lse = x.new_empty(segments, queries, dtype=torch.float32)
    if segments == 0:
        return y, lse
    config, programs = _launch(x, config, programs, backward=False)
    part_y = x.new_empty(programs, 2, queries, dim, dtype=torch.float32)
    part_lse = x.new_empty(programs, 2, queries, dtype=torch.float32)
    sizes = (segments, x.shape[0], programs)
    pool_forward[(programs,)](
        x,
        u,
        offsets,
        y,
        lse,
        part_y,
        part_lse,
        x.stride(0),
        *sizes,
        **_constants(queries, dim, config),
        **_options(config),
    )
    pool_combine[(segments, -(-dim // COMBINE_CHANNELS))](
        offsets,
        part_y,
        part_lse,
        y,
        lse,
        *sizes,
        H=queries,
        D=dim,
        C=COMBINE_CHANNELS,
        Q=MAX_QUERIES,
        MIN_SHARE=MIN_SHARE,
        num_warps=COMBINE_WARPS,
    )
    return y, lse


def segment_pool_backward(
    grad: Tensor,
    x: Tensor,
    u: Tensor,
    y: Tensor,
    lse: Tensor,
    offsets: Tensor,
    *,
    config: PoolConfig | None = None,
    programs: int = 0,
) -> tuple[Tensor, Tensor]:
    """Gradients of ``x`` and ``u``, from that of ``y`` and the forward's results."""
    segments, (queries, dim) = offsets.shape[0] - 1, u.shape
    x, u = _dense_channels(x), u.contiguous()
    dx = x.new_empty(x.shape)
    config, programs = _launch(x, config, programs, backward=True)
    part_du = x.new_empty(programs, queries, dim, dtype=torch.float32)
    pool_backward[(programs,)](
        grad.contiguous(),
        x,
        u,
        y,
        lse,
        offsets,
        dx,
        part_du,
        x.stride(0),
        segments,
        x.shape[0],
        programs,
        **_constants(queries, dim, config),
        SUM_ON_CHIP=config.sum_on_chip,
        **_options(config),
    )
    return dx, part_du.sum(0).to(u.dtype)


def _dense_channels(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()


def _constants(queries: int, dim: int, config: PoolConfig) -> dict[str, int | bool]:
    return {
        "H": queries,
        "D": dim,
        "PARTS": -(-dim // (config.warps * config.width)),
        "W": config.warps,
        "C": config.width,
        "T": config.tile,
        "Q": MAX_QUERIES,
        "MIN_SHARE": MIN_SHARE,
        "RESIDENT": config.resident,
        "PRECISION": PRECISION,
    }


def _options(config: PoolConfig) -> dict[str, int]:
    options = {"num_warps": config.warps, "num_stages": config.stages}
    return options if config.maxnreg is None else {**options, "maxnreg": config.maxnreg}


def _launch(
    x: Tensor, config: PoolConfig | None, programs: int, *, backward: bool
) -> tuple[PoolConfig, int]:
    """The configuration and the number of programs, no more than there are shares."""
    if config is None:
        arch, multiprocessors = _device(x.device.index)
        config = pool_config(arch, x.shape[1], x.dtype, backward=backward)
        programs = config.programs * multiprocessors
    return config, max(1, min(programs, -(-x.shape[0] // MIN_SHARE)))


@lru_cache
def _device(index: int) -> tuple[int, int]:
    """Architecture and multiprocessors."""
    found = torch.cuda.get_device_properties(index)
    return 10 * found.major + found.minor, found.multi_processor_count


# Ahead-of-time checks --------------------------------------------------------------------------

TRITON_TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


def aot_cases(arch: int) -> Iterator[AotCase]:
    """What models of the usual widths with 12 queries launch on an architecture."""
    for dtype, kind in TRITON_TYPES.items():
        pointers = {
            **dict.fromkeys(("p_x", "p_y", "p_grad", "p_dx"), f"*{kind}:16"),
            **dict.fromkeys(("p_u", "p_lse", "p_part_y", "p_part_lse", "p_part_du"), "*fp32:16"),
            "p_offsets": "*i32:16",
            "x_stride": "i32:16",
            **dict.fromkeys(("num_segments", "rows", "programs"), "i32"),
        }

        def case(kernel, dim, constants, launch, pointers=pointers, kind=kind):
            return AotCase(
                f"{kernel.__name__} {kind} dim {dim}",
                kernel,
                {name: pointers[name] for name in kernel.arg_names if name in pointers},
                constants,
                launch["num_warps"],
                launch.get("num_stages", 3),
                max_shared=176 * 1024,
                max_registers=launch.get("maxnreg", 255),
                expects_wgmma=False,  # 16 rows are too few for it
                maxnreg=launch.get("maxnreg"),
            )

        for dim in (192, 384, 768, 1024):
            if dim > max_dim(arch, dtype):
                continue
            for backward, kernel in enumerate((pool_forward, pool_backward)):
                config = pool_config(arch, dim, dtype, backward=bool(backward))
                constants = _constants(12, dim, config)
                if backward:
                    constants["SUM_ON_CHIP"] = config.sum_on_chip
                yield case(kernel, dim, constants, _options(config))
        constants = {"H": 12, "D": 768, "C": COMBINE_CHANNELS, "Q": 16, "MIN_SHARE": MIN_SHARE}
        yield case(pool_combine, 768, constants, {"num_warps": COMBINE_WARPS})
