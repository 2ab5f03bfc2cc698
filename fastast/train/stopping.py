"""When a metric has stopped improving."""

from __future__ import annotations

import math
from typing import Literal


class EarlyStopping:
    """Runs out of patience when a metric has not improved for a while.

    Args:
        patience: evaluations in a row without improvement after which it has run out.
        mode: whether the metric is to rise (``"max"``) or to fall (``"min"``).
        min_delta: a smaller change is no improvement.
        relative: ``min_delta`` is a share of the best value.

    Attributes:
        best: the best value so far, None before the first.
        bad: evaluations since then.

    Raises:
        ValueError: an argument out of range.
    """

    def __init__(
        self,
        patience: int,
        mode: Literal["max", "min"] = "max",
        min_delta: float = 0.0,
        relative: bool = False,
    ) -> None:
        if patience < 1:
            raise ValueError(f"patience must be at least 1, got {patience}")
        if mode not in ("max", "min"):
            raise ValueError(f"mode must be 'max' or 'min', got {mode!r}")
        if not min_delta >= 0:
            raise ValueError(f"min_delta must be at least 0, got {min_delta}")
        self.patience, self.mode = patience, mode
        self.min_delta, self.relative = min_delta, relative
        self.best: float | None = None
        self.bad = 0

    def update(self, value: float) -> bool:
        """Notes an evaluation; returns whether patience has run out. NaN is no improvement."""
        if self._improves(value):
            self.best, self.bad = value, 0
        else:
            self.bad += 1
        return self.bad >= self.patience

    def _improves(self, value: float) -> bool:
        if not math.isfinite(value):
            return False
        if self.best is None:
            return True
        gain = value - self.best if self.mode == "max" else self.best - value
        return gain > self.min_delta * (abs(self.best) if self.relative else 1.0)

    def state_dict(self) -> dict:
        """What a resumed run needs."""
        return {"best": self.best, "bad": self.bad}

    def load_state_dict(self, state: dict) -> None:
        """Goes on from there."""
        self.best, self.bad = state["best"], state["bad"]
