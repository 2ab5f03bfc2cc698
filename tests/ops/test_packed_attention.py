"""Attention within segments against its specification, on every geometry."""

import itertools

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from fastast import Segments, TokenBudget
from fastast.ops import packed_attention, packed_attention_qkv
from tests.testing import (
    GEOMETRIES,
    Geometry,
    assert_as_accurate,
    forward_and_gradients,
    over_draws,
    poisoned_memory,
)

HEADS, DIM = 3, 8
every_geometry = pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES)
WITH_DEAD_ROWS = {name: g for name, g in GEOMETRIES.items() if g.rows > g.used}

every_scale = pytest.mark.parametrize("scale", [None, 1.0], ids=["default-scale", "unscaled"])


def inputs_of(geometry: Geometry, dtype=torch.float64, seed=0):
    """q, k and v as views of one projection, and a gradient of the output."""
    torch.manual_seed(seed)
    qkv = torch.randn(geometry.rows, 3, HEADS, DIM, dtype=dtype)
    return qkv.unbind(1), torch.randn(geometry.rows, HEADS, DIM, dtype=dtype)


def attention(geometry: Geometry, **options):
    return lambda q, k, v: packed_attention(q, k, v, geometry.segments, **options)


def attention_qkv(geometry: Geometry, **options):
    return lambda qkv: packed_attention_qkv(qkv, geometry.segments, **options)


@every_geometry
@every_scale
def test_equals_reference(geometry, scale):
    inputs, grad = inputs_of(geometry)
    actual = forward_and_gradients(attention(geometry, scale=scale), inputs, grad)
    reference = attention(geometry, scale=scale, backend="reference")
    expected = forward_and_gradients(reference, inputs, grad)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    assert actual[0].is_contiguous()


@every_geometry
@every_scale
def test_qkv_equals_separate_bit_for_bit(geometry, scale):
    inputs, grad = inputs_of(geometry)
    out, *grads = forward_and_gradients(attention(geometry, scale=scale), inputs, grad)
    qkv = torch.stack(inputs, 1)
    packed = forward_and_gradients(attention_qkv(geometry, scale=scale), [qkv], grad)
    assert torch.equal(packed[0], out)
    assert torch.equal(packed[1], torch.stack(grads, 1))


@every_geometry
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_low_precision_is_as_accurate_as_eager(geometry, dtype):
    reference = attention(geometry, backend="reference")

    def results(seed):
        inputs, grad = inputs_of(geometry, dtype, seed)
        actual = forward_and_gradients(attention(geometry), inputs, grad)
        eager = forward_and_gradients(reference, inputs, grad)
        truth = forward_and_gradients(reference, [x.double() for x in inputs], grad.double())
        return actual, eager, truth

    assert_as_accurate(*over_draws(results, 8 if dtype == torch.float32 else 1))


