"""Runs each GPU kernel of ours once on small inputs: what ``compute-sanitizer`` watches.

``python -m bench.sanitize --probe`` only allocates and fills a little memory, to find out whether
the sanitizer runs at all. Results are compared loosely with the references, which run on the CPU,
so that a kernel that did not run is not taken for one without errors.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastast import Segments
from fastast.ops import (
    MelPlan,
    WindowGrids,
    distillation_cross_entropy,
    frame_segments,
    mel_filterbank,
    mel_filterbank_reference,
    packed_attention_qkv,
    segment_pool,
    window_attention,
)

LENGTHS = {
    "segments of at most 64": (1, 16, 0, 63, 64, 17),
    "segments of at most 128": (5, 128, 0, 100),
    "long segments": (1, 300, 0, 129, 64),
}
"""One list for each regime of the attention kernels; none fills its last tile."""

TOLERANCE = 0.05
"""Relative, in the Euclidean norm: bfloat16 stays within a fifth of it."""


Comparison = tuple[str, Tensor, Tensor]
"""What was run, what came out and what should have, both on the CPU."""


def attention(device: torch.device) -> Iterator[Comparison]:
    """Outputs and gradients of ``packed_attention``, queries, keys and values in one tensor."""
    for name, lengths in LENGTHS.items():
        for head_dim in (24, 64):
            qkv = torch.randn(sum(lengths), 3, 2, head_dim)
            what = f"packed_attention, {name}, head dim {head_dim}"
            segments = Segments.from_lengths(lengths)
            yield from both(what, packed_attention_qkv, (qkv,), (segments,), device)


def pooling(device: torch.device) -> Iterator[Comparison]:
    """Outputs and gradients of ``segment_pool``."""
    for name, lengths in LENGTHS.items():
        x, u = torch.randn(sum(lengths), 192), 192**-0.5 * torch.randn(3, 192)
        segments = Segments.from_lengths(lengths)
        yield from both(f"segment_pool, {name}", segment_pool, (x, u), (segments,), device)


def windows(device: torch.device) -> Iterator[Comparison]:
    """Outputs and gradients of ``window_attention``, on grids that windows do not divide."""

    def cosines(
        qkv: Tensor, table: Tensor, scale: Tensor, grids: WindowGrids, **rest: Any
    ) -> Tensor:
        return window_attention(qkv, table, grids, logit_scale=scale, **rest)

    sizes = [(9, 13), (8, 8), (0, 5), (3, 17), (16, 4)]
    rows = sum(height * width for height, width in sizes)
    for name, window, head_dim, function in (
        ("scaled, head dim 24", 8, 24, window_attention),
        ("cosines, head dim 32", 4, 32, cosines),
    ):
        grids = WindowGrids.from_sizes(sizes, window, window // 2)
        inputs = torch.randn(rows, 3, 2, head_dim), torch.randn(2, grids.num_offsets)
        if function is cosines:
            inputs = (*inputs, torch.tensor([3.0, 8.0]))
        yield from both(f"window_attention, {name}", function, inputs, (grids,), device)


def distillation(device: torch.device) -> Iterator[Comparison]:
    """Losses and gradients of ``distillation_cross_entropy``."""
    function = partial(distillation_cross_entropy, student_temp=0.1, teacher_temp=0.07)
    for rows, classes in ((37, 1000), (5, 8192)):
        student, teacher = torch.randn(2, rows, classes).div(16).to(torch.bfloat16).unbind()
        rest = teacher, torch.randn(classes) / 16
        name = f"distillation_cross_entropy, {rows} x {classes}"
        yield from both(name, function, (student,), rest, device)


def both(
    name: str,
    function: Callable[..., Tensor],
    inputs: Sequence[Tensor],
    rest: Sequence[Tensor | Segments | WindowGrids],
    device: torch.device,
) -> Iterator[Comparison]:
    """In bfloat16 on the device by our kernels, and in float64 on the CPU by the reference; what
    else the function takes is the same there."""
    inputs, grad, results = [x.to(torch.bfloat16) for x in inputs], None, []
    for dtype, where, backend in (
        (torch.bfloat16, device, "auto"),
        (torch.float64, torch.device("cpu"), "reference"),
    ):
        leaves = [x.to(where, dtype, copy=True).requires_grad_() for x in inputs]
        out = function(*leaves, *(x.to(where) for x in rest), backend=backend)
        grad = torch.randn(out.shape).to(torch.bfloat16) if grad is None else grad
        grads = torch.autograd.grad(out, leaves, grad.to(where, dtype))
        results.append([x.detach().cpu() for x in (out, *grads)])
    parts = ("out", *["gradient"] * len(inputs))
    for part, got, want in zip(parts, *results, strict=True):
        yield f"{name}, {part}", got, want


def filterbank(device: torch.device) -> Iterator[Comparison]:
    """Ragged clips of mixed shifts, from both sample types to both result types."""
    lengths, shifts = [399, 400, 0, 16_000, 5_003], [160, 160, 160, 640, 171]
    plan = MelPlan.kaldi()
    frames = frame_segments(lengths, shifts, plan)
    samples = 0.1 * torch.randn(sum(lengths))
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    shift = torch.tensor(shifts, dtype=torch.int32)
    for waveforms in (samples, (samples * 2**15).to(torch.int16)):
        want = mel_filterbank_reference(waveforms, offsets, shift, frames, plan)
        table = [x.to(device) for x in (waveforms, offsets, shift, frames, plan)]
        for dtype in (torch.float32, torch.bfloat16):
            name = f"mel_filterbank, {str(waveforms.dtype)[6:]} to {str(dtype)[6:]}"
            yield name, mel_filterbank(*table, dtype=dtype).cpu(), want


def main(arguments: list[str] | None = None) -> None:
    """Runs everything on the GPU, or on the CPU where there is none, and says what it ran."""
    parser = argparse.ArgumentParser(prog="python -m bench.sanitize", description=__doc__)
    parser.add_argument("--probe", action="store_true", help="only touch the GPU's memory")
    options = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if options.probe:
        assert torch.full((1000,), 7, device="cuda").cpu().eq(7).all()
        return
    torch.manual_seed(0)
    for run in (filterbank, attention, pooling, windows, distillation):
        for name, got, want in run(device):
            error = float((got.double() - want).norm() / want.norm())
            print(f"{name}: off by {error:.1e}", flush=True)
            if not error < TOLERANCE:
                raise SystemExit(f"{name} differs from its reference")


if __name__ == "__main__":
    main()
