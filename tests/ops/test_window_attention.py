"""Attention within windows against its specification and against Swin's own way."""

import itertools
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from fastast.ops import WindowBudget, WindowGrids, window_attention
from tests.testing import assert_as_accurate, forward_and_gradients, poisoned_memory

HEADS, DIM = 3, 8


class Windows(NamedTuple):
    """Grids of clips, cut into windows, and the rows of their stream, dead ones included."""

    sizes: list[tuple[int, int]]
    grids: WindowGrids
    rows: int

    @classmethod
    def of(cls, sizes, window, shift=0, budget=None):
        grids = WindowGrids.from_sizes(sizes, window, shift, budget)
        used = sum(height * width for height, width in sizes)
        return cls(sizes, grids, budget.tokens if budget else used)

    @property
    def used(self):
        return int(self.grids.host_windows[-1, 0])

    @property
    def clips(self):
        """The rows of each clip."""
        ends = list(itertools.accumulate(height * width for height, width in self.sizes))
        return [slice(*ends) for ends in zip([0, *ends[:-1]], ends, strict=True)]


RAGGED = [(5, 11), (8, 8), (1, 1), (0, 3), (9, 4), (2, 17)]
CASES = {
    "whole-windows": Windows.of([(8, 16), (16, 8)], 8),
    "shifted": Windows.of([(16, 16)], 8, 4),
    "shifted-in-height": Windows.of([(16, 8)], 4, (2, 0)),
    "ragged": Windows.of(RAGGED, 4),
    "ragged-shifted": Windows.of(RAGGED, 4, 2),
    "odd-window": Windows.of(RAGGED, 7, (3, 5)),
    "single-patches": Windows.of([(1, 1)] * 3, 4, 2),
    "window-of-one": Windows.of([(3, 2), (1, 4)], 1),
    "empty-clips": Windows.of([(0, 4), (6, 5), (4, 0)], 4, 2),
    "all-empty": Windows.of([(0, 4)], 4),
    "budget": Windows.of(RAGGED, 4, 2, WindowBudget(300, 50)),
    "budget-full": Windows.of([(8, 8)], 4, 0, WindowBudget(64, 4)),
    "budget-unused": Windows.of([], 4, 2, WindowBudget(10, 3)),
}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
WITH_DEAD_ROWS = {name: case for name, case in CASES.items() if case.rows > case.used}
every_score = pytest.mark.parametrize("scores", ["scaled", "cosine"])


def inputs_of(case, scores="scaled", dtype=torch.float64, heads=HEADS):
    """qkv, the bias table and, for cosines, the logit scale; and a gradient of the output.

    Parameters have at least float32, as in training under autocast.
    """
    torch.manual_seed(0)
    qkv = torch.randn(case.rows, 3, heads, DIM).to(dtype)
    parameters = [torch.randn(heads, case.grids.num_offsets)]
    if scores == "cosine":
        parameters.append(torch.rand(heads) * 9 + 1)
    wide = torch.promote_types(dtype, torch.float32)
    grad = torch.randn(case.rows, heads, DIM).to(dtype)
    return [qkv, *(x.to(wide) for x in parameters)], grad


def attention(case, **options):
    return lambda qkv, table, logit_scale=None: window_attention(
        qkv, table, case.grids, logit_scale=logit_scale, **options
    )


@every_case
@every_score
def test_equals_reference(case, scores):
    inputs, grad = inputs_of(case, scores)
    actual = forward_and_gradients(attention(case), inputs, grad)
    expected = forward_and_gradients(attention(case, backend="reference"), inputs, grad)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    assert actual[0].is_contiguous()


