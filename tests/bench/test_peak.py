"""What a process grows by."""

import sys

import pytest

from bench import peak

MIB = 2**20


def take(mebibytes: str, before: str):
    """Works that hold so much memory for a moment."""
    return [lambda: bytearray(int(before) * MIB).count(1), lambda: _touch(int(mebibytes) * MIB)]


def _touch(size: int) -> int:
    memory = bytearray(size)
    memory[::4096] = b"x" * len(range(0, size, 4096))
    return len(memory)


pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@pytest.mark.parametrize("warm", [False, True])
def test_growth_is_the_peak_over_what_there_was(warm, monkeypatch):
    monkeypatch.setattr(peak, "PROCESSES", 1)
    found = peak.growth("tests.bench.test_peak:take", "64", "200", warm=warm)
    # A larger peak before the measurement does not hide it.
    assert 63 * MIB < found < 72 * MIB


def test_a_process_that_fails_says_why():
    with pytest.raises(RuntimeError, match="no such contender|StopIteration|invalid literal"):
        peak.growth("tests.bench.test_peak:take", "x", "y", warm=True)
