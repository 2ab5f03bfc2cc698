r"""Attention within the segments of a packed stream, forward and backward.

For the rows :math:`i, j` of one segment and each head, with :math:`c = s \log_2 e` for the scale
:math:`s` of the scores, so that the exponential is the hardware's :math:`2^x`:

.. math::
    S_{ij} = c\, q_i \cdot k_j, \quad
    m_i = \max_j S_{ij}, \quad
    l_i = \sum_j 2^{S_{ij} - m_i}, \quad
    o_i = \frac{1}{l_i} \sum_j 2^{S_{ij} - m_i} v_j, \quad
    \ell_i = (m_i + \log_2 l_i) \ln 2

Over keys that come block by block, with a new maximum :math:`m'_i`, sum and output are multiplied
by :math:`2^{m_i - m'_i}` before the block is added (Milakov and Gimelshein, 2018; FlashAttention,
Dao et al., 2022). The natural log-sum-exp :math:`\ell_i` is kept for the backward, which computes
the weights again, :math:`P_{ij} = 2^{S_{ij} - \ell_i \log_2 e}`. With the gradient :math:`dO`:

.. math::
    dV_j = \sum_i P_{ij}\, dO_i, \quad
    dP_{ij} = dO_i \cdot v_j, \quad
    dS_{ij} = P_{ij}\,(dP_{ij} - \delta_i), \quad
    dQ_i = s \sum_j dS_{ij} k_j, \quad
    dK_j = s \sum_i dS_{ij} q_i

where :math:`\delta_i = \sum_j P_{ij}\, dP_{ij} = dO_i \cdot o_i`: the first form where a program
sees all of a row's keys, the second where it does not.

========== =========================== ============= ===================== =======================
regime     longest segment             program       forward               backward
========== =========================== ============= ===================== =======================
micro      up to 32 rows               several whole one pass, masked      one kernel, 5 matmuls
                                       segments
small      up to 64, backward 128      one segment   one pass              one kernel, 5 matmuls
tiled      any                         64 rows       walk over the keys    two kernels, 7 matmuls
========== =========================== ============= ===================== =======================

The regime follows from ``Segments.max_length``, a number known without the device. All regimes are
deterministic: no sum is shared between programs. None has an early return: a program without work
runs loops of no iterations, and also clears its share of the dead rows. Nothing is copied where
channels are neighbours in memory, so q, k and v may be parts of one projection's output.

Names: ``p_`` pointer, ``b_`` block of values, ``o_`` offsets, ``m_`` mask. Sizes: R rows of a
one-pass block, M rows that a tiled program holds, N rows that it walks over at a time, D channels.
"""

from fastast.kernels.packed_attention.cases import aot_cases
from fastast.kernels.packed_attention.launch import backward, forward, launches, supports

__all__ = ["aot_cases", "backward", "forward", "launches", "supports"]
