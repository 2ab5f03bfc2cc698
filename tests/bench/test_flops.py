"""Analytic FLOPs against torch's counter, and what packing saves."""

from functools import partial

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import fastast.nn.attention_pool
import fastast.nn.packed_attention
from bench import flops
from bench.batches import CLIPS, mixed_resolution_frames
from bench.cases.elastic_ast import batch, dense_rows_step, packed_step, padded_step
from bench.peers.attention import explicit_attention
from bench.peers.dense_rows import next_fit
from fastast import ElasticAST, create_model
from fastast.ops.packed_attention import attention_flops

FRAMES = [160, 16, 48, 96, 160]


def counted(step) -> int:
    with FlopCounterMode(display=False) as counter:
        step.train()
    return counter.get_total_flops()


@pytest.mark.parametrize(
    "make",
    [
        packed_step,
        partial(dense_rows_step, limit=100),
        partial(padded_step, attention=explicit_attention),
    ],
    ids=["packed", "dense rows", "padded"],
)
def test_a_step_counts_what_torch_counts_on_explicit_attention(make, monkeypatch):
    # The references are matmuls and softmaxes, which the stock counter understands.
    for module, name in (
        (fastast.nn.packed_attention, "packed_attention_qkv"),
        (fastast.nn.attention_pool, "segment_pool"),
    ):
        monkeypatch.setattr(module, name, partial(getattr(module, name), backend="reference"))
    model = ElasticAST(20, dim=48, depth=3, num_heads=2)
    step = make(model, *batch(FRAMES, 128, "cpu", classes=20))
    assert step.flops == pytest.approx(counted(step), rel=0.01)


def test_attention_formulas_are_those_of_the_operators():
    offsets = torch.tensor([0, 0, 3, 10], dtype=torch.int32)
    assert flops.attention(flops.pairs([0, 3, 7]), 24) == attention_flops(offsets, 4, 6)


def test_packing_saves_two_fifths_of_the_paper_s_flops():
    with torch.device("meta"):
        model = create_model("elastic_ast_base", 527)
    clips, labels = batch(mixed_resolution_frames(), 128, "cpu")
    packed, rows, padded = (
        make(model, clips, labels).flops for make in (packed_step, dense_rows_step, padded_step)
    )
    assert packed <= 0.6 * rows
    assert packed <= 0.6 * padded


def test_the_batch_is_a_typical_one():
    """Its ratio of FLOPs lies in the middle fifth of a thousand draws of the batch."""

    def ratio(seed: int | None = None) -> float:
        frames = mixed_resolution_frames(*(() if seed is None else (CLIPS, seed)))
        lengths = [count // 16 * 8 for count in frames]
        rows = next_fit(lengths)
        width = max(map(sum, rows))
        trunk = [
            12 * (flops.linear(tokens, 768, 12 * 768) + flops.attention(scored, 768))
            for tokens, scored in (
                (sum(lengths), flops.pairs(lengths)),
                (len(rows) * width, flops.pairs([width] * len(rows))),
            )
        ]
        return trunk[0] / trunk[1]

    draws = sorted(ratio(seed) for seed in range(1000, 2000))
    assert draws[400] <= ratio() <= draws[600]
