r"""InfoNCE within each clip: which of a clip's keys belongs to a query, one value per row.

Row :math:`i` of a stream holds a query :math:`q_i` and the key :math:`k_i` that belongs to it. With
the scores :math:`S_{ij} = q_i \cdot k_j`, over the rows :math:`j` of the same segment that take
part,

.. math::
    \mathcal{L}_i = \log \sum_j e^{S_{ij}} - S_{ii}

(van den Oord et al., "Representation learning with contrastive predictive coding", 2018). SSAST's
discriminative objective is this, without temperature or normalisation (Gong et al., 2022,
equation 1): a clip's other masked patches are the negatives.

With :math:`P_{ij} = e^{S_{ij}} / \sum_l e^{S_{il}}` and :math:`g_i = \partial / \partial
\mathcal{L}_i`,

.. math::
    dS_{ij} = g_i\,(P_{ij} - \delta_{ij}), \qquad
    dq_i = \sum_j dS_{ij}\, k_j, \qquad dk_j = \sum_i dS_{ij}\, q_i

The backward computes the scores once more, so that nothing but the inputs is kept.

A row can be right in two ways: :math:`\mathrm{argmax}_j\, S_{ij} = i`, its query finds its key; and
:math:`\mathrm{argmax}_j\, P_{ji} = i`, its key finds its query among the probabilities. Both come
with the loss, since the scores are there.

There is no Triton kernel. On a CPU the rows that take part are picked out and multiplied alone.
Elsewhere the device alone knows which these are: there segments become squares of ``max_length``
rows, in which the others have no score, so nothing waits and a captured graph serves every batch.

Layouts: ``queries, keys [rows, dim]``, ``member [rows]``, ``loss [rows]``, ``found [2, rows]``.
Rows that take no part, dead ones among them, are never read; their loss and gradients are zero.
Sums are accumulated in float32 at least, under autocast too.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

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
)
from fastast.segments import Segments

BACKENDS = ("auto", "reference")

SCORES = {"cpu": 2**18}
"""Scores held at a time, unless a single segment has more: on a CPU what fits into its cache,
elsewhere 2**24."""


class InfoNCE(NamedTuple):
    """What :func:`info_nce` returns.

    Attributes:
        loss: ``[rows]``, float32 (float64 if an input is).
        found_key: bool ``[rows]``, whether the row's key has the highest score for its query.
        found_query: bool ``[rows]``, whether the row's query is the one that gives its key the
            highest probability. (Not the highest score: probabilities are relative to each query.)
    """

    loss: Tensor
    found_key: Tensor
    found_query: Tensor


def info_nce(
    queries: Tensor, keys: Tensor, segments: Segments, member: Tensor, *, backend: str = "auto"
) -> InfoNCE:
    """Contrasts each row's key with the other keys of its segment.

    Means over rows and clips are the caller's.

    Args:
        queries: ``[rows, dim]``, floating point.
        keys: ``[rows, dim]``; row ``i`` is the one that belongs to query ``i``.
        segments: of the stream.
        member: bool ``[rows]``, the rows that take part.
        backend: ``"auto"`` or ``"reference"`` (explicit scores, segment by segment).

    Raises:
        ValueError: shapes, dtypes or devices that do not fit together.
    """
    check_choice("backend", backend, BACKENDS)
    check_stream("queries", queries, segments)
    if queries.ndim != 2 or keys.shape != queries.shape:
        raise ValueError(
            f"queries and keys must be [rows, dim] of one shape, got {tuple(queries.shape)} and "
            f"{tuple(keys.shape)}"
        )
    if not keys.is_floating_point():
        raise ValueError(f"keys must be floating point, got {keys.dtype}")
    if member.dtype != torch.bool or member.shape != queries.shape[:1]:
        raise ValueError(
            f"member must be torch.bool of shape [{queries.shape[0]}], one per row, got "
            f"{member.dtype} of shape {list(member.shape)}"
        )
    for name, x in (("keys", keys), ("member", member)):
        if x.device != queries.device:
            raise ValueError(f"{name} is on {x.device} but queries are on {queries.device}")
    if backend == "reference":
        return info_nce_reference(queries, keys, segments.host_offsets, member)
    loss, found = torch.ops.fastast.info_nce(
        queries,
        keys,
        member,
        segments.offsets,
        segments.host_offsets,
        segments.tiles,
        segments.max_length,
    )
    return InfoNCE(loss, *found.unbind())


def info_nce_reference(
    queries: Tensor, keys: Tensor, host_offsets: Tensor, member: Tensor
) -> InfoNCE:
    """The specification: the rows that take part, segment by segment, differentiable."""
    dtype = _compute_dtype(queries, keys)
    offsets, num_rows = host_offsets.tolist(), queries.shape[0]
    loss = queries.new_zeros(num_rows, dtype=dtype)
    found = torch.zeros(2, num_rows, dtype=torch.bool, device=queries.device)
    for begin, end in zip(offsets[:-1], offsets[1:], strict=True):
        rows = begin + member[begin:end].nonzero()[:, 0]
        if len(rows):
            scores = queries[rows].to(dtype) @ keys[rows].to(dtype).T
            log_p = scores.log_softmax(1)
            own = torch.arange(len(rows), device=rows.device)
            loss = loss.index_add(0, rows, -log_p.diagonal())
            found[0, rows] = scores.argmax(1) == own
            found[1, rows] = log_p.argmax(0) == own
    return InfoNCE(loss, *found.unbind())


# The operators --------------------------------------------------------------------------------

_INPUTS = f"Tensor queries, Tensor keys, Tensor member, {SEGMENTS_SCHEMA}"
LIBRARY.define(f"info_nce({_INPUTS}) -> (Tensor loss, Tensor found)")
LIBRARY.define(f"info_nce_backward(Tensor grad, {_INPUTS}) -> (Tensor dqueries, Tensor dkeys)")


def _compute_dtype(queries: Tensor, keys: Tensor) -> torch.dtype:
    return torch.promote_types(torch.promote_types(queries.dtype, keys.dtype), torch.float32)


def _squares(member: Tensor, offsets: Tensor, max_length: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Rows ``[segments, max_length]`` of some segments at a time, and which of them take part.
    A place behind a segment's end is the row behind the stream's."""
    num_rows = len(member)
    place = torch.arange(max_length, device=offsets.device)
    most = max(1, SCORES.get(member.device.type, 2**24) // max_length**2)
    for first, last in zip(offsets[:-1].split(most), offsets[1:].split(most), strict=True):
        rows = first[:, None] + place
        inside = rows < last[:, None]
        yield torch.where(inside, rows, num_rows), inside & member[rows.clamp(max=num_rows - 1)]


def _scores(
    queries: Tensor, keys: Tensor, rows: Tensor, part: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and scores of squares: ``[segments, max_length, ...]``.

    Rows that take no part are zeros in the first two; as keys they have no score.
    """
    dtype, rows = _compute_dtype(queries, keys), rows.clamp(max=len(queries) - 1)
    q, k = (torch.where(part[..., None], x[rows], 0).to(dtype) for x in (queries, keys))
    return q, k, (q @ k.mT).masked_fill_(~part[:, None], -torch.inf)


@torch.library.impl(LIBRARY, "info_nce", ANY_DEVICE)
def _info_nce(queries, keys, member, offsets, host_offsets, tiles, max_length):
    # One row more, into which goes what belongs to none.
    num_rows = queries.shape[0]
    loss = queries.new_zeros(num_rows + 1, dtype=_compute_dtype(queries, keys))
    found = member.new_zeros(2, num_rows + 1)
    own = torch.arange(max_length, device=queries.device)
    with torch.autocast(queries.device.type, enabled=False):
        for rows, part in _squares(member, offsets, max_length) if num_rows else ():
            _, _, scores = _scores(queries, keys, rows, part)
            lse = scores.logsumexp(2)
            loss[rows] = torch.where(part, lse - scores.diagonal(dim1=1, dim2=2), 0)
            found[0, rows] = part & (scores.argmax(2) == own)
            log_p = (scores - lse[..., None]).masked_fill_(~part[..., None], -torch.inf)
            found[1, rows] = part & (log_p.argmax(1) == own)
    return loss[:num_rows], found[:, :num_rows].contiguous()


@torch.library.impl(LIBRARY, "info_nce_backward", ANY_DEVICE)
def _info_nce_backward(grad, queries, keys, member, offsets, host_offsets, tiles, max_length):
    num_rows, dim = queries.shape
    dqueries, dkeys = (x.new_zeros(num_rows + 1, dim) for x in (queries, keys))
    for rows, part in _squares(member, offsets, max_length) if num_rows else ():
        q, k, scores = _scores(queries, keys, rows, part)
        weight = torch.where(part, grad[rows.clamp(max=num_rows - 1)].to(q.dtype), 0)
        p = scores.softmax(2)
        p.diagonal(dim1=1, dim2=2).sub_(1)
        # A row without weight may have no score at all, and no probabilities.
        ds = torch.where(part[..., None], weight[..., None] * p, 0)
        ds.masked_fill_(~part[:, None], 0)
        dqueries[rows] = (ds @ k).to(queries.dtype)
        dkeys[rows] = (ds.mT @ q).to(keys.dtype)
    return dqueries[:num_rows], dkeys[:num_rows]


# On CPUs.


def _members(member: Tensor, host_offsets: Tensor) -> Iterator[Tensor]:
    """Rows ``[segments, length]`` that take part, of neighbouring segments with equally many."""
    rows = member.nonzero()[:, 0]
    for run in equal_runs(torch.searchsorted(rows, host_offsets.to(rows.dtype))):
        most = max(1, SCORES["cpu"] // run.length**2)
        yield from rows[run.rows].unflatten(0, (run.count, run.length)).split(most)


def _member_scores(queries: Tensor, keys: Tensor, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and scores of some segments' rows: ``[segments, length, ...]``."""
    dtype = _compute_dtype(queries, keys)
    q, k = (x[rows].to(dtype) for x in (queries, keys))
    return q, k, q @ k.mT


@torch.library.impl(LIBRARY, "info_nce", "CPU")
def _info_nce_cpu(queries, keys, member, offsets, host_offsets, tiles, max_length):
    check_rows("queries", queries, host_offsets)
    loss = queries.new_zeros(queries.shape[0], dtype=_compute_dtype(queries, keys))
    found = member.new_zeros(2, queries.shape[0])
    with torch.autocast("cpu", enabled=False):
        for rows in _members(member, host_offsets):
            _, _, scores = _member_scores(queries, keys, rows)
            log_p, own = scores.log_softmax(2), torch.arange(rows.shape[1])
            loss[rows] = -log_p.diagonal(dim1=1, dim2=2)
            found[0, rows] = scores.argmax(2) == own
            found[1, rows] = log_p.argmax(1) == own
    return loss, found


@torch.library.impl(LIBRARY, "info_nce_backward", "CPU")
def _info_nce_backward_cpu(grad, queries, keys, member, offsets, host_offsets, tiles, max_length):
    dqueries, dkeys = queries.new_zeros(queries.shape), keys.new_zeros(keys.shape)
    for rows in _members(member, host_offsets):
        q, k, scores = _member_scores(queries, keys, rows)
        ds = scores.softmax(2)
        ds.diagonal(dim1=1, dim2=2).sub_(1)
        ds *= grad[rows][..., None]
        dqueries[rows] = (ds @ k).to(queries.dtype)
        dkeys[rows] = (ds.mT @ q).to(keys.dtype)
    return dqueries, dkeys


# Shapes for tracing, autograd, cost ------------------------------------------------------------


@torch.library.register_fake("fastast::info_nce", lib=LIBRARY)
def _(queries, keys, member, offsets, host_offsets, tiles, max_length):
    num_rows = queries.shape[0]
    loss = queries.new_empty(num_rows, dtype=_compute_dtype(queries, keys))
    return loss, queries.new_empty(2, num_rows, dtype=torch.bool)


@torch.library.register_fake("fastast::info_nce_backward", lib=LIBRARY)
def _(grad, queries, keys, member, offsets, host_offsets, tiles, max_length):
    return queries.new_empty(queries.shape), keys.new_empty(keys.shape)


def _save(ctx, inputs, output):
    *tensors, ctx.max_length = inputs
    ctx.save_for_backward(*tensors)
    ctx.mark_non_differentiable(output[1])


def _vjp(ctx, grad, _):
    dqueries, dkeys = torch.ops.fastast.info_nce_backward(grad, *ctx.saved_tensors, ctx.max_length)
    return dqueries, dkeys, None, None, None, None, None


torch.library.register_autograd("fastast::info_nce", _vjp, setup_context=_save, lib=LIBRARY)
once_differentiable("fastast::info_nce_backward")


def _product(queries: Tensor, host_offsets: Tensor) -> int:
    """FLOPs of a product of queries and keys, as if all rows of a segment took part: which do is
    known to the device alone."""
    lengths = host_offsets.diff().long()
    return 2 * int(lengths.square().sum()) * queries.shape[1]


@register_flop_formula(torch.ops.fastast.info_nce, get_raw=True)
def _(queries, keys, member, offsets, host_offsets, *args, **kwargs) -> int:
    return _product(queries, host_offsets)


@register_flop_formula(torch.ops.fastast.info_nce_backward, get_raw=True)
def _(grad, queries, keys, member, offsets, host_offsets, *args, **kwargs) -> int:
    return 3 * _product(queries, host_offsets)
