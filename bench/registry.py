"""What a benchmark is, and the list of them.

A benchmark is a function from settings to cases; a case is one piece of work, described without
being built; building it makes its inputs and its contenders. Ours comes first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor

GROUPS = ("ops", "e2e", "memory")


@dataclass(frozen=True)
class Settings:
    """What the command line chooses; ``None`` leaves the choice to the benchmark.

    Args:
        device: where the work runs.
        dtype: of the inputs of an op; of the autocast region of a model.
        size: of the trunk, a key of :data:`fastast.models.vit.TRUNK_SIZES`.
    """

    device: torch.device
    dtype: torch.dtype | None = None
    size: str | None = None

    @property
    def timed_dtype(self) -> torch.dtype:
        """What is trained in on the device: bfloat16 on a GPU, float32 on a CPU."""
        if self.dtype is not None:
            return self.dtype
        return torch.float32 if self.device.type == "cpu" else torch.bfloat16

    @property
    def timed_size(self) -> str:
        """What the device can repeat in reasonable time."""
        return self.size or ("tiny" if self.device.type == "cpu" else "base")


@dataclass(frozen=True)
class Contender:
    """One way to do a case's work.

    Args:
        name: short; a column of the report.
        why: what it stands for, and why the comparison is fair.
        outputs: does the work and returns its outputs and, where trained, its gradients by name,
            in the layout that all the case's contenders share.
        step: the work to be timed; leaves no gradients behind. ``None``: nothing is timed.
        saved_bytes: counts what the forward keeps for the backward (:mod:`bench.memory`).
        peak_bytes: what the work takes at most, where the clock does not measure it, see
            :mod:`bench.peak`.
        flops: of the matmuls over the rows that it computes, see :mod:`bench.flops`.
        bytes: of the operation's inputs, outputs and gradients in its layout, each read or
            written once per pass; intermediate results are not counted.
        tokens: rows that it computes, padding included.
        unchecked: why its outputs are not those of the reference, for a contender that is worth
            seeing nevertheless; ``None``: they are compared before it is timed.
    """

    name: str
    why: str
    outputs: Callable[[], dict[str, Tensor]]
    step: Callable[[], None] | None = None
    saved_bytes: Callable[[], int] | None = None
    peak_bytes: Callable[[], int] | None = None
    flops: int | None = None
    bytes: int | None = None
    tokens: int | None = None
    unchecked: str | None = None


def peer(name: str, why: str, make: Callable[[str, str], Contender]) -> Contender:
    """``make(name, why)``; if that raises, a contender whose outputs raise the same.

    So what a machine or a version lacks is recorded as this peer's reason, and the case goes on.
    """
    try:
        return make(name, why)
    except Exception as error:
        failure = error  # the name in the except clause is unbound after it

    def outputs() -> dict[str, Tensor]:
        raise failure

    return Contender(name, why, outputs)


@dataclass(frozen=True)
class Work:
    """A case that is ready to run.

    Args:
        contenders: ours first.
        expected: the reference's outputs and gradients, computed in the given dtype from the
            contenders' inputs. float64 gives the truth, the case's own dtype the error that
            rounding explains.
    """

    contenders: tuple[Contender, ...]
    expected: Callable[[torch.dtype], dict[str, Tensor]]


@dataclass(frozen=True)
class Case:
    """One piece of work, not built yet.

    Args:
        name: unique within the benchmark.
        dtype, size: that it runs with.
        shapes: what a reader needs to repeat it, as JSON.
        build: makes inputs and contenders.
    """

    name: str
    dtype: torch.dtype
    size: str
    shapes: dict
    build: Callable[[], Work]


@dataclass(frozen=True)
class Benchmark:
    """Named ``group/what``; ``summary`` is a sentence for the report."""

    name: str
    summary: str
    cases: Callable[[Settings], Iterable[Case]]

    @property
    def group(self) -> str:
        return self.name.split("/")[0]


BENCHMARKS: dict[str, Benchmark] = {}


def benchmark(name: str, summary: str) -> Callable:
    """Registers a function ``Settings -> iterable of Case``.

    Raises:
        ValueError: the name is taken, or does not begin with one of :data:`GROUPS`.
    """

    def register(cases: Callable[[Settings], Iterable[Case]]) -> Callable:
        if name in BENCHMARKS:
            raise ValueError(f"a benchmark named {name!r} is registered already")
        if name.split("/")[0] not in GROUPS:
            raise ValueError(f"name must begin with one of {GROUPS}, got {name!r}")
        BENCHMARKS[name] = Benchmark(name, summary, cases)
        return cases

    return register


def find(group: str, settings: Settings, pattern: str = "*") -> Iterator[tuple[Benchmark, Case]]:
    """The cases of a group of which ``pattern`` matches a part of ``"benchmark case"``."""
    for bench in BENCHMARKS.values():
        if bench.group == group:
            for case in bench.cases(settings):
                if fnmatchcase(f"{bench.name} {case.name}", f"*{pattern}*"):
                    yield bench, case
