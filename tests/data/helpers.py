"""What the tests of the data path share."""

import dataclasses
from pathlib import Path

import numpy as np
import torch

RATE = 8000


def tone(samples: int, rate: int = RATE, hertz: float = 440.0) -> np.ndarray:
    """A sine at half of full scale."""
    return 0.5 * np.sin(2 * np.pi * hertz / rate * np.arange(samples))


def write_audio(path: Path, samples: int = 800, rate: int = RATE) -> None:
    """A tone as a file, and the folders that it needs."""
    import soundfile  # which not every machine that runs tests has

    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, tone(samples, rate), rate)


def tensors(batch) -> dict[str, torch.Tensor]:
    """Every tensor of a batch, by name."""
    found = {}
    for field in dataclasses.fields(batch):
        value = getattr(batch, field.name)
        if isinstance(value, torch.Tensor):
            found[field.name] = value
        elif dataclasses.is_dataclass(value):
            found |= {f"{field.name}.{name}": tensor for name, tensor in tensors(value).items()}
    return found
