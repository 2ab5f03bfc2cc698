"""Runs Triton kernels on the CPU, beside tests that compile them, in one process."""

from types import ModuleType

import numpy as np
import pytest
import torch


@pytest.fixture
def interpret(monkeypatch):
    """``interpret(module)`` replaces the kernels of a module by interpreted ones for one test.

    ``TRITON_INTERPRET=1`` does so for a whole process, and only if it is set before Triton is
    imported. Two faults of the interpreter (Triton 3.6) are mended on the way: its ``tl.dot``
    multiplies the bit patterns of bfloat16 numbers, and its casts to bfloat16 truncate.
    """
    import triton.experimental.gluon  # noqa: F401  imports names that are replaced below
    import triton.language as tl
    from triton.runtime.interpreter import (
        InterpretedFunction,
        InterpreterBuilder,
        TensorHandle,
    )
    from triton.runtime.jit import JITFunction

    dot, cast = InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl

    def widened(x):
        if x.dtype.scalar != tl.bfloat16:
            return x
        return TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def exact_dot(self, a, b, *rest):
        return dot(self, widened(a), widened(b), *rest)

    def rounding_cast(self, src, dst_type):
        if (src.dtype.scalar, dst_type.scalar) != (tl.float32, tl.bfloat16):
            return cast(self, src, dst_type)
        rounded = torch.from_numpy(np.ascontiguousarray(src.data)).bfloat16().view(torch.int16)
        return TensorHandle(rounded.numpy().view(np.uint16), tl.bfloat16)

    def replace(module: ModuleType) -> None:
        for name, value in list(vars(module).items()):
            if isinstance(value, JITFunction):
                monkeypatch.setattr(module, name, InterpretedFunction(value.fn))

    monkeypatch.setattr(InterpreterBuilder, "create_dot", exact_dot)
    monkeypatch.setattr(InterpreterBuilder, "cast_impl", rounding_cast)
    for name in ("create_fp_trunc", "create_fp_ext"):
        monkeypatch.setattr(InterpreterBuilder, name, InterpreterBuilder.cast_impl)
    for module in (tl, tl.standard):
        replace(module)
    return replace
