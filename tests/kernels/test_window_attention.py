"""The window kernels, interpreted on the CPU, against their specification in float64."""

import importlib
import inspect

import pytest
import torch

from fastast.kernels import window_attention as kernels
from fastast.kernels.packed_attention import _rows, whole
from fastast.kernels.window_attention import kernels as source
from fastast.kernels.window_attention import launch
from fastast.ops import WindowBudget, window_attention
from tests.ops.test_window_attention import CASES, RAGGED, Windows
from tests.testing import assert_as_accurate, forward_and_gradients, poisoned_memory

HEADS, SCALE = 2, 0.3
SHAPES = {
    **CASES,
    "sixteen-to-a-block": Windows.of([(5, 5), (3, 8), (0, 1), (1, 1)], 2, 1),
    "clipped-in-both": Windows.of([(13, 11)], 8, (4, 3)),
    "many-clips": Windows.of([(3, 3), (8, 4)] * 4, 4, 2, WindowBudget(180, 40)),
}
every_case = pytest.mark.parametrize("case", SHAPES.values(), ids=SHAPES)
some_cases = pytest.mark.parametrize("name", ["ragged-shifted", "budget", "odd-window"])
every_score = pytest.mark.parametrize("scores", ["scaled", "cosine"])


@pytest.fixture(autouse=True)
def interpreted(interpret):
    for module in (_rows, whole, source):
        interpret(module)


def inputs_of(case, scores, dtype=torch.float32, head_dim=24, heads=HEADS):
    torch.manual_seed(0)
    qkv = torch.randn(case.rows, 3, heads, head_dim).to(dtype)
    grad = torch.randn(case.rows, heads, head_dim).to(dtype)
    table = torch.randn(heads, case.grids.num_offsets)
    logit_scale = [torch.rand(heads) * 9 + 1] if scores == "cosine" else []
    return [qkv, table, *logit_scale], grad


def run(case, inputs, grad, scale=SCALE):
    """Output and gradients; what a kernel leaves unwritten is NaN."""
    inputs = (*inputs, None)[:3]
    table = (case.grids.windows, case.grids.window, scale)
    with poisoned_memory():
        out = kernels.forward(*inputs, *table)
        grads = kernels.backward(grad, *inputs, *table)
    return [out, *(grads if inputs[2] is not None else grads[:2])]


def specification(case, inputs, grad, scale=SCALE):
    def attention(qkv, table, logit_scale=None):
        by = {"scale": scale} if logit_scale is None else {"logit_scale": logit_scale}
        return window_attention(qkv, table, case.grids, **by, backend="reference")

    return forward_and_gradients(attention, inputs, grad)


def check(case, inputs, grad):
    eager = specification(case, inputs, grad)
    truth = specification(case, [x.double() for x in inputs], grad.double())
    actual = run(case, inputs, grad)
    if len(actual) == 4:
        # The gradient of the logit scale is a number per head, whose error is a draw from a
        # distribution that many heads would be needed to compare; see the test of its own.
        actual, eager, truth = actual[:3], eager[:3], truth[:3]
    assert_as_accurate(actual, eager, truth)


@every_case
@every_score
def test_as_accurate_as_eager(case, scores):
    check(case, *inputs_of(case, scores, torch.bfloat16))


@some_cases
@every_score
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_other_precisions(name, scores, dtype):
    check(SHAPES[name], *inputs_of(SHAPES[name], scores, dtype))


@every_score
@pytest.mark.parametrize("head_dim", [3, 16, 20, 32])
def test_head_sizes(head_dim, scores):
    case = SHAPES["ragged-shifted"]
    check(case, *inputs_of(case, scores, torch.bfloat16, head_dim))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradient_of_the_logit_scale(dtype):
    case = SHAPES["empty-clips"]
    inputs, grad = inputs_of(case, "cosine", dtype, heads=24)
    eager = specification(case, inputs, grad)[3]
    truth = specification(case, [x.double() for x in inputs], grad.double())[3]
    assert_as_accurate([run(case, inputs, grad)[3]], [eager], [truth])


