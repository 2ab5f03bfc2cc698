"""Segments that fit a block of rows: one program for each block and head.

In :func:`forward` and :func:`backward` a program owns ``GROUP`` neighbouring whole segments, which
together have at most ``BLOCK`` rows: one segment of up to 64 rows, or several short ones, which the
mask keeps apart. All of q, k and v is on chip at once, so the softmax needs no running maximum, and
the backward computes every gradient with five matmuls, adding ``delta_i = sum_j P_ij dP_ij`` up by
itself: it reads q, k, v and do once, writes dq, dk and dv once, and does not need the output.
:func:`backward_walk` does the same for one segment of up to 128 rows, some queries at a time. The
weights are divided by their sum, which is 1 but for the rounding of the log-sum-exp, so that dS
adds up to 0 over the keys even where scores are large.

Segments that share a block share its matmuls, in which a weight of zero does not silence an
infinity. The forward therefore takes such values out of v and brings them back through the scores
of their own segment, which become NaN. The backward does not: a gradient that is not finite spoils
those of the segments beside it.
"""

import triton
import triton.language as tl

from fastast.kernels.packed_attention._rows import (
    LN2,
    LOG2E,
    VARYING,
    clear_rows,
    clear_values,
    dead_share,
    head_of,
    load_rows,
    store_rows,
)


@triton.jit
def owners(p_offsets, group, num_segments, b_rows, GROUP: tl.constexpr):
    """Position in the group of each row's segment; ``GROUP`` for rows past the group."""
    o_g = tl.minimum(group * GROUP + 1 + tl.arange(0, GROUP), num_segments)
    b_ends = tl.load(p_offsets + o_g)
    return tl.sum((b_rows[None, :] >= b_ends[:, None]).to(tl.int32), 0)


@triton.jit
def finite(b_x):
    """Zeros in place of infinities and NaN."""
    return tl.where(tl.abs(b_x.to(tl.float32)) < float("inf"), b_x, 0.0)


@triton.jit(do_not_specialize=VARYING)
def forward(
    p_q,
    p_k,
    p_v,
    p_out,
    p_lse,
    p_offsets,
    rows,
    num_segments,
    num_groups,
    heads,
    scale,
    q_row,
    q_head,
    k_row,
    k_head,
    v_row,
    v_head,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
    ALIGN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    group = tl.program_id(0) // heads
    head = tl.program_id(0) % heads
    begin = tl.load(p_offsets + tl.minimum(group * GROUP, num_segments))
    b_owner = owners(p_offsets, group, num_segments, begin + tl.arange(0, BLOCK), GROUP)
    p_q = head_of(p_q, head, q_head, ALIGN)
    p_k = head_of(p_k, head, k_head, ALIGN)
    p_v = head_of(p_v, head, v_head, ALIGN)
    p_out += head * HEAD_DIM
    p_lse += head.to(tl.int64) * rows

    o_r = tl.arange(0, BLOCK)
    m_r = b_owner < GROUP
    b_q = load_rows(p_q, begin, q_row, o_r, m_r, HEAD_DIM, BLOCK_D, ALIGN)  # [R, D]
    b_k = load_rows(p_k, begin, k_row, o_r, m_r, HEAD_DIM, BLOCK_D, ALIGN)
    b_v = load_rows(p_v, begin, v_row, o_r, m_r, HEAD_DIM, BLOCK_D, ALIGN)
    b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)  # [R, R]
    if GROUP > 1:
        b_s += 0.0 * tl.sum(b_v.to(tl.float32), 1)[None, :]
        b_v = finite(b_v)
    b_s = tl.where(b_owner[:, None] == b_owner[None, :], b_s, float("-inf"))
    b_max = tl.max(b_s, 1) * (scale * LOG2E)
    b_p = tl.exp2(b_s * (scale * LOG2E) - b_max[:, None])
    b_sum = tl.sum(b_p, 1)
    b_out = tl.dot(b_p.to(b_v.dtype), b_v, input_precision=PRECISION) / b_sum[:, None]
    store_rows(p_out, begin, heads * HEAD_DIM, o_r, m_r, b_out, HEAD_DIM, BLOCK_D)
    tl.store(p_lse + begin + o_r, (b_max + tl.log2(b_sum)) * LN2, mask=m_r)

    dead, dead_end = dead_share(p_offsets, num_segments, rows, group, num_groups)
    clear_rows(p_out, dead, dead_end, heads * HEAD_DIM, HEAD_DIM, BLOCK_D)
    clear_values(p_lse, dead, dead_end)


