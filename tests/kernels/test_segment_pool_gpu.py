"""The pooling kernels, compiled, through the public function."""

import pytest
import torch

from fastast import Segments, TokenBudget
from fastast.ops import segment_pool
from tests.testing import (
    GEOMETRIES,
    Geometry,
    assert_as_accurate,
    forward_and_gradients,
    over_draws,
)

pytestmark = pytest.mark.gpu

QUERIES = 12
SHAPES = {
    **GEOMETRIES,
    "many-short": Geometry.of([16, 0, 24, 17] * 200, TokenBudget(16384, 1000, 24)),
    "mixed": Geometry.of([1214, 3, 600, 0, 100, 512] * 4, TokenBudget(10000, 32, 1214)),
    "few-long": Geometry.of([5000, 9000]),
}


def inputs_of(geometry, dtype, dim, seed=0):
    torch.manual_seed(seed)
    x = torch.randn(geometry.rows, dim, device="cuda")
    u = torch.randn(QUERIES, dim, device="cuda") / dim**0.5
    grad = torch.randn(geometry.segments.num_segments, QUERIES, dim, device="cuda")
    return (x.to(dtype), u.to(dtype)), grad.to(dtype)


def pool(segments, **options):
    segments = segments.to("cuda")
    return lambda x, u: segment_pool(x, u, segments, **options)


@pytest.mark.parametrize("geometry", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("dim", [24, 192, 384, 768, 1024])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_as_accurate_as_eager(geometry, dim, dtype):
    from fastast.kernels.segment_pool import max_dim

    if dim > max_dim(90, dtype):
        pytest.skip("left to PyTorch's own operations")

    def results(seed):
        inputs, grad = inputs_of(geometry, dtype, dim, seed)
        inputs[0][geometry.used :] = torch.nan
        found = forward_and_gradients(pool(geometry.segments), inputs, grad)
        inputs[0][geometry.used :] = 0
        reference = pool(geometry.segments, backend="reference")
        eager = forward_and_gradients(reference, inputs, grad)
        truth = forward_and_gradients(reference, [x.double() for x in inputs], grad.double())
        return found, eager, truth

    assert_as_accurate(*over_draws(results, 8 if dtype == torch.float32 else 1))


def test_float32_queries_of_a_bfloat16_stream():
    geometry = SHAPES["mixed"]
    (x, u), grad = inputs_of(geometry, torch.bfloat16, 768)
    out, dx, du = forward_and_gradients(pool(geometry.segments), (x, u.float()), grad)
    assert du.dtype == torch.float32
    reference = pool(geometry.segments, backend="reference")
    eager = forward_and_gradients(reference, (x, u), grad)
    truth = forward_and_gradients(reference, (x.double(), u.double()), grad.double())
    assert_as_accurate([out, dx, du.bfloat16()], eager, truth)


def test_deterministic():
    geometry = SHAPES["mixed"]
    inputs, grad = inputs_of(geometry, torch.bfloat16, 768)
    function = pool(geometry.segments)
    first = forward_and_gradients(function, inputs, grad)
    for _ in range(10):
        again = forward_and_gradients(function, inputs, grad)
        assert all(map(torch.equal, first, again))


BUDGET = TokenBudget(4096, 64, 1214)


def batches(count):
    """Ragged batches of one budget."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(count):
        lengths, left = [], BUDGET.tokens
        while len(lengths) < BUDGET.clips:
            length = int(torch.randint(0, 300, (), generator=generator))
            if length > left:
                break
            lengths.append(length)
            left -= length
        yield Geometry.of(lengths, BUDGET)


def test_graph_replays_other_batches():
    first, *others = batches(6)
    (x, u), grad = inputs_of(first, torch.bfloat16, 768)
    segments = first.segments.to("cuda")
    x.requires_grad_()
    u.requires_grad_()

    def step():
        out = segment_pool(x, u, segments)
        return [out, *torch.autograd.grad(out, (x, u), grad)]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    for geometry in others:
        segments.offsets.copy_(geometry.segments.offsets)
        with torch.no_grad():
            x.normal_()
        graph.replay()
        expected = forward_and_gradients(pool(geometry.segments), (x, u), grad)
        assert all(map(torch.equal, results, expected))


def test_ragged_batches_compile_once_and_never_wait():
    """Neither the graph compiler nor Triton compiles again, and the host waits for nothing."""
    import triton

    torch._dynamo.reset()

    def loss(x, u, segments):
        return segment_pool(x, u, segments).float().square().sum()

    compiled = torch.compile(loss, fullgraph=True)
    prepared = [(*inputs_of(g, torch.bfloat16, 384)[0], g.segments.to("cuda")) for g in batches(50)]
    built = []
    for index, (x, u, segments) in enumerate(prepared):
        x.requires_grad_()
        u.requires_grad_()
        warm = index >= 2
        with triton.knobs.compilation.scope():
            triton.knobs.compilation.listener = lambda **event: built.append(event["src"].name)
            if warm:
                torch.cuda.set_sync_debug_mode("error")
                built.clear()
            try:
                with torch._dynamo.config.patch(error_on_recompile=warm):
                    compiled(x, u, segments).backward()
            finally:
                torch.cuda.set_sync_debug_mode("default")
        assert not (warm and built)


@pytest.mark.parametrize("count", [15, 16, 17, 1, 2])
def test_any_number_of_segments_is_one_kernel(count):
    """Numbers that a launcher would specialise on: one, and multiples of 16."""
    import triton

    warm, other = Geometry.of([40] * 7), Geometry.of([33] * count)
    for geometry in (warm, other):
        inputs, grad = inputs_of(geometry, torch.bfloat16, 192)
        built = []
        with triton.knobs.compilation.scope():
            triton.knobs.compilation.listener = lambda **event: built.append(event["src"].name)  # noqa: B023
            forward_and_gradients(pool(geometry.segments), inputs, grad)
    assert not [name for name in built if name.startswith("pool_")]


def test_more_elements_than_32_bits_count():
    rows, dim = 2**22, 1024
    if torch.cuda.mem_get_info()[0] < 4 * rows * dim * 2:
        pytest.skip("needs 32 GiB of GPU memory")
    geometry = Geometry.of([rows - 100, 100])
    x = torch.zeros(rows, dim, device="cuda", dtype=torch.bfloat16)
    x[-100:].normal_()
    u = torch.randn(QUERIES, dim, device="cuda", dtype=torch.bfloat16) / 32
    grad = torch.randn(2, QUERIES, dim, device="cuda", dtype=torch.bfloat16)
    out, dx, _ = forward_and_gradients(pool(geometry.segments), (x, u), grad)
    reference = pool(Segments.from_lengths([100]), backend="reference")
    last, last_grad = x[-100:].clone(), grad[1:]
    eager = forward_and_gradients(reference, (last, u), last_grad)[:2]
    truth = forward_and_gradients(reference, (last.double(), u.double()), last_grad.double())[:2]
    assert_as_accurate([out[1:], dx[-100:]], eager, truth)