@every_geometry
def test_log_sum_exp(geometry):
    q, k, v = (x.requires_grad_() for x in inputs_of(geometry)[0])
    lse = torch.ops.fastast.packed_attention(q, k, v, *tables(geometry.segments), 0.5)[1]
    assert not lse.requires_grad
    expected = torch.zeros(HEADS, geometry.rows, dtype=q.dtype)
    for clip in geometry.clips:
        expected[:, clip] = torch.einsum("ihd,jhd->hij", q[clip], 0.5 * k[clip]).logsumexp(-1)
    torch.testing.assert_close(lse, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("geometry", WITH_DEAD_ROWS.values(), ids=WITH_DEAD_ROWS)
def test_dead_rows_are_never_read(geometry):
    inputs, grad = inputs_of(geometry)
    expected = forward_and_gradients(attention(geometry), inputs, grad)
    for x in (*inputs, grad):
        x[geometry.used :] = torch.nan
    actual = forward_and_gradients(attention(geometry), inputs, grad)
    for value, other in zip(actual, expected, strict=True):
        assert torch.equal(value, other)
        assert (value[geometry.used :] == 0).all()


@every_geometry
def test_everything_is_written(geometry):
    inputs, grad = inputs_of(geometry)
    with poisoned_memory():
        separate = forward_and_gradients(attention(geometry), inputs, grad)
        packed = forward_and_gradients(attention_qkv(geometry), [torch.stack(inputs, 1)], grad)
        lse = torch.ops.fastast.packed_attention(*inputs, *tables(geometry.segments), 1.0)[1]
    for value in (*separate, *packed, lse):
        assert value.isfinite().all()


@every_geometry
def test_deterministic(geometry):
    inputs, grad = inputs_of(geometry, torch.float32)
    first = forward_and_gradients(attention(geometry), inputs, grad)
    second = forward_and_gradients(attention(geometry), inputs, grad)
    assert all(map(torch.equal, first, second))


@every_geometry
def test_independent_of_the_neighbours(geometry):
    inputs, grad = inputs_of(geometry, torch.float32)
    expected = forward_and_gradients(attention(geometry), inputs, grad)
    for clip in geometry.clips:
        others = [torch.randn_like(x) for x in (*inputs, grad)]
        for other, x in zip(others, (*inputs, grad), strict=True):
            other[clip] = x[clip]
        actual = forward_and_gradients(attention(geometry), others[:3], others[3])
        for value, other in zip(actual, expected, strict=True):
            assert torch.equal(value[clip], other[clip])


STRIDES = {
    "heads-first": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "channels-first": lambda x: x.permute(2, 0, 1).contiguous().permute(1, 2, 0),
    "every-second-channel": lambda x: x.repeat_interleave(2, -1)[..., ::2],
    "every-second-row": lambda x: x.repeat_interleave(2, 0)[::2],
}


@pytest.mark.parametrize("view", STRIDES.values(), ids=STRIDES)
def test_any_strides_of_the_inputs(view):
    geometry = GEOMETRIES["odd-sizes"]
    inputs, grad = inputs_of(geometry)
    expected = forward_and_gradients(attention(geometry), inputs, grad)
    actual = forward_and_gradients(attention(geometry), [view(x) for x in inputs], grad)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def test_any_strides_of_qkv():
    geometry = GEOMETRIES["odd-sizes"]
    inputs, grad = inputs_of(geometry)
    qkv = torch.stack(inputs, 1)
    expected = forward_and_gradients(attention_qkv(geometry), [qkv], grad)
    for order in ([1, 0, 2, 3], [0, 2, 1, 3], [3, 0, 1, 2]):  # dimensions in memory
        back = torch.tensor(order).argsort().tolist()
        view = qkv.permute(order).contiguous().permute(back)
        actual = forward_and_gradients(attention_qkv(geometry), [view], grad)
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("view", STRIDES.values(), ids=STRIDES)
def test_any_strides_of_the_gradient(view):
    geometry = GEOMETRIES["odd-sizes"]
    inputs, grad = inputs_of(geometry)
    expected = forward_and_gradients(attention(geometry), inputs, grad)
    actual = forward_and_gradients(attention(geometry), inputs, view(grad))
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def test_broadcast_gradient():
    geometry = GEOMETRIES["odd-sizes"]
    inputs, grad = inputs_of(geometry)
    one = torch.ones((), dtype=grad.dtype)
    expected = forward_and_gradients(attention(geometry), inputs, torch.ones_like(grad))
    actual = forward_and_gradients(attention(geometry), inputs, one.expand_as(grad))
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("wanted", list(itertools.product([True, False], repeat=3))[:-1], ids=str)
def test_gradients_of_some_inputs(wanted):
    geometry = GEOMETRIES["odd-sizes"]
    inputs, grad = inputs_of(geometry)
    _, *expected = forward_and_gradients(attention(geometry), inputs, grad)
    inputs = [x.detach().requires_grad_(want) for x, want in zip(inputs, wanted, strict=True)]
    attention(geometry)(*inputs).backward(grad)
    for x, want, other in zip(inputs, wanted, expected, strict=True):
        assert torch.equal(x.grad, other) if want else x.grad is None


def test_no_gradient_is_tracked_without_need():
    geometry = GEOMETRIES["odd-sizes"]
    assert not attention(geometry)(*inputs_of(geometry)[0]).requires_grad


def test_gradcheck():
    geometry = Geometry.of([3, 0, 2], TokenBudget(tokens=6, clips=3, max_length=3))
    qkv = torch.randn(6, 3, 2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(attention_qkv(geometry, scale=1.0), [qkv])
    inputs = [x.detach().requires_grad_() for x in qkv.unbind(1)]
    assert torch.autograd.gradcheck(attention(geometry), inputs)


def test_second_derivatives_are_refused():
    geometry = GEOMETRIES["odd-sizes"]
    inputs = [x.detach().requires_grad_() for x in inputs_of(geometry)[0]]
    out = attention(geometry)(*inputs)
    grads = torch.autograd.grad(out.square().sum(), inputs, create_graph=True)
    with pytest.raises(RuntimeError, match="differentia|derivative"):
        torch.autograd.grad(sum(grad.square().sum() for grad in grads), inputs)


def tables(segments: Segments):
    return segments.offsets, segments.host_offsets, segments.tiles, segments.max_length


@pytest.mark.parametrize("name", ["odd-sizes", "empty-in-middle", "budget"])
def test_opcheck(name):
    geometry = GEOMETRIES[name]
    (q, k, v), grad = inputs_of(geometry, torch.float32)
    qkv, table, scale = torch.stack([q, k, v], 1), tables(geometry.segments), 0.3
    out, lse = torch.ops.fastast.packed_attention(q, k, v, *table, scale)
    for op, args in (
        ("packed_attention", [x.detach().requires_grad_() for x in (q, k, v)]),
        ("packed_attention_qkv", [qkv.detach().requires_grad_()]),
        ("packed_attention_backward", [grad, q, k, v, out, lse]),
        ("packed_attention_qkv_backward", [grad, qkv, out, lse]),
    ):
        torch.library.opcheck(getattr(torch.ops.fastast, op).default, (*args, *table, scale))


@every_geometry
@pytest.mark.parametrize("variant", [attention, attention_qkv])
def test_flops(geometry, variant):
    (q, k, v), grad = inputs_of(geometry)
    inputs = [q, k, v] if variant is attention else [torch.stack([q, k, v], 1)]
    squares = sum((clip.stop - clip.start) ** 2 for clip in geometry.clips)

    def count(backend, run):
        with FlopCounterMode(display=False) as counter:
            run(variant(geometry, backend=backend))
        return counter.get_total_flops()

    def forward(function):
        function(*inputs)

    def step(function):
        forward_and_gradients(function, inputs, grad)

    assert count("auto", forward) == count("reference", forward) == 4 * HEADS * DIM * squares
    # The backward computes the scores once more: five matmuls to explicit attention's four.
    assert count("auto", step) == 14 * HEADS * DIM * squares
    assert count("reference", step) == 12 * HEADS * DIM * squares


SEGMENTS = Segments.from_lengths([3, 5])
X = torch.zeros(8, 2, 4)


@pytest.mark.parametrize(
    "q, k, v, message",
    [
        (X.long(), X, X, "q must be floating point, got torch.int64"),
        (X.to("meta"), X, X, r"q is on meta but segments are on cpu.*segments\.to"),
        (X[0], X, X, r"q must be \[rows, heads, head_dim\], got \(2, 4\)"),
        (X, X[:, :1], X, r"k must match q .*got \(\(8, 1, 4\)"),
        (X, X, X.double(), r"v must match q .*torch.float64"),
        (X, X.to("meta"), X, r"k must match q .*meta"),
        (X[:7], X[:7], X[:7], r"q has 7 rows"),
    ],
    ids=["dtype", "device", "shape", "k-shape", "v-dtype", "k-device", "rows"],
)
def test_wrong_input_says_so(q, k, v, message):
    with pytest.raises(ValueError, match=message):
        packed_attention(q, k, v, SEGMENTS)


@pytest.mark.parametrize(
    "qkv, message",
    [
        (X, r"qkv must be \[rows, 3, heads, head_dim\], got \(8, 2, 4\)"),
        (X[:, None].expand(8, 2, 2, 4), r"qkv must be .*got \(8, 2, 2, 4\)"),
        (X[:, None].expand(8, 3, 2, 4).int(), "qkv must be floating point"),
        (X[:7, None].expand(7, 3, 2, 4), "qkv has 7 rows"),
    ],
    ids=["no-three", "two", "dtype", "rows"],
)
def test_wrong_qkv_says_so(qkv, message):
    with pytest.raises(ValueError, match=message):
        packed_attention_qkv(qkv, SEGMENTS)


def test_wrong_backend_says_so():
    with pytest.raises(ValueError, match="backend must be one of .*got 'fast'"):
        packed_attention(X, X, X, SEGMENTS, backend="fast")
    with pytest.raises(ValueError, match="backend must be one of .*got 'fast'"):
        packed_attention_qkv(torch.stack([X] * 3, 1), SEGMENTS, backend="fast")
