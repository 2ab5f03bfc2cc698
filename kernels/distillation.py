r"""Distillation cross-entropy, forward and backward, reading each logit once each way.

For a row's logits :math:`s, t`, the centre :math:`c`, the temperatures and the row's largest values
:math:`m^s, m^t` (see ``fastast/ops/distillation.py``),

.. math::
    S = \sum_k e^{(s_k - m^s) / \tau_s} = e^{\ell^s}, \quad
    T = \sum_k e^{(t_k - c_k - m^t) / \tau_t} = e^{\ell^t}, \quad
    W = \sum_k e^{(t_k - c_k - m^t) / \tau_t} (s_k - m^s), \qquad
    \mathcal{L} = \log S - \frac{W}{T \tau_s}

*Forward.* Up to 8,192 classes both rows are on chip as a whole: each logit is read once, and what
leaves the chip is the loss and the two log-sum-exps. More classes come in blocks with the online
softmax: where the maxima grow by :math:`\Delta^s, \Delta^t`, what was summed becomes

.. math::
    S \leftarrow e^{-\Delta^s / \tau_s} S, \quad
    W \leftarrow e^{-\Delta^t / \tau_t} (W - \Delta^s T), \quad
    T \leftarrow e^{-\Delta^t / \tau_t} T

*Backward.* With :math:`m` and :math:`\ell` kept, :math:`ds_k = (e^{(s_k - m^s) / \tau_s - \ell^s}
- e^{(t_k - c_k - m^t) / \tau_t - \ell^t})\, g / \tau_s` needs no sum at all. A row with
:math:`g = 0` is written and not read.

This is memory traffic and nothing else: rows are dealt out to a fixed number of programs, each of
which keeps the centre in its registers. One warp serves 1,024 classes, 32 of them per thread, so
that up to there no sum crosses warps.

Names: ``b_`` blocks on chip, ``p_`` pointers, ``o_`` offsets, ``m_`` masks; blocks are
``[ROWS, BLOCK]``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastast.kernels.aot import AotCase

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
LOWEST = tl.constexpr(-1e30)  # a finite pivot: -inf - -inf is NaN


@triton.jit
def _load_classes(p_rows, o_class, m_row, K: tl.constexpr):
    """A block of logits in float32: minus infinity, which is no weight, where there are none."""
    mask = m_row[:, None] & (o_class < K)[None, :]
    b_x = tl.load(p_rows + o_class[None, :], mask=mask, other=float("-inf"))
    return b_x.to(tl.float32)


@triton.jit
def _load_center(p_center, o_class, K: tl.constexpr):
    return tl.load(p_center + o_class, mask=o_class < K, other=0.0).to(tl.float32)[None, :]


@triton.jit(do_not_specialize=["rows"])
def distillation_forward_kernel(
    p_student,  # [rows, K]
    p_teacher,  # [rows, K]
    p_center,  # [K]
    p_teacher_temp,  # float32 []
    p_loss,  # float32 [rows]
    p_lse,  # float32 [4, rows]
    student_stride,
    teacher_stride,
    student_temp,
    rows,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    student_rate = LOG2_E / student_temp
    teacher_rate = LOG2_E / tl.load(p_teacher_temp)
    o_block = tl.arange(0, BLOCK)
    b_center = _load_center(p_center, o_block, K)
    for row in range(tl.program_id(0) * ROWS, rows, tl.num_programs(0) * ROWS):
        o_row = row + tl.arange(0, ROWS).to(tl.int64)
        m_row = o_row < rows
        p_student_row = p_student + o_row[:, None] * student_stride
        p_teacher_row = p_teacher + o_row[:, None] * teacher_stride
        b_student_max = tl.full([ROWS], LOWEST, tl.float32)
        b_teacher_max = tl.full([ROWS], LOWEST, tl.float32)
        b_student_sum = tl.zeros([ROWS], tl.float32)
        b_teacher_sum = tl.zeros([ROWS], tl.float32)
        b_product = tl.zeros([ROWS], tl.float32)
        for block in range(0, K, BLOCK):
            o_class = block + o_block
            if BLOCK < K:
                b_center = _load_center(p_center, o_class, K)
            b_student = _load_classes(p_student_row, o_class, m_row, K)
            b_teacher = _load_classes(p_teacher_row, o_class, m_row, K) - b_center
            b_new = tl.maximum(b_student_max, tl.max(b_student, 1))
            b_growth = b_new - b_student_max
            b_student_max = b_new
            b_new = tl.maximum(b_teacher_max, tl.max(b_teacher, 1))
            b_rescale = tl.exp2((b_teacher_max - b_new) * teacher_rate)
            b_teacher_max = b_new
            b_d = b_student - b_student_max[:, None]
            b_q = tl.exp2(b_d * student_rate)
            b_p = tl.exp2((b_teacher - b_teacher_max[:, None]) * teacher_rate)
            b_weighted = tl.where((o_class < K)[None, :], b_p * b_d, 0.0)  # 0 x inf past the end
            b_student_sum = b_student_sum * tl.exp2(-b_growth * student_rate) + tl.sum(b_q, 1)
            b_product = (b_product - b_growth * b_teacher_sum) * b_rescale + tl.sum(b_weighted, 1)
            b_teacher_sum = b_teacher_sum * b_rescale + tl.sum(b_p, 1)

        b_student_lse = tl.log2(b_student_sum)
        b_loss = (b_student_lse - b_product / b_teacher_sum * student_rate) * LN_2
        tl.store(p_loss + o_row, b_loss, mask=m_row)
        p_lse_row = p_lse + o_row
        tl.store(p_lse_row, b_student_max, mask=m_row)
        tl.store(p_lse_row + rows, b_student_lse * LN_2, mask=m_row)
        tl.store(p_lse_row + 2 * rows, b_teacher_max, mask=m_row)
        tl.store(p_lse_row + 3 * rows, tl.log2(b_teacher_sum) * LN_2, mask=m_row)


@triton.jit(do_not_specialize=["grad_stride", "rows"])
def distillation_backward_kernel(
    p_grad,  # float32 [rows]
    p_student,  # [rows, K]
    p_teacher,  # [rows, K]
    p_center,  # [K]
    p_teacher_temp,  # float32 []
    p_lse,  # float32 [4, rows]
    p_dstudent,  # [rows, K]
    grad_stride,
    student_stride,
    teacher_stride,
    student_temp,
    rows,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    student_rate = LOG2_E / student_temp
    teacher_rate = LOG2_E / tl.load(p_teacher_temp)
    o_block = tl.arange(0, BLOCK)
    b_center = _load_center(p_center, o_block, K)
    for row in range(tl.program_id(0) * ROWS, rows, tl.num_programs(0) * ROWS):
        o_row = row + tl.arange(0, ROWS).to(tl.int64)
        m_row = o_row < rows
        b_grad = tl.load(p_grad + o_row * grad_stride, mask=m_row, other=0.0) / student_temp
        m_used = b_grad != 0
        p_lse_row = p_lse + o_row
        b_student_max = tl.load(p_lse_row, mask=m_used, other=0.0)
        b_student_lse = tl.load(p_lse_row + rows, mask=m_used, other=0.0) * LOG2_E
        b_teacher_max = tl.load(p_lse_row + 2 * rows, mask=m_used, other=0.0)
        b_teacher_lse = tl.load(p_lse_row + 3 * rows, mask=m_used, other=0.0) * LOG2_E
        p_student_row = p_student + o_row[:, None] * student_stride
        p_teacher_row = p_teacher + o_row[:, None] * teacher_stride
        for block in range(0, K, BLOCK):
            o_class = block + o_block
            if BLOCK < K:
                b_center = _load_center(p_center, o_class, K)
            b_student = _load_classes(p_student_row, o_class, m_used, K)
            b_teacher = _load_classes(p_teacher_row, o_class, m_used, K) - b_center
            b_d = (b_student - b_student_max[:, None]) * student_rate
            b_e = (b_teacher - b_teacher_max[:, None]) * teacher_rate
            b_q = tl.exp2(b_d - b_student_lse[:, None])
            b_p = tl.exp2(b_e - b_teacher_lse[:, None])
            b_dstudent = (b_q - b_p) * b_grad[:, None]
            p_out = p_dstudent + o_row[:, None] * K + o_class[None, :]
            mask = m_row[:, None] & (o_class < K)[None, :]
            tl.store(p_out, b_dstudent.to(p_dstudent.dtype.element_ty), mask=mask)


# Launches --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DistillationConfig:
    """How a kernel is launched.

    Attributes:
        block: classes on chip at a time, a power of two.
        rows: of a program at a time; several where one row would leave lanes idle.
        warps: of a program.
        programs: per multiprocessor: enough bytes on their way to hide the memory's latency, and
            few enough that all run at once.
    """

    block: int
    rows: int
    warps: int
    programs: int


MAX_BLOCK = 8192


def distillation_config(classes: int) -> DistillationConfig:
    """The launch for a number of classes: 1,024 numbers of each row or rows per warp."""
    block = min(triton.next_power_of_2(classes), MAX_BLOCK)
    warps = max(1, block // 1024)
    return DistillationConfig(block, max(1, 1024 // block), warps, max(1, 16 // warps))


def supports(student: Tensor, teacher: Tensor, center: Tensor) -> bool:
    """Whether the kernels take these inputs."""
    return all(x.dtype in TRITON_TYPES for x in (student, teacher, center))


def distillation_forward(
    student: Tensor,
    teacher: Tensor,
    center: Tensor,
    student_temp: float,
    teacher_temp: Tensor,
    *,
    config: DistillationConfig | None = None,
    programs: int = 0,
) -> tuple[Tensor, Tensor]:
    """Losses ``[rows]`` and log-sum-exps ``[4, rows]``, in float32.

    Args:
        student, teacher: ``[rows, K]``; rows may be any distance apart.
        center: ``[K]``.
        student_temp, teacher_temp: the latter float32 without dimensions, on the device.
        config, programs: of the launch, for tests; by default the device's.
    """
    num_rows, classes = student.shape
    student, teacher = _dense_classes(student), _dense_classes(teacher)
    loss = student.new_empty(num_rows, dtype=torch.float32)
    lse = student.new_empty(4, num_rows, dtype=torch.float32)
    if num_rows == 0:
        return loss, lse
    config, programs = _launch(student, config, programs)
    distillation_forward_kernel[(programs,)](
        student,
        teacher,
        center.contiguous(),
        teacher_temp,
        loss,
        lse,
        student.stride(0),
        teacher.stride(0),
        student_temp,
        num_rows,
        **_constants(classes, config),
        num_warps=config.warps,
    )
    return loss, lse


def distillation_backward(
    grad: Tensor,
    student: Tensor,
    teacher: Tensor,
    center: Tensor,
    student_temp: float,
    teacher_temp: Tensor,
    lse: Tensor,
    *,
    config: DistillationConfig | None = None,
    programs: int = 0,
) -> Tensor:
    """The gradient of ``student``, from that of the losses and the forward's log-sum-exps."""
    num_rows, classes = student.shape
    student, teacher = _dense_classes(student), _dense_classes(teacher)
    dstudent = student.new_empty(num_rows, classes)
    if num_rows == 0:
        return dstudent
    config, programs = _launch(student, config, programs)
    distillation_backward_kernel[(programs,)](
        grad,
        student,
        teacher,
        center.contiguous(),
        teacher_temp,
        lse,
        dstudent,
        grad.stride(0),
        student.stride(0),
        teacher.stride(0),
        student_temp,
        num_rows,
        **_constants(classes, config),
        num_warps=config.warps,
    )
    return dstudent


