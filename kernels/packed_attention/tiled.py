"""Segments of any length: one program for ``BLOCK_M`` rows of a segment and each head.

The work list is :attr:`fastast.Segments.tiles`: ``(begin, end, first, last)`` says that the rows
``begin:end`` attend to the rows ``first:last``. A kernel that holds more rows than a tile has takes
so many neighbouring tiles per program, and does the work of several where it meets the first of
them: half as much is then read from the L2 cache, whose bandwidth bounds the forward of 64 rows at
a time on an H200. The forward walks over the keys with a running
maximum and sum. The backward is two kernels, so that no sum is shared between programs: one walks
over the keys of a tile of queries, the other over the queries of a tile of keys. That takes seven
matmuls instead of five. Tiles without keys (dead rows, surplus tiles) run no iterations.

Only the last block of a walk is masked, and only where zeros from outside the segment would count:
an absent key must not add to a softmax, but an absent query has no gradient to give.
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
from fastast.segments import TILE_ROWS as SEGMENT_TILE_ROWS

TILE_ROWS = tl.constexpr(SEGMENT_TILE_ROWS)


@triton.jit
def block_of(p_tiles, tile, num_tiles, BLOCK_M: tl.constexpr):
    """``begin, end, first, last``: a block's rows ``begin:end`` attend to ``first:last``.

    Neither has any rows if the tile is surplus, dead, or part of a block that begins before it.
    """
    m_tile = tile < num_tiles
    begin = tl.load(p_tiles + tile * 4, mask=m_tile, other=0)
    first = tl.load(p_tiles + tile * 4 + 2, mask=m_tile, other=0)
    last = tl.load(p_tiles + tile * 4 + 3, mask=m_tile, other=0)
    last = tl.where((begin - first) % BLOCK_M == 0, last, first)
    return begin, tl.where(last > first, tl.minimum(begin + BLOCK_M, last), begin), first, last


@triton.jit
def attend(
    b_acc,  # [M, D], sum of exp2(s - max) v
    b_max,  # [M], of the scores so far, log2
    b_sum,  # [M], of exp2(s - max)
    b_q,  # [M, D]
    p_k,
    p_v,
    k_row,
    v_row,
    begin,
    end,
    last,
    scale_log2,
    MASKED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ALIGN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The forward's walk over the keys ``begin:end``, of which those before ``last`` exist."""
    o_n = tl.arange(0, BLOCK_N)
    for key in range(begin, end, BLOCK_N):
        m_n = key + o_n < last if MASKED else o_n >= 0
        b_k = load_rows(p_k, key, k_row, o_n, m_n, HEAD_DIM, BLOCK_D, ALIGN)  # [N, D]
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)  # [M, N]
        if MASKED:
            b_s = tl.where(m_n[None, :], b_s, float("-inf"))
        # Scaled in the exponent's multiply-add: no multiplication of its own for each score.
        b_new = tl.maximum(b_max, tl.max(b_s, 1) * scale_log2)
        b_p = tl.exp2(b_s * scale_log2 - b_new[:, None])
        b_shrink = tl.exp2(b_max - b_new)
        b_sum = b_sum * b_shrink + tl.sum(b_p, 1)
        b_acc = b_acc * b_shrink[:, None]
        b_v = load_rows(p_v, key, v_row, o_n, m_n, HEAD_DIM, BLOCK_D, ALIGN)  # [N, D]
        b_acc = tl.dot(b_p.to(b_v.dtype), b_v, b_acc, input_precision=PRECISION)
        b_max = b_new
    return b_acc, b_max, b_sum