def swin_attention(qkv, table, height, width, window, shift, logit_scale=None):
    """Swin's: roll, partition, attend with bias and a mask of -100, undo both.

    ``qkv [clips * height * width, 3, heads, dim]``. The mask is made of the regions of the rolled
    grid that came together from different places. In double precision e**-100 is below rounding.
    """
    heads, dim = qkv.shape[2:]
    shifts = (-shift[0], -shift[1])

    def partition(x):
        x = x.unflatten(1, (height // window, window)).unflatten(3, (width // window, window))
        return x.transpose(2, 3).flatten(3, 4).flatten(0, 2)

    grid = qkv.view(-1, height, width, 3, heads, dim).roll(shifts, (1, 2))
    q, k, v = partition(grid).permute(2, 0, 3, 1, 4)
    region = torch.zeros(1, height, width)
    for index, (y, x) in enumerate(itertools.product(range(3), repeat=2)):
        edges = [
            [0, size - window, size - by if by else size, size]
            for size, by in zip((height, width), shift, strict=True)
        ]
        region[:, edges[0][y] : edges[0][y + 1], edges[1][x] : edges[1][x + 1]] = index
    region = partition(region)
    mask = -100.0 * (region[:, :, None] != region[:, None]).to(qkv.dtype)

    y, x = torch.meshgrid(torch.arange(window), torch.arange(window), indexing="ij")
    dy, dx = (axis.flatten()[:, None] - axis.flatten() + window - 1 for axis in (y, x))
    scores = q @ k.mT * dim**-0.5
    if logit_scale is not None:
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        scores = q @ k.mT * logit_scale[:, None, None]
    scores = scores + table[:, (2 * window - 1) * dy + dx]
    scores = scores.unflatten(0, (-1, len(mask))) + mask[:, None]
    out = (scores.flatten(0, 1).softmax(-1) @ v).transpose(1, 2)
    out = out.unflatten(1, (window, window))
    out = out.unflatten(0, (-1, height // window, width // window)).transpose(2, 3)
    out = out.flatten(3, 4).flatten(1, 2)
    return out.roll(shift, (1, 2)).flatten(0, 2)


@every_score
@pytest.mark.parametrize(
    "height, width, window, shift",
    [(16, 24, 8, (0, 0)), (16, 24, 8, (4, 4)), (32, 8, 4, (2, 0)), (8, 12, 4, (1, 3))],
    ids=str,
)
def test_equals_swins_roll_and_mask(height, width, window, shift, scores):
    case = Windows.of([(height, width)] * 2, window, shift)
    inputs, grad = inputs_of(case, scores)

    def swin(*inputs):
        qkv, table, *rest = inputs
        return swin_attention(qkv, table, height, width, window, shift, *rest)

    actual = forward_and_gradients(attention(case), inputs, grad)
    expected = forward_and_gradients(swin, inputs, grad)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@every_score
@pytest.mark.parametrize("name", ["ragged", "ragged-shifted", "odd-window"])
def test_ragged_clips_equal_one_at_a_time(name, scores):
    case = CASES[name]
    shift = {"ragged": 0, "ragged-shifted": 2, "odd-window": (3, 5)}[name]
    (qkv, *parameters), grad = inputs_of(case, scores)
    out, dqkv, *totals = forward_and_gradients(attention(case), [qkv, *parameters], grad)
    sums = [torch.zeros_like(total) for total in totals]
    for size, clip in zip(case.sizes, case.clips, strict=True):
        alone = Windows.of([size], case.grids.window, shift)
        inputs = [qkv[clip], *parameters]
        part, dpart, *shares = forward_and_gradients(attention(alone), inputs, grad[clip])
        torch.testing.assert_close([out[clip], dqkv[clip]], [part, dpart], rtol=0, atol=1e-12)
        sums = [total + share for total, share in zip(sums, shares, strict=True)]
    torch.testing.assert_close(totals, sums, rtol=1e-12, atol=1e-12)


@every_case
@every_score
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_low_precision_is_as_accurate_as_eager(case, scores, dtype):
    # The gradient of the logit scale is a number per head: enough of them for a mean.
    inputs, grad = inputs_of(case, scores, dtype, heads=24)
    reference = attention(case, backend="reference")
    eager = forward_and_gradients(reference, inputs, grad)
    truth = forward_and_gradients(reference, [x.double() for x in inputs], grad.double())
    assert_as_accurate(forward_and_gradients(attention(case), inputs, grad), eager, truth)


@every_score
def test_one_low_precision_throughout(scores):
    case = CASES["ragged-shifted"]
    inputs, grad = inputs_of(case, scores, heads=24)
    inputs, grad = [x.bfloat16() for x in inputs], grad.bfloat16()
    actual = forward_and_gradients(attention(case), inputs, grad)
    assert {x.dtype for x in actual} == {torch.bfloat16}
    reference = attention(case, backend="reference")
    eager = forward_and_gradients(reference, inputs, grad)
    truth = forward_and_gradients(reference, [x.double() for x in inputs], grad.double())
    assert_as_accurate(actual, eager, truth)


def test_scale():
    case = CASES["ragged"]
    (qkv, table), _ = inputs_of(case)
    default, scaled = (attention(case, scale=s)(qkv, table) for s in (None, 2.0))
    assert torch.equal(default, attention(case, scale=DIM**-0.5)(qkv, table))
    qkv[:, 0] *= 2 * DIM**0.5
    torch.testing.assert_close(attention(case)(qkv, table), scaled, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("case", WITH_DEAD_ROWS.values(), ids=WITH_DEAD_ROWS)
@every_score
def test_dead_rows_are_never_read(case, scores):
    inputs, grad = inputs_of(case, scores)
    expected = forward_and_gradients(attention(case), inputs, grad)
    for x in (inputs[0], grad):
        x[case.used :] = torch.nan
    actual = forward_and_gradients(attention(case), inputs, grad)
    assert all(map(torch.equal, actual, expected))
    assert all((x[case.used :] == 0).all() for x in actual[:2])


@every_case
@every_score
def test_everything_is_written(case, scores):
    inputs, grad = inputs_of(case, scores)
    with poisoned_memory():
        values = forward_and_gradients(attention(case), inputs, grad)
    assert all(value.isfinite().all() for value in values)


@every_case
@every_score
def test_deterministic(case, scores):
    inputs, grad = inputs_of(case, scores, torch.float32)
    first = forward_and_gradients(attention(case), inputs, grad)
    second = forward_and_gradients(attention(case), inputs, grad)
    assert all(map(torch.equal, first, second))


@pytest.mark.parametrize("name", ["ragged", "ragged-shifted", "odd-window"])
def test_independent_of_the_neighbours(name):
    case = CASES[name]
    inputs, grad = inputs_of(case)
    expected = forward_and_gradients(attention(case), inputs, grad)
    for clip in case.clips:
        qkv, new_grad = torch.full_like(inputs[0], torch.nan), torch.full_like(grad, torch.nan)
        qkv[clip], new_grad[clip] = inputs[0][clip], grad[clip]
        actual = forward_and_gradients(attention(case), [qkv, *inputs[1:]], new_grad)
        for value, other in zip(actual[:2], expected, strict=False):
            torch.testing.assert_close(value[clip], other[clip], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("order", list(itertools.permutations(range(4)))[1:], ids=str)
def test_any_strides(order):
    case = CASES["ragged-shifted"]
    (qkv, table), grad = inputs_of(case)
    expected = forward_and_gradients(attention(case), [qkv, table], grad)
    back = torch.tensor(order).argsort().tolist()
    qkv = qkv.permute(order).contiguous().permute(back)
    table, grad = table.t().contiguous().t(), grad.transpose(0, 2).contiguous().transpose(0, 2)
    actual = forward_and_gradients(attention(case), [qkv, table], grad)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def test_broadcast_gradient():
    case = CASES["ragged-shifted"]
    inputs, grad = inputs_of(case)
    one = grad.new_ones(())
    expected = forward_and_gradients(attention(case), inputs, torch.ones_like(grad))
    actual = forward_and_gradients(attention(case), inputs, one.expand_as(grad))
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("wanted", list(itertools.product([True, False], repeat=3))[:-1], ids=str)
def test_gradients_of_some_inputs(wanted):
    case = CASES["ragged-shifted"]
    inputs, grad = inputs_of(case, "cosine")
    _, *expected = forward_and_gradients(attention(case), inputs, grad)
    inputs = [x.detach().requires_grad_(want) for x, want in zip(inputs, wanted, strict=True)]
    attention(case)(*inputs).backward(grad)
    for x, want, other in zip(inputs, wanted, expected, strict=True):
        assert torch.equal(x.grad, other) if want else x.grad is None


@every_score
def test_queries_and_keys_of_zero_length(scores):
    """They have no direction: cosines and their gradients are zero."""
    case = CASES["whole-windows"]
    inputs, grad = inputs_of(case, scores)
    inputs[0][::3, 0] = 0
    inputs[0][::5, 1] = 0
    actual = forward_and_gradients(attention(case), inputs, grad)
    expected = forward_and_gradients(attention(case, backend="reference"), inputs, grad)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    if scores == "cosine":
        assert (actual[1][::3, 0] == 0).all() and (actual[1][::5, 1] == 0).all()


@every_score
def test_gradcheck(scores):
    case = Windows.of([(3, 4), (0, 1), (1, 2)], 2, 1, WindowBudget(16, 12))
    inputs, _ = inputs_of(case, scores)
    inputs[0] = inputs[0][:, :, :2, :3]
    inputs = [inputs[0], *(x[:2] for x in inputs[1:])]
    inputs = [x.clone().requires_grad_() for x in inputs]
    assert torch.autograd.gradcheck(attention(case), inputs)


def test_second_derivatives_are_refused():
    case = CASES["ragged"]
    inputs = [x.requires_grad_() for x in inputs_of(case)[0]]
    out = attention(case)(*inputs)
    grads = torch.autograd.grad(out.square().sum(), inputs, create_graph=True)
    with pytest.raises(RuntimeError, match="differentia|derivative"):
        torch.autograd.grad(sum(grad.square().sum() for grad in grads), inputs)


@pytest.mark.parametrize("name", ["ragged-shifted", "empty-clips", "budget"])
@every_score
def test_opcheck(name, scores):
    case = CASES[name]
    (qkv, *parameters), grad = inputs_of(case, scores, torch.float32)
    table, logit_scale = (*parameters, None)[:2]
    grids = case.grids
    geometry = (grids.windows, grids.host_windows, grids.window, 0.3)
    ops = torch.ops.fastast
    inputs = [x if x is None else x.detach() for x in (qkv, table, logit_scale)]
    torch.library.opcheck(ops.window_attention_backward.default, (grad, *inputs, *geometry))
    inputs = [x if x is None else x.requires_grad_() for x in inputs]
    torch.library.opcheck(ops.window_attention.default, (*inputs, *geometry))


@every_case
def test_flops(case):
    inputs, grad = inputs_of(case)
    squares = sum((h * w) ** 2 for _, _, h, w in case.grids.windows.tolist())

    def count(backend, run):
        with FlopCounterMode(display=False) as counter:
            run(attention(case, backend=backend))
        return counter.get_total_flops()

    def forward(function):
        function(*inputs)

    def step(function):
        forward_and_gradients(function, inputs, grad)

    assert count("auto", forward) == count("reference", forward) == 4 * HEADS * DIM * squares
    # The backward computes the scores once more: five matmuls to explicit attention's four.
    assert count("auto", step) == 14 * HEADS * DIM * squares
    assert count("reference", step) == 12 * HEADS * DIM * squares


GRIDS = WindowGrids.from_sizes([(2, 4)], 2)
QKV, TABLE, LOGIT = torch.zeros(8, 3, 2, 4), torch.zeros(2, 9), torch.ones(2)


@pytest.mark.parametrize(
    "qkv, table, options, message",
    [
        (QKV[:, 0], TABLE, {}, r"qkv must be \[rows, 3, heads, head_dim\], got \(8, 2, 4\)"),
        (QKV[:, :2], TABLE, {}, r"qkv must be .*got \(8, 2, 2, 4\)"),
        (QKV.long(), TABLE, {}, "qkv must be floating point, got torch.int64"),
        (QKV.to("meta"), TABLE.to("meta"), {}, r"qkv is on meta but grids.*grids\.to"),
        (QKV[:7], TABLE, {}, "qkv has 7 rows but the clips of its grids have 8"),
        (QKV, TABLE.t(), {}, r"bias_table must be \[2, 9\] on cpu .*windows of 2, got \[9, 2\]"),
        (QKV, TABLE.to("meta"), {}, "bias_table must be .* on meta"),
        (QKV, TABLE.long(), {}, "bias_table must be floating point"),
        (QKV, TABLE, {"logit_scale": LOGIT[:1]}, r"logit_scale must be \[2\].* got \[1\]"),
        (QKV, TABLE, {"logit_scale": LOGIT, "scale": 1.0}, "give one"),
        (QKV, TABLE, {"backend": "fast"}, "backend must be one of .*got 'fast'"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_wrong_input_says_so(qkv, table, options, message):
    with pytest.raises(ValueError, match=message):
        window_attention(qkv, table, GRIDS, **options)
