"""The distillation kernels, interpreted on the CPU, against their specification in float64."""

import numpy as np
import pytest
import torch

from fastast.kernels import distillation as kernels
from fastast.kernels.distillation import DistillationConfig, distillation_config
from fastast.ops import distillation_cross_entropy
from tests.testing import assert_as_accurate, forward_and_gradients, poisoned_memory

TEMPS = (0.1, torch.tensor(0.07))
# Several rows at a time, of which the last program has fewer; one row; rows in several blocks.
CONFIGS = {
    "rows": DistillationConfig(block=64, rows=4, warps=1, programs=1),
    "row": DistillationConfig(block=64, rows=1, warps=1, programs=1),
    "blocks": DistillationConfig(block=16, rows=2, warps=1, programs=1),
}
SHAPES = {"odd": (41, 43), "full": (32, 64), "one-class": (5, 1)}
every_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
every_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


@pytest.fixture(autouse=True)
def interpreted(interpret):
    interpret(kernels)


def inputs_of(shape, dtype=torch.float32, scale=1.0):
    """Student, teacher, centre, and a gradient of the loss."""
    torch.manual_seed(0)
    student, teacher = (scale * torch.randn(shape) for _ in range(2))
    return (student.to(dtype), teacher.to(dtype), 0.1 * torch.randn(shape[1])), torch.randn(
        shape[0]
    )


def run(inputs, grad, config, programs=2):
    """Loss, gradient and log-sum-exps; what a kernel leaves unwritten is NaN."""
    launch = {"config": config, "programs": programs}
    with poisoned_memory():
        loss, lse = kernels.distillation_forward(*inputs, *TEMPS, **launch)
        dstudent = kernels.distillation_backward(grad, *inputs, *TEMPS, lse, **launch)
    return [loss, dstudent], lse


def specification(inputs, grad):
    student, teacher, center = inputs

    def loss(student):
        return distillation_cross_entropy(student, teacher, center, *TEMPS, backend="reference")

    return forward_and_gradients(loss, [student], grad)


def check(inputs, grad, config, programs=2):
    eager = specification(inputs, grad)
    truth = specification([x.double() for x in inputs], grad.double())
    assert_as_accurate(run(inputs, grad, config, programs)[0], eager, truth)


