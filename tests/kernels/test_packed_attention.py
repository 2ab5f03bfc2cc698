"""The attention kernels, interpreted on the CPU, against their specification in float64."""

import importlib
import inspect

import pytest
import torch

from fastast import Segments, TokenBudget
from fastast.kernels import packed_attention as kernels
from fastast.kernels.packed_attention import _rows, launch, tiled, whole
from fastast.kernels.packed_attention.configs import Config, Launch
from fastast.ops import packed_attention
from tests.testing import (
    GEOMETRIES,
    Geometry,
    assert_as_accurate,
    forward_and_gradients,
    poisoned_memory,
)

HEADS, SCALE = 2, 0.3
LONG = 10**6  # no block holds such a segment: takes the tiled kernels
SHAPES = {
    **GEOMETRIES,
    "sixteen-to-a-block": Geometry.of([4, 1, 3, 0, 4] * 4, TokenBudget(52, 20, 4)),
    "two-odd-tiles": Geometry.of([129, 65], TokenBudget(200, 2, 129)),
}
every_geometry = pytest.mark.parametrize("geometry", SHAPES.values(), ids=SHAPES)
some_geometries = pytest.mark.parametrize("name", ["odd-sizes", "budget"])
# The bound on the lengths that the kernels are chosen by.
REGIMES = {"whole": 1, "queries-in-steps": 128, "tiled": LONG}
every_regime = pytest.mark.parametrize("bound", REGIMES.values(), ids=REGIMES)


@pytest.fixture(autouse=True)
def interpreted(interpret):
    for module in (_rows, tiled, whole):
        interpret(module)


@pytest.fixture(params=[80, 90], ids="sm_{}".format)
def architecture(request, monkeypatch):
    """The launches of an architecture: blocks differ."""
    monkeypatch.setattr(launch, "_architecture", lambda device: request.param)


def inputs_of(geometry, dtype=torch.float32, head_dim=24):
    torch.manual_seed(0)
    q, k, v, grad = torch.randn(4, geometry.rows, HEADS, head_dim).to(dtype)
    return (q, k, v), grad


def run(geometry, inputs, grad, bound=1, scale=SCALE, config=None):
    """Output, gradients and log-sum-exp; what a kernel leaves unwritten is NaN."""
    segments = geometry.segments
    table = (segments.offsets, segments.tiles, max(bound, segments.max_length), scale, config)
    with poisoned_memory():
        out, lse = kernels.forward(*inputs, *table)
        grads = tuple(x.new_empty(x.shape) for x in inputs)
        kernels.backward(grads, grad, *inputs, out, lse, *table)
    return [out, *grads], lse


def specification(geometry, inputs, grad, scale=SCALE):
    def attention(q, k, v):
        return packed_attention(q, k, v, geometry.segments, scale=scale, backend="reference")

    return forward_and_gradients(attention, inputs, grad)


def check(geometry, inputs, grad, bound, scale=SCALE, config=None):
    eager = specification(geometry, inputs, grad, scale)
    truth = specification(geometry, [x.double() for x in inputs], grad.double(), scale)
    assert_as_accurate(run(geometry, inputs, grad, bound, scale, config)[0], eager, truth)


@every_geometry
@every_regime
def test_as_accurate_as_eager(geometry, bound):
    check(geometry, *inputs_of(geometry, torch.bfloat16), bound)


@some_geometries
@every_regime
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_other_precisions(name, bound, dtype, architecture):
    check(SHAPES[name], *inputs_of(SHAPES[name], dtype), bound)


WIDE = Launch(128, 64, 8, 2)
OTHER_LAUNCHES = {
    "tiled": Config((), (), WIDE, WIDE, WIDE),
    "whole": Config((Launch(128, 128, 8, 1),), (Launch(128, 128, 8, 1),), WIDE, WIDE, WIDE),
}


@some_geometries
@pytest.mark.parametrize("config", OTHER_LAUNCHES.values(), ids=OTHER_LAUNCHES)
def test_launches_of_128_rows(name, config):
    """Two tiles to a program, or one block of them: what bench.launches times beside ours."""
    check(SHAPES[name], *inputs_of(SHAPES[name], torch.bfloat16), 1, config=config)


@every_regime
@pytest.mark.parametrize("head_dim", [3, 16, 20, 64, 80, 128])
def test_head_sizes(head_dim, bound):
    geometry = GEOMETRIES["odd-sizes"]
    check(geometry, *inputs_of(geometry, torch.bfloat16, head_dim), bound)


