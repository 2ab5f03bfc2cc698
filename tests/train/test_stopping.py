"""Early stopping."""

import math

import pytest

from fastast.train.stopping import EarlyStopping


def stops_at(metrics, **kwargs):
    """Index of the first evaluation at which to stop."""
    stopping = EarlyStopping(**kwargs)
    return next((i for i, metric in enumerate(metrics) if stopping.update(metric)), None)


def test_patience_counts_evaluations_since_the_best():
    metrics = [0.5, 0.6, 0.6, 0.59, 0.61, 0.3, 0.4, 0.5]
    assert stops_at(metrics, patience=1) == 2  # equal is no improvement
    assert stops_at(metrics, patience=2) == 3
    assert stops_at(metrics, patience=3) == 7
    assert stops_at(metrics, patience=4) is None
    falling = [1 - metric for metric in metrics]
    assert stops_at(falling, patience=3, mode="min") == 7
    assert stops_at(falling, patience=3, mode="max") == 3


def test_small_changes_are_no_improvement():
    metrics = [10.0, 10.25, 10.5, 10.75, 11.0]
    assert stops_at(metrics, patience=1, min_delta=0.25) == 1
    assert stops_at(metrics, patience=2, min_delta=0.25) is None  # 10.5 is 0.5 above the best
    assert stops_at(metrics, patience=2, min_delta=0.5) == 2
    assert stops_at(metrics, patience=2, min_delta=0.04, relative=True) is None
    assert stops_at(metrics, patience=3, min_delta=0.08, relative=True) == 3
    # A relative change of a negative value, such as a log likelihood.
    assert stops_at([-10.0, -9.0, -8.95, -8.9], patience=2, min_delta=0.05, relative=True) == 3


@pytest.mark.parametrize("mode", ["max", "min"])
def test_what_is_not_finite_is_no_improvement(mode):
    for bad in (math.nan, math.inf, -math.inf):
        stopping = EarlyStopping(3, mode)
        assert not stopping.update(bad)
        assert not stopping.update(0.5)
        assert not stopping.update(bad)
        assert (stopping.best, stopping.bad) == (0.5, 1)
        assert not stopping.update(bad)
        assert stopping.update(bad)
    assert stops_at([math.nan] * 5, patience=2, mode=mode) == 1


def test_resumes():
    metrics = [0.1, 0.3, 0.2, 0.2, 0.35, 0.1, 0.1, 0.1]
    for cut in range(len(metrics)):
        whole = EarlyStopping(3)
        told = [whole.update(metric) for metric in metrics[:cut]]
        resumed = EarlyStopping(3)
        resumed.load_state_dict(whole.state_dict())
        told += [resumed.update(metric) for metric in metrics[cut:]]
        assert told == [False] * 7 + [True]


def test_arguments_are_checked():
    for wrong, message in (
        ({"patience": 0}, "patience"),
        ({"patience": 1, "mode": "up"}, "mode"),
        ({"patience": 1, "min_delta": -1.0}, "min_delta"),
        ({"patience": 1, "min_delta": math.nan}, "min_delta"),
    ):
        with pytest.raises(ValueError, match=message):
            EarlyStopping(**wrong)
