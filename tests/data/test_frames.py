from fractions import Fraction

import numpy as np
import pytest

from fastast.data import COMPRESSION_RATES, mixed_frame_shifts
from fastast.ops.mel_filterbank import frame_counts, hop_from_ms

RATES = (8000, 11025, 16000, 22050, 32000, 44100, 48000)


def test_compression_rates_are_those_of_the_paper():
    assert len(COMPRESSION_RATES) == 16
    assert COMPRESSION_RATES[:3] == (1.0, 1.2, 1.4) and COMPRESSION_RATES[-1] == 4.0


@pytest.mark.parametrize("sample_rate", RATES)
@pytest.mark.parametrize("base", ["10", "5", "12.5", "6.25", "11.6"])
def test_hops_are_exact_on_a_fine_grid(sample_rate, base):
    rates = [step / 1000 for step in range(1000, 4001)]
    for step, ms in enumerate(mixed_frame_shifts(float(base), rates), 1000):
        exact = Fraction(base) * step * sample_rate // 1_000_000
        assert hop_from_ms(ms, sample_rate) == exact


def test_bare_products_lose_samples():
    """The trap that the docstring speaks of is real."""
    steps = range(1000, 4001)
    exact = [int(Fraction("12.5") * step * 16000 // 1_000_000) for step in steps]
    assert [hop_from_ms(12.5 * (step / 1000), 16000) for step in steps] != exact


def test_frame_counts():
    samples = np.array([0, 199, 200, 279, 280, 1000])
    assert frame_counts(samples, 200, 80).tolist() == [0, 0, 1, 1, 2, 11]
    assert frame_counts(199, 200, 400) == 0
    assert frame_counts(np.array([600, 600]), 200, np.array([100, 400])).tolist() == [5, 2]
