"""Attention within segments: ours, what PyTorch has for it, the paper's masked rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import groupby

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

from bench import flops
from bench.cases.call import Call, leaf
from bench.cases.lengths import GPU_TOKENS, segment_lengths
from bench.peers.attention import explicit_attention, sdpa_attention, sdpa_with
from bench.peers.dense_rows import RowLayout
from bench.peers.elastic import Attention
from bench.peers.padding import Padding
from bench.peers.streams import Document, Jagged, Varlen
from bench.registry import Case, Contender, Settings, Work, benchmark, peer
from fastast import Segments
from fastast.models.vit import TRUNK_SIZES
from fastast.ops import packed_attention

BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}

MOST_SCORES = 1 << 27
"""That the reference computes at a time: a gigabyte of each of its tensors in float64."""


@benchmark(
    "ops/packed_attention",
    "Self-attention within each segment. Inputs are in each contender's own layout beforehand.",
)
def cases(settings: Settings) -> Iterator[Case]:
    dtype, size = settings.timed_dtype, settings.timed_size
    on_gpu = settings.device.type == "cuda"
    for head_dim in (64, 24, 32, 128) if on_gpu else (64, 24):
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
                    partial(
                        _build, settings.device, dtype, lengths, heads, head_dim, backward, on_gpu
                    ),
                )


def expected(
    inputs: dict[str, Tensor],
    grad: Tensor | None,
    lengths: Sequence[int],
    dtype: torch.dtype,
    most_scores: int = MOST_SCORES,
) -> dict[str, Tensor]:
    """The formula on every segment; neighbours of one length as a batch, for speed.

    Args:
        inputs: ``q, k, v [total, heads, head_dim]`` by name.
        grad: of the output, ``None`` for the forward alone.
        lengths: of the segments.
        dtype: to compute in.
        most_scores: of a batch.
    """
    _, heads, head_dim = inputs["q"].shape
    parts, row = [], 0
    for length, group in groupby(lengths):
        left, most = len(list(group)), max(1, most_scores // (heads * length**2))
        while left:
            count = min(left, most)
            here = slice(row, row + count * length)
            qkv = {name: leaf(x[here].unflatten(0, (count, length)), dtype) for name, x in
                   inputs.items()}  # fmt: skip
            dense = partial(_dense, qkv, explicit_attention, None)
            there = None if grad is None else grad[here].unflatten(0, (count, length)).to(dtype)
            parts.append(Call(dense, qkv, there).outputs())
            row, left = here.stop, left - count
    return {name: torch.cat([part[name].flatten(0, 1) for part in parts]) for name in parts[0]}


def _dense(qkv: dict[str, Tensor], attention: Attention, mask: Tensor | None) -> Tensor:
    """Attention of ``[batch, length, heads, head_dim]``, in that layout."""
    q, k, v = (x.transpose(1, 2) for x in qkv.values())
    return attention(q, k, v, mask, q.shape[-1] ** -0.5).transpose(1, 2)


def _build(
    device: torch.device,
    dtype: torch.dtype,
    lengths: list[int],
    heads: int,
    head_dim: int,
    backward: bool,
    on_gpu: bool,
) -> Work:
    """Ours, and the peers that run on CPUs or on GPUs."""
    generator = torch.Generator(device).manual_seed(0)
    shape = (4, sum(lengths), heads, head_dim)
    *qkv, grad = torch.randn(shape, generator=generator, device=device).to(dtype)
    inputs = dict(zip(("q", "k", "v"), qkv, strict=True))
    grad = grad if backward else None
    segments = Segments.from_lengths(lengths).to(device)
    padded = Padding(lengths, device)
    whole = padded.key_mask()

    def packed() -> Call:
        leaves = {name: leaf(x) for name, x in inputs.items()}
        return Call(lambda: packed_attention(*leaves.values(), segments), leaves, grad)

    def in_layout(
        function: Callable[[dict[str, Tensor]], Tensor],
        layout: Callable[[Tensor], Tensor],
        to_stream: Callable[[Tensor], Tensor],
    ) -> Call:
        leaves = {
            name: layout(x).detach().clone().requires_grad_(backward) for name, x in inputs.items()
        }
        there = layout(grad) if backward else None
        laid_out = ("out", "q", "k", "v")
        return Call(lambda: function(leaves), leaves, there, to_stream, laid_out)

    def dense(padding: Padding, attention: Attention, mask: Tensor | None) -> Call:
        function = partial(_dense, attention=attention, mask=mask)
        return in_layout(function, padding.pad, padding.unpad)

    def contender(name: str, why: str, call: Call, rows: int, pairs: int) -> Contender:
        # q, k, v in, out; backward: q, k, v, out and its gradient in, three gradients out.
        passes = 12 if backward else 4
        scored = flops.attention(pairs, heads * head_dim)
        return Contender(
            name,
            why,
            call.outputs,
            call.step,
            flops=3 * scored if backward else scored,
            bytes=passes * rows * heads * head_dim * dtype.itemsize,
            tokens=rows,
        )

    def stream(name: str, why: str, make: Callable[[], Varlen | Jagged | Document]) -> Contender:
        def build(name: str, why: str) -> Contender:
            way = make()
            call = in_layout(
                lambda leaves: way(*leaves.values(), head_dim**-0.5), way.layout, way.to_stream
            )
            rows = getattr(way, "rows", sum(lengths))
            return contender(name, why, call, rows, getattr(way, "pairs", flops.pairs(lengths)))

        return peer(name, why, build)

    def masked_rows(name: str, why: str) -> Contender:
        rows = RowLayout(lengths, device)
        call = dense(rows.padding, explicit_attention, rows.attention_mask()[:, None])
        count, width = rows.padding.shape
        return contender(name, why, call, count * width, flops.pairs([width] * count))

    def padded_with(attention: Attention) -> Callable[[str, str], Contender]:
        pairs = flops.pairs([padded.shape[1]] * padded.shape[0])
        return lambda name, why: contender(
            name, why, dense(padded, attention, whole), padded.num_rows, pairs
        )

    contenders = [
        contender(
            "fastast",
            "no padding, no mask: scores between segments are never computed",
            packed(),
            sum(lengths),
            flops.pairs(lengths),
        ),
        peer(
            "padded SDPA",
            "PyTorch's fused attention on segments padded to the longest, with a key mask "
            "only where there is padding",
            padded_with(sdpa_attention),
        ),
    ]
    # On a GPU, rows of equal segments take thousands of times the arithmetic: a straw man.
    if not on_gpu or len(set(lengths)) > 1:
        contenders.append(
            peer(
                "masked rows",
                "ElasticAST's method: rows of at most 2048 tokens, explicit masked softmax",
                masked_rows,
            )
        )
    if on_gpu:
        contenders += [
            peer(
                f"padded SDPA, {name}",
                f"the same by PyTorch's {name} backend alone",
                padded_with(sdpa_with(backend)),
            )
            for name, backend in BACKENDS.items()
        ]
        contenders += [
            stream(
                "varlen_attn",
                "torch.nn.attention.varlen, FlashAttention 2 without padding",
                partial(Varlen, lengths, device),
            ),
            stream(
                "NestedTensor",
                "PyTorch's fused attention on jagged nested tensors, shortest and longest length "
                "given",
                partial(Jagged, lengths, device),
            ),
            stream(
                "FlexAttention",
                "compiled, with a document mask over the stream; the block mask is made beforehand "
                "and not timed",
                partial(Document, lengths, device, GPU_TOKENS),
            ),
        ]
    return Work(tuple(contenders), partial(expected, inputs, grad, lengths))
