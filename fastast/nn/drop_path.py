"""Stochastic depth: residual branches that are left out at random in training."""

from __future__ import annotations

import torch
from torch import Tensor

from fastast.random import purpose_key, random_bits, random_uniform

_KEY = purpose_key("drop path key")
_DRAW = purpose_key("drop path")


def drop_path_keys(seed: int, epoch: int | Tensor, clip_ids: Tensor) -> Tensor:
    """What the draws of a batch's clips follow from: int64 ``[clips]``.

    Args:
        seed: of the run.
        epoch: of the training.
        clip_ids: int64 ``[clips]``, stable identifiers of the clips.
    """
    return random_bits(seed, epoch, clip_ids, _KEY, 1)[:, 0]


def drop_path_factors(keys: Tensor, rates: Tensor) -> Tensor:
    """What each residual branch of each clip is multiplied by: float32 ``[clips, branches]``.

    Zero with the branch's probability, else ``1 / (1 - rate)``, so that the mean is 1 (Huang et
    al., "Deep networks with stochastic depth", ECCV 2016; per clip and rescaled as in Swin).

    Args:
        keys: int64 ``[clips]``, from :func:`drop_path_keys` or otherwise distinct.
        rates: float32 ``[branches]``, in [0, 1), on the device of the keys.
    """
    draws = random_uniform(0, 0, keys, _DRAW, len(rates))
    return torch.where(draws < rates, 0.0, 1 / (1 - rates))
