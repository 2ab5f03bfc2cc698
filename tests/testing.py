"""What the tests share: the golden fixtures' value formula, ragged inputs, poisoned memory."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastast import Segments, Spectrograms, TokenBudget
from fastast.data import write_wav


def formula(key: str, count: int) -> np.ndarray:
    """The fixtures' values v(key, 0 .. count-1): uniform, standard deviation 0.02, float64."""
    with np.errstate(over="ignore"):
        x = np.uint64(zlib.crc32(key.encode())) * np.uint64(2**32)
        x = x + np.arange(count, dtype=np.uint64) + np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        x = x ^ (x >> np.uint64(31))
    return (2.0 * ((x >> np.uint64(11)) * 2.0**-53) - 1.0) * np.sqrt(3.0) * 0.02


def formula_weight(key: str, shape: list[int]) -> Tensor:
    """A state-dict entry of the fixtures, rounded to float32."""
    key = key.removeprefix("module.")
    values = formula(key, int(np.prod(shape)))
    norms = ("norm1.weight", "norm2.weight", "v.norm.weight", "mlp_head.0.weight")
    if key.endswith(norms) or key in ("norm.weight", "mlp_norm.weight"):
        values = 1.0 + values
    return torch.from_numpy(values.astype(np.float32).reshape(shape))


def formula_input(key: str, shape: tuple[int, ...]) -> Tensor:
    """An input of the fixtures: unit variance, float32."""
    values = 50.0 * formula(key, int(np.prod(shape)))
    return torch.from_numpy(values.astype(np.float32).reshape(shape))


class Golden:
    """One stored run of an original implementation."""

    def __init__(self, folder: Path, name: str) -> None:
        index = json.loads((folder / "fixtures.json").read_text())
        entries = {entry["name"]: entry for entry in index["fixtures"]}
        self.entry = entries[name]
        self.arrays = np.load(folder / self.entry["file"])

    def state_dict(self, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        """The weights the original ran with."""
        return {
            key: formula_weight(key, shape).to(dtype) for key, shape in self.entry["state_dict"]
        }

    def check(self, name: str, value: Tensor) -> None:
        """Asserts agreement with a stored array within its stated tolerance."""
        suffix = "_f64" if value.dtype == torch.float64 else ""
        stored = torch.from_numpy(self.arrays[name + suffix]).to(value.dtype)
        atol = self.entry["arrays"][name + suffix]["suggested_atol"]
        torch.testing.assert_close(value, stored, rtol=0, atol=atol)

    def check_summary(self, name: str, value: Tensor) -> None:
        """The same of numbers that were summed up in float64, of float32 results."""
        stored = torch.from_numpy(self.arrays[name])[0]
        atol = self.entry["arrays"][name]["suggested_atol"]
        torch.testing.assert_close(value, stored, rtol=0, atol=atol)


def write_tone(path: Path, pitch: float, seconds: float, rate: int = 8000) -> None:
    """A slightly noisy sine as a WAV file."""
    samples = int(rate * seconds)
    rng = np.random.default_rng(samples)
    sound = 0.3 * np.sin(2 * np.pi * pitch * np.arange(samples) / rate)
    sound += 0.02 * rng.standard_normal(samples)
    write_wav(path, torch.from_numpy((32767 * sound).astype(np.int16)), rate)


def ragged(lengths: list[int], width: int, dtype: torch.dtype = torch.float64) -> Spectrograms:
    """Random spectrograms of the given lengths."""
    return Spectrograms(
        torch.randn(sum(lengths), width, dtype=dtype), Segments.from_lengths(lengths)
    )


@contextmanager
def poisoned_memory():
    """Every newly allocated tensor starts as NaN, so that what nobody writes is seen."""
    fill = torch.utils.deterministic.fill_uninitialized_memory
    deterministic = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        assert torch.empty(8).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(deterministic)
        torch.utils.deterministic.fill_uninitialized_memory = fill


class Geometry(NamedTuple):
    """Segments, and the rows of their stream, dead ones included."""

    segments: Segments
    rows: int

    @classmethod
    def of(cls, lengths: list[int], budget: TokenBudget | None = None) -> Geometry:
        segments = Segments.from_lengths(lengths, budget)
        return cls(segments, budget.tokens if budget else sum(lengths))

    @property
    def used(self) -> int:
        """Rows that belong to a clip."""
        return int(self.segments.host_offsets[-1])

    @property
    def clips(self) -> list[slice]:
        """The rows of each segment."""
        offsets = self.segments.host_offsets.tolist()
        return [slice(a, b) for a, b in zip(offsets[:-1], offsets[1:], strict=True)]


GEOMETRIES = {
    "odd-sizes": Geometry.of([5, 17, 1, 33]),
    "powers-of-two": Geometry.of([16, 64, 128]),
    "empty-at-head": Geometry.of([0, 0, 7, 9]),
    "empty-in-middle": Geometry.of([7, 0, 9]),
    "empty-at-tail": Geometry.of([7, 9, 0]),
    "equal-around-empty": Geometry.of([6, 0, 6, 6]),
    "single-rows": Geometry.of([1, 1, 1]),
    "long-among-short": Geometry.of([2, 3, 3, 200, 2, 1, 4]),
    "all-empty": Geometry.of([0, 0]),
    "budget": Geometry.of([5, 0, 17, 17, 9], TokenBudget(128, 8, 32)),
    "budget-full": Geometry.of([20, 12], TokenBudget(32, 2, 20)),
    "budget-unused": Geometry.of([], TokenBudget(8, 2, 8)),
}
"""What every operation over segments is tested on."""


def forward_and_gradients(
    function: Callable[..., Tensor], inputs: Sequence[Tensor], grad: Tensor
) -> list[Tensor]:
    """The function's output and the gradients of all its inputs, whose strides are kept."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    out = function(*inputs)
    return [out.detach(), *torch.autograd.grad(out, inputs, grad)]


def assert_as_accurate(
    actual: Sequence[Tensor], eager: Sequence[Tensor], truth: Sequence[Tensor]
) -> None:
    """At most twice the error of a plain implementation in the same dtype, against float64.

    Errors are root mean squares: the largest one is noise on small tensors. Where the plain
    implementation makes no error, one rounding of the largest result is allowed.
    """
    largest = max((x.abs().max().item() for x in truth if x.numel()), default=0.0)
    for x, plain, true in zip(actual, eager, truth, strict=True):
        assert x.dtype == plain.dtype and x.shape == true.shape
        error, limit = (rms(y.double() - true) for y in (x, plain))
        rounding = torch.finfo(x.dtype).eps * largest
        assert error <= (2 * limit if limit > 0 else rounding)


def over_draws(draw: Callable[[int], Sequence[Sequence[Tensor]]], count: int) -> list[list[Tensor]]:
    """The results of ``count`` draws of the inputs, stacked, for :func:`assert_as_accurate`.

    In float32 the error of a small result is that of a few numbers which all of it shares, such as
    a segment's log-sum-exp: a single draw then compares one roll of the dice with another.

    Args:
        draw: from a seed to lists of results: a kernel's, a plain implementation's, the truth.
    """
    draws = [draw(seed) for seed in range(count)]
    return [
        [torch.stack(values) for values in zip(*results, strict=True)]
        for results in zip(*draws, strict=True)
    ]


def rms(x: Tensor) -> float:
    """Root mean square; zero if there is nothing."""
    return x.square().mean().sqrt().item() if x.numel() else 0.0
