"""The ``fastast::`` operator namespace, and what the operators over segments share.

Every operator is opaque to the compiler: a schema, a kernel per device, a fake kernel for
tracing, and a backward that is an operator of its own. None mutates or aliases its inputs.

The kernels registered here are written in terms of PyTorch's own CPU kernels and read the
geometry from ``host_offsets``, so they run on any device without waiting for it. A kernel for a
particular device registers itself under that device's key and takes precedence.
"""

from __future__ import annotations

import functools
import importlib
import os
from itertools import groupby
from operator import sub
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from fastast.segments import Segments

LIBRARY = torch.library.Library("fastast", "DEF")
ANY_DEVICE = "CompositeExplicitAutograd"

SEGMENTS_SCHEMA = "Tensor offsets, Tensor host_offsets, Tensor tiles, int max_length"
"""How every operator's schema spells a :class:`~fastast.Segments`."""


UNTRIED = frozenset({"distillation", "window_attention"})
"""Operators whose Triton kernels are interpreted and compiled, but have not run on a GPU yet. The
filterbank's for transforms of 512 to 2048 points (``csrc/mel/cuda/warp.h``) is another such."""


def gpu_kernels(operator: str = "") -> bool:
    """Whether kernels of our own serve GPUs, for an operator.

    ``FASTAST_GPU_KERNELS=0``, set before the library is imported, leaves all work to PyTorch's: to
    compare, or to find out which of them is at fault. ``all`` adds those that are :data:`UNTRIED`.
    """
    wanted = os.environ.get("FASTAST_GPU_KERNELS")
    return wanted == "all" or (wanted != "0" and operator not in UNTRIED)


@functools.cache
def triton_kernels(operator: str) -> ModuleType | None:
    """The module ``fastast.kernels.<operator>``; None without Triton, or if it is not wanted.

    Operators ask at their first call on a GPU, so that importing the library does not import a
    compiler.
    """
    if not gpu_kernels(operator):
        return None
    try:
        return importlib.import_module(f"fastast.kernels.{operator}")
    except ModuleNotFoundError as error:
        if error.name != "triton":
            raise
        return None


class Run(NamedTuple):
    """Neighbouring segments of one length: a dense ``[count, length, ...]`` view of the stream."""

    segment: int
    row: int
    count: int
    length: int

    @property
    def rows(self) -> slice:
        """The run's rows of the stream."""
        return slice(self.row, self.row + self.count * self.length)

    @property
    def segments(self) -> slice:
        """The run's segments."""
        return slice(self.segment, self.segment + self.count)


def equal_runs(host_offsets: Tensor) -> list[Run]:
    """Groups neighbouring segments of one length; empty ones are left out.

    One kernel call serves a run, with no copy. Loaders put clips of equal length side by side
    for this.
    """
    offsets = host_offsets.tolist()
    runs: list[Run] = []
    segment, row = 0, offsets[0]
    for length, group in groupby(map(sub, offsets[1:], offsets)):
        count = len(list(group))
        if length:
            runs.append(Run(segment, row, count, length))
        segment, row = segment + count, row + count * length
    return runs


def dense_channels(x: Tensor) -> Tensor:
    """PyTorch's attention for CPUs takes neighbouring channels to be neighbours in memory."""
    return x if x.stride(-1) == 1 else x.contiguous()


def check_stream(name: str, x: Tensor, segments: Segments) -> None:
    """Rejects a stream that does not fit its segments, with a message that says so."""
    if x.device != segments.offsets.device:
        raise ValueError(
            f"{name} is on {x.device} but segments are on {segments.offsets.device}: "
            "move them with segments.to(device)"
        )
    if not x.is_floating_point():
        raise ValueError(f"{name} must be floating point, got {x.dtype}")


def check_rows(name: str, x: Tensor, host_offsets: Tensor) -> None:
    """Rejects a stream shorter than its segments. Reads values: for kernels, not for tracing."""
    if x.shape[0] < (rows := int(host_offsets[-1])):
        raise ValueError(f"{name} has {x.shape[0]} rows but its segments have {rows}")


def once_differentiable(name: str) -> None:
    """Makes a backward operator refuse to be differentiated, which would be wrong silently."""

    def refuse(ctx, *grads):
        raise NotImplementedError(f"{name} is not differentiable: no second derivatives")

    torch.library.register_autograd(name, refuse, lib=LIBRARY)


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Rejects an option's value that is not among its choices."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {choices}, got {value!r}")
