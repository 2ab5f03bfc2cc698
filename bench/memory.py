"""Bytes that a forward keeps for its backward.

Unique storages among the tensors that autograd saves, parameters and inputs excluded, counted by
``torch.autograd.graph.saved_tensors_hooks``. A saved view counts as the whole storage behind it,
which it keeps alive. The copies that autocast makes of the weights count: they are no parameters,
and live until the backward. This is not a GPU's peak memory, which adds temporaries, gradients
and the optimiser's state.

Fake tensors have shapes and no data, so a model of any size is counted in a second on any
machine. The step is traced as on a GPU, with its rules of what autocast casts; there is no
backward, since what is kept is known when the loss is.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode


def saved_bytes(forward: Callable[[], Tensor], exclude: Iterable[Tensor]) -> int:
    """Bytes of the storages that ``forward()`` saves, other than those of ``exclude``."""
    excluded = {tensor.untyped_storage()._cdata for tensor in exclude}
    kept = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in excluded:
            # Holding the storage keeps its address from being given to another one.
            kept[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = forward()
    total = sum(storage.nbytes() for storage in kept.values())
    del result
    return total


def fake_like(value: Any, mode: FakeTensorMode, device: str) -> Any:
    """A copy of nested lists, tuples and objects whose tensors are fake ones on ``device``.

    ``host_offsets`` stay on the CPU, as :meth:`fastast.Segments.to` leaves them.
    """
    if isinstance(value, Tensor):
        with mode:
            return torch.empty_strided(
                value.shape, value.stride(), dtype=value.dtype, device=device
            )
    if isinstance(value, (list, tuple)):
        return type(value)(fake_like(item, mode, device) for item in value)
    if not hasattr(value, "__dict__"):
        return value
    twin = copy.copy(value)
    for name, item in vars(value).items():
        place = "cpu" if name == "host_offsets" else device
        object.__setattr__(twin, name, fake_like(item, mode, place))
    return twin


def tensors_of(value: Any) -> Iterator[Tensor]:
    """The tensors in nested lists, tuples and objects."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors_of(item)
    elif hasattr(value, "__dict__"):
        yield from tensors_of(list(vars(value).values()))


@contextmanager
def cuda_autocast(dtype: torch.dtype | None) -> Iterator[None]:
    """CUDA's autocast rules even without a GPU, where ``torch.autocast`` turns itself off."""
    before = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    torch.set_autocast_enabled("cuda", dtype is not None)
    torch.set_autocast_dtype("cuda", dtype or before[1])
    torch.autocast_increment_nesting()
    try:
        with warnings.catch_warnings():
            # The model's own torch.autocast blocks say that there is no GPU.
            warnings.filterwarnings("ignore", message=".*CUDA is not available.*")
            yield
    finally:
        if torch.autocast_decrement_nesting() == 0:
            torch.clear_autocast_cache()
        torch.set_autocast_enabled("cuda", before[0])
        torch.set_autocast_dtype("cuda", before[1])
