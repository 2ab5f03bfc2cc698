"""The counter-based generator: its values, its statistics, and what a draw depends on."""

import zlib

import numpy as np
import pytest
import scipy.stats
import torch

from fastast import random
from fastast.random import random_below, random_beta, random_bits, random_uniform

CLIPS = torch.arange(2000)


def splitmix64(state: int) -> int:
    """The published generator's output for the state, in Python's unbounded integers."""
    word = (1 << 64) - 1
    state = (state + 0x9E3779B97F4A7C15) & word
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & word
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & word
    return state ^ (state >> 31)


def signed(word: int) -> int:
    return word - (1 << 64) if word >> 63 else word


def unsigned(bits: torch.Tensor) -> list[int]:
    return [word % (1 << 64) for word in bits.flatten().tolist()]


def test_known_answers():
    # The first outputs for the seeds 0 and 1234567, as printed by other implementations.
    assert splitmix64(0) == 0xE220A8397B1DCDAF
    assert splitmix64(0x9E3779B97F4A7C15) == 0x6E789E6AA1B965F4
    assert splitmix64(1234567) == 6457827717110365317
    states = [0, 1234567, 0x9E3779B97F4A7C15, (1 << 64) - 1, 1 << 63]
    ours = random.splitmix64(torch.tensor([signed(state) for state in states]))
    assert unsigned(ours) == [splitmix64(state) for state in states]


@pytest.mark.parametrize(("seed", "epoch"), [(0, 0), (7, 3), (-1, 100), (2**40, 2**33)])
def test_bits_equal_an_independent_implementation(seed, epoch):
    clips, purpose, draws = [0, 1, 123456789, 2**45, -1], "gain", 3
    word = (1 << 64) - 1
    expected = []
    for clip in clips:
        state = seed & word
        for key in (zlib.crc32(purpose.encode()), epoch, clip & word):
            state = splitmix64(state ^ key)
        expected += [splitmix64(splitmix64(state) ^ draw) for draw in range(draws)]
    bits = random_bits(seed, epoch, torch.tensor(clips), purpose, draws)
    assert bits.shape == (5, 3) and unsigned(bits) == expected
    uniform = random_uniform(seed, epoch, torch.tensor(clips), purpose, draws)
    assert uniform.dtype == torch.float32
    assert uniform.flatten().tolist() == [(word >> 40) / 2**24 for word in expected]


def test_a_clip_draws_the_same_in_any_batch():
    full = random_uniform(1, 2, CLIPS, "mask", 5)
    order = torch.randperm(2000, generator=torch.Generator().manual_seed(0))[:300]
    assert torch.equal(random_uniform(1, 2, CLIPS[order], "mask", 5), full[order])
    assert torch.equal(random_uniform(1, 2, CLIPS[17:18], "mask", 5), full[17:18])
    assert torch.equal(random_uniform(1, 2, CLIPS, "mask", 2), full[:, :2])
    assert random_uniform(1, 2, CLIPS[:0], "mask", 5).shape == (0, 5)
    assert random_uniform(1, 2, CLIPS, "mask", 0).shape == (2000, 0)


def test_epoch_may_be_a_tensor():
    for epoch in (torch.tensor(3), torch.tensor(3, dtype=torch.int32)):
        assert torch.equal(
            random_bits(0, epoch, CLIPS, "gain", 2), random_bits(0, 3, CLIPS, "gain", 2)
        )


def test_uniform():
    draws = random_uniform(0, 0, CLIPS, "gain", 100).double().flatten()
    assert 0 <= draws.min() and draws.max() < 1
    # Five standard deviations of the mean and of the variance of 200,000 uniform numbers.
    assert (draws.mean() - 0.5).abs() < 5 * (1 / 12 / len(draws)) ** 0.5
    assert (draws.var() - 1 / 12).abs() < 5 * (1 / 180 / len(draws)) ** 0.5
    counts = torch.histc(draws, bins=64, min=0, max=1)
    chi_square = ((counts - len(draws) / 64).square() / (len(draws) / 64)).sum()
    assert 22 < chi_square < 120  # 63 degrees of freedom: mean 63, standard deviation 11


def test_every_bit_is_fair():
    bits = random_bits(0, 0, CLIPS, "gain", 10).flatten()
    ones = torch.stack([(bits >> place & 1).double().mean() for place in range(64)])
    assert ((ones - 0.5).abs() < 5 * 0.5 / len(bits) ** 0.5).all()