@triton.jit(do_not_specialize=VARYING)
def backward(
    p_q,
    p_k,
    p_v,
    p_lse,
    p_do,
    p_dq,
    p_dk,
    p_dv,
    p_offsets,
    rows,
    num_segments,
    num_groups,
    heads,
    scale,
    q_row,
    q_head,
    k_row,
    k_head,
    v_row,
    v_head,
    do_row,
    do_head,
    PARTS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
    ALIGN: tl.constexpr,
    ALIGN_DO: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Scores are held as ``[keys, queries]``, so that only ``dq`` takes them transposed."""
    group = tl.program_id(0) // heads
    head = tl.program_id(0) % heads
    begin = tl.load(p_offsets + tl.minimum(group * GROUP, num_segments))
    b_owner = owners(p_offsets, group, num_segments, begin + tl.arange(0, BLOCK), GROUP)
    p_q = head_of(p_q, head, q_head, ALIGN)
    p_k = head_of(p_k, head, k_head, ALIGN)
    p_v = head_of(p_v, head, v_head, ALIGN)
    p_do = head_of(p_do, head, do_head, ALIGN_DO)
    p_dq += head * HEAD_DIM
    p_dk += head * HEAD_DIM
    p_dv += head * HEAD_DIM
    p_lse += head.to(tl.int64) * rows
    step = PARTS * heads * HEAD_DIM

    o_r = tl.arange(0, BLOCK)
    m_r = b_owner < GROUP
    b_q = load_rows(p_q, begin, q_row, o_r, m_r, HEAD_DIM, BLOCK_D, ALIGN)  # [R, D]
    b_k = load_rows(p_k, begin, k_row, o_r, m_r, HEAD_DIM, BLOCK_D, ALIGN)
    b_v = load_rows(p_v, begin, v_row, o_r, m_r, HEAD_DIM, BLOCK_D, ALIGN)
    b_do = load_rows(p_do, begin, do_row, o_r, m_r, HEAD_DIM, BLOCK_D, ALIGN_DO)
    b_lse = tl.load(p_lse + begin + o_r, mask=m_r, other=0.0) * LOG2E

    b_s = tl.dot(b_k, tl.trans(b_q), input_precision=PRECISION)  # [R, R]
    b_p = tl.exp2(b_s * (scale * LOG2E) - b_lse[None, :])
    b_p = tl.where(b_owner[:, None] == b_owner[None, :], b_p, 0.0)
    b_p /= tl.sum(b_p, 0)[None, :]
    b_dv = tl.dot(b_p.to(b_do.dtype), b_do, input_precision=PRECISION)
    store_rows(p_dv, begin, step, o_r, m_r, b_dv, HEAD_DIM, BLOCK_D)
    b_dp = tl.dot(b_v, tl.trans(b_do), input_precision=PRECISION)  # [R, R]
    b_ds = (b_p * (b_dp - tl.sum(b_p * b_dp, 0)[None, :])).to(b_q.dtype)
    b_dk = tl.dot(b_ds, b_q, input_precision=PRECISION) * scale
    store_rows(p_dk, begin, step, o_r, m_r, b_dk, HEAD_DIM, BLOCK_D)
    b_dq = tl.dot(tl.trans(b_ds), b_k, input_precision=PRECISION) * scale
    store_rows(p_dq, begin, step, o_r, m_r, b_dq, HEAD_DIM, BLOCK_D)

    dead, dead_end = dead_share(p_offsets, num_segments, rows, group, num_groups)
    clear_rows(p_dq, dead, dead_end, step, HEAD_DIM, BLOCK_D)
    clear_rows(p_dk, dead, dead_end, step, HEAD_DIM, BLOCK_D)
    clear_rows(p_dv, dead, dead_end, step, HEAD_DIM, BLOCK_D)


@triton.jit(do_not_specialize=VARYING)
def backward_walk(
    p_q,
    p_k,
    p_v,
    p_lse,
    p_do,
    p_dq,
    p_dk,
    p_dv,
    p_offsets,
    rows,
    num_segments,
    num_groups,
    heads,
    scale,
    q_row,
    q_head,
    k_row,
    k_head,
    v_row,
    v_head,
    do_row,
    do_head,
    PARTS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr,
    STEP: tl.constexpr,
    ALIGN: tl.constexpr,
    ALIGN_DO: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One segment, whose keys and values are on chip at once and whose queries come in steps.

    A step sees all keys of its queries, so it too adds ``delta`` up by itself and completes its
    ``dq``. A query that does not exist adds nothing, since its row of ``do`` is zero; a key that
    does not exist has no weight.
    """
    segment = tl.program_id(0) // heads
    head = tl.program_id(0) % heads
    begin = tl.load(p_offsets + tl.minimum(segment, num_segments))
    end = tl.load(p_offsets + tl.minimum(segment + 1, num_segments))
    p_q = head_of(p_q, head, q_head, ALIGN)
    p_k = head_of(p_k, head, k_head, ALIGN)
    p_v = head_of(p_v, head, v_head, ALIGN)
    p_do = head_of(p_do, head, do_head, ALIGN_DO)
    p_dq += head * HEAD_DIM
    p_dk += head * HEAD_DIM
    p_dv += head * HEAD_DIM
    p_lse += head.to(tl.int64) * rows
    step = PARTS * heads * HEAD_DIM

    o_n = tl.arange(0, BLOCK)
    o_m = tl.arange(0, STEP)
    m_n = begin + o_n < end
    b_k = load_rows(p_k, begin, k_row, o_n, m_n, HEAD_DIM, BLOCK_D, ALIGN)  # [N, D]
    b_v = load_rows(p_v, begin, v_row, o_n, m_n, HEAD_DIM, BLOCK_D, ALIGN)  # [N, D]
    b_dk = tl.zeros([BLOCK, BLOCK_D], tl.float32)
    b_dv = tl.zeros([BLOCK, BLOCK_D], tl.float32)
    for query in range(begin, end, STEP):
        m_m = query + o_m < end
        b_q = load_rows(p_q, query, q_row, o_m, m_m, HEAD_DIM, BLOCK_D, ALIGN)  # [M, D]
        b_do = load_rows(p_do, query, do_row, o_m, m_m, HEAD_DIM, BLOCK_D, ALIGN_DO)  # [M, D]
        b_lse = tl.load(p_lse + query + o_m, mask=m_m, other=0.0) * LOG2E
        b_s = tl.dot(b_k, tl.trans(b_q), input_precision=PRECISION)  # [N, M]
        b_p = tl.exp2(b_s * (scale * LOG2E) - b_lse[None, :])
        b_p = tl.where(m_n[:, None], b_p, 0.0)
        b_p /= tl.sum(b_p, 0)[None, :]
        b_dv = tl.dot(b_p.to(b_do.dtype), b_do, b_dv, input_precision=PRECISION)
        b_dp = tl.dot(b_v, tl.trans(b_do), input_precision=PRECISION)  # [N, M]
        b_ds = (b_p * (b_dp - tl.sum(b_p * b_dp, 0)[None, :])).to(b_q.dtype)
        b_dk = tl.dot(b_ds, b_q, b_dk, input_precision=PRECISION)
        b_dq = tl.dot(tl.trans(b_ds), b_k, input_precision=PRECISION) * scale
        store_rows(p_dq, query, step, o_m, m_m, b_dq, HEAD_DIM, BLOCK_D)
    store_rows(p_dk, begin, step, o_n, m_n, b_dk * scale, HEAD_DIM, BLOCK_D)
    store_rows(p_dv, begin, step, o_n, m_n, b_dv, HEAD_DIM, BLOCK_D)

    dead, dead_end = dead_share(p_offsets, num_segments, rows, segment, num_groups)
    clear_rows(p_dq, dead, dead_end, step, HEAD_DIM, BLOCK_D)
    clear_rows(p_dk, dead, dead_end, step, HEAD_DIM, BLOCK_D)
    clear_rows(p_dv, dead, dead_end, step, HEAD_DIM, BLOCK_D)
