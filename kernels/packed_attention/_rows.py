"""Reading, writing and clearing rows of a packed stream ``[rows, heads, head_dim]``.

Offsets reach past 2**31 elements: what depends on the row or the head is computed in 64 bits, and
only what lies within one block of rows in 32. Strides arrive in units of ``ALIGN`` elements, which
tells the compiler that every row begins at a multiple of it, so that it reads 16 bytes at a time,
without specialising a kernel on the strides of one batch.
"""

import math

import triton
import triton.language as tl

VARYING = ["rows", "num_segments", "num_tiles", "num_groups", "heads"] + [
    f"{tensor}_{dim}" for tensor in ("q", "k", "v", "do") for dim in ("row", "head")
]
"""Integer arguments that no kernel is specialised on: ragged batches must not compile anew."""

LN2 = tl.constexpr(math.log(2))
LOG2E = tl.constexpr(1 / math.log(2))
CLEARED = tl.constexpr(16)
"""Rows that are cleared at a time."""


@triton.jit
def head_of(p_x, head, stride, ALIGN: tl.constexpr):
    """The first row of a head."""
    return p_x + head.to(tl.int64) * stride * ALIGN


@triton.jit
def load_rows(
    p_x, row, stride, o_r, m_r, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, ALIGN: tl.constexpr
):
    """Rows ``row + o_r`` of a head, ``[R, BLOCK_D]``; zeros where masked and past the head."""
    o_d = tl.arange(0, BLOCK_D)
    step = stride * ALIGN
    p_rows = p_x + tl.cast(row, tl.int64) * step + (o_r[:, None] * step + o_d[None, :])
    return tl.load(p_rows, mask=m_r[:, None] & (o_d < HEAD_DIM)[None, :], other=0.0)


@triton.jit
def store_rows(p_x, row, step, o_r, m_r, b_x, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Writes ``b_x [R, BLOCK_D]`` to the rows ``row + o_r``, ``step`` elements apart."""
    o_d = tl.arange(0, BLOCK_D)
    p_rows = p_x + tl.cast(row, tl.int64) * step + (o_r[:, None] * step + o_d[None, :])
    tl.store(p_rows, b_x.to(p_x.dtype.element_ty), mask=m_r[:, None] & (o_d < HEAD_DIM)[None, :])


@triton.jit
def dead_share(p_offsets, num_segments, rows, part, parts):
    """The dead rows that one of ``parts`` programs clears, as ``begin, end``."""
    dead = tl.load(p_offsets + num_segments)
    share = tl.cdiv(rows - dead, parts)
    begin = dead + part * share
    return begin, tl.minimum(begin + share, rows)


@triton.jit
def clear_rows(p_x, begin, end, step, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Zeros to the rows ``begin:end`` of a head."""
    o_r = tl.arange(0, CLEARED)
    b_zero = tl.zeros([CLEARED, BLOCK_D], tl.float32)
    for row in range(begin, end, CLEARED):
        store_rows(p_x, row, step, o_r, row + o_r < end, b_zero, HEAD_DIM, BLOCK_D)


@triton.jit
def clear_values(p_x, begin, end):
    """Zeros to the values ``begin:end`` of a head, one for each row."""
    o_r = tl.arange(0, CLEARED)
    for row in range(begin, end, CLEARED):
        tl.store(p_x + row + o_r, tl.zeros([CLEARED], tl.float32), mask=row + o_r < end)
