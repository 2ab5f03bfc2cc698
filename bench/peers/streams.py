"""PyTorch's own attention over segments of a packed stream, without padding: three ways.

Each takes ``q, k, v``, laid out once by :attr:`layout`, and returns the output in that layout;
:attr:`to_stream` brings it, or a gradient, back to ``[total, heads, head_dim]``. What depends on
the lengths alone, such as offsets and block masks, is made beforehand, as a data loader would.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention


class Varlen:
    """``torch.nn.attention.varlen.varlen_attn``: FlashAttention 2 on the stream itself."""

    def __init__(self, lengths: Sequence[int], device: torch.device) -> None:
        self.offsets = _offsets(lengths, torch.int32, device)
        self.longest = max(lengths)

    def layout(self, stream: Tensor) -> Tensor:
        return stream

    to_stream = layout

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        from torch.nn.attention.varlen import varlen_attn

        ends = self.offsets, self.offsets, self.longest, self.longest
        return varlen_attn(q, k, v, *ends, scale=scale)


class Jagged:
    """``scaled_dot_product_attention`` of jagged nested tensors.

    The shortest and longest lengths are given, which it would wait for the device to learn.
    """

    def __init__(self, lengths: Sequence[int], device: torch.device) -> None:
        self.offsets = _offsets(lengths, torch.int64, device)
        self.bounds = {"min_seqlen": min(lengths), "max_seqlen": max(lengths)}

    def layout(self, stream: Tensor) -> Tensor:
        return torch.nested.nested_tensor_from_jagged(stream, self.offsets, **self.bounds)

    def to_stream(self, batch: Tensor) -> Tensor:
        return batch.values()

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2)


class Document:
    """Compiled FlexAttention with a document mask on the stream, filled up to ``rows``.

    The stream's length and the block mask's shapes are the same for all lengths, so one
    compilation serves them all.

    Attributes:
        pairs: (query, key) pairs of the blocks that are not skipped.
    """

    def __init__(self, lengths: Sequence[int], device: torch.device, rows: int) -> None:
        document = torch.full((rows,), -1)
        self.total = sum(lengths)
        document[: self.total] = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
        self.rows = rows
        self.mask = document_mask(document.to(device))
        blocks = self.mask.kv_num_blocks.sum() + self.mask.full_kv_num_blocks.sum()
        height, width = self.mask.BLOCK_SIZE
        self.pairs = int(blocks) * height * width

    def layout(self, stream: Tensor) -> Tensor:
        padding = (0, 0) * (stream.ndim - 1) + (0, self.rows - self.total)
        return F.pad(stream, padding)[None]

    def to_stream(self, batch: Tensor) -> Tensor:
        return batch[0, : self.total]

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return _compiled_flex()(q, k, v, block_mask=self.mask, scale=scale).transpose(1, 2)


def document_mask(document: Tensor) -> BlockMask:
    """Rows see the rows of their own document; those of document -1 see nothing."""

    def same(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (document[query] == document[key]) & (document[query] >= 0)

    rows = len(document)
    return create_block_mask(same, None, None, rows, rows, device=document.device)


@functools.cache
def _compiled_flex() -> Callable[..., Tensor]:
    # Head sizes, with and without gradients, are compiled for separately, and one that is one too
    # many must be an error: without compilation all scores of the stream would be computed.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 32)
    return torch.compile(flex_attention, dynamic=False, fullgraph=True)


def _offsets(lengths: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(device, dtype)
