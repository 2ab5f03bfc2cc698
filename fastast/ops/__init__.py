"""The functional API: every operation on a packed stream, for any device."""

from fastast.ops.packed_attention import packed_attention, packed_attention_qkv
from fastast.ops.segment_pool import segment_pool

__all__ = ["packed_attention", "packed_attention_qkv", "segment_pool"]
