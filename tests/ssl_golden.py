"""The golden numbers of Audio-MAE, ASiT and HTS-AT (``fixtures/ssl_family``)."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tests.testing import formula


class SslGolden:
    """One stored run of an original implementation."""

    def __init__(self, shared: Path, name: str) -> None:
        folder = shared / "fixtures" / "ssl_family"
        self.index = json.loads((folder / "fixtures.json").read_text())
        cases = {case["name"]: case for case in self.index["cases"]}
        self.case = cases[name]
        self.arrays = np.load(folder / self.case["file"])

    @property
    def tensors(self) -> dict[str, dict]:
        """What the weights that the original ran with are: shapes and rules, by published key."""
        if "state_dict" in self.case:
            return self.index["state_dicts"][self.case["state_dict"]]["tensors"]
        return self.case["state_dict_keys"]["tensors"]

    def state_dict(self) -> dict[str, Tensor]:
        """The weights; zeros where the original made them itself (``kept``)."""
        return {key: fill_weight(key, **entry) for key, entry in self.tensors.items()}

    def weights(self, prefix: str) -> dict[str, Tensor]:
        """Those filled by a rule whose names begin with ``prefix``, which is taken off."""
        return {
            bare_key(key).removeprefix(prefix): fill_weight(key, **entry)
            for key, entry in self.tensors.items()
            if bare_key(key).startswith(prefix) and entry["fill"] != "kept"
        }

    def check(self, name: str, value: Tensor | np.ndarray) -> None:
        """Asserts agreement with a stored array within its stated tolerance."""
        stored, entry = self.arrays[name], self.case["arrays"][name]
        value = np.asarray(value)
        assert value.shape == stored.shape, name
        if entry.get("exact"):
            assert np.array_equal(value, stored), name
            return
        limit = entry["atol"] + entry["rtol"] * np.abs(stored)
        assert (np.abs(value - stored) <= limit).all(), (name, np.abs(value - stored).max())

    def check_tokens(self, name: str, tokens: Tensor, first: int = 8) -> None:
        """Asserts agreement of a sequence ``[clips, tokens, dim]`` with its stored summaries."""
        summaries = {
            "first": tokens[:, :first],
            "mean": tokens.mean(-1),
            "std": tokens.std(-1, unbiased=False),
            "probe": dot_probe(tokens),
        }
        found = [suffix for suffix in summaries if f"{name}_{suffix}" in self.arrays]
        assert found, name
        for suffix in found:
            self.check(f"{name}_{suffix}", summaries[suffix])


def dot_probe(x: Tensor) -> Tensor:
    """Product of each row with the probe vector, float64 inside."""
    dim = x.shape[-1]
    probe = torch.from_numpy(formula("probe", dim) * 50 / dim**0.5)
    return (x.double() @ probe).to(x.dtype)


def bare_key(key: str) -> str:
    """A published key without what holds the model."""
    return key.removeprefix("module.").removeprefix("sed_model.")


def fill_weight(key: str, shape: list[int], fill: str, dtype: str = "float32") -> Tensor:
    """A state-dict entry by its rule."""
    if fill == "kept":
        return torch.zeros(shape, dtype=getattr(torch, dtype))
    values = formula(bare_key(key), int(np.prod(shape)))
    values = {"v": values, "1+v": 1 + values, "1+|v|": 1 + np.abs(values)}[fill]
    return torch.from_numpy(values.astype(np.float32).reshape(shape))


def formula_wave(clips: int, samples: int, rate: int) -> Tensor:
    """The waveforms of the fixtures: noise and a tone of 440 Hz, float32 ``[clips, samples]``."""
    noise = 5 * formula("wave", clips * samples).reshape(clips, samples)
    tone = 0.3 * np.sin(2 * np.pi * 440 * np.arange(samples) / rate)
    return torch.from_numpy((noise + tone).astype(np.float32))