@some_geometries
@every_regime
def test_log_sum_exp(name, bound):
    geometry = SHAPES[name]
    (q, k, v), grad = inputs_of(geometry)
    expected = torch.zeros(HEADS, geometry.rows)
    for clip in geometry.clips:
        expected[:, clip] = torch.einsum("ihd,jhd->hij", q[clip], SCALE * k[clip]).logsumexp(-1)
    torch.testing.assert_close(run(geometry, (q, k, v), grad, bound)[1], expected)


@every_regime
def test_scores_far_from_zero(bound):
    """All scores about -900: an absent key, at 0, would outweigh the others by e**900."""
    geometry = GEOMETRIES["odd-sizes"]
    (q, k, v), grad = inputs_of(geometry)
    inputs = (0.1 * q + 11, 0.1 * k - 11, v)
    check(geometry, inputs, grad, bound)


@every_regime
def test_dead_rows_are_never_read(bound):
    geometry = GEOMETRIES["budget"]
    inputs, grad = inputs_of(geometry)
    expected = run(geometry, inputs, grad, bound)[0]
    for x in (*inputs, grad):
        x[geometry.used :] = torch.nan
    for value, other in zip(run(geometry, inputs, grad, bound)[0], expected, strict=True):
        assert torch.equal(value, other)
        assert (value[geometry.used :] == 0).all()


@every_regime
def test_rows_beyond_the_budget_are_cleared(bound):
    geometry = Geometry.of([5, 17, 1])
    longer = Geometry(geometry.segments, 150)
    inputs, grad = inputs_of(longer)
    expected = run(geometry, [x[:23] for x in inputs], grad[:23], bound)[0]
    for value, other in zip(run(longer, inputs, grad, bound)[0], expected, strict=True):
        assert torch.equal(value[:23], other)
        assert (value[23:] == 0).all()


@every_regime
@pytest.mark.parametrize("name", ["odd-sizes", "equal-around-empty"])
def test_independent_of_the_neighbours(name, bound):
    geometry = GEOMETRIES[name]
    inputs, grad = inputs_of(geometry)
    expected = run(geometry, inputs, grad, bound)[0]
    clip = geometry.clips[-1]
    for value, gradients in ((100.0, True), (torch.nan, False), (torch.inf, False)):
        others = [torch.full_like(x, value) for x in (*inputs, grad)]
        for other, x in zip(others, (*inputs, grad), strict=True):
            other[clip] = x[clip]
        actual = run(geometry, others[:3], others[3], bound)[0]
        for found, other in zip(actual[: 4 if gradients else 1], expected, strict=False):
            assert torch.equal(found[clip], other[clip])
    # What is not finite stays visible in its own segment.
    others[2][clip] = torch.inf
    assert not run(geometry, others[:3], others[3], bound)[0][0][clip].isfinite().any()


STRIDES = {
    "heads-first": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "odd-row-stride": lambda x: (
        torch.nn.functional.pad(x, (0, 0, 0, 1, 0, 0))
        .flatten(1)[:, : HEADS * 24]
        .unflatten(1, (HEADS, 24))
    ),
    "unaligned": lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape),
    "every-second-row": lambda x: x.repeat_interleave(2, 0)[::2],
    "every-second-channel": lambda x: x.repeat_interleave(2, -1)[..., ::2],
    "five-channels-apart": lambda x: torch.nn.functional.pad(x, (0, 5))[..., :24],
}


@every_regime
@pytest.mark.parametrize("view", STRIDES.values(), ids=STRIDES)
def test_any_strides(view, bound):
    geometry = GEOMETRIES["odd-sizes"]
    inputs, grad = inputs_of(geometry)
    expected = run(geometry, inputs, grad, bound)[0]
    q, k, v = inputs
    assert all(map(torch.equal, run(geometry, (view(q), k, v), view(grad), bound)[0], expected))
    assert all(map(torch.equal, run(geometry, (q, view(k), view(v)), grad, bound)[0], expected))


def test_a_broadcast_gradient():
    geometry = GEOMETRIES["odd-sizes"]
    inputs, grad = inputs_of(geometry)
    one = grad.new_ones(())
    expected = run(geometry, inputs, torch.ones_like(grad))[0]
    assert all(map(torch.equal, run(geometry, inputs, one.expand_as(grad))[0], expected))


# The operators. Their functions for CUDA also take CPU tensors while kernels are interpreted.

ops = importlib.import_module("fastast.ops.packed_attention")


def tables(segments, max_length):
    return segments.offsets, segments.host_offsets, segments.tiles, max_length, SCALE


