import numpy as np
import pytest

from fastast.data.packing import STRATEGIES, pack

BUDGET = 24_576


@pytest.fixture(scope="module")
def voxceleb() -> np.ndarray:
    """Tokens of clips of 4 to 30 s, 8.2 s on average, in patches of 16 x 16 every 10 ms."""
    draw = np.random.default_rng(3)
    excess = np.exp(draw.normal(np.log(4.2) - 0.5, 1.0, 20_000))
    seconds = np.clip(4.0 + excess, None, 145.0).clip(max=30.0)
    return (seconds * 100).astype(np.int64) // 16 * 8


@pytest.mark.parametrize(
    ("lengths", "max_items", "expected"),
    [
        ([4, 4, 2, 3, 9, 1], 8, [0, 0, 0, 1, 2, 2]),
        ([1, 1, 1, 1, 1], 2, [0, 0, 1, 1, 2]),
        (np.array([], np.int32), 2, []),
    ],
)
def test_next_fit_fills_in_order(lengths, max_items, expected):
    bins = pack(lengths, 10, max_items, strategy="next_fit")
    assert bins.dtype == np.int64
    assert bins.tolist() == expected


def test_clip_that_no_batch_can_hold():
    with pytest.raises(ValueError, match=r"lengths\[1\] is 11"):
        pack(np.array([4, 11]), 10, 8)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_strategy_by_name(strategy):
    lengths = np.array([4, 7, 3, 6, 2, 8])
    bins = pack(lengths, 10, 9, strategy=strategy)
    assert np.bincount(bins, lengths).max() <= 10
    assert bins.max() == (3 if strategy != "best_fit_decreasing" else 2)


def test_unknown_strategy():
    with pytest.raises(ValueError, match="strategy is 'best'; it must be one of next_fit, "):
        pack(np.array([4]), 10, 8, strategy="best")


@pytest.mark.parametrize("group", [1, 8])
@pytest.mark.parametrize("strategy", ["first_fit", "best_fit_decreasing"])
def test_padding_is_below_one_percent(voxceleb, strategy, group):
    bins = pack(voxceleb, BUDGET, 128, strategy=strategy, window=1024, group=group)
    num_bins = group * (bins.max() // group + 1)
    tokens = np.bincount(bins, voxceleb, num_bins)
    assert tokens.max() <= BUDGET
    assert np.bincount(bins).max() <= 128
    assert 1 - tokens.sum() / (num_bins * BUDGET) < 0.01


def test_the_defaults_are_those_documented(voxceleb):
    expected = pack(voxceleb, BUDGET, 128, strategy="first_fit", window=1024, group=1)
    assert np.array_equal(pack(voxceleb, BUDGET, 128), expected)


def test_ranks_of_a_step_get_equally_many_tokens(voxceleb):
    bins = pack(voxceleb, BUDGET, 128, group=8)
    tokens = np.bincount(bins, voxceleb, 8 * (bins.max() // 8 + 1)).reshape(-1, 8)
    assert (tokens.max(1) / tokens.mean(1)).mean() < 1.005
    totals = tokens.sum(0)
    assert totals.max() - totals.min() < 0.05 * BUDGET


def test_a_batch_draws_on_two_windows_at_most(voxceleb):
    bins = pack(voxceleb, BUDGET, 128, window=1024)
    window = np.arange(len(bins)) // 1024
    spans = [np.ptp(window[bins == b]) for b in range(bins.max())]
    assert max(spans) == 1
