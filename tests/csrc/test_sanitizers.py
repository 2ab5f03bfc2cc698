"""The filterbank's C++ once more, under the address and undefined-behaviour sanitizers."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def library(name):
    """Path of a sanitizer's library; the compiler gives the bare name back where it has none."""
    compiler = os.environ.get("CXX", "c++")
    found = subprocess.run(
        [compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True
    ).stdout.strip()
    if not os.path.isabs(found):
        pytest.skip(f"{compiler} has no {name}")
    return found


def test_filterbank():
    preload = f"{library('libasan.so')} {library('libubsan.so')}"
    environment = {"FASTAST_SANITIZE": "1", "ASAN_OPTIONS": "detect_leaks=0", "LD_PRELOAD": preload}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "--capture=no", "tests/csrc/test_mel_kernels.py"],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout
