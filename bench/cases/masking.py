"""Masks and corruption of a batch of equal clips: ours, compiled, and as published."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from bench.peers.masking import corrupt_clip_by_clip, random_masking
from bench.registry import Case, Contender, Settings, Work, benchmark
from fastast import Segments, Spectrograms, TokenBudget
from fastast.random import random_bits
from fastast.tokens import GMML, PatchGeometry, UnstructuredMask

VIEWS, MELS = 64, 128
KEYS = {"seed": 0, "epoch": 0}
GEOMETRY = PatchGeometry(MELS)


@benchmark(
    "ops/corruption",
    "GMML corruption of 64 views of 592 x 128 (ASiT): the corrupted frames and the pixel mask.",
)
def corruption(settings: Settings) -> Iterator[Case]:
    for name, gmml in {"paper": GMML(), "aligned": GMML(align=(16, 16))}.items():
        yield Case(
            f"{name}, {VIEWS} x 592",
            settings.timed_dtype,
            settings.timed_size,
            {"views": VIEWS, "frames": 592, "num_mels": MELS, "align": list(gmml.align)},
            partial(_build_corruption, settings.device, settings.timed_dtype, gmml),
        )


def _build_corruption(device: torch.device, dtype: torch.dtype, gmml: GMML) -> Work:
    generator = torch.Generator().manual_seed(0)
    budget = TokenBudget(VIEWS * 592, VIEWS, 592)
    segments = Segments.from_lengths([592] * VIEWS, budget).to(device)
    frames = torch.randn(VIEWS * 592, MELS, generator=generator).to(device, dtype)
    clip_ids = torch.arange(VIEWS, device=device)

    def ours(frames: Tensor, clip_ids: Tensor) -> tuple[Tensor, Tensor]:
        corrupted = gmml(Spectrograms(frames, segments), clip_ids, **KEYS)
        return corrupted.spectrograms.frames, corrupted.mask

    def loop(frames: Tensor, clip_ids: Tensor) -> tuple[Tensor, Tensor]:
        blocks = gmml.draw(segments, MELS, clip_ids, **KEYS)
        found = corrupt_clip_by_clip(frames.unflatten(0, (VIEWS, 592)), blocks)
        return tuple(x.flatten(0, 1) for x in found)

    def outputs(function: Callable, dtype: torch.dtype = dtype) -> dict[str, Tensor]:
        corrupted, mask = function(frames.to(dtype), clip_ids)
        return {"frames": corrupted, "mask": mask.to(dtype)}

    def contender(name: str, why: str, function: Callable) -> Contender:
        return Contender(
            name,
            why,
            partial(outputs, function),
            partial(function, frames, clip_ids),
            # The frames once each way, and a byte of mask.
            bytes=frames.numel() * (2 * dtype.itemsize + 1),
            tokens=len(frames),
        )

    return Work(
        (
            contender("fastast", "all blocks at once, all clips at once", ours),
            contender("compiled", "the same under torch.compile", torch.compile(ours)),
            contender("loop", "as published: clip after clip, block after block", loop),
        ),
        partial(outputs, loop),
    )


@benchmark(
    "ops/masking",
    "Unstructured masking of 64 clips of 64 x 8 patches at 0.8 (Audio-MAE).",
)
def masking(settings: Settings) -> Iterator[Case]:
    yield Case(
        f"unstructured, {VIEWS} x 512",
        settings.timed_dtype,
        settings.timed_size,
        {"clips": VIEWS, "patches": 512, "ratio": 0.8},
        partial(_build_masking, settings.device),
    )


def _build_masking(device: torch.device) -> Work:
    mask = UnstructuredMask(0.8)
    grid = GEOMETRY.grid([1024] * VIEWS).to(device)
    clip_ids = torch.arange(VIEWS, device=device)

    def ours(clip_ids: Tensor) -> Tensor:
        return mask(grid, GEOMETRY, clip_ids, **KEYS)

    def argsort(clip_ids: Tensor) -> Tensor:
        keys = random_bits(**KEYS, clips=clip_ids, purpose="token drop", draws=512)
        return random_masking(keys, mask.num_kept(8, 64)).flatten()

    def outputs(function: Callable, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        return {"mask": function(clip_ids).to(dtype)}

    def contender(name: str, why: str, function: Callable) -> Contender:
        step = partial(function, clip_ids)
        return Contender(name, why, partial(outputs, function), step, tokens=VIEWS * 512)

    return Work(
        (
            contender("fastast", "for clips of any sizes, from a table of tokens", ours),
            contender("compiled", "the same under torch.compile", torch.compile(ours)),
            contender(
                "argsort", "for equal clips: random keys (ours), sorted twice, gathered", argsort
            ),
        ),
        partial(outputs, argsort),
    )
