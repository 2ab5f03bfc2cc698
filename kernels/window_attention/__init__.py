r"""Attention within windows of ragged patch grids, forward and backward.

For the patches :math:`i, j` of one window and a head with its bias :math:`b`, with :math:`s_{ij}`
the scaled product or cosine of query and key (``fastast/ops/window_attention.py``):

.. math::
    S_{ij} = s_{ij} + b_{ij}, \quad
    P_{ij} = \frac{e^{S_{ij} - \max_j S_{ij}}}{\sum_j e^{S_{ij} - \max_j S_{ij}}}, \quad
    o_i = \sum_j P_{ij} v_j

A window's rows of a head fit on chip, all of them. So the backward computes :math:`P` anew from
the inputs, and nothing but them is kept; it reads qkv and the output's gradient once, writes dqkv
once, and takes five matmuls.

*Gathering.* A window is a few stretches of the stream. A program computes their rows from the four
numbers that describe the window and reads q, k and v there: rolling and partitioning are address
arithmetic. Every row is in one window, so its results are written once, by one program.

*Blocks.* 64 rows hold one window of 8 x 8 patches or four of 4 x 4, which a mask keeps apart; that
fills the matrix instructions, and the work is bound by memory traffic in any case.

*Shares.* A program serves one head and an equal share of the windows, one block after the other,
about as many programs as the device runs at a time. The bias of all pairs is read once per program
and stays in registers; in the backward, so does its gradient, summed in float32 over the share.
The programs' sums are added, and folded from pairs to offsets, in a fixed order: no atomics, and
the same bits every time. The heads of a share run side by side, so that the parts of a row that
one program does not use are found in the cache by the next.

*Absent rows.* Where a window is clipped or the last block is not full, rows are absent: they read
zeros, write nothing, and share their weights among themselves, so that no sum is empty; their
gradients are zero. Surplus windows consist of them alone. No kernel has an early return, and each
program clears its share of the dead rows.

Names: ``p_`` pointer, ``b_`` block of values, ``o_`` offsets, ``m_`` mask. R rows of a block, D
channels.
"""

from fastast.kernels.window_attention.launch import aot_cases, backward, forward, supports

__all__ = ["aot_cases", "backward", "forward", "supports"]
