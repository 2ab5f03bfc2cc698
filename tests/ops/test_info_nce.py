"""InfoNCE within segments against its specification, on every geometry."""

import sys

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from fastast import Segments, TokenBudget
from fastast.ops import info_nce
from tests.testing import (
    GEOMETRIES,
    Geometry,
    assert_as_accurate,
    forward_and_gradients,
    poisoned_memory,
)

module = sys.modules["fastast.ops.info_nce"]
DIM = 24
WITH_ROWS = {name: g for name, g in GEOMETRIES.items() if g.used}
every_geometry = pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES)


def inputs_of(geometry: Geometry, dtype=torch.float64, share=0.7):
    """Queries and keys, the rows that take part, and a gradient of the loss."""
    torch.manual_seed(0)
    q, k = torch.randn(2, geometry.rows, DIM, dtype=dtype).unbind()
    member = torch.rand(geometry.rows) < share
    member[geometry.used :] = False
    grad_dtype = torch.promote_types(dtype, torch.float32)
    return (q, k), member, torch.randn(geometry.rows, dtype=grad_dtype)


def loss_of(geometry: Geometry, member, **options):
    return lambda q, k: info_nce(q, k, geometry.segments, member, **options).loss


def tables(segments: Segments):
    return segments.offsets, segments.host_offsets, segments.tiles, segments.max_length


@every_geometry
@pytest.mark.parametrize("share", [0.0, 0.7, 1.0])
def test_equals_reference(geometry, share):
    inputs, member, grad = inputs_of(geometry, share=share)
    actual = forward_and_gradients(loss_of(geometry, member), inputs, grad)
    reference = loss_of(geometry, member, backend="reference")
    if member.any():
        expected = forward_and_gradients(reference, inputs, grad)
    else:
        expected = [reference(*inputs), *(torch.zeros_like(x) for x in inputs)]
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    found = info_nce(*inputs, geometry.segments, member)
    expected = info_nce(*inputs, geometry.segments, member, backend="reference")
    assert torch.equal(found.found_key, expected.found_key)
    assert torch.equal(found.found_query, expected.found_query)


@every_geometry
@pytest.mark.parametrize("share", [0.0, 0.7, 1.0])
def test_other_devices_read_their_own_tables_alone(geometry, share, monkeypatch):
    """Their kernels on a CPU, some segments at a time and without offsets of the host."""
    inputs, member, grad = inputs_of(geometry, share=share)
    offsets, host_offsets, tiles, max_length = table = tables(geometry.segments)
    loss, found = torch.ops.fastast.info_nce(*inputs, member, *table)
    gradients = torch.ops.fastast.info_nce_backward(grad, *inputs, member, *table)
    for x in (*inputs, grad):
        x[~member] = torch.nan
    monkeypatch.setattr(module, "SCORES", {"cpu": 2 * max_length**2})
    table = offsets, None, tiles, max_length
    with poisoned_memory():
        actual_loss, actual_found = module._info_nce(*inputs, member, *table)
        actual = module._info_nce_backward(grad, *inputs, member, *table)
    assert torch.equal(actual_found, found)
    for x, y in zip((actual_loss, *actual), (loss, *gradients), strict=True):
        assert x.is_contiguous()
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)


def test_blocks_of_any_size(monkeypatch):
    geometry = Geometry.of([6, 6, 6, 6, 6, 3])
    inputs, member, grad = inputs_of(geometry)
    whole = forward_and_gradients(loss_of(geometry, member), inputs, grad)
    monkeypatch.setattr(module, "SCORES", {"cpu": 80})  # two segments of six at a time
    parts = forward_and_gradients(loss_of(geometry, member), inputs, grad)
    torch.testing.assert_close(parts, whole, rtol=1e-12, atol=1e-12)


def test_a_perfect_match():
    geometry = GEOMETRIES["odd-sizes"]
    (q, _), member, _ = inputs_of(geometry, share=1.0)
    q = 100 * torch.nn.functional.normalize(q, dim=1)
    result = info_nce(q, q, geometry.segments, member)
    assert result.loss.max() < 1e-9
    assert result.found_key.all() and result.found_query.all()


def test_rows_alone_have_nothing_to_contrast():
    geometry = GEOMETRIES["single-rows"]
    inputs, member, grad = inputs_of(geometry, share=1.0)
    loss, *gradients = forward_and_gradients(loss_of(geometry, member), inputs, grad)
    assert (loss == 0).all() and all((x == 0).all() for x in gradients)


