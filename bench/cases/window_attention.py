"""Attention within windows: ours, and Swin's rolled and partitioned grids."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from bench import flops
from bench.cases.call import Call, leaf
from bench.peers.windows import WAYS, BiasedAttention, RolledWindows, explicit_biased
from bench.registry import Case, Contender, Settings, Work, benchmark, peer
from fastast.nn import WindowAttention
from fastast.ops import WindowGrids, window_attention

CPU_TOKENS = 4096


@dataclass(frozen=True)
class Grid:
    """Windows of a model: patches of a clip, heads, and clips of a batch on a GPU."""

    name: str
    size: tuple[int, int]
    window: int
    heads: int
    head_dim: int
    shifts: tuple[tuple[int, int], ...]
    clips: int
    cosine: bool = False


GRIDS = (
    Grid("HTS-AT stage 1", (64, 64), 8, 4, 24, ((0, 0), (4, 4)), 32),
    Grid("HTS-AT stage 2", (32, 32), 8, 8, 24, ((0, 0), (4, 4)), 32),
    Grid("HTS-AT stage 3", (16, 16), 8, 16, 24, ((0, 0), (4, 4)), 32),
    Grid("HTS-AT stage 4", (8, 8), 8, 32, 24, ((0, 0),), 32),
    Grid("Audio-MAE decoder", (64, 8), 4, 16, 32, ((0, 0), (2, 0)), 64, cosine=True),
)


@benchmark(
    "ops/window_attention",
    "Attention within windows of equal patch grids, with a learned bias for relative positions: "
    "from qkv to output, or the whole layer with its projections.",
)
def cases(settings: Settings) -> Iterator[Case]:
    on_cpu = settings.device.type == "cpu"
    for grid in GRIDS:
        patches = grid.size[0] * grid.size[1]
        clips = max(1, CPU_TOKENS // patches) if on_cpu else grid.clips
        for shift in grid.shifts:
            where = f"{grid.name}{', shifted' * any(shift)}"
            shapes = {
                "clips": clips,
                "grid": list(grid.size),
                "window": grid.window,
                "shift": list(shift),
                "heads": grid.heads,
                "head_dim": grid.head_dim,
                "scores": "cosine" if grid.cosine else "scaled",
            }
            arguments = (settings.device, settings.timed_dtype, grid, shift, clips)
            for backward in (False, True):
                yield Case(
                    f"{where}, forward{'+backward' * backward}",
                    settings.timed_dtype,
                    settings.timed_size,
                    shapes,
                    partial(_build, *arguments, backward),
                )
            if not grid.cosine:
                yield Case(
                    f"{where}, layer, forward+backward",
                    settings.timed_dtype,
                    settings.timed_size,
                    shapes,
                    partial(_build_layer, *arguments),
                )


def _build(
    device: torch.device,
    dtype: torch.dtype,
    grid: Grid,
    shift: tuple[int, int],
    clips: int,
    backward: bool,
) -> Work:
    generator = torch.Generator(device).manual_seed(0)
    normal = partial(torch.randn, generator=generator, device=device)
    rows = clips * grid.size[0] * grid.size[1]
    inputs = {
        "qkv": normal(rows, 3, grid.heads, grid.head_dim).to(dtype),
        # Parameters stay in float32, as under autocast.
        "bias_table": normal(grid.heads, (2 * grid.window - 1) ** 2),
    }
    if grid.cosine:
        inputs["logit_scale"] = 1 + 9 * torch.rand(grid.heads, generator=generator, device=device)
    grad = normal(rows, grid.heads, grid.head_dim).to(dtype) if backward else None
    grids = WindowGrids.from_sizes([grid.size] * clips, grid.window, shift).to(device)
    rolled = RolledWindows(*grid.size, grid.window, shift, device)

    def call(function: Callable[..., Tensor], in_dtype: torch.dtype = dtype) -> Call:
        leaves = {
            name: leaf(x, in_dtype if name == "qkv" else torch.promote_types(in_dtype, x.dtype))
            for name, x in inputs.items()
        }
        there = None if grad is None else grad.to(in_dtype)
        return Call(lambda: function(**leaves), leaves, there)

    def ours() -> Call:
        return call(partial(window_attention, grids=grids))

    def rolling(attention: BiasedAttention, in_dtype: torch.dtype = dtype) -> Call:
        def function(qkv: Tensor, bias_table: Tensor, logit_scale: Tensor | None = None) -> Tensor:
            windows = rolled.partition(qkv)
            return rolled.merge(rolled.attend(windows, bias_table, logit_scale, attention))

        return call(function, in_dtype)

    def contender(name: str, why: str, call: Call, pairs: int) -> Contender:
        scored = flops.attention(pairs, grid.heads * grid.head_dim)
        # qkv in, output out; backward: qkv and the output's gradient in, qkv's gradient out.
        passes = 11 if backward else 4
        return Contender(
            name,
            why,
            call.outputs,
            call.step,
            call.saved_bytes if backward else None,
            flops=3 * scored if backward else scored,
            bytes=passes * rows * grid.heads * grid.head_dim * dtype.itemsize,
            tokens=rows,
        )

    return _work(contender, ours, rolling, grids, rows * grid.window**2)


def _build_layer(
    device: torch.device,
    dtype: torch.dtype,
    grid: Grid,
    shift: tuple[int, int],
    clips: int,
) -> Work:
    generator = torch.Generator(device).manual_seed(0)
    normal = partial(torch.randn, generator=generator, device=device)
    rows, dim = clips * grid.size[0] * grid.size[1], grid.heads * grid.head_dim
    layer = WindowAttention(dim, grid.heads, grid.window).to(device)
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            std = 1.0 if name.endswith(("bias", "table")) else dim**-0.5
            parameter.copy_(std * normal(parameter.shape))
    layer = layer.to(dtype)
    x, grad = normal(rows, dim).to(dtype), normal(rows, dim).to(dtype)
    grids = WindowGrids.from_sizes([grid.size] * clips, grid.window, shift).to(device)
    rolled = RolledWindows(*grid.size, grid.window, shift, device)

    def call(function: Callable[..., Tensor], in_dtype: torch.dtype = dtype) -> Call:
        twin, there = copy.deepcopy(layer).to(in_dtype), leaf(x, in_dtype)
        leaves = {"x": there, **dict(twin.named_parameters())}
        return Call(partial(function, twin, there), leaves, grad.to(in_dtype))

    def ours() -> Call:
        return call(lambda layer, x: layer(x, grids))

    def rolling(attention: BiasedAttention, in_dtype: torch.dtype = dtype) -> Call:
        def function(layer: WindowAttention, x: Tensor) -> Tensor:
            qkv = layer.qkv(rolled.partition(x)).unflatten(-1, (3, grid.heads, -1))
            table = layer.relative_position_bias_table.t()
            out = rolled.attend(qkv, table, None, attention)
            return rolled.merge(layer.proj(out.flatten(2)))

        return call(function, in_dtype)

    def contender(name: str, why: str, call: Call, pairs: int) -> Contender:
        projections = flops.linear(rows, dim, 4 * dim)
        parameters = sum(parameter.numel() for parameter in layer.parameters())
        return Contender(
            name,
            why,
            call.outputs,
            call.step,
            call.saved_bytes,
            flops=3 * (projections + flops.attention(pairs, dim)),
            bytes=3 * (2 * rows * dim + parameters) * dtype.itemsize,
            tokens=rows,
        )

    return _work(contender, ours, rolling, grids, rows * grid.window**2)


def _work(
    contender: Callable[..., Contender],
    ours: Callable[[], Call],
    rolling: Callable[..., Call],
    grids: WindowGrids,
    whole_pairs: int,
) -> Work:
    """Ours and Swin's ways, which mask whole windows; the explicit one is the formula."""
    patches = grids.host_windows[:, 2:].long().prod(1)
    own = contender(
        "fastast",
        "nothing rolled or partitioned; windows are clipped at the grid's edge, not masked",
        ours(),
        int(patches.square().sum()),
    )
    ways = (
        peer(name, why, lambda name, why, way=way: contender(name, why, rolling(way), whole_pairs))
        for name, (why, way) in WAYS.items()
    )
    return Work((own, *ways), lambda in_dtype: rolling(explicit_biased, in_dtype).outputs())
