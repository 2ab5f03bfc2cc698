"""InfoNCE within clips: ours, the formula on gathered rows, and clip after clip as published."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from bench.cases.call import Call, leaf
from bench.registry import Case, Contender, Settings, Work, benchmark
from fastast import Segments
from fastast.ops import info_nce

# SSAST masks 400 of the 512 patches of a clip of 10 s; a patch has 16 x 16 pixels.
PATCHES, MASKED, DIM = 512, 400, 256
CPU_CLIPS, GPU_CLIPS = 12, 64


@benchmark(
    "ops/info_nce",
    "SSAST's discriminative loss: which of a clip's 400 masked patches belongs to a prediction, "
    "and how often the right one is found. saved_bytes: kept for the backward beside both.",
)
def cases(settings: Settings) -> Iterator[Case]:
    clips = CPU_CLIPS if settings.device.type == "cpu" else GPU_CLIPS
    for backward in (False, True):
        yield Case(
            f"{clips} clips, forward{'+backward' * backward}",
            settings.timed_dtype,
            settings.timed_size,
            {"clips": clips, "patches": PATCHES, "masked": MASKED, "dim": DIM},
            partial(_build, settings.device, settings.timed_dtype, clips, backward),
        )


def _build(device: torch.device, dtype: torch.dtype, clips: int, backward: bool) -> Work:
    generator = torch.Generator().manual_seed(0)
    count = clips * PATCHES
    # Scores of order one.
    inputs = {
        name: torch.randn(count, DIM, generator=generator).div_(DIM**0.25).to(device, dtype)
        for name in ("queries", "keys")
    }
    keys = torch.rand(clips, PATCHES, generator=generator)
    rows = keys.argsort(1)[:, :MASKED].sort().values + PATCHES * torch.arange(clips)[:, None]
    rows = rows.to(device)
    member = torch.zeros(count, dtype=torch.bool, device=device)
    member[rows] = True
    segments = Segments.from_lengths([PATCHES] * clips).to(device)
    grad = torch.zeros(count, device=device)
    grad[rows] = 1 / rows.numel()

    def call(function: Callable[[Tensor, Tensor], Tensor], in_dtype: torch.dtype = dtype) -> Call:
        leaves = {name: leaf(x, in_dtype) for name, x in inputs.items()}
        wide = torch.promote_types(in_dtype, torch.float32)
        return Call(
            partial(function, *leaves.values()), leaves, grad.to(wide) if backward else None
        )

    def ours(queries: Tensor, keys: Tensor) -> Tensor:
        return info_nce(queries, keys, segments, member).loss

    def contrast(queries: Tensor, keys: Tensor) -> Tensor:
        """Of some clips' gathered rows ``[clips, masked, dim]``."""
        wide = torch.promote_types(queries.dtype, torch.float32)
        scores = queries.to(wide) @ keys.to(wide).mT
        log_p = scores.log_softmax(2)
        # Which ones are found; ours says so, too.
        scores.argmax(2), log_p.argmax(1)
        return -log_p.diagonal(dim1=1, dim2=2)

    def stream(loss: Tensor, rows: Tensor) -> Tensor:
        return loss.new_zeros(count).index_copy(0, rows.flatten(), loss.flatten())

    def gathered(queries: Tensor, keys: Tensor) -> Tensor:
        return stream(contrast(queries[rows], keys[rows]), rows)

    def loop(queries: Tensor, keys: Tensor) -> Tensor:
        losses = [contrast(queries[clip], keys[clip]) for clip in rows.split(1)]
        return stream(torch.cat(losses), rows)

    def contender(name: str, why: str, function: Callable[[Tensor, Tensor], Tensor]) -> Contender:
        made = call(function)
        # Queries and keys; in the backward both again, and their gradients.
        passes = 6 if backward else 2
        return Contender(
            name,
            why,
            made.outputs,
            made.step,
            made.saved_bytes if backward else None,
            bytes=passes * count * DIM * dtype.itemsize,
            tokens=count,
        )

    return Work(
        (
            contender("fastast", "clips with any numbers of masked patches", ours),
            contender("gathered", "equally many per clip, gathered into one batch", gathered),
            contender("loop", "as published: clip after clip", loop),
        ),
        lambda in_dtype: call(gathered, in_dtype).outputs(),
    )
