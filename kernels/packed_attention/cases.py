"""The configurations that ship, for compilation without a GPU."""

from __future__ import annotations

from collections.abc import Iterator

from triton.runtime.jit import JITFunction

from fastast.kernels.aot import ARCHITECTURES, AotCase
from fastast.kernels.packed_attention import tiled, whole
from fastast.kernels.packed_attention.configs import Launch, config_for

HEAD_DIMS = {"bf16": (24, 64, 128), "fp32": (32, 64)}
BYTES = {"bf16": 2, "fp32": 4}
# What the kernels read and write beside tensors of the input's precision.
SIGNATURE = {
    "p_lse": "*fp32:16",
    "p_delta": "*fp32:16",
    "p_offsets": "*i32:16",
    "p_tiles": "*i32:16",
    "scale": "fp32",
}


def aot_cases(arch: int) -> Iterator[AotCase]:
    """Every launch of every kernel, for a fused ``qkv``, as models call it."""
    for dtype, head_dims in HEAD_DIMS.items():
        for head_dim in head_dims:
            config = config_for(arch, 32 if head_dim == 24 else head_dim, BYTES[dtype])
            launches = [
                *(("forward", whole.forward, x) for x in config.whole_forward),
                *(("backward", _whole_backward(x), x) for x in config.whole_backward),
                ("tiled forward", tiled.forward, config.forward),
                ("tiled backward dq", tiled.backward_queries, config.backward_queries),
                ("tiled backward dk dv", tiled.backward_keys, config.backward_keys),
            ]
            for name, kernel, launch in launches:
                yield _case(arch, name, kernel, launch, dtype, head_dim)


def _whole_backward(launch: Launch) -> JITFunction:
    return whole.backward if launch.step == launch.rows else whole.backward_walk


def _case(
    arch: int, name: str, kernel: JITFunction, launch: Launch, dtype: str, head_dim: int
) -> AotCase:
    unit = 16 // BYTES[dtype]
    constants = {
        "PARTS": 3,
        "HEAD_DIM": head_dim,
        "BLOCK_D": 32 if head_dim == 24 else head_dim,
        "BLOCK": launch.rows,
        "STEP": launch.step,
        "GROUP": 4 if launch.rows == 64 else 1,
        "BLOCK_M": launch.rows,
        "BLOCK_N": launch.step,
        "ALIGN": unit,
        "ALIGN_DO": unit,
        "PRECISION": "ieee",
    }
    signature = {
        argument: SIGNATURE.get(argument, f"*{dtype}:16" if argument.startswith("p_") else "i32")
        for argument in kernel.arg_names
        if argument not in constants
    }
    return AotCase(
        name=f"attention {name} {launch.rows}x{launch.step} {dtype} head {head_dim}",
        fn=kernel,
        signature=signature,
        constexprs={key: value for key, value in constants.items() if key in kernel.arg_names},
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
        max_shared=ARCHITECTURES[arch].shared_per_program,
        max_registers=launch.maxnreg or 255,
        expects_wgmma=dtype == "bf16",
        maxnreg=launch.maxnreg,
    )
