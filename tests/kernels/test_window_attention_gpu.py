"""The window kernels on a GPU: the same results, one compilation, captured graphs."""

import pytest
import torch

from fastast.ops import WindowBudget, WindowGrids, window_attention
from tests.ops.test_window_attention import CASES, Windows
from tests.testing import assert_as_accurate, forward_and_gradients

pytestmark = pytest.mark.gpu

SHAPES = {
    **CASES,
    "hts-at": Windows.of([(64, 64), (32, 32)] * 2, 8, 4),
    "audio-mae": Windows.of([(64, 8)] * 4, 4, (2, 0)),
    "many-ragged": Windows.of([(8, 37), (16, 5), (0, 4), (21, 64)] * 6, 8, 4),
}
every_case = pytest.mark.parametrize("case", SHAPES.values(), ids=SHAPES)
every_score = pytest.mark.parametrize("scores", ["scaled", "cosine"])
every_window = pytest.mark.parametrize("window", [4, 8])
BUDGET = WindowBudget(tokens=1500, windows=250)
HEADS, DIM = 4, 24


def inputs_of(rows, offsets, scores, dtype=torch.bfloat16, head_dim=DIM, heads=HEADS, seed=0):
    torch.manual_seed(seed)
    qkv = torch.randn(rows, 3, heads, head_dim, device="cuda").to(dtype)
    grad = torch.randn(rows, heads, head_dim, device="cuda").to(dtype)
    table = torch.randn(heads, offsets, device="cuda")
    logit_scale = [torch.rand(heads, device="cuda") * 9 + 1] if scores == "cosine" else []
    return [qkv, table, *logit_scale], grad


def ragged_grids(window, seed, budget=BUDGET):
    """Sizes that fit the budget, different for every seed."""
    generator = torch.Generator().manual_seed(seed)
    clips = int(torch.randint(1, 9, (), generator=generator))
    sizes = torch.randint(0, 14, (clips, 2), generator=generator)
    return WindowGrids.from_sizes(sizes.numpy(), window, window // 2, budget)


def step(inputs, grids, grad):
    qkv, table, *rest = inputs
    out = window_attention(qkv, table, grids, logit_scale=rest[0] if rest else None)
    return out, *torch.autograd.grad(out, inputs, grad)


def check(case, scores, dtype, head_dim):
    grids = case.grids.to("cuda")
    # The gradient of the logit scale is a number per head: enough of them for a mean.
    heads = 24 if scores == "cosine" else 3
    offsets = case.grids.num_offsets
    inputs, grad = inputs_of(case.rows, offsets, scores, dtype, head_dim, heads)

    def attention(backend):
        return lambda qkv, table, logit_scale=None: window_attention(
            qkv, table, grids, logit_scale=logit_scale, backend=backend
        )

    actual = forward_and_gradients(attention("auto"), inputs, grad)
    eager = forward_and_gradients(attention("reference"), inputs, grad)
    exact = [x.double() for x in inputs]
    truth = forward_and_gradients(attention("reference"), exact, grad.double())
    assert_as_accurate(actual, eager, truth)
    again = forward_and_gradients(attention("auto"), inputs, grad)
    assert all(map(torch.equal, actual, again))


@every_case
@every_score
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_as_accurate_as_eager(case, scores, dtype):
    check(case, scores, dtype, DIM)


@every_score
@pytest.mark.parametrize("head_dim", [16, 20, 32])
@pytest.mark.parametrize("name", ["ragged-shifted", "many-ragged"])
def test_head_sizes(name, head_dim, scores):
    check(SHAPES[name], scores, torch.bfloat16, head_dim)


@every_window
@every_score
def test_one_compilation_for_ragged_batches(window, scores):
    from fastast.kernels.window_attention import kernels, supports

    (qkv, *parameters), _ = inputs_of(1, (2 * window - 1) ** 2, scores)
    if not supports(qkv, *(*parameters, None)[:2], window):
        pytest.skip("left to PyTorch on this architecture")

    def compiled():
        return [
            sum(len(cache[0]) for cache in kernel.device_caches.values())
            for kernel in (kernels.forward, kernels.backward, kernels.fold_pairs)
        ]

    counts = []
    for seed in range(20):
        # Without a budget, sizes of tables and streams differ from batch to batch.
        for budget in (BUDGET, None):
            grids = ragged_grids(window, seed, budget).to("cuda")
            rows = BUDGET.tokens if budget else max(1, int(grids.host_windows[-1, 0]))
            inputs, grad = inputs_of(rows, grids.num_offsets, scores)
            step([x.requires_grad_() for x in inputs], grids, grad)
        counts.append(compiled())
    assert min(counts[0]) > 0
    assert all(count == counts[0] for count in counts)


@every_window
@every_score
def test_a_captured_graph_serves_other_batches(window, scores):
    grids = ragged_grids(window, 0).to("cuda")
    inputs, grad = inputs_of(BUDGET.tokens, grids.num_offsets, scores)
    inputs = [x.requires_grad_() for x in inputs]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step(inputs, grids, grad)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(inputs, grids, grad)
    for seed in range(1, 6):
        other = ragged_grids(window, seed).to("cuda")
        new, new_grad = inputs_of(BUDGET.tokens, grids.num_offsets, scores, seed=seed)
        grids.windows.copy_(other.windows)
        with torch.no_grad():
            for x, value in zip(inputs, new, strict=True):
                x.copy_(value)
        grad.copy_(new_grad)
        graph.replay()
        expected = step([x.requires_grad_() for x in new], other, new_grad)
        assert all(map(torch.equal, captured, expected))


@every_window
@every_score
def test_never_waits(window, scores):
    grids = ragged_grids(window, 0).to("cuda")
    inputs, grad = inputs_of(BUDGET.tokens, grids.num_offsets, scores)
    inputs = [x.requires_grad_() for x in inputs]
    step(inputs, grids, grad)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(inputs, grids, grad)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@every_window
def test_offsets_past_two_to_the_31(window):
    grids = WindowGrids.from_sizes([(16, 16), (5, 40)], window, window // 2).to("cuda")
    inputs, grad = inputs_of(456, grids.num_offsets, "scaled")
    memory = torch.empty(456, 2**23, device="cuda", dtype=torch.bfloat16)
    assert memory.numel() > 2**31
    near = inputs[0]
    far = memory[:, : near[0].numel()].unflatten(1, near.shape[1:]).copy_(near)
    expected = step([x.requires_grad_() for x in inputs], grids, grad)
    found = step([far.requires_grad_(), inputs[1]], grids, grad)
    assert all(map(torch.equal, found, expected))
