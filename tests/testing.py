"""What the tests share: the golden fixtures' value formula, ragged inputs, poisoned memory."""

from __future__ import annotations

import json
import zlib
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastast import Segments, Spectrograms


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
