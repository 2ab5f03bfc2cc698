"""Learning rate and weight decay as functions of how far a run has come.

They are computed anew at every step from counters that the loop has anyway: steps, epochs and the
share of the run that is done. So a resumed run needs no state of theirs, and a run that is limited
by tokens needs no number of steps known in advance. Only ``plateau`` remembers something: the best
validation metric, and how often it has cut the learning rate.
"""

from __future__ import annotations

from typing import Literal

import torch

from fastast.schedules import cosine
from fastast.train.optim import OptimConfig
from fastast.train.stopping import EarlyStopping


class Schedule:
    """The learning rate and weight decay of a run.

    Args:
        config: the settings.
        mode: whether the metric that ``plateau`` follows is to rise or to fall.

    Attributes:
        cuts: how often ``plateau`` has cut the learning rate.
    """

    def __init__(self, config: OptimConfig, mode: Literal["max", "min"] = "max") -> None:
        self.config = config
        # 1e-4 of the best is ReduceLROnPlateau's default, which SSAST leaves as it is.
        self._patience = EarlyStopping(config.patience + 1, mode, min_delta=1e-4, relative=True)
        self.cuts = 0

    def lr(self, *, step: int, epoch: float, done: float) -> float:
        """The learning rate of a step, before the factor of each parameter group.

        Args:
            step: optimiser steps taken before it.
            epoch: passes over the data before it, a fraction within an epoch.
            done: share of the run before it, in [0, 1].
        """
        config = self.config
        now = {"share": done, "epochs": epoch, "steps": step}[config.warmup_unit]
        if now < config.warmup:
            if config.warmup_unit == "steps":
                now -= now % config.warmup_every
            rise = now / config.warmup
            return self._after_warmup(epoch, 0.0) * (
                config.warmup_from + (1 - config.warmup_from) * rise
            )
        # The share of the run at which the warm-up ended, had the run always gone as fast as it
        # has so far. It is exact in epochs and, if epochs have as many steps, in steps.
        end = config.warmup * done / now if config.warmup else 0.0
        return self._after_warmup(epoch, (done - end) / (1 - end) if end < 1 else 0.0)

    def weight_decay(self, *, done: float) -> float:
        """The weight decay at a share of the run, of those parameters that decay."""
        start, end = self.config.weight_decay, self.config.weight_decay_end
        return start if end is None else cosine(start, end, done)

    def apply(
        self, optimizer: torch.optim.Optimizer, *, step: int, epoch: float, done: float
    ) -> float:
        """Sets an optimiser of :func:`~fastast.train.optim.make_optimizer` up for a step.

        Args:
            optimizer: its groups are changed in place.
            step, epoch, done: see :meth:`lr`.

        Returns:
            The learning rate, for the log.
        """
        lr = self.lr(step=step, epoch=epoch, done=done)
        weight_decay = self.weight_decay(done=done)
        for group in optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
            group["weight_decay"] = weight_decay if group["decays"] else 0.0
        return lr

    def observe(self, metric: float) -> None:
        """Tells ``plateau`` the outcome of an evaluation; to the other schedules it is nothing."""
        if self.config.schedule == "plateau" and self._patience.update(metric):
            self.cuts += 1
            self._patience.bad = 0

    def state_dict(self) -> dict:
        """What a resumed run needs."""
        return {"cuts": self.cuts, "patience": self._patience.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        """Goes on from there."""
        self.cuts = state["cuts"]
        self._patience.load_state_dict(state["patience"])

    def _after_warmup(self, epoch: float, share: float) -> float:
        """The learning rate after so many epochs and at a share of what follows the warm-up."""
        config = self.config
        if config.schedule == "cosine":
            return cosine(config.lr, config.min_lr, share)
        if config.schedule == "step":
            passed = (int(epoch) - config.milestone) // config.milestone_every + 1
            factor = config.gamma ** max(passed, 0)
        elif config.schedule == "table":
            rows = reversed(config.epoch_factors)
            factor = next((factor for first, factor in rows if first <= epoch), 1.0)
        elif config.schedule == "plateau":
            factor = config.gamma**self.cuts
        else:
            factor = 1.0
        return max(config.lr * factor, config.min_lr)
