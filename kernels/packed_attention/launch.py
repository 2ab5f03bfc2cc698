"""Chooses kernels, allocates their results and launches them. Never waits for the device."""

from __future__ import annotations

import functools
import math

import torch
import triton
from torch import Tensor

from fastast.kernels.packed_attention import tiled, whole
from fastast.kernels.packed_attention.configs import Config, Launch, config_for, pick
from fastast.segments import TILE_ROWS

# Full float32 is not worth spilling registers for.
MAX_HEAD_DIM = {torch.bfloat16: 128, torch.float16: 128, torch.float32: 64}
# Elements between two rows: offsets within a block of 128 rows have 32 bits.
MAX_ROW_STRIDE = 2**31 // 256


def supports(q: Tensor, scale: float) -> bool:
    """Whether the kernels take such inputs; attention in plain PyTorch takes all others."""
    return (
        0 < q.shape[-1] <= MAX_HEAD_DIM.get(q.dtype, 0)
        and scale > 0
        and _architecture(q.device) >= 80
    )


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offsets: Tensor,
    tiles: Tensor,
    max_length: int,
    scale: float,
    config: Config | None = None,
) -> tuple[Tensor, Tensor]:
    """``out [rows, heads, head_dim]`` and ``lse [heads, rows]`` of
    :func:`fastast.ops.packed_attention`; with other launches than the device's, for timing them."""
    rows, heads, head_dim = q.shape
    out, lse = q.new_empty(q.shape), q.new_empty(heads, rows, dtype=torch.float32)
    (q, k, v), strides, align = _readable(q, k, v)
    config = config or launches(q)
    segments = offsets.shape[0] - 1
    constants = {"ALIGN": align, **_constants(q)}
    with torch.cuda.device_of(q):
        if launch := pick(config.whole_forward, max_length):
            group, parts = _group(launch, max_length, segments)
            whole.forward[(parts * heads,)](
                q, k, v, out, lse, offsets, rows, segments, parts, heads, scale, *strides,
                BLOCK=launch.rows, GROUP=group, **constants, **_options(launch),
            )  # fmt: skip
        else:
            launch = config.forward
            tiled.forward[(_parts(launch, tiles) * heads,)](
                q, k, v, out, lse, offsets, tiles, rows, segments, tiles.shape[0], heads, scale,
                *strides, BLOCK_M=launch.rows, BLOCK_N=launch.step, **constants, **_options(launch),
            )  # fmt: skip
    return out, lse


def backward(
    grads: tuple[Tensor, Tensor, Tensor],
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    offsets: Tensor,
    tiles: Tensor,
    max_length: int,
    scale: float,
    config: Config | None = None,
) -> None:
    """Writes dq, dk and dv into ``grads``: three tensors, or the parts of one ``dqkv``."""
    rows, heads, head_dim = q.shape
    (q, k, v), strides, align = _readable(q, k, v)
    (grad_out,), grad_strides, grad_align = _readable(grad_out)
    config = config or launches(q)
    segments = offsets.shape[0] - 1
    constants = {
        "PARTS": grads[0].stride(0) // (heads * head_dim),
        "ALIGN": align,
        "ALIGN_DO": grad_align,
        **_constants(q),
    }
    with torch.cuda.device_of(q):
        if launch := pick(config.whole_backward, max_length):
            if launch.step < launch.rows:
                kernel, parts, shape = whole.backward_walk, max(1, segments), {"STEP": launch.step}
            else:
                group, parts = _group(launch, max_length, segments)
                kernel, shape = whole.backward, {"GROUP": group}
            kernel[(parts * heads,)](
                q, k, v, lse, grad_out, *grads, offsets, rows, segments, parts, heads, scale,
                *strides, *grad_strides,
                BLOCK=launch.rows, **shape, **constants, **_options(launch),
            )  # fmt: skip
            return
        delta = torch.empty_like(lse)
        shape = (offsets, tiles, rows, segments, tiles.shape[0], heads, scale)
        launch = config.backward_queries
        tiled.backward_queries[(_parts(launch, tiles) * heads,)](
            q, k, v, out, lse, grad_out, grads[0], delta, *shape, *strides, *grad_strides,
            BLOCK_M=launch.rows, BLOCK_N=launch.step, **constants, **_options(launch),
        )  # fmt: skip
        launch = config.backward_keys
        tiled.backward_keys[(_parts(launch, tiles) * heads,)](
            q, k, v, lse, delta, grad_out, grads[1], grads[2], *shape, *strides, *grad_strides,
            BLOCK_M=launch.rows, BLOCK_N=launch.step, **constants, **_options(launch),
        )  # fmt: skip


def launches(q: Tensor) -> Config:
    """Those that serve such tensors on their device."""
    return config_for(_architecture(q.device), _padded(q.shape[2]), q.element_size())


@functools.cache
def _architecture(device: torch.device) -> int:
    """Compute capability, as in ``sm_90``; Hopper's stands in for a CPU with an interpreter."""
    if device.type != "cuda":
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def _padded(head_dim: int) -> int:
    return max(16, triton.next_power_of_2(head_dim))


def _constants(q: Tensor) -> dict:
    precision = torch.backends.cuda.matmul.fp32_precision  # concerns float32 inputs alone
    return {
        "HEAD_DIM": q.shape[2],
        "BLOCK_D": _padded(q.shape[2]),
        "PRECISION": "tf32" if precision == "tf32" else "ieee",
    }


def _options(launch: Launch) -> dict:
    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
    return options if launch.maxnreg is None else {**options, "maxnreg": launch.maxnreg}


def _group(launch: Launch, max_length: int, segments: int) -> tuple[int, int]:
    """Segments of a block, and number of blocks; one if there are no segments, for dead rows."""
    group = 1 << min(4, (launch.rows // max(1, max_length)).bit_length() - 1)
    return group, max(1, triton.cdiv(segments, group))


def _parts(launch: Launch, tiles: Tensor) -> int:
    """Programs per head of a tiled kernel."""
    return triton.cdiv(tiles.shape[0], launch.rows // TILE_ROWS)


def _readable(*tensors: Tensor) -> tuple[list[Tensor], list[int], int]:
    """Tensors as the kernels read them; strides of their rows and heads, in units; the unit.

    A tensor is copied only if its channels are not neighbours or its rows are too far apart. The
    unit is what all strides are a multiple of, at most 16 bytes.
    """
    tensors = [
        x if x.stride(2) == 1 and x.stride(0) <= MAX_ROW_STRIDE else x.contiguous() for x in tensors
    ]
    strides = [stride for x in tensors for stride in x.stride()[:2]]
    unit = math.gcd(16 // tensors[0].element_size(), *strides)
    return tensors, [stride // unit for stride in strides], unit
