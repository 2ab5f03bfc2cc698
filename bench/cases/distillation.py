"""Distillation cross-entropy: ours, the formula in PyTorch, PyTorch's cross-entropy."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.cases.call import Call, leaf
from bench.memory import saved_bytes
from bench.registry import Case, Contender, Settings, Work, benchmark
from fastast.ops import distillation_cross_entropy

STUDENT_TEMP, TEACHER_TEMP = 0.1, 0.07

# ASiT's two losses on 64 views of 296 tokens (its code: batches of 32 clips, two views each).
SHAPES = {"local": (64 * 296, 1024), "global": (64, 8192)}


@benchmark(
    "ops/distillation",
    "ASiT's losses between teacher and student: 1,024 classes per token, 8,192 per view; "
    "the teacher centred and sharpened. saved_bytes: kept for the backward beside the logits.",
)
def cases(settings: Settings) -> Iterator[Case]:
    for name, (rows, classes) in SHAPES.items():
        for backward in (False, True):
            yield Case(
                f"{name}, {rows} x {classes}, forward{'+backward' * backward}",
                settings.timed_dtype,
                settings.timed_size,
                {"rows": rows, "classes": classes},
                partial(_build, settings.device, settings.timed_dtype, rows, classes, backward),
            )


def _build(
    device: torch.device, dtype: torch.dtype, rows: int, classes: int, backward: bool
) -> Work:
    generator = torch.Generator().manual_seed(0)

    def cosines() -> Tensor:
        # Of unit vectors in 256 dimensions, as the heads give.
        return torch.randn(rows, classes, generator=generator).div_(16).to(device, dtype)

    student, teacher = cosines(), cosines()
    center = (torch.randn(classes, generator=generator) / 16).to(device)
    grad = torch.full((rows,), 1 / rows, device=device)

    def call(function: Callable[..., Tensor], dtype: torch.dtype, wide: torch.dtype) -> Call:
        logits = leaf(student, dtype)
        rest = teacher.to(dtype), center.to(wide)
        return Call(
            partial(function, logits, *rest),
            {"student": logits},
            grad.to(wide) if backward else None,
        )

    def fused(student: Tensor, teacher: Tensor, center: Tensor) -> Tensor:
        return distillation_cross_entropy(student, teacher, center, STUDENT_TEMP, TEACHER_TEMP)

    def eager(student: Tensor, teacher: Tensor, center: Tensor) -> Tensor:
        target = ((teacher - center) / TEACHER_TEMP).softmax(1)
        return -(target * F.log_softmax(student.to(center.dtype) / STUDENT_TEMP, 1)).sum(1)

    def soft_targets(student: Tensor, teacher: Tensor, center: Tensor) -> Tensor:
        target = ((teacher - center) / TEACHER_TEMP).softmax(1)
        return F.cross_entropy(student.to(center.dtype) / STUDENT_TEMP, target, reduction="none")

    def contender(name: str, why: str, function: Callable[..., Tensor]) -> Contender:
        made = call(function, dtype, torch.float32)
        logits, given = made.leaves["student"], (teacher, center)
        return Contender(
            name,
            why,
            made.outputs,
            made.step,
            partial(saved_bytes, partial(function, logits, *given), (logits, *given))
            if backward
            else None,
            # Student and teacher; in the backward both again, and the student's gradient.
            bytes=(5 if backward else 2) * rows * classes * dtype.itemsize,
            tokens=rows,
        )

    return Work(
        (
            contender("fastast", "keeps two log-sum-exps per row", fused),
            contender("eager", "the formula in PyTorch: softmax, log-softmax, sum", eager),
            contender(
                "cross_entropy",
                "PyTorch's own, with the teacher's softmax as its targets",
                soft_targets,
            ),
            contender("compiled", "the formula under torch.compile", torch.compile(eager)),
        ),
        lambda in_dtype: call(
            eager, in_dtype, torch.promote_types(in_dtype, torch.float32)
        ).outputs(),
    )
