"""The pooling kernels, interpreted on the CPU, against their specification in float64."""

import numpy as np
import pytest
import torch

from fastast import TokenBudget
from fastast.kernels import segment_pool as kernels
from fastast.kernels.segment_pool import PoolConfig
from fastast.ops import segment_pool
from tests.testing import (
    GEOMETRIES,
    Geometry,
    assert_as_accurate,
    forward_and_gradients,
    over_draws,
    poisoned_memory,
)

QUERIES, DIM = 5, 40
SHAPES = {
    **GEOMETRIES,
    "one-long": Geometry.of([75], TokenBudget(80, 2, 75)),
    "cut-beside-empty": Geometry.of([0, 30, 0, 0, 33, 3, 0], TokenBudget(72, 8, 64)),
}
every_geometry = pytest.mark.parametrize("geometry", SHAPES.values(), ids=SHAPES)
some_geometries = pytest.mark.parametrize("name", ["odd-sizes", "one-long", "cut-beside-empty"])
# Two warps and 16 channels: 40 channels are two parts, the second with padding.
CONFIGS = {
    "on-chip": PoolConfig(warps=2, stages=1, programs=1, width=16),
    "from-cache": PoolConfig(warps=2, stages=1, programs=1, width=16, resident=False),
    "all-from-cache": PoolConfig(2, 1, programs=1, width=16, resident=False, sum_on_chip=False),
}
every_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


@pytest.fixture
def interpreted(interpret, monkeypatch):
    """Interpreted kernels with short shares, so that small segments are cut already."""
    interpret(kernels)
    monkeypatch.setattr(kernels, "MIN_SHARE", 8)
    monkeypatch.setattr(kernels, "PRECISION", "ieee")  # it knows no splitting, and needs none


pytestmark = pytest.mark.usefixtures("interpreted")


def inputs_of(geometry, dtype=torch.float32, queries=QUERIES, dim=DIM, seed=0):
    torch.manual_seed(seed)
    x = torch.randn(geometry.rows, dim)
    u = torch.randn(queries, dim) / dim**0.5
    grad = torch.randn(geometry.segments.num_segments, queries, dim)
    return (x.to(dtype), u.to(dtype)), grad.to(dtype)


def run(geometry, inputs, grad, config=CONFIGS["on-chip"], programs=3):
    """Output, gradients and log-sum-exp; what a kernel leaves unwritten is NaN."""
    launch = {"config": config, "programs": programs}
    offsets = geometry.segments.offsets
    with poisoned_memory():
        y, lse = kernels.segment_pool_forward(*inputs, offsets, **launch)
        grads = kernels.segment_pool_backward(grad, *inputs, y, lse, offsets, **launch)
    return [y, *grads], lse


def specification(geometry, inputs, grad):
    def pool(x, u):
        return segment_pool(x, u, geometry.segments, backend="reference")

    return forward_and_gradients(pool, inputs, grad)


def results(geometry, inputs, grad, config=CONFIGS["on-chip"], programs=3):
    """The kernels' results, plain ones in the same precision, exact ones."""
    eager = specification(geometry, inputs, grad)
    truth = specification(geometry, [x.double() for x in inputs], grad.double())
    return run(geometry, inputs, grad, config, programs)[0], eager, truth


def check(*args):
    assert_as_accurate(*results(*args))


@every_geometry
def test_as_accurate_as_eager(geometry):
    check(geometry, *inputs_of(geometry, torch.bfloat16))


@some_geometries
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_precisions(name, dtype):
    geometry = SHAPES[name]
    found = over_draws(lambda seed: results(geometry, *inputs_of(geometry, dtype, seed=seed)), 8)
    assert_as_accurate(*found)


@every_config
@pytest.mark.parametrize("queries, dim", [(1, 7), (16, 32), (12, 96)])
def test_sizes(queries, dim, config):
    geometry = SHAPES["cut-beside-empty"]
    check(geometry, *inputs_of(geometry, torch.bfloat16, queries, dim), config)


def test_float32_queries_of_a_bfloat16_stream():
    """As the module calls it. The gradient comes in the queries' own precision."""
    geometry = GEOMETRIES["odd-sizes"]
    (x, u), grad = inputs_of(geometry, torch.bfloat16)
    (_, queries), _ = inputs_of(geometry)
    y, dx, du = run(geometry, (x, queries), grad)[0]
    assert du.dtype == torch.float32
    eager = specification(geometry, (x, u), grad)
    truth = specification(geometry, (x.double(), queries.double()), grad.double())
    assert_as_accurate([y, dx, du.bfloat16()], eager, truth)


