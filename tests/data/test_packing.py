import numpy as np
import pytest

from fastast.data import next_fit


def test_fills_in_order():
    assert next_fit(np.array([4, 4, 2, 3, 9, 1]), 10, 8).tolist() == [0, 0, 0, 1, 2, 2]
    assert next_fit(np.array([1, 1, 1, 1, 1]), 10, 2).tolist() == [0, 0, 1, 1, 2]
    assert next_fit(np.array([], np.int64), 10, 2).tolist() == []


def test_clip_that_no_batch_can_hold():
    with pytest.raises(ValueError, match=r"lengths\[1\] is 11"):
        next_fit(np.array([4, 11]), 10, 8)
