"""Do contenders compute the same thing?

The error of a tensor is measured twice, as ``|x - truth| / |truth|`` in the Euclidean and in the
maximum norm, with the truth in float64. The budget comes from the data: a contender may err three
times as much as the plain formula does in the contender's precision (FlashAttention's rule for its
backward), plus one rounding of the output and the 20-ulp exponentials of vectorised CPU kernels.
A mask that is off by one row, or a forgotten scale, exceeds it a thousandfold in float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

EXP_ULPS = 32


class DisagreementError(AssertionError):
    """A contender does not compute what the reference computes."""


def relative_errors(got: Tensor, truth: Tensor) -> tuple[float, float]:
    """Relative error in the Euclidean and in the maximum norm; NaN counts as infinite."""
    truth = truth.double()
    difference = (got.detach().to(truth.device, torch.float64) - truth).flatten()
    errors = []
    for order in (2, torch.inf):
        size = torch.linalg.vector_norm(truth.flatten(), order)
        error = torch.linalg.vector_norm(difference, order) / size.clamp(min=1e-300)
        errors.append(torch.nan_to_num(error, nan=torch.inf, posinf=torch.inf).item())
    return errors[0], errors[1]


def check(
    who: str,
    got: dict[str, Tensor],
    truth: dict[str, Tensor],
    rounded: dict[str, Tensor],
    dtype: torch.dtype,
) -> float:
    """Compares a contender's outputs with the reference's.

    Args:
        who: for the message.
        got: the contender's outputs and gradients.
        truth: the reference's in float64.
        rounded: the reference's in ``dtype``.
        dtype: that the contender computes in.

    Returns:
        The largest Euclidean error.

    Raises:
        DisagreementError: other tensors, shapes, or an error beyond the budget.
    """
    if got.keys() != truth.keys():
        raise DisagreementError(f"{who} returns {sorted(got)}, the reference {sorted(truth)}")
    floor = torch.finfo(dtype).eps + EXP_ULPS * torch.finfo(torch.float32).eps
    worst = 0.0
    for name, want in truth.items():
        if got[name].shape != want.shape:
            raise DisagreementError(
                f"{who}: {name} is {tuple(got[name].shape)}, the reference {tuple(want.shape)}"
            )
        errors = relative_errors(got[name], want)
        plain = relative_errors(rounded[name], want)
        for norm, error, rounding in zip(("2", "max"), errors, plain, strict=True):
            budget = 3 * rounding + floor
            if not error <= budget:
                raise DisagreementError(
                    f"{who}: {name} is off by {error:.2e} in the {norm}-norm; {budget:.2e} is "
                    f"what {str(dtype).removeprefix('torch.')} explains"
                )
        worst = max(worst, errors[0])
    return worst
