"""The kernels: forward, backward, and from a gradient of pairs to one of offsets."""

import triton
import triton.language as tl

from fastast.kernels.packed_attention._rows import LOG2E, clear_rows, dead_share, head_of
from fastast.kernels.packed_attention.whole import finite

VARYING = [
    "rows",
    "num_windows",
    "parts",
    "heads",
    "qkv_row",
    "qkv_part",
    "qkv_head",
    "do_row",
    "do_head",
    "bias_head",
    "bias_offset",
]
"""Integer arguments that no kernel is specialised on: ragged batches must not compile anew."""

SMALLEST_SQUARE = tl.constexpr(1e-24)
"""Of the norm of a vector that has a direction."""


@triton.jit
def share_of(num_windows, part, parts, GROUP: tl.constexpr):
    """The blocks of ``GROUP`` windows that one of ``parts`` programs works through."""
    blocks = tl.cdiv(num_windows, GROUP)
    share = tl.cdiv(blocks, parts)
    begin = tl.minimum(part * share, blocks)
    return begin, tl.minimum(begin + share, blocks)


@triton.jit
def patches_of(
    p_windows, block, num_windows, WINDOW: tl.constexpr, SLOTS: tl.constexpr, GROUP: tl.constexpr
):
    """Rows of the stream, int64 ``[R]``, and each row's window in the block; ``GROUP``: absent."""
    o_r = tl.arange(0, SLOTS * GROUP)
    b_y, b_x = o_r % SLOTS // WINDOW, o_r % SLOTS % WINDOW
    if GROUP == 1:
        p_window = p_windows + block * 4
        b_member = 0
    else:
        # The window after the last has no patches, and stands for all that would follow.
        b_member = o_r // SLOTS
        p_window = p_windows + tl.minimum(block * GROUP + b_member, num_windows) * 4
    b_row = tl.load(p_window).to(tl.int64)
    b_pitch, b_height, b_width = tl.load(p_window + 1), tl.load(p_window + 2), tl.load(p_window + 3)
    m_r = (b_y < b_height) & (b_x < b_width)
    return b_row + b_y * b_pitch + b_x, tl.where(m_r, b_member, GROUP)


@triton.jit
def bias_of_pairs(
    p_bias,
    offset_stride,
    WINDOW: tl.constexpr,
    SLOTS: tl.constexpr,
    GROUP: tl.constexpr,
):
    """A head's biases ``[R, R]``, queries by keys."""
    o_r = tl.arange(0, SLOTS * GROUP) % SLOTS
    o_q, o_k = o_r[:, None], o_r[None, :]
    b_dy = o_q // WINDOW - o_k // WINDOW + WINDOW - 1
    b_dx = o_q % WINDOW - o_k % WINDOW + WINDOW - 1
    m_pair = (o_q < WINDOW * WINDOW) & (o_k < WINDOW * WINDOW)
    p_pair = p_bias + (b_dy * (2 * WINDOW - 1) + b_dx) * offset_stride
    return tl.load(p_pair, mask=m_pair, other=0.0).to(tl.float32)


@triton.jit
def load_patches(
    p_x, stride, b_row, m_r, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, ALIGN: tl.constexpr
):
    """Rows of a head, ``[R, BLOCK_D]``; zeros where masked and past the head."""
    o_d = tl.arange(0, BLOCK_D)
    p_rows = p_x + b_row[:, None] * (stride * ALIGN) + o_d[None, :]
    return tl.load(p_rows, mask=m_r[:, None] & (o_d < HEAD_DIM)[None, :], other=0.0)


