"""Distillation cross-entropy against its specification."""

import math

import pytest
import torch
import torch.nn.functional as F

from fastast.ops import distillation, distillation_cross_entropy
from tests.testing import assert_as_accurate, forward_and_gradients, poisoned_memory

TEMPS = {"student_temp": 0.1, "teacher_temp": 0.07}
SHAPES = {
    "asit-token": (37, 1024),
    "odd": (23, 1000),
    "wide": (40, 8192),
    "one-class": (5, 1),
    "one-row": (1, 17),
    "no-rows": (0, 12),
}
every_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """So that a few rows are several chunks, the last one shorter."""
    monkeypatch.setattr(distillation, "CHUNK", {"cpu": 3000})


def inputs_of(shape, dtype=torch.float64, scale=1.0):
    """Student, teacher, centre, and a gradient of the loss."""
    torch.manual_seed(0)
    student, teacher = (scale * torch.randn(shape, dtype=torch.float64) for _ in range(2))
    center = 0.1 * torch.randn(shape[1], dtype=torch.float64)
    grad = torch.randn(shape[0], dtype=torch.float64)
    dtype_of_loss = torch.promote_types(dtype, torch.float32)
    return (student.to(dtype), teacher.to(dtype), center.to(dtype_of_loss)), grad.to(dtype_of_loss)


def run(inputs, grad, **options):
    """The loss and the student's gradient."""
    student, teacher, center = inputs

    def loss(student):
        return distillation_cross_entropy(student, teacher, center, **TEMPS, **options)

    return forward_and_gradients(loss, [student], grad)


@every_shape
def test_equals_reference(shape):
    inputs, grad = inputs_of(shape)
    actual = run(inputs, grad)
    expected = run(inputs, grad, backend="reference")
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-11)


def test_equals_pytorch():
    (student, teacher, center), _ = inputs_of((7, 40))
    loss = distillation_cross_entropy(student, teacher, center, 0.1, 0.07)
    target = F.softmax((teacher - center) / 0.07, 1)
    torch.testing.assert_close(loss, F.cross_entropy(student / 0.1, target, reduction="none"))


@every_shape
@pytest.mark.parametrize("scale", [1.0, 1e4], ids=["usual", "huge"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_low_precision_is_as_accurate_as_eager(shape, scale, dtype):
    inputs, grad = inputs_of(shape, dtype, scale)
    eager = run(inputs, grad, backend="reference")
    truth = run([x.double() for x in inputs], grad.double(), backend="reference")
    assert_as_accurate(run(inputs, grad), eager, truth)


def test_teacher_of_another_precision():
    (student, teacher, center), grad = inputs_of((11, 100), torch.float32)
    inputs = student.bfloat16(), teacher, center
    loss, dstudent = run(inputs, grad)
    assert loss.dtype == torch.float32 and dstudent.dtype == torch.bfloat16
    eager = run(inputs, grad, backend="reference")
    truth = run([x.double() for x in inputs], grad.double(), backend="reference")
    assert_as_accurate((loss, dstudent), eager, truth)


@every_shape
def test_log_sum_exps(shape):
    (student, teacher, center), _ = inputs_of(shape)
    temp = torch.tensor(0.07, dtype=torch.float64)
    op = torch.ops.fastast.distillation_cross_entropy
    lse = op(student.requires_grad_(), teacher, center, 0.1, temp)[1]
    assert not lse.requires_grad
    expected = [(student / 0.1).logsumexp(1), ((teacher - center) / 0.07).logsumexp(1)]
    found = torch.stack([lse[0] / 0.1 + lse[1], lse[2] / 0.07 + lse[3]])
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-12, atol=1e-12)


def test_a_perfect_student_learns_nothing():
    """Its loss is the teacher's entropy, its gradient zero."""
    (student, *_), grad = inputs_of((9, 50))
    teacher, center = 0.5 * student, student.new_zeros(50)
    loss = distillation_cross_entropy(student.requires_grad_(), teacher, center, 0.2, 0.1)
    p = (teacher / 0.1).softmax(1)
    torch.testing.assert_close(loss, -(p * p.log()).sum(1))
    (dstudent,) = torch.autograd.grad(loss, student, grad)
    torch.testing.assert_close(dstudent, torch.zeros_like(student), rtol=0, atol=1e-14)


def test_classes_without_weight():
    """A teacher's logits of minus infinity."""
    (student, teacher, center), grad = inputs_of((9, 50))
    teacher[:, 30:] = -torch.inf
    loss, dstudent = run((student, teacher, center), grad)
    target = ((teacher - center) / 0.07).softmax(1)
    torch.testing.assert_close(loss, -(target * (student / 0.1).log_softmax(1)).sum(1))
    assert dstudent.isfinite().all()


def test_unused_rows_get_zeros_whatever_they_hold():
    inputs, grad = inputs_of((12, 700), torch.float32)
    grad[::3] = 0
    _, expected = run(inputs, grad)
    for x in inputs[:2]:
        x[::3] = torch.nan
    _, dstudent = run(inputs, grad)
    assert torch.equal(dstudent, expected)
    assert (dstudent[::3] == 0).all()


@every_shape
def test_everything_is_written(shape):
    inputs, grad = inputs_of(shape, torch.float32)
    with poisoned_memory():
        assert all(x.isfinite().all() for x in run(inputs, grad))


def test_rows_are_independent():
    inputs, grad = inputs_of((20, 300), torch.float32)
    others, other_grad = inputs_of((20, 300), torch.float32, scale=5.0)
    expected = run(inputs, grad)
    for x, y in zip((*others[:2], other_grad), (*inputs[:2], grad), strict=True):
        x[3] = y[3]
    found = run((*others[:2], inputs[2]), other_grad)
    assert all(torch.equal(x[3], y[3]) for x, y in zip(found, expected, strict=True))


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
    (student, teacher, center), grad = inputs_of((20, 300))
    expected = run((student, teacher, center), grad)
    actual = run((view(student), view(teacher), center), grad)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def test_only_the_student_learns():
    inputs, grad = inputs_of((5, 12))
    student, teacher, center = (x.requires_grad_() for x in inputs)
    for backend in ("auto", "reference"):
        loss = distillation_cross_entropy(student, teacher, center, **TEMPS, backend=backend)
        grads = torch.autograd.grad(loss, inputs, grad, allow_unused=True)
        assert grads[0] is not None and grads[1] is None and grads[2] is None


def test_temperature_as_a_tensor():
    """A schedule's: one compiled graph serves all its values."""
    (student, teacher, center), _ = inputs_of((5, 12), torch.float32)
    compiled = torch.compile(distillation_cross_entropy, fullgraph=True, backend="aot_eager")
    for index, temp in enumerate((0.04, 0.05, 0.07)):
        with torch._dynamo.config.patch(error_on_recompile=index > 0):
            loss = compiled(student, teacher, center, 0.1, torch.tensor(temp))
        expected = distillation_cross_entropy(student, teacher, center, 0.1, temp)
        torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)