BASE = {"seed": 0, "epoch": 0, "clips": CLIPS, "purpose": "gain", "draws": 20}


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 1},
        {"epoch": 1},
        {"purpose": "mask"},
        {"clips": CLIPS + 2000},
        {"seed": 1, "epoch": -1},  # would cancel out if the keys were added
        {"seed": 1, "epoch": 1},  # or combined with exclusive or
    ],
    ids=str,
)
def test_keys_are_independent(change):
    a = random_uniform(**BASE).double().flatten()
    b = random_uniform(**{**BASE, **change}).double().flatten()
    assert (a == b).double().mean() < 1e-4
    correlation = torch.corrcoef(torch.stack([a, b]))[0, 1]
    assert correlation.abs() < 5 / len(a) ** 0.5


def test_neighbours_are_independent():
    draws = random_uniform(0, 0, CLIPS, "gain", 50).double() - 0.5
    for shifted in (draws.roll(1, 0), draws.roll(1, 1)):
        correlation = 12 * (draws * shifted).mean()
        assert correlation.abs() < 5 / draws.numel() ** 0.5


def test_no_two_draws_collide():
    bits = random_bits(0, 0, CLIPS, "gain", 100)
    assert bits.unique().numel() == bits.numel()


# Integers and Beta numbers --------------------------------------------------------------------


def test_integers_equal_an_independent_computation():
    clips = torch.tensor([0, 1, 123456789, 2**45, -1])
    words = [word >> 32 for word in unsigned(random_bits(5, 2, clips, "partner", 1))]
    for limit in (0, 1, 7, 160_000, 2**31 - 1):
        expected = [word * limit // 2**32 for word in words]
        assert random_below(5, 2, clips, "partner", limit).tolist() == expected
    limits = [3, 0, 10**6, 2**31 - 1, 48_000]
    expected = [word * limit // 2**32 for word, limit in zip(words, limits, strict=True)]
    for dtype in (torch.int32, torch.int64):
        drawn = random_below(5, 2, clips, "partner", torch.tensor(limits, dtype=dtype))
        assert drawn.dtype == torch.int64 and drawn.tolist() == expected


def test_integers_are_uniform():
    counts = torch.bincount(random_below(0, 0, torch.arange(20_000), "partner", 10), minlength=10)
    assert len(counts) == 10
    assert ((counts - 2000).abs() < 5 * 1800**0.5).all()
    # Every number of a large range can come up, which float32 would not allow.
    large = random_below(0, 0, torch.arange(20_000), "partner", 2**31 - 1)
    assert (large % 2 == 1).double().mean() == pytest.approx(0.5, abs=0.02)


SHAPES = [0.02, 0.2, 0.5, 0.9, 1.0, 1.5, 10.0, 300.0, 10_000.0]


@pytest.mark.parametrize("a", SHAPES)
def test_beta_is_the_inverse_of_the_distribution_function(a, monkeypatch):
    uniform = np.arange(1, 2**16).astype(np.float32) / 2**16
    monkeypatch.setattr(random, "random_uniform", lambda *keys: torch.from_numpy(uniform))
    numbers = random_beta(0, 0, CLIPS, "mix", 1, a)
    assert numbers.dtype == torch.float32
    # Close to 1 float32 is too coarse for the comparison, but the upper half mirrors the lower.
    lower, upper = numbers[: 2**15], numbers[2**15 - 1 :]
    torch.testing.assert_close(upper.flip(0), 1 - lower, rtol=0, atol=2.0**-23)
    lower = lower[lower > torch.finfo(torch.float32).tiny].double().numpy()
    assert len(lower) > 10_000 and lower[-1] == 0.5
    error = scipy.stats.beta.cdf(lower, a, a) - uniform[2**15 - len(lower) : 2**15]
    assert np.abs(error).max() < 1e-4


@pytest.mark.parametrize("a", [0.2, 0.5, 1.0, 10.0])
def test_beta_numbers_of_clips(a):
    numbers = random_beta(1, 2, CLIPS, "mix", 3, a)
    assert numbers.shape == (2000, 3) and 0 <= numbers.min() and numbers.max() <= 1
    assert scipy.stats.kstest(numbers.double().flatten().numpy(), "beta", (a, a)).pvalue > 1e-4
    order = torch.randperm(2000, generator=torch.Generator().manual_seed(0))[:7]
    assert torch.equal(random_beta(1, 2, CLIPS[order], "mix", 3, a), numbers[order])
    assert torch.equal(random_beta(1, 2, CLIPS[5:6], "mix", 1, a), numbers[5:6, :1])
    assert random_beta(1, 2, CLIPS[:0], "mix", 3, a).shape == (0, 3)


@pytest.mark.parametrize("a", [0.0, -1.0, float("nan"), 1e5])
def test_beta_of_a_wrong_shape(a):
    with pytest.raises(ValueError, match=r"a must lie in \(0, 10000\]"):
        random_beta(0, 0, CLIPS, "mix", 1, a)