@pytest.mark.parametrize("programs", [1, 2, 3, 12])
@pytest.mark.parametrize("name", ["long-among-short", "cut-beside-empty"])
def test_any_number_of_programs(name, programs):
    """However the rows are shared out, and wherever segments are cut."""
    geometry = SHAPES[name]
    inputs, grad = inputs_of(geometry)
    found, _ = run(geometry, inputs, grad, programs=programs)
    truth = specification(geometry, [x.double() for x in inputs], grad.double())
    for value, true in zip(found, truth, strict=True):
        torch.testing.assert_close(value, true.float(), rtol=1e-4, atol=1e-5)


@some_geometries
def test_log_sum_exp(name):
    geometry = SHAPES[name]
    (x, u), grad = inputs_of(geometry)
    lse = run(geometry, (x, u), grad)[1]
    expected = [(x[clip] @ u.T).logsumexp(0) for clip in geometry.clips]  # -inf where empty
    torch.testing.assert_close(lse, torch.stack(expected))


@every_config
def test_large_scores_do_not_overflow(config):
    geometry = SHAPES["cut-beside-empty"]
    (x, u), grad = inputs_of(geometry)
    # All the weight on one row of each segment.
    y, dx, du = run(geometry, (x, 1e4 * u), grad, config)[0]
    for row, clip in zip(y, geometry.clips, strict=True):
        if clip.stop > clip.start:
            torch.testing.assert_close(row, x[clip][(x[clip] @ u.T).argmax(0)])
    assert dx.isfinite().all() and du.isfinite().all()


@every_config
@pytest.mark.parametrize("name", ["budget", "cut-beside-empty"])
def test_dead_rows_are_never_read(name, config):
    geometry = SHAPES[name]
    (x, u), grad = inputs_of(geometry)
    expected = run(geometry, (x, u), grad, config)[0]
    x[geometry.used :] = torch.nan
    grad[geometry.segments.lengths == 0] = torch.nan
    found = run(geometry, (x, u), grad, config)[0]
    assert all(map(torch.equal, found, expected))
    assert (found[1][geometry.used :] == 0).all()
    assert (found[0][geometry.segments.lengths == 0] == 0).all()


def test_all_rows_dead():
    geometry = SHAPES["budget-unused"]
    inputs, grad = inputs_of(geometry)
    found, lse = run(geometry, inputs, grad)
    assert all((value == 0).all() for value in found)
    assert (lse == -torch.inf).all()


def test_independent_of_the_neighbours():
    geometry = SHAPES["cut-beside-empty"]
    (x, u), grad = inputs_of(geometry)
    y, dx, _ = run(geometry, (x, u), grad)[0]
    for segment in (1, 4, 5):
        clip = geometry.clips[segment]
        other, other_grad = torch.full_like(x, 1e3), torch.randn_like(grad)
        other[clip], other_grad[segment] = x[clip], grad[segment]
        found = run(geometry, (other, u), other_grad)[0]
        assert torch.equal(found[0][segment], y[segment])
        assert torch.equal(found[1][clip], dx[clip])


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x.mT.contiguous().mT,
        lambda x: x.repeat_interleave(2, -1)[..., ::2],
        lambda x: x.repeat_interleave(2, 0)[::2],
    ],
    ids=["transposed", "every-second-column", "every-second-row"],
)
def test_any_strides(view):
    geometry = GEOMETRIES["odd-sizes"]
    (x, u), grad = inputs_of(geometry)
    expected = run(geometry, (x, u), grad)[0]
    found = run(geometry, (view(x), view(u)), view(grad))[0]
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("programs", [1, 4])
@pytest.mark.parametrize("name", ["odd-sizes", "cut-beside-empty"])
def test_each_row_is_read_once_each_way(name, programs, monkeypatch):
    """The kernels' claim to speed: no row of the stream is loaded twice."""
    from triton.runtime.interpreter import InterpreterBuilder

    geometry = SHAPES[name]
    inputs, grad = inputs_of(geometry)
    expected = np.zeros(inputs[0].shape)
    expected[: geometry.used] = 1
    reads = []
    load = InterpreterBuilder.create_masked_load

    def counting_load(self, ptrs, mask, *rest):
        reads.append(ptrs.data[mask.data.astype(bool)].reshape(-1))
        return load(self, ptrs, mask, *rest)

    def count(x, function, *args):
        reads.clear()
        begin = x.data_ptr()
        function(*args, config=CONFIGS["on-chip"], programs=programs)
        places = (np.concatenate(reads).astype(np.int64) - begin) // x.element_size()
        places = places[(places >= 0) & (places < x.numel())]
        return np.bincount(places, minlength=x.numel()).reshape(x.shape)

    monkeypatch.setattr(InterpreterBuilder, "create_masked_load", counting_load)
    offsets = geometry.segments.offsets
    y, lse = kernels.segment_pool_forward(*inputs, offsets, config=CONFIGS["on-chip"])
    forward = count(inputs[0], kernels.segment_pool_forward, *inputs, offsets)
    backward = count(inputs[0], kernels.segment_pool_backward, grad, *inputs, y, lse, offsets)
    assert (forward == expected).all()
    assert (backward == expected).all()
