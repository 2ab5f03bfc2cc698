"""Analytic FLOPs of models against torch's counter, on attention that is explicit matmuls."""

from functools import partial

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import fastast.nn.attention_pool
import fastast.nn.packed_attention
from fastast import create_model
from tests.testing import ragged

SIZE = {"num_mels": 32, "patch_size": (16, 8), "dim": 48, "depth": 3, "num_heads": 2}


@pytest.mark.parametrize(
    "name, settings",
    [
        ("ast_tiny", {"input_frames": 64, "stride": (16, 8)}),
        ("flexi_ast_tiny", {"input_frames": 64}),
        ("ssast_patch_tiny", {"input_frames": 64, "stride": (8, 8)}),
        ("audio_mae_tiny", {}),
        ("elastic_ast_tiny", {}),
        ("elastic_ast_tiny", {"pool": "mean"}),
    ],
)
def test_training_counts_what_torch_counts(name, settings, monkeypatch):
    for module, op in (
        (fastast.nn.packed_attention, "packed_attention_qkv"),
        (fastast.nn.attention_pool, "segment_pool"),
    ):
        monkeypatch.setattr(module, op, partial(getattr(module, op), backend="reference"))
    model = create_model(name, 7, **SIZE, **settings)
    clips = ragged([64, 160, 8], 32, torch.float32)
    tokens = model.geometry.grid(clips.segments).segments.lengths
    with FlopCounterMode(display=False) as counter:
        model(clips).sum().backward()
    assert model.flops(tokens).training == pytest.approx(counter.get_total_flops(), rel=0.01)


def test_clips_without_tokens_cost_nothing():
    model = create_model("ast_tiny", 7, **SIZE, input_frames=64, stride=(16, 8))
    assert model.flops([0, 18, 0]) == model.flops([18])
    assert model.flops([]).training == 0