@triton.jit
def store_patches(p_x, step, b_row, m_r, b_x, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Writes ``b_x [R, BLOCK_D]`` to rows that are ``step`` elements apart."""
    o_d = tl.arange(0, BLOCK_D)
    p_rows = p_x + b_row[:, None] * step + o_d[None, :]
    tl.store(p_rows, b_x.to(p_x.dtype.element_ty), mask=m_r[:, None] & (o_d < HEAD_DIM)[None, :])


@triton.jit
def inverse_norm(b_x):
    """One over the length of each row, ``[R]``; zero for a row without direction."""
    b_wide = b_x.to(tl.float32)
    b_square = tl.sum(b_wide * b_wide, 1)
    m_long = b_square > SMALLEST_SQUARE
    return tl.where(m_long, tl.rsqrt(tl.where(m_long, b_square, 1.0)), 0.0)


@triton.jit
def along(b_dx, b_x, b_r):
    """The part of each gradient along its vector, with ``b_r`` the inverse norm; their product."""
    b_wide = b_x.to(tl.float32)
    b_product = tl.sum(b_dx * b_wide, 1)
    return b_wide * (b_product * b_r * b_r)[:, None], b_product


@triton.jit(do_not_specialize=VARYING)
def forward(
    p_qkv,
    p_bias,
    p_logit_scale,
    p_out,
    p_windows,
    rows,
    num_windows,
    parts,
    heads,
    scale,
    qkv_row,
    qkv_part,
    qkv_head,
    bias_head,
    bias_offset,
    WINDOW: tl.constexpr,
    SLOTS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    COSINE: tl.constexpr,
    ALIGN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    part = tl.program_id(0) // heads
    head = tl.program_id(0) % heads
    p_q = head_of(p_qkv, head, qkv_head, ALIGN)
    p_k = head_of(p_q, tl.full((), 1, tl.int32), qkv_part, ALIGN)
    p_v = head_of(p_q, tl.full((), 2, tl.int32), qkv_part, ALIGN)
    p_out += head * HEAD_DIM
    b_bias = bias_of_pairs(p_bias + head * bias_head, bias_offset, WINDOW, SLOTS, GROUP)
    if COSINE:
        scale = tl.load(p_logit_scale + head).to(tl.float32)

    begin, end = share_of(num_windows, part, parts, GROUP)
    for block in range(begin, end):
        b_row, b_owner = patches_of(p_windows, block, num_windows, WINDOW, SLOTS, GROUP)
        m_r = b_owner < GROUP
        b_q = load_patches(p_q, qkv_row, b_row, m_r, HEAD_DIM, BLOCK_D, ALIGN)  # [R, D]
        b_k = load_patches(p_k, qkv_row, b_row, m_r, HEAD_DIM, BLOCK_D, ALIGN)
        b_v = load_patches(p_v, qkv_row, b_row, m_r, HEAD_DIM, BLOCK_D, ALIGN)
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)  # [R, R]
        if COSINE:
            b_s *= (scale * inverse_norm(b_q))[:, None] * inverse_norm(b_k)[None, :]
        else:
            b_s *= scale
        b_s += b_bias
        if GROUP > 1:
            # A weight of zero does not silence an infinity of a window in the same block, so v is
            # made finite, and what was not turns the scores of its own window into NaN.
            b_s += 0.0 * tl.sum(b_v.to(tl.float32), 1)[None, :]
            b_v = finite(b_v)
        b_s = tl.where(b_owner[:, None] == b_owner[None, :], b_s, float("-inf"))
        b_p = tl.exp2((b_s - tl.max(b_s, 1)[:, None]) * LOG2E)
        b_sum = tl.sum(b_p, 1)
        b_out = tl.dot(b_p.to(b_v.dtype), b_v, input_precision=PRECISION) / b_sum[:, None]
        store_patches(p_out, heads * HEAD_DIM, b_row, m_r, b_out, HEAD_DIM, BLOCK_D)

    dead, dead_end = dead_share(p_windows, num_windows * 4, rows, part, parts)
    clear_rows(p_out, dead, dead_end, heads * HEAD_DIM, HEAD_DIM, BLOCK_D)


@triton.jit(do_not_specialize=VARYING)
def backward(
    p_qkv,
    p_bias,
    p_logit_scale,
    p_do,
    p_dqkv,
    p_part_bias,  # float32 [parts, heads, R, R], queries by keys
    p_part_logit,  # float32 [parts, heads]
    p_windows,
    rows,
    num_windows,
    parts,
    heads,
    scale,
    qkv_row,
    qkv_part,
    qkv_head,
    do_row,
    do_head,
    bias_head,
    bias_offset,
    WINDOW: tl.constexpr,
    SLOTS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    COSINE: tl.constexpr,
    ALIGN: tl.constexpr,
    ALIGN_DO: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Scores are held as ``[queries, keys]``, where sums over keys stay within a warp; ``dv`` and
    ``dk`` take them transposed."""
    R: tl.constexpr = SLOTS * GROUP
    part = tl.program_id(0) // heads
    head = tl.program_id(0) % heads
    p_q = head_of(p_qkv, head, qkv_head, ALIGN)
    p_k = head_of(p_q, tl.full((), 1, tl.int32), qkv_part, ALIGN)
    p_v = head_of(p_q, tl.full((), 2, tl.int32), qkv_part, ALIGN)
    p_do = head_of(p_do, head, do_head, ALIGN_DO)
    p_dq = p_dqkv + head * HEAD_DIM
    p_dk = p_dq + heads * HEAD_DIM
    p_dv = p_dk + heads * HEAD_DIM
    step = 3 * heads * HEAD_DIM
    b_bias = bias_of_pairs(p_bias + head * bias_head, bias_offset, WINDOW, SLOTS, GROUP)
    if COSINE:
        scale = tl.load(p_logit_scale + head).to(tl.float32)

    b_dbias = tl.zeros([R, R], tl.float32)
    b_dlogit = tl.zeros([R], tl.float32)
    begin, end = share_of(num_windows, part, parts, GROUP)
    for block in range(begin, end):
        b_row, b_owner = patches_of(p_windows, block, num_windows, WINDOW, SLOTS, GROUP)
        m_r = b_owner < GROUP
        b_q = load_patches(p_q, qkv_row, b_row, m_r, HEAD_DIM, BLOCK_D, ALIGN)  # [R, D]
        b_k = load_patches(p_k, qkv_row, b_row, m_r, HEAD_DIM, BLOCK_D, ALIGN)
        b_v = load_patches(p_v, qkv_row, b_row, m_r, HEAD_DIM, BLOCK_D, ALIGN)
        b_do = load_patches(p_do, do_row, b_row, m_r, HEAD_DIM, BLOCK_D, ALIGN_DO)

        b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)  # [R, R]
        if COSINE:
            b_rq, b_rk = scale * inverse_norm(b_q), inverse_norm(b_k)
            b_s *= b_rq[:, None] * b_rk[None, :]
        else:
            b_s *= scale
        b_s = tl.where(b_owner[:, None] == b_owner[None, :], b_s + b_bias, float("-inf"))
        b_p = tl.exp2((b_s - tl.max(b_s, 1)[:, None]) * LOG2E)
        b_p /= tl.sum(b_p, 1)[:, None]
        b_dv = tl.dot(tl.trans(b_p.to(b_do.dtype)), b_do, input_precision=PRECISION)
        store_patches(p_dv, step, b_row, m_r, b_dv, HEAD_DIM, BLOCK_D)
        b_dp = tl.dot(b_do, tl.trans(b_v), input_precision=PRECISION)  # [R, R]
        b_dp *= b_p
        b_ds = b_dp - b_p * tl.sum(b_dp, 1)[:, None]
        b_dbias += b_ds
        if COSINE:
            b_g = (b_ds * (b_rq[:, None] * b_rk[None, :])).to(b_q.dtype)
            b_dk = tl.dot(tl.trans(b_g), b_q, input_precision=PRECISION)
            b_dk -= along(b_dk, b_k, b_rk)[0]
        else:
            b_g = b_ds.to(b_q.dtype)
            b_dk = tl.dot(tl.trans(b_g), b_q, input_precision=PRECISION) * scale
        store_patches(p_dk, step, b_row, m_r, b_dk, HEAD_DIM, BLOCK_D)
        b_dq = tl.dot(b_g, b_k, input_precision=PRECISION)
        if COSINE:
            b_along, b_part = along(b_dq, b_q, b_rq / scale)
            b_dq -= b_along
            b_dlogit += b_part
        else:
            b_dq *= scale
        store_patches(p_dq, step, b_row, m_r, b_dq, HEAD_DIM, BLOCK_D)

    place = part.to(tl.int64) * heads + head
    o_r = tl.arange(0, R)
    tl.store(p_part_bias + place * (R * R) + o_r[:, None] * R + o_r[None, :], b_dbias)
    if COSINE:
        tl.store(p_part_logit + place, tl.sum(b_dlogit, 0) / scale)

    dead, dead_end = dead_share(p_windows, num_windows * 4, rows, part, parts)
    clear_rows(p_dq, dead, dead_end, step, HEAD_DIM, BLOCK_D)
    clear_rows(p_dk, dead, dead_end, step, HEAD_DIM, BLOCK_D)
    clear_rows(p_dv, dead, dead_end, step, HEAD_DIM, BLOCK_D)


