"""Attention within segments: ours, the paper's masked rows, padded fused attention."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from bench import flops
from bench.cases.call import Call, leaf
from bench.cases.lengths import segment_lengths
from bench.peers.attention import explicit_attention, sdpa_attention
from bench.peers.dense_rows import RowLayout
from bench.peers.elastic import Attention
from bench.peers.padding import Padding
from bench.registry import Case, Contender, Settings, Work, benchmark
from fastast import Segments
from fastast.models.vit import TRUNK_SIZES
from fastast.ops import packed_attention


@benchmark(
    "ops/packed_attention",
    "Self-attention within each segment. Inputs are in each contender's own layout beforehand.",
)
def cases(settings: Settings) -> Iterator[Case]:
    dtype, size = settings.timed_dtype, settings.timed_size
    for head_dim in (64, 24):
        heads = TRUNK_SIZES[size].dim // head_dim
        for name, lengths in segment_lengths(settings.device):
            for backward in (False, True):
                yield Case(
                    f"length {name}, head dim {head_dim}, forward{'+backward' * backward}",
                    dtype,
                    size,
                    {
                        "segments": len(lengths),
                        "lengths": sorted(set(lengths)) if name != "mixed" else lengths,
                        "tokens": sum(lengths),
                        "heads": heads,
                        "head_dim": head_dim,
                    },
                    partial(_build, settings.device, dtype, lengths, heads, head_dim, backward),
                )


def _build(
    device: torch.device,
    dtype: torch.dtype,
    lengths: list[int],
    heads: int,
    head_dim: int,
    backward: bool,
) -> Work:
    generator = torch.Generator().manual_seed(0)
    shape = (4, sum(lengths), heads, head_dim)
    *qkv, grad = torch.randn(shape, generator=generator).to(device, dtype)
    inputs = dict(zip(("q", "k", "v"), qkv, strict=True))
    segments = Segments.from_lengths(lengths).to(device)
    rows, padded = RowLayout(lengths, device), Padding(lengths, device)
    row_mask = rows.attention_mask()[:, None]

    def packed(dtype: torch.dtype, backend: str) -> Call:
        qkv = {name: leaf(x, dtype) for name, x in inputs.items()}
        return Call(
            lambda: packed_attention(*qkv.values(), segments, backend=backend),
            qkv,
            grad.to(dtype) if backward else None,
        )

    def dense(padding: Padding, attention: Attention, mask: Tensor | None) -> Call:
        qkv = {name: leaf(padding.pad(x)) for name, x in inputs.items()}

        def function() -> Tensor:
            q, k, v = (x.transpose(1, 2) for x in qkv.values())
            return attention(q, k, v, mask, head_dim**-0.5).transpose(1, 2)

        return Call(
            function,
            qkv,
            padding.pad(grad) if backward else None,
            padding.unpad,
            ("out", "q", "k", "v"),
        )

    def contender(name: str, why: str, call: Call, widths: list[int]) -> Contender:
        # q, k, v in, out; backward: q, k, v, out and its gradient in, three gradients out.
        passes = 12 if backward else 4
        scored = flops.attention(flops.pairs(widths), heads * head_dim)
        return Contender(
            name,
            why,
            call.outputs,
            call.step,
            flops=3 * scored if backward else scored,
            bytes=passes * sum(widths) * heads * head_dim * dtype.itemsize,
            tokens=sum(widths),
        )

    return Work(
        (
            contender(
                "fastast",
                "no padding, no mask: scores between segments are never computed",
                packed(dtype, "auto"),
                lengths,
            ),
            contender(
                "masked rows",
                "ElasticAST's method: rows of at most 2048 tokens, explicit masked softmax",
                dense(rows.padding, explicit_attention, row_mask),
                [rows.padding.shape[1]] * rows.padding.shape[0],
            ),
            contender(
                "padded SDPA",
                "PyTorch's fused attention on segments padded to the longest, with a key mask "
                "only where there is padding",
                dense(padded, sdpa_attention, padded.key_mask()),
                [padded.shape[1]] * padded.shape[0],
            ),
        ),
        lambda in_dtype: packed(in_dtype, "reference").outputs(),
    )
