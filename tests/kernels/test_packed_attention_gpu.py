"""The attention kernels on a GPU: the same results, one compilation, captured graphs."""

import pytest
import torch

from fastast import Segments, TokenBudget
from fastast.ops import packed_attention, packed_attention_qkv
from tests.testing import GEOMETRIES, Geometry, assert_as_accurate, forward_and_gradients

pytestmark = pytest.mark.gpu

HEADS = 3
SHAPES = {
    **GEOMETRIES,
    "micro": Geometry.of([16] * 40, TokenBudget(700, 48, 16)),
    "hundred": Geometry.of([100, 128, 65] * 5),
    "two-odd-tiles": Geometry.of([129, 65], TokenBudget(200, 4, 129)),
    "long": Geometry.of([1214, 300, 600, 1, 0, 512]),
}
every_geometry = pytest.mark.parametrize("geometry", SHAPES.values(), ids=SHAPES)
BUDGETS = {
    "micro": TokenBudget(512, 64, 16),
    "small": TokenBudget(1024, 32, 128),
    "tiled": TokenBudget(2048, 16, 600),
}
every_budget = pytest.mark.parametrize("budget", BUDGETS.values(), ids=BUDGETS)


def ragged_batch(budget, seed):
    """Lengths that fit a budget, different for every seed."""
    generator = torch.Generator().manual_seed(seed)
    lengths, room = [], budget.tokens
    while len(lengths) < budget.clips - 1:
        length = int(torch.randint(0, budget.max_length + 1, (), generator=generator))
        if length > room:
            break
        lengths.append(length)
        room -= length
    return lengths


def step(qkv, segments, grad):
    out = packed_attention_qkv(qkv, segments)
    return out, *torch.autograd.grad(out, qkv, grad)


def check(geometry, dtype, head_dim):
    segments = geometry.segments.to("cuda")
    torch.manual_seed(0)
    *inputs, grad = torch.randn(4, geometry.rows, HEADS, head_dim, device="cuda").to(dtype)

    def attention(backend):
        return lambda q, k, v: packed_attention(q, k, v, segments, backend=backend)

    actual = forward_and_gradients(attention("auto"), inputs, grad)
    eager = forward_and_gradients(attention("reference"), inputs, grad)
    exact = [x.double() for x in inputs]
    truth = forward_and_gradients(attention("reference"), exact, grad.double())
    assert_as_accurate(actual, eager, truth)
    again = forward_and_gradients(attention("auto"), inputs, grad)
    assert all(map(torch.equal, actual, again))
    qkv = torch.stack(inputs, 1).requires_grad_()
    out, dqkv = step(qkv, segments, grad)
    assert all(map(torch.equal, [out, *dqkv.unbind(1)], actual))


@every_geometry
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_as_accurate_as_eager(geometry, dtype):
    check(geometry, dtype, 64)


@pytest.mark.parametrize("head_dim", [16, 20, 24, 32, 80, 128])
@pytest.mark.parametrize("name", ["odd-sizes", "micro", "hundred", "long"])
def test_head_sizes(name, head_dim):
    check(SHAPES[name], torch.bfloat16, head_dim)


@every_budget
def test_one_compilation_for_ragged_batches(budget):
    from fastast.kernels.packed_attention import tiled, whole

    kernels = (
        tiled.forward,
        tiled.backward_queries,
        tiled.backward_keys,
        whole.forward,
        whole.backward,
        whole.backward_walk,
    )

    def compiled():
        return [sum(len(cache[0]) for cache in k.device_caches.values()) for k in kernels]

    counts = []
    for seed in range(20):
        lengths = ragged_batch(budget, seed)
        # Without a budget, sizes of tables and streams differ from batch to batch.
        exact = Segments.from_lengths([*lengths, budget.max_length])
        for segments, rows in (
            (Segments.from_lengths(lengths, budget), budget.tokens),
            (exact, sum(lengths) + budget.max_length),
        ):
            qkv = torch.randn(rows, 3, HEADS, 64, device="cuda", dtype=torch.bfloat16)
            out = packed_attention_qkv(qkv.requires_grad_(), segments.to("cuda"))
            out.sum().backward()
        counts.append(compiled())
    assert sum(counts[0]) > 0
    assert all(count == counts[0] for count in counts)


@every_budget
def test_a_captured_graph_serves_other_batches(budget):
    def tables(seed):
        return Segments.from_lengths(ragged_batch(budget, seed), budget)

    def inputs(seed):
        torch.manual_seed(seed)
        qkv, grad = torch.randn(2, budget.tokens, 3, HEADS, 64, device="cuda").bfloat16()
        return qkv, grad[:, 0].contiguous()

    segments = tables(0).to("cuda")
    qkv, grad = inputs(0)
    qkv.requires_grad_()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step(qkv, segments, grad)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(qkv, segments, grad)
    for seed in range(1, 6):
        other, (new_qkv, new_grad) = tables(seed).to("cuda"), inputs(seed)
        segments.offsets.copy_(other.offsets)
        segments.tiles.copy_(other.tiles)
        with torch.no_grad():
            qkv.copy_(new_qkv)
        grad.copy_(new_grad)
        graph.replay()
        expected = step(new_qkv.requires_grad_(), other, new_grad)
        assert all(map(torch.equal, captured, expected))


@every_budget
def test_never_waits(budget):
    segments = Segments.from_lengths(ragged_batch(budget, 0), budget).to("cuda")
    qkv = torch.randn(budget.tokens, 3, HEADS, 64, device="cuda", dtype=torch.bfloat16)
    grad = torch.randn(budget.tokens, HEADS, 64, device="cuda", dtype=torch.bfloat16)
    step(qkv.requires_grad_(), segments, grad)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(qkv, segments, grad)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("length, count", [(16, 40), (100, 6), (300, 2)])
def test_offsets_past_two_to_the_31(length, count):
    geometry = Geometry.of([length] * count)
    near = torch.randn(geometry.rows, 3, HEADS, 64, device="cuda").bfloat16()
    memory = torch.empty(geometry.rows, 2**22, device="cuda", dtype=torch.bfloat16)
    assert memory.numel() > 2**31
    far = memory[:, : near[0].numel()].unflatten(1, near.shape[1:]).copy_(near)
    grad, segments = torch.randn_like(near[:, 0]), geometry.segments.to("cuda")
    expected = step(near.requires_grad_(), segments, grad)
    found = step(far.requires_grad_(), segments, grad)
    assert all(map(torch.equal, found, expected))
