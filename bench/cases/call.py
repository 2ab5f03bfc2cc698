"""A differentiable function on fixed inputs, as a contender: the step and its checked outputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from bench.memory import saved_bytes


@dataclass(frozen=True)
class Call:
    """``function()``, with gradients with respect to ``leaves`` if ``grad`` is given.

    Args:
        function: reads the leaves and returns the output.
        leaves: tensors that want gradients, by name.
        grad: of the output, or ``None`` for the forward alone.
        to_stream: brings a tensor of the contender's layout back to a packed stream.
        laid_out: names of the tensors that are in that layout; ``"out"`` is the output.
    """

    function: Callable[[], Tensor]
    leaves: dict[str, Tensor]
    grad: Tensor | None
    to_stream: Callable[[Tensor], Tensor] | None = None
    laid_out: tuple[str, ...] = ()

    def _run(self) -> tuple[Tensor, ...]:
        if self.grad is None:
            with torch.no_grad():
                return (self.function(),)
        out = self.function()
        return out.detach(), *torch.autograd.grad(out, tuple(self.leaves.values()), self.grad)

    def step(self) -> None:
        """The work that is timed."""
        self._run()

    def saved_bytes(self) -> int | None:
        """What the forward keeps for the backward beside the leaves; ``None`` without one."""
        return None if self.grad is None else saved_bytes(self.function, self.leaves.values())

    def outputs(self) -> dict[str, Tensor]:
        """The output and, if there are any, the leaves' gradients by name."""
        names = ("out", *self.leaves) if self.grad is not None else ("out",)
        return {
            name: self.to_stream(value) if name in self.laid_out else value
            for name, value in zip(names, self._run(), strict=True)
        }


def leaf(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """A copy that wants its gradient."""
    return tensor.detach().to(dtype or tensor.dtype, copy=True).requires_grad_()
