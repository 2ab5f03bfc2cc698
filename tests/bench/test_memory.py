"""What a step keeps for its backward, at full size without memory."""

from functools import partial

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from bench.cases.elastic_ast import batch, dense_rows_step, packed_step, padded_step
from bench.cases.memory import cases
from bench.memory import fake_like, saved_bytes, tensors_of
from bench.peers.attention import modelled_fused_attention
from bench.registry import Settings
from fastast import ElasticAST, Segments


def test_saved_bytes_counts_storages_once_and_leaves_the_given_out():
    weight = torch.ones(10, requires_grad=True)
    x = torch.ones(10)

    def forward():
        y = (weight * x).exp()  # keeps x and its own result
        return (y[:5] * y[5:]).sum()  # keeps two views of that result

    assert saved_bytes(forward, [weight, x]) == 40
    assert saved_bytes(forward, [weight]) == 80


def test_a_view_keeps_its_whole_storage():
    x = torch.ones(10, requires_grad=True)

    def forward():
        return (x * 2)[:1].exp().add(1).pow(2).sum() + (3 * x)[:1].square().sum()

    # exp's result and its successor, one float each, and the ten floats behind the last view.
    assert saved_bytes(forward, [x]) == 4 + 4 + 40


@pytest.mark.parametrize(
    "make",
    [packed_step, dense_rows_step, partial(padded_step, attention=modelled_fused_attention)],
    ids=["packed", "dense rows", "padded"],
)
def test_fake_tensors_count_what_real_ones_do(make):
    model = ElasticAST(7, dim=24, depth=2, num_heads=2)
    step = make(model, *batch([96, 16, 48], 128, "cpu", classes=7))
    given = [*model.parameters(), *tensors_of(step.inputs), step.labels]
    real = saved_bytes(lambda: step.loss()[0], given)

    mode = FakeTensorMode()
    with mode:
        twin = ElasticAST(7, dim=24, depth=2, num_heads=2)
    fake = make(twin, *batch([96, 16, 48], 128, "cpu", classes=7))
    inputs, labels = (fake_like(value, mode, "cpu") for value in (fake.inputs, fake.labels))
    run = type(step)(twin, fake.run, inputs, labels, 0, 0, 0)
    given = [*twin.parameters(), *tensors_of(inputs), labels]
    with mode:
        assert saved_bytes(lambda: run.loss()[0], given) == real > 0


def test_fake_twins_keep_structure_and_the_host_s_offsets():
    segments = Segments.from_lengths([3, 4])
    twin = fake_like((segments, [1, "a"]), FakeTensorMode(), "cuda")
    assert twin[1] == [1, "a"]
    assert twin[0].offsets.device.type == "cuda"
    assert twin[0].host_offsets.device.type == "cpu"
    assert twin[0].offsets.shape == segments.offsets.shape
    assert twin[0].max_length == segments.max_length
    assert segments.offsets.device.type == "cpu"


# What the paper's attention keeps is its weights: 4 bytes each in float32; under autocast 6, while
# everything else shrinks to about a half. So the factor is larger there, where it is trained.
@pytest.mark.parametrize(("dtype", "of_rows"), [(torch.float32, 1 / 3.5), (torch.bfloat16, 1 / 6)])
def test_what_packing_saves_at_full_size(dtype, of_rows):
    (case,) = cases(Settings(torch.device("cpu"), dtype))
    assert case.size == "base"
    ours, rows, padded = case.build().contenders
    kept = ours.saved_bytes()
    assert kept <= of_rows * rows.saved_bytes()
    assert kept <= 0.75 * padded.saved_bytes()
    assert ours.flops <= 0.6 * rows.flops
