"""Runs each GPU kernel of ours once at full size: what ``ncu`` watches.

    ncu --clock-control none --profile-from-start off --set full python -m bench.profile

Everything runs twice, and only the second time between the marks that the profiler waits for: then
nothing is compiled or allocated for the first time any more.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from bench.cases.distillation import SHAPES, STUDENT_TEMP, TEACHER_TEMP
from bench.cases.lengths import GPU_TOKENS
from bench.cases.window_attention import GRIDS, Grid
from fastast import Segments
from fastast.ops import (
    MelPlan,
    WindowGrids,
    distillation_cross_entropy,
    frame_segments,
    mel_filterbank,
    packed_attention_qkv,
    segment_pool,
    window_attention,
)

DIM = 768
CLIPS, SAMPLES, SHIFT = 512, 160_000, 160


def attention(length: int, head_dim: int, device: torch.device) -> Callable[[], object]:
    """Forward and backward on equal segments."""
    segments = Segments.from_lengths([length] * (GPU_TOKENS // length)).to(device)
    rows = GPU_TOKENS // length * length
    shape = (rows, 3, DIM // head_dim, head_dim)
    qkv = torch.randn(shape, device=device, dtype=torch.bfloat16, requires_grad=True)
    grad = torch.randn(rows, *shape[2:], device=device, dtype=torch.bfloat16)
    return lambda: torch.autograd.grad(packed_attention_qkv(qkv, segments), qkv, grad)


def pooling(length: int, device: torch.device) -> Callable[[], object]:
    """Forward and backward on equal segments."""
    count = GPU_TOKENS // length
    segments = Segments.from_lengths([length] * count).to(device)
    options = {"device": device, "dtype": torch.bfloat16}
    x = torch.randn(count * length, DIM, requires_grad=True, **options)
    u = (DIM**-0.5 * torch.randn(12, DIM, **options)).requires_grad_()
    grad = torch.randn(count, 12, DIM, **options)
    return lambda: torch.autograd.grad(segment_pool(x, u, segments), (x, u), grad)


def filterbank(device: torch.device) -> Callable[[], object]:
    """Clips of 10 s, int16 to bfloat16."""
    plan = MelPlan.kaldi()
    frames = frame_segments([SAMPLES] * CLIPS, [SHIFT] * CLIPS, plan)
    waveforms = torch.randint(-3000, 3000, (CLIPS * SAMPLES,), dtype=torch.int16, device=device)
    offsets = torch.arange(CLIPS + 1, device=device) * SAMPLES
    shift = torch.full((CLIPS,), SHIFT, dtype=torch.int32, device=device)
    table = (waveforms, offsets, shift, frames.to(device), plan.to(device))
    return partial(mel_filterbank, *table, int(frames.host_offsets[-1]), dtype=torch.bfloat16)


def windows(grid: Grid, device: torch.device) -> Callable[[], object]:
    """Forward and backward on equal grids, shifted where the model shifts them."""
    options = {"device": device, "dtype": torch.bfloat16, "requires_grad": True}
    rows = grid.clips * grid.size[0] * grid.size[1]
    grids = WindowGrids.from_sizes([grid.size] * grid.clips, grid.window, grid.shifts[-1])
    qkv = torch.randn(rows, 3, grid.heads, grid.head_dim, **options)
    table = torch.randn(grid.heads, grids.num_offsets, device=device, requires_grad=True)
    leaves, scale = [qkv, table], None
    if grid.cosine:
        scale = torch.full((grid.heads,), 5.0, device=device, requires_grad=True)
        leaves.append(scale)
    grad = torch.randn(rows, grid.heads, grid.head_dim, device=device, dtype=torch.bfloat16)
    call = partial(window_attention, qkv, table, grids.to(device), logit_scale=scale)
    return lambda: torch.autograd.grad(call(), leaves, grad)


def distillation(rows: int, classes: int, device: torch.device) -> Callable[[], object]:
    """Forward and backward."""
    shape = (2, rows, classes)
    student, teacher = torch.randn(shape, device=device, dtype=torch.bfloat16).div_(16).unbind()
    center = torch.zeros(classes, device=device)
    student.requires_grad_()
    grad = torch.full((rows,), 1 / rows, device=device)
    call = partial(distillation_cross_entropy, student, teacher, center, STUDENT_TEMP, TEACHER_TEMP)
    return lambda: torch.autograd.grad(call(), student, grad)


# The lengths that have kernels of their own, and one of each kind of head.
STEPS: dict[str, Callable[[torch.device], Callable[[], object]]] = {
    f"packed_attention, length {length}, head dim {head_dim}": partial(attention, length, head_dim)
    for length, head_dim in ((16, 64), (64, 64), (128, 64), (512, 64), (1024, 64), (512, 24))
}
STEPS |= {f"segment_pool, length {length}": partial(pooling, length) for length in (16, 512)}
STEPS |= {f"window_attention, {grid.name}": partial(windows, grid) for grid in GRIDS}
STEPS |= {
    f"distillation_cross_entropy, {name}": partial(distillation, *shape)
    for name, shape in SHAPES.items()
}
STEPS["mel_filterbank"] = filterbank
"""What is run, by name: makes the inputs on a device and returns the step."""


def main() -> None:
    """Warms up, then runs everything once under the profiler's eyes."""
    todo = [make(torch.device("cuda")) for make in STEPS.values()]
    for step in todo:
        step()
    torch.cuda.synchronize()
    torch.cuda.profiler.start()
    for step in todo:
        step()
        torch.cuda.synchronize()
    torch.cuda.profiler.stop()


if __name__ == "__main__":
    main()