@triton.jit(do_not_specialize=["heads"])
def fold_pairs(
    p_pairs,  # float32 [heads, R, R], queries by keys
    p_dbias,  # [heads, (2 WINDOW - 1)**2]
    heads,
    WINDOW: tl.constexpr,
    SLOTS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Adds the gradients of all pairs of one offset, for ``BLOCK_T`` offsets of a head."""
    R: tl.constexpr = SLOTS * GROUP
    SIDE: tl.constexpr = 2 * WINDOW - 1
    head = tl.program_id(0) % heads
    o_t = tl.program_id(0) // heads * BLOCK_T + tl.arange(0, BLOCK_T)
    o_q = tl.arange(0, R)[None, :]  # a query, and the key that lies the offset before it
    b_y = o_q % SLOTS // WINDOW - (o_t // SIDE - (WINDOW - 1))[:, None]
    b_x = o_q % SLOTS % WINDOW - (o_t % SIDE - (WINDOW - 1))[:, None]
    m_pair = (o_q % SLOTS < WINDOW * WINDOW) & (o_t < SIDE * SIDE)[:, None]
    m_pair &= (b_y >= 0) & (b_y < WINDOW) & (b_x >= 0) & (b_x < WINDOW)
    o_k = o_q // SLOTS * SLOTS + b_y * WINDOW + b_x
    p_pair = p_pairs + head * (R * R) + o_q * R + o_k
    b_sum = tl.sum(tl.load(p_pair, mask=m_pair, other=0.0), 1)
    p_offset = p_dbias + head * (SIDE * SIDE) + o_t
    tl.store(p_offset, b_sum.to(p_dbias.dtype.element_ty), mask=o_t < SIDE * SIDE)