@every_shape
@every_config
@pytest.mark.parametrize("scale", [1.0, 1e4], ids=["usual", "huge"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_as_accurate_as_eager(shape, config, scale, dtype):
    check(*inputs_of(shape, dtype, scale), config)


@pytest.mark.parametrize("classes", [1, 7, 100, 1000, 1024, 2500])
def test_shipped_configurations(classes):
    check(*inputs_of((37, classes), torch.bfloat16), distillation_config(classes))


@pytest.mark.parametrize("classes", [1, 2, 33, 1024, 1025, 8192, 65536])
def test_configurations_fill_their_programs(classes):
    config = distillation_config(classes)
    assert config.block >= min(classes, kernels.MAX_BLOCK)
    assert config.block * config.rows == 1024 * config.warps


def test_more_classes_than_fit_on_chip(monkeypatch):
    """The configuration for them: several blocks."""
    monkeypatch.setattr(kernels, "MAX_BLOCK", 32)
    config = distillation_config(100)
    assert config.block == 32
    check(*inputs_of((37, 100), torch.bfloat16), config)


@every_config
@pytest.mark.parametrize("programs", [1, 3, 50])
def test_any_number_of_programs(config, programs):
    inputs, grad = inputs_of((11, 43), torch.bfloat16)
    expected, lse = run(inputs, grad, config, programs=2)
    found, lse_found = run(inputs, grad, config, programs)
    assert all(map(torch.equal, (*found, lse_found), (*expected, lse)))


@every_config
def test_log_sum_exps(config):
    (student, teacher, center), grad = inputs_of((11, 43))
    _, lse = run((student, teacher, center), grad, config)
    for x, temp, (largest, rest) in zip(
        (student, teacher - center), TEMPS, lse.unflatten(0, (2, 2)), strict=True
    ):
        assert torch.equal(largest, x.amax(1))
        torch.testing.assert_close(rest, ((x - x.amax(1, True)) / temp).logsumexp(1))


@every_config
def test_classes_without_weight(config):
    """A teacher's logits of minus infinity, whole blocks of them, the first one too."""
    inputs, grad = inputs_of((6, 43))
    inputs[1][:3, :20] = -torch.inf
    inputs[1][3:, 10:] = -torch.inf
    truth = specification([x.double() for x in inputs], grad.double())
    for found, true in zip(run(inputs, grad, config)[0], truth, strict=True):
        torch.testing.assert_close(found, true.float(), rtol=1e-4, atol=1e-5)


@every_config
def test_unused_rows_get_zeros_and_are_not_read(config):
    inputs, grad = inputs_of((11, 43), torch.bfloat16)
    grad[::3] = 0
    (_, expected), _ = run(inputs, grad, config)
    for x in inputs[:2]:
        x[::3] = torch.nan
    (_, dstudent), _ = run(inputs, grad, config)
    assert torch.equal(dstudent, expected)
    assert (dstudent[::3] == 0).all()


@every_config
def test_rows_are_independent(config):
    inputs, grad = inputs_of((11, 43))
    (loss, dstudent), _ = run(inputs, grad, config)
    others = [torch.full_like(x, 1e3) for x in inputs[:2]]
    for x, y in zip(others, inputs, strict=False):
        x[6] = y[6]
    (other_loss, other_dstudent), _ = run((*others, inputs[2]), grad, config)
    assert torch.equal(other_loss[6], loss[6])
    assert torch.equal(other_dstudent[6], dstudent[6])


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
    (student, teacher, center), grad = inputs_of((11, 43))
    expected, _ = run((student, teacher, center), grad, CONFIGS["rows"])
    inputs = view(student), teacher, center.repeat_interleave(2)[::2]
    found, _ = run(inputs, grad.repeat_interleave(2)[::2], CONFIGS["rows"])
    assert all(map(torch.equal, found, expected))
    found, _ = run((student, view(teacher), center), grad, CONFIGS["rows"])
    assert all(map(torch.equal, found, expected))


def test_one_gradient_for_all_rows():
    """As a sum's backward passes it: one number, expanded."""
    inputs, _ = inputs_of((11, 43))
    expected, _ = run(inputs, torch.ones(11), CONFIGS["rows"])
    found, _ = run(inputs, torch.ones(()).expand(11), CONFIGS["rows"])
    assert torch.equal(found[1], expected[1])


def test_mixed_precision():
    (student, teacher, center), grad = inputs_of((11, 43))
    inputs = student.bfloat16(), teacher, center.bfloat16()
    check(inputs, grad, CONFIGS["row"])


def test_no_rows():
    inputs, grad = inputs_of((0, 43))
    (loss, dstudent), lse = run(inputs, grad, CONFIGS["row"])
    assert loss.shape == (0,) and dstudent.shape == (0, 43) and lse.shape == (4, 0)


@every_config
def test_each_logit_is_read_once_each_way(config, monkeypatch):
    """The kernels' claim to speed; and in the backward, none of a row that is not used."""
    from triton.runtime.interpreter import InterpreterBuilder

    inputs, grad = inputs_of((11, 43))
    grad[4:6] = 0
    reads = []
    load = InterpreterBuilder.create_masked_load

    def counting_load(self, ptrs, mask, *rest):
        reads.append(ptrs.data[mask.data.astype(bool)].reshape(-1))
        return load(self, ptrs, mask, *rest)

    def count(x):
        places = np.concatenate(reads).astype(np.int64) - x.data_ptr()
        places = places[(places >= 0) & (places < x.nbytes)] // x.element_size()
        return np.bincount(places, minlength=x.numel()).reshape(x.shape)

    monkeypatch.setattr(InterpreterBuilder, "create_masked_load", counting_load)
    launch = {"config": config, "programs": 3}
    _, lse = kernels.distillation_forward(*inputs, *TEMPS, **launch)
    assert all((count(x) == 1).all() for x in inputs[:2])
    reads.clear()
    kernels.distillation_backward(grad, *inputs, *TEMPS, lse, **launch)
    used = (grad != 0)[:, None].numpy()
    assert all((count(x) == used).all() for x in inputs[:2])