@pytest.mark.parametrize("geometry", WITH_ROWS.values(), ids=WITH_ROWS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_low_precision_is_as_accurate_as_eager(geometry, dtype):
    inputs, member, grad = inputs_of(geometry, dtype, share=1.0)
    member[geometry.used :] = False
    actual = forward_and_gradients(loss_of(geometry, member), inputs, grad)
    reference = loss_of(geometry, member, backend="reference")
    eager = forward_and_gradients(reference, inputs, grad)
    truth = forward_and_gradients(reference, [x.double() for x in inputs], grad.double())
    assert_as_accurate(actual, eager, truth)


def test_autocast_does_not_reach_the_scores():
    geometry = GEOMETRIES["odd-sizes"]
    inputs, member, _ = inputs_of(geometry, torch.float32)
    plain = loss_of(geometry, member)(*inputs)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(loss_of(geometry, member)(*inputs), plain)


@every_geometry
def test_what_takes_no_part_is_never_read(geometry):
    inputs, member, grad = inputs_of(geometry)
    expected = forward_and_gradients(loss_of(geometry, member), inputs, grad)
    for x in (*inputs, grad):
        x[~member] = torch.nan
    actual = forward_and_gradients(loss_of(geometry, member), inputs, grad)
    assert all(map(torch.equal, actual, expected))
    assert all((x[~member] == 0).all() for x in actual)


@every_geometry
def test_everything_is_written(geometry):
    inputs, member, grad = inputs_of(geometry)
    with poisoned_memory():
        results = forward_and_gradients(loss_of(geometry, member), inputs, grad)
    assert all(x.isfinite().all() for x in results)


def test_gradcheck():
    geometry = Geometry.of([3, 0, 2, 2], TokenBudget(tokens=9, clips=5, max_length=3))
    q, k = (torch.randn(9, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    member = torch.tensor([1, 0, 1, 1, 1, 1, 0, 0, 0], dtype=torch.bool)
    assert torch.autograd.gradcheck(loss_of(geometry, member), [q, k])


def test_second_derivatives_are_refused():
    geometry = GEOMETRIES["odd-sizes"]
    inputs, member, _ = inputs_of(geometry)
    inputs = [x.detach().requires_grad_() for x in inputs]
    loss = loss_of(geometry, member)(*inputs).square().sum()
    grads = torch.autograd.grad(loss, inputs, create_graph=True)
    with pytest.raises(RuntimeError, match="differentia|derivative"):
        torch.autograd.grad(sum(grad.square().sum() for grad in grads), inputs)


@pytest.mark.parametrize("name", ["odd-sizes", "empty-in-middle", "budget"])
def test_opcheck(name):
    geometry = GEOMETRIES[name]
    (q, k), member, grad = inputs_of(geometry, torch.float32)
    table = tables(geometry.segments)
    wanted = [x.detach().requires_grad_() for x in (q, k)]
    torch.library.opcheck(torch.ops.fastast.info_nce.default, (*wanted, member, *table))
    torch.library.opcheck(torch.ops.fastast.info_nce_backward.default, (grad, q, k, member, *table))


@every_geometry
def test_flops(geometry):
    inputs, member, grad = inputs_of(geometry, share=1.0)
    product = 2 * DIM * sum((clip.stop - clip.start) ** 2 for clip in geometry.clips)
    with FlopCounterMode(display=False) as counter:
        loss_of(geometry, member)(*inputs)
    assert counter.get_total_flops() == product
    with FlopCounterMode(display=False) as counter:
        forward_and_gradients(loss_of(geometry, member), inputs, grad)
    assert counter.get_total_flops() == 4 * product


SEGMENTS = Segments.from_lengths([3, 5])
X, MEMBER = torch.zeros(8, 4), torch.ones(8, dtype=torch.bool)


@pytest.mark.parametrize(
    "q, k, member, message",
    [
        (X.long(), X, MEMBER, "queries must be floating point, got torch.int64"),
        (X, X.long(), MEMBER, "keys must be floating point, got torch.int64"),
        (X, X[:, :3], MEMBER, r"of one shape, got \(8, 4\) and \(8, 3\)"),
        (X, X, MEMBER.long(), r"member must be torch.bool of shape \[8\]"),
        (X, X, MEMBER[:7], r"member must be .* got torch.bool of shape \[7\]"),
        (X, X.to("meta"), MEMBER, "keys is on meta but queries are on cpu"),
        (X.to("meta"), X, MEMBER, "queries is on meta but segments are on cpu"),
        (X[:7], X[:7], MEMBER[:7], "queries has 7 rows"),
    ],
)
def test_wrong_input_says_so(q, k, member, message):
    with pytest.raises(ValueError, match=message):
        info_nce(q, k, SEGMENTS, member)


def test_wrong_backend_says_so():
    with pytest.raises(ValueError, match="backend must be one of .*got 'fast'"):
        info_nce(X, X, SEGMENTS, MEMBER, backend="fast")
