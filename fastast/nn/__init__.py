"""The operations as drop-in modules."""

from fastast.nn.attention_pool import AttentionPool, MeanPool
from fastast.nn.packed_attention import PackedAttention

__all__ = ["AttentionPool", "MeanPool", "PackedAttention"]