@every_score
@pytest.mark.parametrize("multiprocessors", [1, 3, 50])
def test_shares_of_the_windows(scores, multiprocessors, monkeypatch):
    """One program with all windows, several with unequal shares, more programs than shares."""
    monkeypatch.setattr(launch, "_device", lambda device: (90, multiprocessors))
    check(SHAPES["many-clips"], *inputs_of(SHAPES["many-clips"], scores))


def test_more_programs_than_windows_clear_dead_rows(monkeypatch):
    monkeypatch.setattr(launch, "_device", lambda device: (90, 50))
    case = Windows.of([(2, 3)], 4, 0, WindowBudget(200, 9))
    out, dqkv, dbias = run(case, *inputs_of(case, "scaled"))
    assert (out[6:] == 0).all() and (dqkv[6:] == 0).all() and dbias.isfinite().all()


@every_score
def test_scores_far_from_zero(scores):
    """About -900, cosines -100: an absent key, at 0, would outweigh the others by e**100."""
    case = SHAPES["ragged-shifted"]
    (qkv, table, *logit_scale), grad = inputs_of(case, scores)
    offset = 11 if scores == "scaled" else 2
    qkv[:, :2] = 0.1 * qkv[:, :2] + torch.tensor([offset, -offset])[:, None, None]
    check(case, [qkv, table, *(100 * torch.ones_like(x) for x in logit_scale)], grad)


@every_score
def test_dead_rows_are_never_read(scores):
    case = SHAPES["budget"]
    inputs, grad = inputs_of(case, scores)
    expected = run(case, inputs, grad)
    for x in (inputs[0], grad):
        x[case.used :] = torch.nan
    actual = run(case, inputs, grad)
    assert all(map(torch.equal, actual, expected))
    assert all((x[case.used :] == 0).all() for x in actual[:2])


@every_score
def test_rows_beyond_the_budget_are_cleared(scores):
    case = Windows.of(RAGGED, 4, 2)
    longer = Windows(case.sizes, case.grids, case.rows + 77)
    inputs, grad = inputs_of(longer, scores)
    shorter = [inputs[0][: case.rows], *inputs[1:]]
    expected = run(case, shorter, grad[: case.rows])
    actual = run(longer, inputs, grad)
    for value, other in zip(actual[:2], expected, strict=False):
        assert torch.equal(value[: case.rows], other)
        assert (value[case.rows :] == 0).all()
    assert all(map(torch.equal, actual[2:], expected[2:]))


@every_score
@pytest.mark.parametrize("name", ["ragged-shifted", "odd-window"])
def test_independent_of_the_neighbours(name, scores):
    """Also of those in the same block, and of what is not finite; gradients of finite ones."""
    case = SHAPES[name]
    inputs, grad = inputs_of(case, scores)
    expected = run(case, inputs, grad)
    clip = case.clips[4]
    for value, gradients in ((100.0, True), (torch.nan, False), (torch.inf, False)):
        qkv, other_grad = torch.full_like(inputs[0], value), torch.full_like(grad, value)
        qkv[clip], other_grad[clip] = inputs[0][clip], grad[clip]
        actual = run(case, [qkv, *inputs[1:]], other_grad)
        for found, other in zip(actual[: 2 if gradients else 1], expected, strict=False):
            assert torch.equal(found[clip], other[clip])
    # What is not finite stays visible in its own windows.
    qkv[clip] = torch.inf
    assert not run(case, [qkv, *inputs[1:]], grad)[0][clip].isfinite().any()


@every_score
def test_vectors_of_zero_length(scores):
    case = SHAPES["whole-windows"]
    (qkv, *parameters), grad = inputs_of(case, scores)
    qkv[::3, 0] = 0
    qkv[::5, 1] = 0
    check(case, [qkv, *parameters], grad)


STRIDES = {
    "heads-first": lambda x: x.transpose(0, -2).contiguous().transpose(0, -2),
    "unaligned": lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape),
    "every-second-row": lambda x: x.repeat_interleave(2, 0)[::2],
    "every-second-channel": lambda x: x.repeat_interleave(2, -1)[..., ::2],
    "five-channels-apart": lambda x: torch.nn.functional.pad(x, (0, 5))[..., :24],
}