def test_peak_memory_is_the_gradient_and_a_chunk(monkeypatch):
    """No copy of the logits, forward or backward: what is allocated beyond the results."""
    monkeypatch.setattr(distillation, "CHUNK", {"cpu": 2**12})
    inputs, grad = inputs_of((512, 256), torch.float32)
    logits = inputs[0].nbytes

    def peak(**options):
        with torch.profiler.profile(profile_memory=True) as profiler:
            run(inputs, grad, **options)
        held, most = 0, 0
        for event in profiler.profiler.kineto_results.events():
            if event.name() == "[memory]":
                held += event.nbytes()
                most = max(most, held)
        return most

    assert peak() < 1.25 * logits
    assert peak(backend="reference") > 2.5 * logits


def test_gradcheck():
    (student, teacher, center), _ = inputs_of((4, 6))

    def loss(student):
        return distillation_cross_entropy(student, teacher, center, 0.5, 0.3)

    assert torch.autograd.gradcheck(loss, [student.requires_grad_()])


def test_second_derivatives_are_refused():
    (student, teacher, center), _ = inputs_of((4, 6))
    loss = distillation_cross_entropy(student.requires_grad_(), teacher, center, **TEMPS)
    (grad,) = torch.autograd.grad(loss.square().sum(), student, create_graph=True)
    with pytest.raises(RuntimeError, match="differentia|derivative"):
        torch.autograd.grad(grad.square().sum(), student)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(5, 12), (0, 12)], ids=str)
def test_opcheck(shape, dtype):
    (student, teacher, center), grad = inputs_of(shape, dtype)
    temp = torch.tensor(0.07)
    inputs = (student.requires_grad_(), teacher, center, 0.1, temp)
    lse = torch.ops.fastast.distillation_cross_entropy(*inputs)[1]
    forward = torch.ops.fastast.distillation_cross_entropy.default
    torch.library.opcheck(forward, inputs)
    backward = torch.ops.fastast.distillation_cross_entropy_backward.default
    torch.library.opcheck(backward, (grad, student.detach(), *inputs[1:], lse.detach()))


def test_no_class_has_any_loss_alone():
    loss, dstudent = run(*inputs_of((5, 1)))
    assert (loss == 0).all() and (dstudent == 0).all()


def test_uniform_distributions():
    zeros = torch.zeros(3, 1000)
    loss = distillation_cross_entropy(zeros, zeros, zeros[0], 0.1, 0.07)
    torch.testing.assert_close(loss, torch.full((3,), math.log(1000)))


X, C = torch.zeros(3, 4), torch.zeros(4)


@pytest.mark.parametrize(
    "student, teacher, center, temps, message",
    [
        (X, X[:2], C, (0.1, 0.1), r"student and teacher must be \[rows, classes\].*\(2, 4\)"),
        (X[0], X[0], C, (0.1, 0.1), r"must be \[rows, classes\]"),
        (X, X, X[:1], (0.1, 0.1), r"center \[classes\].*\(1, 4\)"),
        (X[:, :0], X[:, :0], C[:0], (0.1, 0.1), "student has no classes"),
        (X.long(), X, C, (0.1, 0.1), "student must be floating point, got torch.int64"),
        (X, X, C.long(), (0.1, 0.1), "center must be floating point, got torch.int64"),
        (X, X.to("meta"), C, (0.1, 0.1), "teacher is on meta but student is on cpu"),
        (X, X, C, (0.0, 0.1), "student_temp must be positive, got 0.0"),
        (X, X, C, (0.1, -1.0), "teacher_temp must be positive, got -1.0"),
        (X, X, C, (0.1, C), "teacher_temp must be a number or a tensor without dimensions"),
    ],
)
def test_wrong_input_says_so(student, teacher, center, temps, message):
    with pytest.raises(ValueError, match=message):
        distillation_cross_entropy(student, teacher, center, *temps)


def test_wrong_backend_says_so():
    with pytest.raises(ValueError, match="backend must be one of .*got 'fast'"):
        distillation_cross_entropy(X, X, C, 0.1, 0.1, backend="fast")
