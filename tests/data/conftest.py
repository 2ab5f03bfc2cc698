"""Small audio data sets on disk."""

import numpy as np
import pytest
import torch

from fastast.data import AudioDataset, write_wav
from tests.data.helpers import RATE, tone


@pytest.fixture
def tones(tmp_path):
    """40 tones of 0.02 to 1.1 s in two classes; the lengths are in the dataset."""
    root = tmp_path / "tones"
    for number, samples in enumerate(np.random.default_rng(0).integers(160, 9000, 40)):
        folder = root / ("even" if number % 2 == 0 else "odd")
        folder.mkdir(parents=True, exist_ok=True)
        waveform = torch.from_numpy(tone(samples, hertz=100 + 10 * number) * 32768).short()
        write_wav(folder / f"{number:02}.wav", waveform, RATE)
    return AudioDataset.from_folder(root, RATE)
