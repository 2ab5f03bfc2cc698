"""Attention pooling of segments against its specification, on every geometry."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from fastast import Segments, TokenBudget
from fastast.ops import segment_pool
from tests.testing import (
    GEOMETRIES,
    Geometry,
    assert_as_accurate,
    forward_and_gradients,
    poisoned_memory,
)

QUERIES, DIM = 12, 24
WITH_DEAD_ROWS = {name: g for name, g in GEOMETRIES.items() if g.rows > g.used}
every_geometry = pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES)


def inputs_of(geometry: Geometry, dtype=torch.float64, query_dtype=None):
    """The stream, the queries, and a gradient of the output."""
    torch.manual_seed(0)
    x = torch.randn(geometry.rows, DIM, dtype=dtype)
    u = torch.randn(QUERIES, DIM, dtype=query_dtype or dtype) / DIM**0.5
    return (x, u), torch.randn(geometry.segments.num_segments, QUERIES, DIM, dtype=dtype)


def pool(geometry: Geometry, **options):
    return lambda x, u: segment_pool(x, u, geometry.segments, **options)


def tables(segments: Segments):
    return segments.offsets, segments.host_offsets, segments.tiles, segments.max_length


@every_geometry
def test_equals_reference(geometry):
    inputs, grad = inputs_of(geometry)
    actual = forward_and_gradients(pool(geometry), inputs, grad)
    expected = forward_and_gradients(pool(geometry, backend="reference"), inputs, grad)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def test_queries_of_zeros_take_the_mean():
    geometry = GEOMETRIES["empty-in-middle"]
    (x, _), _ = inputs_of(geometry)
    pooled = pool(geometry)(x, x.new_zeros(2, DIM))
    for row, clip in zip(pooled, geometry.clips, strict=True):
        mean = x[clip].sum(0) / max(clip.stop - clip.start, 1)
        torch.testing.assert_close(row, mean.expand(2, DIM), rtol=1e-12, atol=1e-12)


def test_large_scores_do_not_overflow():
    geometry = GEOMETRIES["odd-sizes"]
    (x, u), grad = inputs_of(geometry, torch.float32)
    # All the weight on one row of each segment.
    out, dx, du = forward_and_gradients(pool(geometry), [x, 1e4 * u], grad)
    for row, clip in zip(out, geometry.clips, strict=True):
        torch.testing.assert_close(row, x[clip][(x[clip] @ u.T).argmax(0)])
    assert dx.isfinite().all() and du.isfinite().all()


@every_geometry
@pytest.mark.parametrize(
    "dtype, query_dtype",
    [
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float16),
        (torch.bfloat16, torch.float32),
    ],
    ids=str,
)
def test_low_precision_is_as_accurate_as_eager(geometry, dtype, query_dtype):
    inputs, grad = inputs_of(geometry, dtype, query_dtype)
    actual = forward_and_gradients(pool(geometry), inputs, grad)
    reference = pool(geometry, backend="reference")
    eager = forward_and_gradients(reference, inputs, grad)
    truth = forward_and_gradients(reference, [x.double() for x in inputs], grad.double())
    assert_as_accurate(actual, eager, truth)


@every_geometry
def test_log_sum_exp(geometry):
    x, u = (x.requires_grad_() for x in inputs_of(geometry)[0])
    lse = torch.ops.fastast.segment_pool(x, u, *tables(geometry.segments))[1]
    assert not lse.requires_grad
    expected = [(x[clip] @ u.T).logsumexp(0) for clip in geometry.clips]  # -inf where empty
    torch.testing.assert_close(lse, torch.stack(expected), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("geometry", WITH_DEAD_ROWS.values(), ids=WITH_DEAD_ROWS)
def test_dead_rows_are_never_read(geometry):
    (x, u), grad = inputs_of(geometry)
    expected = forward_and_gradients(pool(geometry), (x, u), grad)
    x[geometry.used :] = torch.nan
    grad[geometry.segments.lengths == 0] = torch.nan
    actual = forward_and_gradients(pool(geometry), (x, u), grad)
    assert all(map(torch.equal, actual, expected))
    out, dx, _ = actual
    assert (dx[geometry.used :] == 0).all()
    assert (out[geometry.segments.lengths == 0] == 0).all()


@every_geometry
def test_everything_is_written(geometry):
    inputs, grad = inputs_of(geometry)
    with poisoned_memory():
        results = forward_and_gradients(pool(geometry), inputs, grad)
        lse = torch.ops.fastast.segment_pool(*inputs, *tables(geometry.segments))[1]
    assert all(x.isfinite().all() for x in results)
    assert not lse.isnan().any()


@every_geometry
def test_deterministic(geometry):
    inputs, grad = inputs_of(geometry, torch.float32)
    first = forward_and_gradients(pool(geometry), inputs, grad)
    second = forward_and_gradients(pool(geometry), inputs, grad)
    assert all(map(torch.equal, first, second))


@every_geometry
def test_independent_of_the_neighbours(geometry):
    (x, u), grad = inputs_of(geometry, torch.float32)
    out, dx, _ = forward_and_gradients(pool(geometry), (x, u), grad)
    for segment, clip in enumerate(geometry.clips):
        other, other_grad = torch.randn_like(x), torch.randn_like(grad)
        other[clip], other_grad[segment] = x[clip], grad[segment]
        results = forward_and_gradients(pool(geometry), (other, u), other_grad)
        assert torch.equal(results[0][segment], out[segment])
        assert torch.equal(results[1][clip], dx[clip])


STRIDES = {
    "transposed": lambda x: x.mT.contiguous().mT,
    "every-second-column": lambda x: x.repeat_interleave(2, -1)[..., ::2],
    "every-second-row": lambda x: x.repeat_interleave(2, 0)[::2],
}


@pytest.mark.parametrize("view", STRIDES.values(), ids=STRIDES)
def test_any_strides(view):
    geometry = GEOMETRIES["odd-sizes"]
    (x, u), grad = inputs_of(geometry)
    expected = forward_and_gradients(pool(geometry), (x, u), grad)
    actual = forward_and_gradients(pool(geometry), (view(x), view(u)), view(grad))
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("wanted", [(True, False), (False, True)], ids=["only-x", "only-u"])
def test_gradient_of_one_input(wanted):
    geometry = GEOMETRIES["odd-sizes"]
    inputs, grad = inputs_of(geometry)
    _, *expected = forward_and_gradients(pool(geometry), inputs, grad)
    inputs = [x.detach().requires_grad_(want) for x, want in zip(inputs, wanted, strict=True)]
    pool(geometry)(*inputs).backward(grad)
    for x, want, other in zip(inputs, wanted, expected, strict=True):
        assert torch.equal(x.grad, other) if want else x.grad is None


def test_gradcheck():
    geometry = Geometry.of([3, 0, 2, 2], TokenBudget(tokens=9, clips=5, max_length=3))
    x = torch.randn(9, 4, dtype=torch.float64, requires_grad=True)
    u = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(pool(geometry), [x, u])


def test_second_derivatives_are_refused():
    geometry = GEOMETRIES["odd-sizes"]
    inputs = [x.detach().requires_grad_() for x in inputs_of(geometry)[0]]
    grads = torch.autograd.grad(pool(geometry)(*inputs).square().sum(), inputs, create_graph=True)
    with pytest.raises(RuntimeError, match="differentia|derivative"):
        torch.autograd.grad(sum(grad.square().sum() for grad in grads), inputs)


@pytest.mark.parametrize("name", ["odd-sizes", "empty-in-middle", "budget"])
def test_opcheck(name):
    geometry = GEOMETRIES[name]
    (x, u), grad = inputs_of(geometry, torch.float32)
    table = tables(geometry.segments)
    _, lse = torch.ops.fastast.segment_pool(x, u, *table)
    for op, args in (
        ("segment_pool", [x.detach().requires_grad_(), u.detach().requires_grad_()]),
        ("segment_pool_backward", [grad, x, u, lse]),
    ):
        torch.library.opcheck(getattr(torch.ops.fastast, op).default, (*args, *table))


@every_geometry
def test_flops(geometry):
    inputs, grad = inputs_of(geometry)
    product = 2 * geometry.used * QUERIES * DIM  # the scores, or the weighted sum

    def count(backend, run):
        with FlopCounterMode(display=False) as counter:
            run(pool(geometry, backend=backend))
        return counter.get_total_flops()

    def forward(function):
        function(*inputs)

    def step(function):
        forward_and_gradients(function, inputs, grad)

    assert count("auto", forward) == count("reference", forward) == 2 * product
    # The backward computes the scores once more: five products to explicit pooling's four.
    assert count("auto", step) == 7 * product
    assert count("reference", step) == 6 * product


SEGMENTS = Segments.from_lengths([3, 5])
X, U = torch.zeros(8, 4), torch.zeros(2, 4)


@pytest.mark.parametrize(
    "x, u, message",
    [
        (X.long(), U, "x must be floating point, got torch.int64"),
        (X, U.long(), "u must be floating point, got torch.int64"),
        (X.to("meta"), U, r"x is on meta but segments are on cpu.*segments\.to"),
        (X, U.to("meta"), "u is on meta but x is on cpu"),
        (X[0], U, r"x must be \[rows, dim\].*got \(4,\)"),
        (X, U[0], r"u \[queries, dim\].*and \(4,\)"),
        (X, U[:, :3], r"with one dim, got \(8, 4\) and \(2, 3\)"),
        (X[:7], U, "x has 7 rows"),
    ],
    ids=["x-dtype", "u-dtype", "x-device", "u-device", "x-shape", "u-shape", "dim", "rows"],
)
def test_wrong_input_says_so(x, u, message):
    with pytest.raises(ValueError, match=message):
        segment_pool(x, u, SEGMENTS)


def test_wrong_backend_says_so():
    with pytest.raises(ValueError, match="backend must be one of .*got 'fast'"):
        segment_pool(X, U, SEGMENTS, backend="fast")