@pytest.mark.parametrize("view", STRIDES.values(), ids=STRIDES)
def test_any_strides(view):
    case = SHAPES["ragged-shifted"]
    (qkv, table), grad = inputs_of(case, "scaled")
    expected = run(case, [qkv, table], grad)
    found = run(case, [view(qkv), table.t().contiguous().t()], view(grad))
    assert all(map(torch.equal, found, expected))


def test_a_broadcast_gradient():
    case = SHAPES["ragged-shifted"]
    inputs, grad = inputs_of(case, "scaled")
    expected = run(case, inputs, torch.ones_like(grad))
    assert all(map(torch.equal, run(case, inputs, grad.new_ones(()).expand_as(grad)), expected))


# The operators. Their functions for CUDA also take CPU tensors while kernels are interpreted.

ops = importlib.import_module("fastast.ops.window_attention")


@some_cases
@every_score
def test_operators(name, scores):
    case = SHAPES[name]
    inputs, grad = inputs_of(case, scores)
    expected = run(case, inputs, grad)
    inputs = (*inputs, None)[:3]
    geometry = (case.grids.windows, case.grids.host_windows, case.grids.window, SCALE)
    out = ops._window_attention_cuda(*inputs, *geometry)
    dqkv, dbias, dlogit = ops._window_attention_backward_cuda(grad, *inputs, *geometry)
    assert all(map(torch.equal, [out, dqkv, dbias, dlogit], [*expected, dlogit][:4]))
    assert dqkv.is_contiguous() and dbias.is_contiguous()
    assert dlogit.shape == (HEADS if scores == "cosine" else 0,)


@pytest.mark.parametrize(
    "dtype, head_dim, window",
    [(torch.float64, 24, 4), (torch.bfloat16, 40, 4), (torch.bfloat16, 24, 9)],
    ids=["float64", "head-of-40", "window-of-9"],
)
def test_other_inputs_take_plain_pytorch(dtype, head_dim, window, monkeypatch):
    case = Windows.of(RAGGED, window, 2)
    inputs, grad = inputs_of(case, "scaled", dtype, head_dim)
    monkeypatch.setattr(kernels, "forward", None)
    monkeypatch.setattr(kernels, "backward", None)
    assert not kernels.supports(*inputs, None, window)
    geometry = (None, case.grids.windows, case.grids.host_windows, window, SCALE)
    inputs[1] = inputs[1].to(torch.promote_types(dtype, torch.float32))
    out = ops._window_attention_cuda(*inputs, *geometry)
    dqkv, dbias, _ = ops._window_attention_backward_cuda(grad, *inputs, *geometry)
    eager = specification(case, inputs, grad)
    truth = specification(case, [x.double() for x in inputs], grad.double())
    if dtype == torch.float64:
        torch.testing.assert_close([out, dqkv, dbias], truth, rtol=1e-12, atol=1e-12)
    else:
        assert_as_accurate([out, dqkv, dbias], eager, truth)


@pytest.mark.parametrize("arch, window, taken", [(80, 8, False), (80, 5, True), (90, 8, True)])
def test_cosines_of_large_windows_need_shared_memory_operands(arch, window, taken, monkeypatch):
    monkeypatch.setattr(launch, "_device", lambda device: (arch, 1))
    (qkv, table, logit_scale), _ = inputs_of(SHAPES["ragged"], "cosine")
    assert kernels.supports(qkv, table, None, window)
    assert kernels.supports(qkv, table, logit_scale, window) == taken


def test_no_kernel_is_specialised_on_a_batch():
    """What varies between ragged batches is an integer; each is kept from specialisation."""
    for kernel in (source.forward, source.backward, source.fold_pairs):
        for name, parameter in inspect.signature(kernel.fn).parameters.items():
            constant = parameter.annotation is not inspect.Parameter.empty
            assert constant or name.startswith("p_") or name in {*source.VARYING, "scale"}
