"""The operations as drop-in modules."""

from fastast.nn.attention_pool import AttentionPool, MeanPool
from fastast.nn.mel_filterbank import MelFilterbank
from fastast.nn.packed_attention import PackedAttention
from fastast.nn.window_attention import ContinuousPositionBias, WindowAttention

__all__ = [
    "AttentionPool",
    "ContinuousPositionBias",
    "MeanPool",
    "MelFilterbank",
    "PackedAttention",
    "WindowAttention",
]
