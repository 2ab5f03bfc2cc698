"""Counter-based random numbers: a pure function of (seed, epoch, clip, purpose, index).

The same clip draws the same numbers in whichever worker, rank or batch it turns up, so a run
does not depend on how its clips were dealt out. There is no generator state to save or to
synchronise, and the draws are made on the device that uses them.

The mixing function is splitmix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number
generators", OOPSLA 2014), applied to a chain of the keys.
"""

from __future__ import annotations

import zlib

import numpy as np
import torch
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)  # as signed 64-bit integers, which wrap around
_MIX_1 = 0xBF58476D1CE4E5B9 - (1 << 64)
_MIX_2 = 0x94D049BB133111EB - (1 << 64)


def purpose_key(purpose: str) -> int:
    """The number that stands for a purpose. Compiled code needs it beforehand, as a constant."""
    return zlib.crc32(purpose.encode())


def _shift_right(x: Tensor, bits: int) -> Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)  # torch's shift copies the sign bit; drop it


def splitmix64(x: Tensor) -> Tensor:
    """Mixes int64 numbers, each by itself; the arithmetic wraps around."""
    x = x + _GOLDEN
    x = (x ^ _shift_right(x, 30)) * _MIX_1
    x = (x ^ _shift_right(x, 27)) * _MIX_2
    return x ^ _shift_right(x, 31)


def random_bits(
    seed: int, epoch: int | Tensor, clips: Tensor, purpose: str | int, draws: int
) -> Tensor:
    """Hashes the keys to int64 ``[len(clips), draws]``, uniform over all 64-bit patterns.

    Args:
        seed: of the run.
        epoch: of the training; the same clip draws anew in each. A tensor works as well, so
            that a compiled step need not be recompiled for every epoch.
        clips: int64 ``[S]``, stable identifiers of the clips (their index in the dataset).
        purpose: what the numbers are for, such as ``"gain"``, or its :func:`purpose_key`; different
            purposes are independent.
        draws: how many numbers per clip.
    """
    purpose = purpose_key(purpose) if isinstance(purpose, str) else purpose
    state = torch.full_like(clips, seed, dtype=torch.int64)
    for key in (purpose, epoch, clips):
        state = splitmix64(state ^ key)
    index = torch.arange(draws, device=clips.device, dtype=torch.int64)
    return splitmix64(splitmix64(state[:, None]) ^ index)


def random_uniform(
    seed: int, epoch: int | Tensor, clips: Tensor, purpose: str | int, draws: int
) -> Tensor:
    """Uniform numbers in [0, 1): float32 ``[len(clips), draws]``. Arguments: `random_bits`."""
    return unit_interval(random_bits(seed, epoch, clips, purpose, draws))


def random_below(
    seed: int, epoch: int | Tensor, clips: Tensor, purpose: str | int, limit: int | Tensor
) -> Tensor:
    """Uniform integers in [0, limit): int64 ``[len(clips)]``, one per clip.

    The likeliest number is likelier than the others by a factor of about ``1 + limit / 2**32``.

    Args:
        seed, epoch, clips, purpose: see :func:`random_bits`.
        limit: below 2**31; one for all clips, or integers ``[len(clips)]``. A limit of 0 gives 0.
    """
    return below(random_bits(seed, epoch, clips, purpose, 1)[:, 0], limit)


def below(bits: Tensor, limit: int | Tensor) -> Tensor:
    """Makes of :func:`random_bits` integers in [0, limit), as :func:`random_below` does."""
    return _shift_right(bits, 32) * limit >> 32  # the product stays below 2**63


def unit_interval(bits: Tensor) -> Tensor:
    """Makes of :func:`random_bits` float32 numbers in [0, 1), as :func:`random_uniform` does."""
    return _shift_right(bits, 40).to(torch.float32) * 2.0**-24


def random_beta(
    seed: int, epoch: int | Tensor, clips: Tensor, purpose: str | int, draws: int, a: float
) -> Tensor:
    """Numbers of the symmetric distribution Beta(a, a): float32 ``[len(clips), draws]``.

    The inverse of the distribution function, which is tabulated, at uniform numbers; within 1e-4
    in probability. For the host alone.

    Args:
        seed, epoch, clips, purpose, draws: see :func:`random_bits`.
        a: both parameters, in (0, 10000]. Numbers near 0 and 1 prevail below 1, numbers near a
            half above.

    Raises:
        ValueError: ``a`` out of range.
    """
    if not 0 < a <= 1e4:
        raise ValueError(f"a must lie in (0, 10000], got {a}")
    # The lower half; the upper one is its mirror image. Where the density x^(a-1) (1-x)^(a-1) is
    # unbounded at 0, the table is over t = (2x)^a: with dt for x^(a-1) dx, nothing is.
    power = min(a, 1.0)
    x = np.linspace(0.0, 0.5, 4097)
    t = (2 * x) ** power
    middle = (x[1:] + x[:-1]) / 2
    density = np.exp((a - power) * np.log(2 * middle) + (a - 1) * np.log(2 - 2 * middle))
    cdf = np.cumsum(np.append(0.0, density * np.diff(t)))
    cdf *= 0.5 / cdf[-1]

    uniform = random_uniform(seed, epoch, clips, purpose, draws).double().numpy()
    lower = np.interp(np.minimum(uniform, 1 - uniform), cdf, t) ** (1 / power) / 2
    return torch.from_numpy(np.where(uniform < 0.5, lower, 1 - lower)).float()
