"""The operations as drop-in modules."""

from fastast.nn.attention_pool import AttentionPool, MeanPool
from fastast.nn.mel_filterbank import MelFilterbank
from fastast.nn.packed_attention import PackedAttention

__all__ = ["AttentionPool", "MeanPool", "MelFilterbank", "PackedAttention"]
