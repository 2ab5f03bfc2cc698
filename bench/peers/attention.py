"""Ways to compute masked attention on dense ``[batch, heads, length, head_dim]`` tensors.

All take ``mask``, boolean and broadcastable to ``[batch, heads, queries, keys]``, True where a
query may attend to a key, or ``None``. The output's memory is laid out ``[batch, length, heads,
head_dim]`` where the implementation chooses it, as fused kernels do.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

LIBRARY = torch.library.Library("fastast_bench", "DEF")


def explicit_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float
) -> Tensor:
    """Matmul, fill, softmax, matmul: what the papers' code does.

    The fill is finite, so a query that may attend to nothing gets the mean of the values, not NaN.
    """
    scores = q @ k.transpose(-1, -2)
    if scale != 1:
        scores = scores * scale
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.finfo(scores.dtype).max)
    return scores.softmax(-1).to(v.dtype) @ v


def sdpa_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """PyTorch's fused attention; without a mask it may choose its fastest kernels."""
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)


def sdpa_with(backend: SDPBackend) -> Callable[..., Tensor]:
    """:func:`sdpa_attention` by one backend alone; an error where it does not take the input."""

    def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
        with sdpa_kernel(backend):
            return sdpa_attention(q, k, v, mask, scale)

    return attention


def modelled_fused_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float
) -> Tensor:
    """An ideal fused attention, for counting memory: keeps q, k, v, out and lse, no more.

    Traced without a GPU, :func:`sdpa_attention` falls back to the explicit formula and keeps the
    weights, which no fused kernel does. This operator is opaque to the count.
    """
    return torch.ops.fastast_bench.fused_attention(q, k, v, mask, scale)[0]


LIBRARY.define(
    "fused_attention(Tensor q, Tensor k, Tensor v, Tensor? mask, float scale)"
    " -> (Tensor out, Tensor lse)"
)
LIBRARY.define(
    "fused_attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse,"
    " Tensor? mask, float scale) -> (Tensor, Tensor, Tensor)"
)


def _empty_out(q: Tensor) -> Tensor:
    batch, heads, length, dim = q.shape
    return q.new_empty(batch, length, heads, dim).transpose(1, 2)


def _lse_dtype(q: Tensor) -> torch.dtype:
    return torch.promote_types(q.dtype, torch.float32)


def _masked_scores(q: Tensor, k: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    scores = (q @ k.transpose(-1, -2)).to(_lse_dtype(q)) * scale
    return scores if mask is None else scores.masked_fill(~mask, -torch.finfo(scores.dtype).max)


@torch.library.impl(LIBRARY, "fused_attention", "CompositeExplicitAutograd")
def _fused(q, k, v, mask, scale):
    scores = _masked_scores(q, k, mask, scale)
    lse = scores.logsumexp(-1)
    weights = (scores - lse[..., None]).exp().to(v.dtype)
    return _empty_out(q).copy_(weights @ v), lse


@torch.library.impl(LIBRARY, "fused_attention_backward", "CompositeExplicitAutograd")
def _fused_backward(grad, q, k, v, out, lse, mask, scale):
    p = (_masked_scores(q, k, mask, scale) - lse[..., None]).exp()
    delta = (grad * out).sum(-1, keepdim=True, dtype=p.dtype)
    ds = (scale * p * (grad @ v.transpose(-1, -2) - delta)).to(q.dtype)
    return ds @ k, ds.transpose(-1, -2) @ q, p.to(grad.dtype).transpose(-1, -2) @ grad


@torch.library.register_fake("fastast_bench::fused_attention", lib=LIBRARY)
def _(q, k, v, mask, scale):
    return _empty_out(q), q.new_empty(q.shape[:-1], dtype=_lse_dtype(q))


@torch.library.register_fake("fastast_bench::fused_attention_backward", lib=LIBRARY)
def _(grad, q, k, v, out, lse, mask, scale):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx, inputs, output):
    q, k, v, mask, scale = inputs
    ctx.save_for_backward(q, k, v, *output, mask)
    ctx.scale = scale
    ctx.mark_non_differentiable(output[1])


def _vjp(ctx, grad, _):
    grads = torch.ops.fastast_bench.fused_attention_backward(grad, *ctx.saved_tensors, ctx.scale)
    return *grads, None, None


torch.library.register_autograd(
    "fastast_bench::fused_attention", _vjp, setup_context=_save, lib=LIBRARY
)