def _dense_classes(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()


def _constants(classes: int, config: DistillationConfig) -> dict[str, int]:
    return {"K": classes, "BLOCK": config.block, "ROWS": config.rows}


def _launch(
    student: Tensor, config: DistillationConfig | None, programs: int
) -> tuple[DistillationConfig, int]:
    """The configuration and the number of programs, no more than there are rows for."""
    if config is None:
        config = distillation_config(student.shape[1])
        programs = config.programs * _multiprocessors(student.device.index)
    return config, min(programs, -(-student.shape[0] // config.rows))


@lru_cache
def _multiprocessors(device: int) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


# Ahead-of-time checks --------------------------------------------------------------------------

TRITON_TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


def aot_cases(arch: int) -> Iterator[AotCase]:
    """The heads of DINO and ASiT, and a number of classes that is no power of two."""
    for kind in TRITON_TYPES.values():
        types = {
            **dict.fromkeys(("p_student", "p_teacher", "p_dstudent"), f"*{kind}:16"),
            **dict.fromkeys(("p_center", "p_teacher_temp"), "*fp32:16"),
            **dict.fromkeys(("p_grad", "p_loss", "p_lse"), "*fp32:16"),
            **dict.fromkeys(("grad_stride", "rows"), "i32"),
            "student_temp": "fp32",
        }
        for classes in (256, 1000, 1024, 4096, 8192, 65536):
            stride = "i32:16" if classes % 16 == 0 else "i32"
            config = distillation_config(classes)
            for kernel in (distillation_forward_kernel, distillation_backward_kernel):
                kinds = {**types, **dict.fromkeys(("student_stride", "teacher_stride"), stride)}
                yield AotCase(
                    f"{kernel.__name__.removesuffix('_kernel')} {kind} classes {classes}",
                    kernel,
                    {name: kinds[name] for name in kernel.arg_names if name in kinds},
                    _constants(classes, config),
                    config.warps,
                    num_stages=3,
                    max_shared=16
                    * 1024,  # for sums across warps, and the centre on its way to its threads
                    # So that the programs that are launched run at once.
                    max_registers=65536 // (32 * config.warps * config.programs),
                    expects_wgmma=False,
                )