@triton.jit(do_not_specialize=VARYING)
def forward(
    p_q,
    p_k,
    p_v,
    p_out,
    p_lse,
    p_offsets,
    p_tiles,
    rows,
    num_segments,
    num_tiles,
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
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ALIGN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    part = tl.program_id(0) // heads
    head = tl.program_id(0) % heads
    p_k = head_of(p_k, head, k_head, ALIGN)
    p_v = head_of(p_v, head, v_head, ALIGN)
    p_out += head * HEAD_DIM
    p_lse += head.to(tl.int64) * rows

    p_q = head_of(p_q, head, q_head, ALIGN)

    o_m = tl.arange(0, BLOCK_M)
    TILES: tl.constexpr = BLOCK_M // TILE_ROWS
    for tile in range(part * TILES, (part + 1) * TILES):
        begin, end, first, last = block_of(p_tiles, tile, num_tiles, BLOCK_M)
        m_m = begin + o_m < end
        b_q = load_rows(p_q, begin, q_row, o_m, m_m, HEAD_DIM, BLOCK_D, ALIGN)
        b_acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        b_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
        b_sum = tl.zeros([BLOCK_M], tl.float32)
        full = first + (last - first) // BLOCK_N * BLOCK_N
        b_acc, b_max, b_sum = attend(
            b_acc, b_max, b_sum, b_q, p_k, p_v, k_row, v_row, first, full, last, scale * LOG2E,
            False, HEAD_DIM, BLOCK_D, BLOCK_N, ALIGN, PRECISION,
        )  # fmt: skip
        b_acc, b_max, b_sum = attend(
            b_acc, b_max, b_sum, b_q, p_k, p_v, k_row, v_row, full, last, last, scale * LOG2E,
            True, HEAD_DIM, BLOCK_D, BLOCK_N, ALIGN, PRECISION,
        )  # fmt: skip
        b_out = b_acc / b_sum[:, None]
        store_rows(p_out, begin, heads * HEAD_DIM, o_m, m_m, b_out, HEAD_DIM, BLOCK_D)
        tl.store(p_lse + begin + o_m, (b_max + tl.log2(b_sum)) * LN2, mask=m_m)

    dead, dead_end = dead_share(p_offsets, num_segments, rows, part, tl.cdiv(num_tiles, TILES))
    clear_rows(p_out, dead, dead_end, heads * HEAD_DIM, HEAD_DIM, BLOCK_D)
    clear_values(p_lse, dead, dead_end)


@triton.jit
def query_gradient(
    b_dq,  # [M, D]
    b_q,  # [M, D]
    b_do,  # [M, D]
    b_lse,  # [M], log2
    b_delta,  # [M]
    p_k,
    p_v,
    k_row,
    v_row,
    begin,
    end,
    last,
    scale_log2,
    MASKED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ALIGN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The walk of :func:`backward_queries`, as :func:`attend` is the forward's."""
    o_n = tl.arange(0, BLOCK_N)
    for key in range(begin, end, BLOCK_N):
        m_n = key + o_n < last if MASKED else o_n >= 0
        b_k = load_rows(p_k, key, k_row, o_n, m_n, HEAD_DIM, BLOCK_D, ALIGN)  # [N, D]
        b_v = load_rows(p_v, key, v_row, o_n, m_n, HEAD_DIM, BLOCK_D, ALIGN)  # [N, D]
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)  # [M, N]
        b_p = tl.exp2(b_s * scale_log2 - b_lse[:, None])
        b_dp = tl.dot(b_do, tl.trans(b_v), input_precision=PRECISION)  # [M, N]
        b_ds = b_p * (b_dp - b_delta[:, None])
        if MASKED:
            b_ds = tl.where(m_n[None, :], b_ds, 0.0)
        b_dq = tl.dot(b_ds.to(b_k.dtype), b_k, b_dq, input_precision=PRECISION)
    return b_dq


@triton.jit(do_not_specialize=VARYING)
def backward_queries(
    p_q,
    p_k,
    p_v,
    p_out,
    p_lse,
    p_do,
    p_dq,
    p_delta,
    p_offsets,
    p_tiles,
    rows,
    num_segments,
    num_tiles,
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
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ALIGN: tl.constexpr,
    ALIGN_DO: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``dq``, and ``delta = rowsum(do * out)`` for :func:`backward_keys`."""
    part = tl.program_id(0) // heads
    head = tl.program_id(0) % heads
    p_k = head_of(p_k, head, k_head, ALIGN)
    p_v = head_of(p_v, head, v_head, ALIGN)
    p_out += head * HEAD_DIM
    p_dq += head * HEAD_DIM
    p_lse += head.to(tl.int64) * rows
    p_delta += head.to(tl.int64) * rows
    p_q = head_of(p_q, head, q_head, ALIGN)
    p_do = head_of(p_do, head, do_head, ALIGN_DO)
    step = PARTS * heads * HEAD_DIM

    o_m = tl.arange(0, BLOCK_M)
    TILES: tl.constexpr = BLOCK_M // TILE_ROWS
    for tile in range(part * TILES, (part + 1) * TILES):
        begin, end, first, last = block_of(p_tiles, tile, num_tiles, BLOCK_M)
        m_m = begin + o_m < end
        b_do = load_rows(p_do, begin, do_row, o_m, m_m, HEAD_DIM, BLOCK_D, ALIGN_DO)
        b_out = load_rows(p_out, begin, heads * HEAD_DIM, o_m, m_m, HEAD_DIM, BLOCK_D, 1)
        b_delta = tl.sum(b_do.to(tl.float32) * b_out.to(tl.float32), 1)
        tl.store(p_delta + begin + o_m, b_delta, mask=m_m)
        b_q = load_rows(p_q, begin, q_row, o_m, m_m, HEAD_DIM, BLOCK_D, ALIGN)
        b_lse = tl.load(p_lse + begin + o_m, mask=m_m, other=0.0) * LOG2E
        b_dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        full = first + (last - first) // BLOCK_N * BLOCK_N
        b_dq = query_gradient(
            b_dq, b_q, b_do, b_lse, b_delta, p_k, p_v, k_row, v_row, first, full, last,
            scale * LOG2E, False, HEAD_DIM, BLOCK_D, BLOCK_N, ALIGN, PRECISION,
        )  # fmt: skip
        b_dq = query_gradient(
            b_dq, b_q, b_do, b_lse, b_delta, p_k, p_v, k_row, v_row, full, last, last,
            scale * LOG2E, True, HEAD_DIM, BLOCK_D, BLOCK_N, ALIGN, PRECISION,
        )  # fmt: skip
        store_rows(p_dq, begin, step, o_m, m_m, b_dq * scale, HEAD_DIM, BLOCK_D)

    dead, dead_end = dead_share(p_offsets, num_segments, rows, part, tl.cdiv(num_tiles, TILES))
    clear_rows(p_dq, dead, dead_end, step, HEAD_DIM, BLOCK_D)


@triton.jit(do_not_specialize=VARYING)
def backward_keys(
    p_q,
    p_k,
    p_v,
    p_lse,
    p_delta,
    p_do,
    p_dk,
    p_dv,
    p_offsets,
    p_tiles,
    rows,
    num_segments,
    num_tiles,
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
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ALIGN: tl.constexpr,
    ALIGN_DO: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``dk`` and ``dv`` of the tile's rows, from all queries of its segment.

    Scores are held as ``[keys, queries]``, so that they enter the products for ``dk`` and ``dv``
    as they are.
    """
    part = tl.program_id(0) // heads
    head = tl.program_id(0) % heads
    p_q = head_of(p_q, head, q_head, ALIGN)
    p_do = head_of(p_do, head, do_head, ALIGN_DO)
    p_lse += head.to(tl.int64) * rows
    p_delta += head.to(tl.int64) * rows
    p_dk += head * HEAD_DIM
    p_dv += head * HEAD_DIM

    p_k = head_of(p_k, head, k_head, ALIGN)
    p_v = head_of(p_v, head, v_head, ALIGN)
    step = PARTS * heads * HEAD_DIM

    o_m = tl.arange(0, BLOCK_M)
    o_n = tl.arange(0, BLOCK_N)
    TILES: tl.constexpr = BLOCK_M // TILE_ROWS
    for tile in range(part * TILES, (part + 1) * TILES):
        begin, end, first, last = block_of(p_tiles, tile, num_tiles, BLOCK_M)
        m_m = begin + o_m < end
        b_k = load_rows(p_k, begin, k_row, o_m, m_m, HEAD_DIM, BLOCK_D, ALIGN)
        b_v = load_rows(p_v, begin, v_row, o_m, m_m, HEAD_DIM, BLOCK_D, ALIGN)
        b_dk = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        b_dv = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        for query in range(first, last, BLOCK_N):
            m_n = query + o_n < last
            b_q = load_rows(p_q, query, q_row, o_n, m_n, HEAD_DIM, BLOCK_D, ALIGN)  # [N, D]
            b_do = load_rows(p_do, query, do_row, o_n, m_n, HEAD_DIM, BLOCK_D, ALIGN_DO)  # [N, D]
            b_lse = tl.load(p_lse + query + o_n, mask=m_n, other=0.0) * LOG2E
            b_delta = tl.load(p_delta + query + o_n, mask=m_n, other=0.0)
            b_s = tl.dot(b_k, tl.trans(b_q), input_precision=PRECISION)  # [M, N]
            b_p = tl.exp2(b_s * (scale * LOG2E) - b_lse[None, :])
            b_dv = tl.dot(b_p.to(b_do.dtype), b_do, b_dv, input_precision=PRECISION)
            b_dp = tl.dot(b_v, tl.trans(b_do), input_precision=PRECISION)  # [M, N]
            b_ds = b_p * (b_dp - b_delta[None, :])
            b_dk = tl.dot(b_ds.to(b_q.dtype), b_q, b_dk, input_precision=PRECISION)
        store_rows(p_dk, begin, step, o_m, m_m, b_dk * scale, HEAD_DIM, BLOCK_D)
        store_rows(p_dv, begin, step, o_m, m_m, b_dv, HEAD_DIM, BLOCK_D)

    dead, dead_end = dead_share(p_offsets, num_segments, rows, part, tl.cdiv(num_tiles, TILES))
    clear_rows(p_dk, dead, dead_end, step, HEAD_DIM, BLOCK_D)
    clear_rows(p_dv, dead, dead_end, step, HEAD_DIM, BLOCK_D)
