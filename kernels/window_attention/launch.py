"""Which kernels run with which launch; their results; the launches that ship. Never waits."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from fastast.kernels.aot import ARCHITECTURES, AotCase
from fastast.kernels.window_attention import kernels

MAX_WINDOW = 8
MAX_HEAD_DIM = 32  # beyond it the backward would spill registers
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
WARPGROUPS = (90, 100, 103)
"""Architectures whose matmuls read their operands from shared memory."""

# Elements between two rows, or two heads: products of a row and a stride have 64 bits.
MAX_STRIDE = 2**31 - 1
FOLDED = 32
"""Offsets that a program of the last kernel adds up."""


@dataclass(frozen=True)
class Launch:
    """How a kernel is launched.

    Attributes:
        rows: of a block.
        num_warps: of a program.
        num_stages: of its pipeline of loads.
        programs: per multiprocessor, about as many as its registers allow.
    """

    rows: int
    num_warps: int
    num_stages: int
    programs: int


@dataclass(frozen=True)
class Config:
    """The launches of both directions."""

    forward: Launch
    backward: Launch


# A block's scores are 64 x 64 float32 numbers: 32 registers for each thread of four warps, which
# one warpgroup matmul of Hopper needs in any case. The forward holds two such matrices (scores and
# bias), the backward four (weights, their gradient, bias, the bias's gradient), which leaves room
# for two programs. A second stage, the next block's rows on their way while this one is worked on,
# keeps the memory busy; where operands pass through registers, it would spill in the backward.
WARPGROUP = Config(Launch(64, 4, 2, programs=4), Launch(64, 4, 2, programs=2))
ONE_WARP_MATMUL = Config(Launch(64, 4, 2, programs=4), Launch(64, 4, 1, programs=2))
# Several small windows: half the rows are a quarter of the scores, and less of them masked.
SMALL = Config(Launch(32, 2, 2, programs=8), Launch(32, 2, 1, programs=4))
# Full float32 runs on the ordinary arithmetic units, for which the compiler unrolls whole matmuls:
# many warps keep their operands in registers.
FLOAT32 = Config(Launch(64, 16, 1, programs=1), Launch(64, 16, 1, programs=1))
SMALL_FLOAT32 = Config(Launch(32, 4, 1, programs=4), Launch(32, 8, 1, programs=2))


def config_for(arch: int, slots: int, itemsize: int) -> Config:
    """The launches for windows of up to ``slots`` patches and a number of bytes per element."""
    if slots <= SMALL.forward.rows:
        return SMALL_FLOAT32 if itemsize == 4 else SMALL
    if itemsize == 4:
        return FLOAT32
    return WARPGROUP if arch in WARPGROUPS else ONE_WARP_MATMUL


def supports(qkv: Tensor, bias_table: Tensor, logit_scale: Tensor | None, window: int) -> bool:
    """Whether the kernels take such inputs; attention in plain PyTorch takes all others."""
    arch = _device(qkv.device)[0]
    return (
        qkv.dtype in DTYPES
        and bias_table.dtype in DTYPES
        and 0 < qkv.shape[3] <= MAX_HEAD_DIM
        and window <= MAX_WINDOW
        and arch >= 80
        and _spills_nothing(arch, _slots(window), logit_scale is not None)
    )


def _spills_nothing(arch: int, slots: int, cosine: bool) -> bool:
    """The norms of a large window's keys are one matrix too many for most register files."""
    return not cosine or slots <= SMALL.forward.rows or arch in WARPGROUPS


def forward(
    qkv: Tensor,
    bias_table: Tensor,
    logit_scale: Tensor | None,
    windows: Tensor,
    window: int,
    scale: float,
) -> Tensor:
    """The output of :func:`fastast.ops.window_attention`."""
    rows, _, heads, head_dim = qkv.shape
    out = qkv.new_empty(rows, heads, head_dim)
    qkv, strides, align = _readable(qkv)
    arch, multiprocessors = _device(qkv.device)
    launch = config_for(arch, _slots(window), qkv.element_size()).forward
    constants = _constants(launch, qkv, window, logit_scale)
    num_windows = windows.shape[0] - 1
    parts = _parts(launch, multiprocessors, num_windows, constants["GROUP"], heads)
    with torch.cuda.device_of(qkv):
        kernels.forward[(parts * heads,)](
            qkv, bias_table, logit_scale, out, windows, rows, num_windows, parts, heads, scale,
            *strides, *bias_table.stride(), ALIGN=align, **constants,
            num_warps=launch.num_warps, num_stages=launch.num_stages,
        )  # fmt: skip
    return out


