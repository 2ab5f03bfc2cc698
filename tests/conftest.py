"""Fixtures and markers that every test may use."""

import faulthandler
import multiprocessing
import os
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

# Before the library is imported: some kernels wait for nothing but these tests.
os.environ.setdefault("FASTAST_GPU_KERNELS", "all")

from tests.testing import write_tone  # noqa: E402


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    no_gpu = pytest.mark.skip(reason="no CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(no_gpu)


def pytest_unconfigure():
    # Python waits at its exit for what still runs, without limit. Here that is a failure, and shows
    # where it waits; the stream is the real one, which pytest has given back by then.
    faulthandler.dump_traceback_later(120, exit=True, file=sys.__stderr__)


@pytest.fixture(autouse=True)
def nothing_left_running():
    """No test leaves behind what Python would wait for at its exit."""
    before = running()
    yield
    # What was told to end may need a moment on a busy machine.
    patience = time.monotonic() + 20
    while (left := running() - before) and time.monotonic() < patience:
        time.sleep(0.05)
    assert not left, f"still running: {sorted(map(str, left))}"


def running() -> set:
    """Processes that multiprocessing has started, and threads that are not daemons.

    Not the pools that PyTorch's compiler keeps, nameless and idle, which Python ends at its exit.
    """
    threads = (
        thread
        for thread in threading.enumerate()
        if not thread.daemon and not thread.name.startswith("ThreadPoolExecutor-")
    )
    return {*multiprocessing.active_children(), *threads}


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """Folder of the golden numbers and real audio that are not part of the repository."""
    named = os.environ.get("FASTAST_SHARED")
    if named:
        # A wrong name is a mistake to report, not a reason to skip.
        assert Path(named).is_dir(), f"FASTAST_SHARED={named} is not a folder"
        return Path(named)
    beside = Path(__file__).resolve().parents[2] / "shared"
    if not beside.is_dir():
        pytest.skip(f"no shared data: set FASTAST_SHARED or provide {beside}")
    return beside


@pytest.fixture(scope="session")
def tones(tmp_path_factory) -> Path:
    """A data set of two classes, noisy tones of 0.2 to 0.9 s."""
    root = tmp_path_factory.mktemp("tones")
    for label, pitch in (("high", 1500.0), ("low", 300.0)):
        (root / label).mkdir()
        for index in range(20):
            write_tone(root / label / f"{index}.wav", pitch, 0.2 + 0.035 * index)
    return root


@pytest.fixture
def recipe(tones):
    """A recipe that trains an ElasticAST of two narrow blocks on it in a few seconds."""
    # Imported here, because the machine that runs the GPU tests may lack what training needs.
    from fastast.train import (
        AugmentConfig,
        DataConfig,
        FrontendConfig,
        ModelConfig,
        OptimConfig,
        Recipe,
        TrainConfig,
    )

    return Recipe(
        DataConfig(root=str(tones), sample_rate=8000, validation=0.2, test=0.2),
        FrontendConfig(num_mels=32, compression=[1.0, 1.6, 2.0]),
        AugmentConfig(gain_db=3.0, time_mask=0.1),
        ModelConfig(patch_size=(16, 8), dim=32, depth=2, num_heads=2, max_time_patches=10),
        OptimConfig(lr=2e-3),
        TrainConfig(epochs=3, batch_tokens=120, batch_clips=8, device="cpu"),
    )
