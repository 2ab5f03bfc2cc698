"""Attention pooling with its projections: ours, PyTorch's fused ones, a loop over segments."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import partial
from itertools import groupby

import torch
from torch import Tensor

from bench import flops
from bench.cases.call import Call, leaf
from bench.cases.lengths import segment_lengths
from bench.peers.attention import explicit_attention, sdpa_attention
from bench.peers.elastic import pool
from bench.peers.padding import Padding
from bench.registry import Case, Contender, Settings, Work, benchmark, peer
from fastast import Segments
from fastast.models.vit import TRUNK_SIZES
from fastast.nn import AttentionPool

Pooling = Callable[[AttentionPool, Tensor], Tensor]

MOST_LOOPS = 64
"""Segments that a GPU is made to take one after the other."""


@benchmark(
    "ops/segment_pool",
    "The whole pooling layer: query, key, value and output projections, one row per segment.",
)
def cases(settings: Settings) -> Iterator[Case]:
    dtype, size = settings.timed_dtype, settings.timed_size
    on_gpu = settings.device.type == "cuda"
    trunk = TRUNK_SIZES[size]
    for name, lengths in segment_lengths(settings.device):
        for backward in (False, True):
            yield Case(
                f"length {name}, forward{'+backward' * backward}",
                dtype,
                size,
                {
                    "segments": len(lengths),
                    "lengths": sorted(set(lengths)) if name != "mixed" else lengths,
                    "tokens": sum(lengths),
                    "dim": trunk.dim,
                    "heads": trunk.num_heads,
                },
                partial(
                    _build,
                    settings.device,
                    dtype,
                    lengths,
                    trunk.dim,
                    trunk.num_heads,
                    backward,
                    on_gpu,
                ),
            )


def _build(
    device: torch.device,
    dtype: torch.dtype,
    lengths: list[int],
    dim: int,
    heads: int,
    backward: bool,
    on_gpu: bool,
) -> Work:
    """Ours, and the peers that run on CPUs or on GPUs."""
    generator = torch.Generator(device).manual_seed(0)
    normal = partial(torch.randn, generator=generator, device=device)
    layer = AttentionPool(dim, heads).to(device)
    with torch.no_grad():
        for parameter in layer.parameters():
            # Scores of order one, so that the softmax is neither flat nor a choice.
            std = 1.0 if parameter.ndim == 1 else dim**-0.5
            parameter.copy_(std * normal(parameter.shape))
    layer = layer.to(dtype)
    x, grad = normal(sum(lengths), dim).to(dtype), normal(len(lengths), dim).to(dtype)
    segments, padding = Segments.from_lengths(lengths).to(device), Padding(lengths, device)
    one_each = torch.arange(len(lengths) + 1, dtype=torch.int32, device=device)

    def call(function: Pooling, rows: Tensor, dtype: torch.dtype, **layout) -> Call:
        twin, rows = copy.deepcopy(layer).to(dtype), leaf(rows, dtype)
        return Call(
            partial(function, twin, rows),
            {"x": rows, **dict(twin.named_parameters())},
            grad.to(dtype) if backward else None,
            **layout,
        )

    def folded(layer: AttentionPool, rows: Tensor) -> Tensor:
        return layer(rows, segments)

    def padded(layer: AttentionPool, rows: Tensor) -> Tensor:
        query = layer.query[None, None]
        return pool(layer, rows, query, padding.key_mask(), sdpa_attention).squeeze(1)

    def varlen(layer: AttentionPool, rows: Tensor) -> Tensor:
        from torch.nn.attention.varlen import varlen_attn

        heads = layer.num_heads
        q, k, v = layer.q(layer.query).expand(len(lengths), -1), layer.k(rows), layer.v(rows)
        q, k, v = (y.unflatten(-1, (heads, -1)) for y in (q, k, v))
        pooled = varlen_attn(
            q, k, v, one_each, segments.offsets, 1, max(lengths), scale=layer.scale
        )
        return layer.proj(pooled.flatten(1))

    def explicit(layer: AttentionPool, parts: list[Tensor]) -> Tensor:
        query = layer.query[None, None]
        pooled = [pool(layer, part, query, None, explicit_attention) for part in parts]
        return torch.cat(pooled).squeeze(1)

    def loop(layer: AttentionPool, rows: Tensor) -> Tensor:
        return explicit(layer, [part[None] for part in rows.split(lengths)])

    def by_runs(layer: AttentionPool, rows: Tensor) -> Tensor:
        """The loop's sums, with neighbours of one length as a batch."""
        runs = [(length, len(list(group))) for length, group in groupby(lengths)]
        parts = rows.split([length * count for length, count in runs])
        shaped = zip(parts, runs, strict=True)
        return explicit(layer, [part.unflatten(0, (count, -1)) for part, (_, count) in shaped])

    def contender(name: str, why: str, call: Call, tokens: int, forward: int) -> Contender:
        parameters = sum(weight.numel() for weight in layer.parameters())
        once = tokens * dim + parameters + len(lengths) * dim
        return Contender(
            name,
            why,
            call.outputs,
            call.step,
            call.saved_bytes if backward else None,
            # The gradients of query and tokens are wanted, so nothing is spared.
            flops=3 * forward if backward else forward,
            # Backward: the inputs and the output's gradient again, the inputs' gradients out.
            bytes=(3 * once if backward else once) * dtype.itemsize,
            tokens=tokens,
        )

    total, count = sum(lengths), len(lengths)
    contenders = [
        contender(
            "fastast",
            "the query goes through the key projection: no keys, no values",
            call(folded, x, dtype),
            total,
            flops.pool_folded(dim, heads, total, count),
        ),
        peer(
            "padded SDPA",
            "keys and values of every token, then PyTorch's fused attention with one query "
            "on segments padded to the longest",
            lambda name, why: contender(
                name,
                why,
                call(padded, padding.pad(x), dtype, to_stream=padding.unpad, laid_out=("x",)),
                padding.num_rows,
                flops.pool_projected(dim, padding.num_rows, 1, count, padding.num_rows),
            ),
        ),
    ]
    if on_gpu:
        contenders.append(
            peer(
                "varlen_attn",
                "keys and values of every token, then torch.nn.attention.varlen with one query "
                "per segment, without padding",
                lambda name, why: contender(
                    name,
                    why,
                    call(varlen, x, dtype),
                    total,
                    flops.pool_projected(dim, total, 1, count, total),
                ),
            )
        )
    if not on_gpu or count <= MOST_LOOPS:
        contenders.append(
            peer(
                "loop",
                "keys and values, explicit softmax, one segment after the other",
                lambda name, why: contender(
                    name,
                    why,
                    call(loop, x, dtype),
                    total,
                    flops.pool_projected(dim, total, count, count, total),
                ),
            )
        )
    return Work(
        tuple(contenders),
        lambda in_dtype: call(by_runs, x, in_dtype).outputs(),
    )
