"""Patch embedding of equal clips: gather and linear layer, or a convolution over everything."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bench import flops
from bench.cases.call import Call, leaf
from bench.registry import Case, Contender, Settings, Work, benchmark
from fastast.models.vit import TRUNK_SIZES
from fastast.tokens import PatchGeometry, UnstructuredMask, kept_lists, patchify

CLIPS, FRAMES = 16, 1024
GEOMETRIES = {
    "16 x 16": PatchGeometry(128, (16, 16)),
    "16 x 16 by 10": PatchGeometry(128, (16, 16), (10, 10)),
    "pooled by 4": PatchGeometry(128, (16, 16), time_pool=4),
}


@benchmark(
    "ops/patchify",
    "Patches of 16 clips of 1024 x 128, embedded: all of them, or the 20 % that a masked "
    "autoencoder sees. The frames need no gradient, the weights do.",
)
def cases(settings: Settings) -> Iterator[Case]:
    dtype, size = settings.timed_dtype, settings.timed_size
    for name, geometry in GEOMETRIES.items():
        for drop in (0.0, 0.8):
            yield Case(
                f"{name}, {'visible 20 %' if drop else 'all'}, forward+backward",
                dtype,
                size,
                {
                    "clips": CLIPS,
                    "frames": FRAMES,
                    "patch_size": list(geometry.patch_size),
                    "stride": list(geometry.stride),
                    "time_pool": geometry.time_pool,
                    "drop": drop,
                },
                partial(_build, settings.device, dtype, TRUNK_SIZES[size].dim, geometry, drop),
            )


def _build(
    device: torch.device, dtype: torch.dtype, dim: int, geometry: PatchGeometry, drop: float
) -> Work:
    generator = torch.Generator().manual_seed(0)
    frames = torch.randn(CLIPS, FRAMES, 128, generator=generator).to(device, dtype)
    times = geometry.time_patches(FRAMES)
    patches, ids = geometry.freq_patches * times, range(CLIPS)
    keep = kept_lists(UnstructuredMask(drop), geometry, [times] * CLIPS, ids, seed=0, epoch=0)
    grid = geometry.grid([FRAMES] * CLIPS, keep=keep).to(device)
    kept = np.concatenate([clip * patches + rows for clip, rows in enumerate(keep)])
    kept = torch.from_numpy(kept).to(device)
    height, width = geometry.patch_size
    weight = torch.randn(dim, height * width, generator=generator).div_(16).to(device, dtype)
    bias = torch.randn(dim, generator=generator).to(device, dtype)
    grad = torch.randn(grid.num_rows, dim, generator=generator).to(device, dtype)

    def ours(frames: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.linear(patchify(frames.flatten(0, 1), grid, geometry), weight, bias)

    def convolution(frames: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        image = frames.mT
        if geometry.time_pool > 1:
            image = F.avg_pool1d(image, geometry.time_pool)
        kernel = weight.view(dim, 1, height, width)
        tokens = F.conv2d(image[:, None], kernel, bias, geometry.stride)
        tokens = tokens.flatten(2).mT.flatten(0, 1)
        return tokens[kept] if drop else tokens

    def call(function: Callable[..., Tensor], dtype: torch.dtype) -> Call:
        leaves = {"weight": leaf(weight, dtype), "bias": leaf(bias, dtype)}
        return Call(partial(function, frames.to(dtype), *leaves.values()), leaves, grad.to(dtype))

    def contender(name: str, why: str, function: Callable[..., Tensor], tokens: int) -> Contender:
        made = call(function, dtype)
        return Contender(
            name,
            why,
            made.outputs,
            made.step,
            # Forward, and the weight's gradient.
            flops=2 * flops.linear(tokens, height * width, dim),
            tokens=tokens,
        )

    return Work(
        (
            contender("fastast", "gathers the kept patches alone", ours, grid.num_rows),
            contender(
                "compiled", "the same under torch.compile", torch.compile(ours), grid.num_rows
            ),
            contender(
                "conv2d",
                "a convolution over whole clips, of which the kept rows are taken",
                convolution,
                CLIPS * patches,
            ),
        ),
        lambda in_dtype: call(convolution, in_dtype).outputs(),
    )