@some_geometries
@every_regime
def test_operators(name, bound):
    geometry = SHAPES[name]
    inputs, grad = inputs_of(geometry)
    table = tables(geometry.segments, max(bound, geometry.segments.max_length))
    expected, expected_lse = run(geometry, inputs, grad, bound)
    out, lse = ops._attention_cuda(*inputs, *table)
    grads = ops._attention_backward_cuda(grad, *inputs, out, lse, *table)
    assert all(map(torch.equal, [lse, out, *grads], [expected_lse, *expected]))
    qkv = torch.stack(inputs, 1)
    out, lse = ops._attention_qkv_cuda(qkv, *table)
    dqkv = ops._attention_qkv_backward_cuda(grad, qkv, out, lse, *table)
    assert dqkv.is_contiguous()
    assert all(map(torch.equal, [lse, out, *dqkv.unbind(1)], [expected_lse, *expected]))


@pytest.mark.parametrize(
    "change",
    [
        lambda x, s: (x.double(), s),
        lambda x, s: (x.repeat(1, 1, 6) / 6, s),  # scores of order one
        lambda x, s: (x, -s),
    ],
    ids=["float64", "head-of-144", "negative-scale"],
)
def test_other_inputs_take_plain_pytorch(change, monkeypatch):
    geometry = GEOMETRIES["odd-sizes"]
    inputs, grad = inputs_of(geometry)
    inputs, scale = [change(x, SCALE)[0] for x in inputs], change(grad, SCALE)[1]
    monkeypatch.setattr(kernels, "forward", None)
    monkeypatch.setattr(kernels, "backward", None)
    table = (*tables(geometry.segments, 64)[:-1], scale)
    assert not kernels.supports(inputs[0], scale)
    out, lse = ops._attention_cuda(*inputs, *table)
    grads = ops._attention_backward_cuda(change(grad, scale)[0], *inputs, out, lse, *table)
    expected = specification(geometry, inputs, change(grad, scale)[0], scale)
    torch.testing.assert_close([out, *grads], expected, rtol=1e-4, atol=1e-4)


def test_no_kernel_is_specialised_on_a_batch():
    """What varies between ragged batches is an integer; each is kept from specialisation."""
    for kernel in (
        tiled.forward,
        tiled.backward_queries,
        tiled.backward_keys,
        whole.forward,
        whole.backward,
        whole.backward_walk,
    ):
        for name, parameter in inspect.signature(kernel.fn).parameters.items():
            constant = parameter.annotation is not inspect.Parameter.empty
            assert constant or name.startswith("p_") or name in {*_rows.VARYING, "scale"}


# The alias -----------------------------------------------------------------------------------


@every_geometry
def test_tiles_computed_on_the_device(geometry):
    segments = geometry.segments
    found = ops._tiles_of(segments.offsets, geometry.rows)
    alive = segments.tiles[segments.tiles[:, 3] > segments.tiles[:, 2]]
    assert torch.equal(found[: len(alive)], alive) and (found[len(alive) :] == 0).all()
    assert found.dtype == torch.int32


def test_flash_attention_signature():
    geometry = GEOMETRIES["odd-sizes"]
    (q, k, v), _ = inputs_of(geometry)
    offsets = geometry.segments.offsets
    found = ops.flash_attn_varlen_func(
        q, k, v, offsets, offsets.clone(), 33, 33, softmax_scale=SCALE, deterministic=True
    )
    expected = packed_attention(q, k, v, geometry.segments, scale=SCALE)
    assert torch.equal(found, expected)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"causal": True}, "causal must be False"),
        ({"dropout_p": 0.1}, "dropout_p must be 0.0"),
        ({"window_size": (4, 4)}, r"window_size must be \(-1, -1\)"),
        ({"alibi_slopes": torch.ones(2)}, "alibi_slopes must be None"),
        ({"cu_seqlens_k": torch.tensor([0, 9, 56], dtype=torch.int32)}, "cu_seqlens_k must equal"),
        ({"cu_seqlens_q": None}, "cu_seqlens_q must be int32"),
    ],
    ids=["causal", "dropout", "window", "alibi", "keys", "dtype"],
)
def test_flash_attention_refuses_what_it_lacks(options, message):
    x = torch.zeros(56, HEADS, 24)
    offsets = torch.tensor([0, 5, 56], dtype=torch.int32)
    arguments = {
        "cu_seqlens_q": offsets,
        "cu_seqlens_k": offsets,
        "max_seqlen_q": 51,
        "max_seqlen_k": 51,
        **options,
    }
    if arguments["cu_seqlens_q"] is None:
        arguments["cu_seqlens_q"] = arguments["cu_seqlens_k"] = offsets.long()
    with pytest.raises(ValueError, match=message):
        ops.flash_attn_varlen_func(x, x, x, **arguments)


def test_segments_without_rows():
    geometry = Geometry(Segments.from_lengths([]), 5)
    values, lse = run(geometry, *inputs_of(geometry))
    assert all((value == 0).all() for value in (*values, lse))