def backward(
    grad_out: Tensor,
    qkv: Tensor,
    bias_table: Tensor,
    logit_scale: Tensor | None,
    windows: Tensor,
    window: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of qkv, bias table and, if there is one, logit scale."""
    rows, _, heads, head_dim = qkv.shape
    dqkv = qkv.new_empty(qkv.shape)
    qkv, strides, align = _readable(qkv)
    grad_out, grad_strides, grad_align = _readable(grad_out)
    arch, multiprocessors = _device(qkv.device)
    launch = config_for(arch, _slots(window), qkv.element_size()).backward
    constants = _constants(launch, qkv, window, logit_scale)
    layout = {name: constants[name] for name in ("WINDOW", "SLOTS", "GROUP")}
    num_windows = windows.shape[0] - 1
    parts = _parts(launch, multiprocessors, num_windows, constants["GROUP"], heads)
    part_bias = qkv.new_empty(parts, heads, launch.rows, launch.rows, dtype=torch.float32)
    part_logit = qkv.new_empty(parts, 0 if logit_scale is None else heads, dtype=torch.float32)
    dbias = torch.empty_like(bias_table, memory_format=torch.contiguous_format)
    with torch.cuda.device_of(qkv):
        kernels.backward[(parts * heads,)](
            qkv, bias_table, logit_scale, grad_out, dqkv, part_bias, part_logit, windows, rows,
            num_windows, parts, heads, scale, *strides, *grad_strides, *bias_table.stride(),
            ALIGN=align, ALIGN_DO=grad_align, **constants,
            num_warps=launch.num_warps, num_stages=launch.num_stages,
        )  # fmt: skip
        kernels.fold_pairs[(heads * triton.cdiv(dbias.shape[1], FOLDED),)](
            part_bias.sum(0), dbias, heads, BLOCK_T=FOLDED, **layout, num_warps=4, num_stages=1
        )
    dtype = torch.float32 if logit_scale is None else logit_scale.dtype
    return dqkv, dbias, part_logit.sum(0).to(dtype)


@functools.cache
def _device(device: torch.device) -> tuple[int, int]:
    """Compute capability, as in ``sm_90``, and multiprocessors; a small Hopper stands in for a CPU
    with an interpreter."""
    if device.type != "cuda":
        return 90, 1
    found = torch.cuda.get_device_properties(device)
    return 10 * found.major + found.minor, found.multi_processor_count


def _padded(head_dim: int) -> int:
    return max(16, triton.next_power_of_2(head_dim))


def _parts(launch: Launch, multiprocessors: int, num_windows: int, group: int, heads: int) -> int:
    """Shares of the windows, at least one for dead rows."""
    resident = triton.cdiv(launch.programs * multiprocessors, heads)
    return max(1, min(resident, triton.cdiv(num_windows, group)))


def _slots(window: int) -> int:
    """Rows of a block that a window takes, some of which may be absent."""
    return triton.next_power_of_2(window * window)


def _constants(launch: Launch, qkv: Tensor, window: int, logit_scale: Tensor | None) -> dict:
    slots = _slots(window)
    precision = torch.backends.cuda.matmul.fp32_precision  # concerns float32 inputs alone
    return {
        "WINDOW": window,
        "SLOTS": slots,
        "GROUP": launch.rows // slots,
        "HEAD_DIM": qkv.shape[3],
        "BLOCK_D": _padded(qkv.shape[3]),
        "COSINE": logit_scale is not None,
        "PRECISION": "tf32" if precision == "tf32" else "ieee",
    }


def _readable(x: Tensor) -> tuple[Tensor, list[int], int]:
    """A tensor as the kernels read it; strides of all its dimensions but the channels, in units;
    the unit, of which all strides are a multiple, at most 16 bytes.

    It is copied only if its channels are not neighbours.
    """
    if x.stride(-1) != 1 or max(x.stride()) > MAX_STRIDE:
        x = x.contiguous()
    strides = x.stride()[:-1]
    unit = math.gcd(16 // x.element_size(), *strides)
    return x, [stride // unit for stride in strides], unit


# Ahead-of-time checks --------------------------------------------------------------------------

# HTS-AT's windows, those of Audio-MAE's decoder, and Swin v2's.
SHIPPED = {
    "8x8 head 24": (8, 24, False),
    "4x4 head 32 cosine": (4, 32, True),
    "8x8 head 32 cosine": (8, 32, True),
}
TRITON_TYPES = {torch.bfloat16: "bf16", torch.float32: "fp32"}
SIGNATURE = {
    "p_bias": "*fp32:16",
    "p_logit_scale": "*fp32:16",
    "p_part_bias": "*fp32:16",
    "p_part_logit": "*fp32:16",
    "p_pairs": "*fp32:16",
    "p_dbias": "*fp32:16",
    "p_windows": "*i32:16",
    "scale": "fp32",
}


def aot_cases(arch: int) -> Iterator[AotCase]:
    """What the models of both kinds launch on an architecture."""
    for dtype, kind in TRITON_TYPES.items():
        for name, (window, head_dim, cosine) in SHIPPED.items():
            if not _spills_nothing(arch, _slots(window), cosine):
                continue
            qkv = torch.empty(0, 3, 1, head_dim, dtype=dtype)
            logit_scale = torch.empty(1) if cosine else None
            config = config_for(arch, _slots(window), dtype.itemsize)
            for kernel, launch in (
                (kernels.forward, config.forward),
                (kernels.backward, config.backward),
            ):
                constants = {
                    **_constants(launch, qkv, window, logit_scale),
                    "ALIGN": 16 // dtype.itemsize,
                    "ALIGN_DO": 16 // dtype.itemsize,
                    **({} if cosine else {"p_logit_scale": None}),
                }
                yield AotCase(
                    f"window {kernel.__name__} {name} {kind}",
                    kernel,
                    {
                        argument: SIGNATURE.get(
                            argument, f"*{kind}:16" if argument.startswith("p_") else "i32"
                        )
                        for argument in kernel.arg_names
                        if argument not in constants
                    },
                    {key: value for key, value in constants.items() if key in kernel.arg_names},
                    launch.num_warps,
                    launch.num_stages,
                    max_shared=ARCHITECTURES[arch].shared_per_program,
                    max_registers=255,
                    expects_wgmma=dtype == torch.bfloat16 and launch.rows == 64,
                )
    for window, rows in ((8, 64), (4, 32)):
        slots = _slots(window)
        yield AotCase(
            f"window fold_pairs {window}x{window}",
            kernels.fold_pairs,
            {"p_pairs": "*fp32:16", "p_dbias": "*fp32:16", "heads": "i32"},
            {"WINDOW": window, "SLOTS": slots, "GROUP": rows // slots, "BLOCK_T": FOLDED},
            num_warps=4,
            num_stages=1,
            max_shared=16 * 1024,
            max_registers=255,
            expects_wgmma=False,
        )
