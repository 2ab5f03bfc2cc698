"""Fixtures and markers that every test may use."""

import os
from pathlib import Path

import pytest
import torch


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    no_gpu = pytest.mark.skip(reason="no CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(no_gpu)


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
