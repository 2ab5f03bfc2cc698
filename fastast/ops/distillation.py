r"""Cross-entropy between a teacher's and a student's distributions, one value per row.

For a row of student logits :math:`s`, teacher logits :math:`t`, the centre :math:`c` and the
temperatures :math:`\tau_s, \tau_t`, over :math:`K` classes :math:`k`,

.. math::
    p = \mathrm{softmax}\Big(\frac{t - c}{\tau_t}\Big), \qquad
    q = \mathrm{softmax}\Big(\frac{s}{\tau_s}\Big), \qquad
    \mathcal{L} = -\sum_k p_k \log q_k

This is the self-distillation loss of DINO (Caron et al., 2021, equations 2 and 4), for ASiT's class
token, and for each of its tokens (Atito et al., equations 3 to 5). With the row's largest values
:math:`m^s = \max_k s_k` and :math:`m^t = \max_k (t_k - c_k)`,

.. math::
    d_k = \frac{s_k - m^s}{\tau_s}, \quad \ell^s = \log \sum_k e^{d_k}, \qquad
    e_k = \frac{t_k - c_k - m^t}{\tau_t}, \quad \ell^t = \log \sum_k e^{e_k}, \qquad
    \mathcal{L} = \ell^s - \sum_k e^{e_k - \ell^t} d_k

Besides the inputs, the two log-sum-exps are all that the forward keeps, and the student's gradient
is all that the backward writes:

.. math::
    \frac{\partial \mathcal{L}}{\partial s_k} = \frac{1}{\tau_s}
    \left(e^{d_k - \ell^s} - e^{e_k - \ell^t}\right)

A log-sum-exp is kept as the pair :math:`(m, \ell)`. As one number, :math:`m / \tau + \ell`, its
rounding would be an error of all the row's probabilities: with logits of order one, seven times the
error of plain PyTorch's gradient; with logits of order 10,000, one per cent.

Teacher and centre get no gradient. A row whose loss is not used, because its gradient is zero, gets
a zero gradient whatever its logits hold: dead rows and rows that a mask leaves out.

Layouts: ``student, teacher [rows, K]``, ``center [K]``, ``loss [rows]``, ``lse [4, rows]``
(:math:`m^s, \ell^s, m^t, \ell^t`; natural logarithm). Sums are accumulated in float32 at least.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from fastast.ops._library import (
    ANY_DEVICE,
    LIBRARY,
    check_choice,
    once_differentiable,
    triton_kernels,
)

BACKENDS = ("auto", "reference")
LOG2_E = math.log2(math.e)


def distillation_cross_entropy(
    student: Tensor,
    teacher: Tensor,
    center: Tensor,
    student_temp: float,
    teacher_temp: float | Tensor,
    *,
    backend: str = "auto",
) -> Tensor:
    """Cross-entropy of the student's distribution under the centred, sharpened teacher's.

    Masks, weights and means are the caller's: ``(weight * loss).sum()`` or the like. Rows of no
    weight cost no reading of logits in the backward.

    Args:
        student: ``[rows, K]`` logits, floating point.
        teacher: ``[rows, K]`` logits; may be of another precision. Minus infinity is a class
            without weight.
        center: ``[K]``, subtracted from the teacher's logits; usually a running mean of them.
        student_temp: temperature, above 0. 0.1 in DINO and ASiT.
        teacher_temp: temperature, above 0; lower is sharper. If it follows a schedule in compiled
            or captured code, pass a tensor without dimensions, on the device.
        backend: ``"auto"`` or ``"reference"`` (explicit softmax, any dtype).

    Returns:
        ``[rows]``, float32 (float64 if an input is).

    Raises:
        ValueError: shapes, devices or dtypes that do not fit, or a temperature not above 0.
    """
    check_choice("backend", backend, BACKENDS)
    if student.ndim != 2 or student.shape != teacher.shape or center.shape != student.shape[1:]:
        raise ValueError(
            "student and teacher must be [rows, classes] and center [classes], got "
            f"{tuple(student.shape)}, {tuple(teacher.shape)} and {tuple(center.shape)}"
        )
    if student.shape[1] == 0:
        raise ValueError("student has no classes: softmax needs at least one")
    for name, x in (("student", student), ("teacher", teacher), ("center", center)):
        if not x.is_floating_point():
            raise ValueError(f"{name} must be floating point, got {x.dtype}")
        if x.device != student.device:
            raise ValueError(f"{name} is on {x.device} but student is on {student.device}")
    if not student_temp > 0:
        raise ValueError(f"student_temp must be positive, got {student_temp}")
    dtype = _compute_dtype(student, teacher, center)
    if isinstance(teacher_temp, Tensor):
        if teacher_temp.ndim != 0 or teacher_temp.device != student.device:
            raise ValueError(
                "teacher_temp must be a number or a tensor without dimensions on "
                f"{student.device}, got shape {tuple(teacher_temp.shape)} on {teacher_temp.device}"
            )
        teacher_temp = teacher_temp.to(dtype)
    elif not teacher_temp > 0:
        raise ValueError(f"teacher_temp must be positive, got {teacher_temp}")
    else:
        teacher_temp = torch.full((), teacher_temp, dtype=dtype, device=student.device)
    if backend == "reference":
        return distillation_cross_entropy_reference(
            student, teacher, center, student_temp, teacher_temp
        )
    return torch.ops.fastast.distillation_cross_entropy(
        student, teacher, center, student_temp, teacher_temp
    )[0]


def distillation_cross_entropy_reference(
    student: Tensor,
    teacher: Tensor,
    center: Tensor,
    student_temp: float,
    teacher_temp: float | Tensor,
) -> Tensor:
    """The specification: explicit softmax and logarithm, differentiable."""
    dtype = _compute_dtype(student, teacher, center)
    teacher, center = teacher.detach().to(dtype), center.detach().to(dtype)
    target = ((teacher - center) / teacher_temp).softmax(1)
    return -(target * F.log_softmax(student.to(dtype) / student_temp, 1)).sum(1)


# The operators --------------------------------------------------------------------------------

_INPUTS = "Tensor student, Tensor teacher, Tensor center, float student_temp, Tensor teacher_temp"
LIBRARY.define(f"distillation_cross_entropy({_INPUTS}) -> (Tensor loss, Tensor lse)")
LIBRARY.define(
    f"distillation_cross_entropy_backward(Tensor grad, {_INPUTS}, Tensor lse) -> Tensor dstudent"
)


def _compute_dtype(*inputs: Tensor) -> torch.dtype:
    wide = any(x.dtype == torch.float64 for x in inputs)
    return torch.float64 if wide else torch.float32


CHUNK = {"cpu": 2**18}
"""Numbers worked on at a time: on a CPU what stays in its caches and is worth the calls, elsewhere
enough for few launches."""


def _chunks(student: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Rows at a time, and two buffers for them."""
    num_rows, classes = student.shape
    size = max(1, CHUNK.get(student.device.type, 2**24) // classes)
    scratch = student.new_empty(2, min(size, num_rows), classes, dtype=dtype)
    for begin in range(0, num_rows, size):
        end = min(begin + size, num_rows)
        yield slice(begin, end), *scratch[:, : end - begin]


# On CPUs exp2 takes a quarter of the time of exp, so that exponents are to base 2 here as well.


@torch.library.impl(LIBRARY, "distillation_cross_entropy", ANY_DEVICE)
def _cross_entropy(student, teacher, center, student_temp, teacher_temp):
    dtype = _compute_dtype(student, teacher, center)
    student_rate, teacher_rate = LOG2_E / student_temp, LOG2_E / teacher_temp.to(dtype)
    center = center.to(dtype)
    lse = student.new_empty(4, student.shape[0], dtype=dtype)
    loss = torch.empty_like(lse[0])
    for rows, d, p in _chunks(student, dtype):
        torch.sub(teacher[rows], center, out=p)
        largest = p.amax(1, keepdim=True)
        total = p.sub_(largest).mul_(teacher_rate).exp2_().sum(1)
        lse[2, rows], lse[3, rows] = largest[:, 0], total.log()
        largest = student[rows].amax(1, keepdim=True).to(dtype)
        torch.sub(student[rows], largest, out=d).mul_(student_rate)
        mean = p.mul_(d).sum(1).div_(total * LOG2_E)
        lse[0, rows], lse[1, rows] = largest[:, 0], d.exp2_().sum(1).log_()
        torch.sub(lse[1, rows], mean, out=loss[rows])
    return loss, lse


@torch.library.impl(LIBRARY, "distillation_cross_entropy_backward", ANY_DEVICE)
def _cross_entropy_backward(grad, student, teacher, center, student_temp, teacher_temp, lse):
    dtype = lse.dtype
    student_rate, teacher_rate = LOG2_E / student_temp, LOG2_E / teacher_temp.to(dtype)
    center, lse = center.to(dtype), lse[..., None]
    grad = grad.to(dtype)[:, None] / student_temp
    student_weight, teacher_weight = (grad * (-x).exp() for x in (lse[1], lse[3]))
    dstudent = student.new_empty(student.shape)
    for rows, d, p in _chunks(student, dtype):
        torch.sub(teacher[rows], center, out=p)
        p.sub_(lse[2, rows]).mul_(teacher_rate).exp2_()
        torch.sub(student[rows], lse[0, rows], out=d)
        d.mul_(student_rate).exp2_().mul_(student_weight[rows])
        torch.addcmul(d, p, teacher_weight[rows], value=-1, out=dstudent[rows])
    unused = grad[:, 0] == 0
    if student.device.type == "cpu":  # there masked_fill_ takes as long as all the rest
        return dstudent.index_fill_(0, unused.nonzero()[:, 0], 0)
    return dstudent.masked_fill_(unused[:, None], 0)


# The implementation in Triton.


def _kernels_for(student: Tensor, teacher: Tensor, center: Tensor) -> ModuleType | None:
    kernels = triton_kernels("distillation")
    return kernels if kernels is not None and kernels.supports(student, teacher, center) else None


@torch.library.impl(LIBRARY, "distillation_cross_entropy", "CUDA")
def _cross_entropy_cuda(student, teacher, center, student_temp, teacher_temp):
    kernels = _kernels_for(student, teacher, center)
    if kernels is None:
        return _cross_entropy(student, teacher, center, student_temp, teacher_temp)
    with torch.cuda.device(student.device):
        return kernels.distillation_forward(student, teacher, center, student_temp, teacher_temp)


@torch.library.impl(LIBRARY, "distillation_cross_entropy_backward", "CUDA")
def _cross_entropy_backward_cuda(grad, student, teacher, center, student_temp, teacher_temp, lse):
    inputs = student, teacher, center, student_temp, teacher_temp, lse
    kernels = _kernels_for(student, teacher, center)
    if kernels is None:
        return _cross_entropy_backward(grad, *inputs)
    with torch.cuda.device(student.device):
        return kernels.distillation_backward(grad, *inputs)


@torch.library.register_fake("fastast::distillation_cross_entropy", lib=LIBRARY)
def _(student, teacher, center, student_temp, teacher_temp):
    rows, dtype = student.shape[0], _compute_dtype(student, teacher, center)
    return student.new_empty(rows, dtype=dtype), student.new_empty(4, rows, dtype=dtype)


@torch.library.register_fake("fastast::distillation_cross_entropy_backward", lib=LIBRARY)
def _(grad, student, teacher, center, student_temp, teacher_temp, lse):
    return student.new_empty(student.shape)


def _save(ctx, inputs, output):
    student, teacher, center, ctx.student_temp, teacher_temp = inputs
    _, lse = output
    ctx.save_for_backward(student, teacher, center, teacher_temp, lse)
    ctx.mark_non_differentiable(lse)


def _vjp(ctx, grad, _):
    student, teacher, center, teacher_temp, lse = ctx.saved_tensors
    dstudent = None
    if ctx.needs_input_grad[0]:
        dstudent = torch.ops.fastast.distillation_cross_entropy_backward(
            grad, student, teacher, center, ctx.student_temp, teacher_temp, lse
        )
    return dstudent, None, None, None, None


torch.library.register_autograd(
    "fastast::distillation_cross_entropy", _vjp, setup_context=_save, lib=LIBRARY
)
once_differentiable("fastast::distillation_cross_entropy_backward")

# No FLOP formula: the counter counts matrix products, of which there are none.
