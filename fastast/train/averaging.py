"""Averages of a model's weights: moving ones, over epochs, and of saved files.

All floating-point tensors of the state dict are averaged, buffers too, in float32 also if the model
is kept in less; integer ones (counters, index tables) are taken from the latest state.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn


class _Average:
    """An average of a model's states, updated in place.

    Attributes:
        updates: how many states it has been given.
    """

    def __init__(self, model: nn.Module) -> None:
        self.updates = 0
        self._weights = {
            name: value.detach().to(_accumulator(value), copy=True)
            for name, value in model.state_dict().items()
        }

    @torch.no_grad()
    def _blend(self, model: nn.Module, share: float) -> None:
        """``average += share * (state - average)``."""
        averages, values = [], []
        state = model.state_dict()
        for name, average in self._weights.items():
            if average.is_floating_point():
                averages.append(average)
                values.append(state[name].to(average.dtype))
            else:
                average.copy_(state[name])
        torch._foreach_lerp_(averages, values, share)
        self.updates += 1

    def weights(self) -> dict[str, Tensor]:
        """The average, for ``model.load_state_dict`` or a file. Later updates change it."""
        return dict(self._weights)

    def state_dict(self) -> dict:
        """What a resumed run needs. Later updates change it."""
        return {"updates": self.updates, "weights": dict(self._weights)}

    def load_state_dict(self, state: dict) -> None:
        """Goes on from there.

        Raises:
            ValueError: it is another model's.
        """
        _check_alike(state["weights"], self._weights, "the saved average", "this model")
        for name, average in self._weights.items():
            average.copy_(state["weights"][name])
        self.updates = state["updates"]


class EMA(_Average):
    """Exponential moving average: ``average = decay * average + (1 - decay) * weights``.

    Args:
        model: its state is where the average begins.
        decay: in [0, 1).
        warmup: let the decay grow as ``min(decay, (1 + t) / (10 + t))``, with ``t`` the updates
            made before, so that the beginning is soon forgotten (TensorFlow's
            ``ExponentialMovingAverage``).

    Raises:
        ValueError: ``decay`` out of range.
    """

    def __init__(self, model: nn.Module, decay: float, *, warmup: bool = False) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"decay must lie in [0, 1), got {decay}")
        super().__init__(model)
        self.decay, self.warmup = decay, warmup

    def update(self, model: nn.Module) -> None:
        """Takes in the model's state after an optimiser step."""
        decay = self.decay
        if self.warmup:
            decay = min(decay, (1 + self.updates) / (10 + self.updates))
        self._blend(model, 1 - decay)


class EpochMean(_Average):
    """Arithmetic mean of the states after some epochs, the weight averaging of AST and SSAST.

    Args:
        model: gives the shapes.
        first, last: epochs to average, counted from 1 and both included, as in AST's scripts
            (AudioSet: 1 to 5; balanced AudioSet: 6 to 25). Default: to the end of the run.

    Raises:
        ValueError: ``first`` and ``last`` hold no epoch.
    """

    def __init__(self, model: nn.Module, first: int, last: int | None = None) -> None:
        if first < 1 or (last is not None and last < first):
            raise ValueError(f"first and last must be 1 <= first <= last, got {first} and {last}")
        super().__init__(model)
        self.first, self.last = first, last

    def update(self, model: nn.Module, epoch: int) -> None:
        """Takes in the model's state, if ``epoch`` is one to average.

        Args:
            model: the model.
            epoch: how many epochs are done.
        """
        if self.first <= epoch and (self.last is None or epoch <= self.last):
            self._blend(model, 1 / (self.updates + 1))

    def weights(self) -> dict[str, Tensor]:
        """The mean, for ``model.load_state_dict`` or a file. Later updates change it.

        Raises:
            ValueError: none of the epochs has been taken in yet.
        """
        if not self.updates:
            raise ValueError(
                f"there is no mean of weights before the end of epoch {self.first}; "
                "choose an earlier first epoch, or train longer"
            )
        return super().weights()


def average_files(paths: Sequence[str | PathLike]) -> dict[str, Tensor]:
    """Mean of the weights in several files, as HTS-AT takes of its best checkpoints.

    Sums are kept in float64, so the result does not depend on the order of the files, but for
    the last bit and for integer tensors, which are taken from the last file.

    Args:
        paths: safetensors files of one model.

    Returns:
        The weights in the data types of the files.

    Raises:
        ValueError: no files, one that is missing or damaged, or files of different models.
    """
    if not paths:
        raise ValueError("paths is empty: name at least one file of weights to average")
    first = _read(paths[0])
    sums = {name: value.to(_accumulator(value, torch.float64)) for name, value in first.items()}
    for path in paths[1:]:
        weights = _read(path)
        _check_alike(weights, first, path, paths[0])
        for name, value in weights.items():
            sums[name] = sums[name] + value if value.is_floating_point() else value
    return {
        name: (total / len(paths)).to(first[name].dtype) if total.is_floating_point() else total
        for name, total in sums.items()
    }


def _accumulator(value: Tensor, least: torch.dtype = torch.float32) -> torch.dtype:
    return torch.promote_types(value.dtype, least) if value.is_floating_point() else value.dtype


def _read(path: str | PathLike) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} cannot be read as a safetensors file: {error}") from error


def _check_alike(
    weights: Mapping[str, Tensor], expected: Mapping[str, Tensor], which: object, than: object
) -> None:
    def kind(tensors: Mapping[str, Tensor], name: str) -> tuple | None:
        return (tensors[name].dtype, tensors[name].shape) if name in tensors else None

    names = sorted(weights.keys() | expected.keys())
    differ = [name for name in names if kind(weights, name) != kind(expected, name)]
    if differ:
        raise ValueError(
            f"{which} holds other weights than {than}: {len(differ)} tensors differ in presence, "
            f"type or shape, such as {', '.join(differ[:3])}; average states of one model"
        )
