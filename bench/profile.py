"""Runs each GPU kernel of ours once at full size: what ``ncu`` watches.

    ncu --clock-control none --profile-from-start off --set full python -m bench.profile

Everything runs twice, and only the second time between the marks that the profiler waits for: then
nothing is compiled or allocated for the first time any more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch

from bench.cases.lengths import GPU_TOKENS
from fastast import Segments
from fastast.ops import (
    MelPlan,
    frame_segments,
    mel_filterbank,
    packed_attention_qkv,
    segment_pool,
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


def steps(device: torch.device) -> Iterator[Callable[[], object]]:
    """The lengths that have kernels of their own, and one of each kind of head."""
    for length, head_dim in ((16, 64), (64, 64), (128, 64), (512, 64), (1024, 64), (512, 24)):
        yield attention(length, head_dim, device)
    for length in (16, 512):
        yield pooling(length, device)
    yield filterbank(device)


def main() -> None:
    """Warms up, then runs everything once under the profiler's eyes."""
    todo = list(steps(torch.device("cuda")))
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
