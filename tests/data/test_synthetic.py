import numpy as np
import pytest
import torch

from fastast.data import AudioDataset, generate_sounds


@pytest.fixture(scope="module")
def sounds(tmp_path_factory):
    return generate_sounds(tmp_path_factory.mktemp("sounds") / "new", 6, 2, seed=3)


def test_layout(sounds):
    train = AudioDataset.from_folder(sounds / "train", 16000)
    test = AudioDataset.from_folder(sounds / "test", 16000)
    assert len(train.class_names) == 8 and train.class_names == test.class_names
    assert len(train) == 48 and len(test) == 16
    assert train.lengths.min() >= 0.3 * 16000 - 1 and train.lengths.max() <= 6 * 16000
    assert train.lengths.max() > 3 * train.lengths.min()
    peaks = [train.waveform(index).abs().max() for index in range(len(train))]
    assert min(peaks) > 1000 and max(peaks) < 32767
    assert list(sounds.parent.iterdir()) == [sounds]


def test_deterministic_and_independent_of_the_count(sounds, tmp_path):
    again = AudioDataset.from_folder(generate_sounds(tmp_path / "a", 2, 1, 3) / "train", 16000)
    other = AudioDataset.from_folder(generate_sounds(tmp_path / "b", 2, 1, 4) / "train", 16000)
    first = {path.relative_to(sounds): path for path in (sounds / "train").rglob("*.wav")}
    for path in again.paths:
        assert path.read_bytes() == first[path.relative_to(tmp_path / "a")].read_bytes()
    assert again.lengths.tolist() != other.lengths.tolist()


def test_train_and_test_differ(sounds):
    train = AudioDataset.from_folder(sounds / "train", 16000)
    test = AudioDataset.from_folder(sounds / "test", 16000)
    seen = {train.waveform(index).numpy().tobytes() for index in range(len(train))}
    assert not any(test.waveform(index).numpy().tobytes() in seen for index in range(len(test)))


@pytest.mark.parametrize(
    "name, sign",
    [("rising_chirp", 1), ("falling_chirp", -1), ("rising_noise", 1), ("falling_noise", -1)],
)
def test_chirps_move_the_way_they_are_called(sounds, name, sign):
    dataset = AudioDataset.from_folder(sounds / "train", 16000)
    steps = []
    for index in np.flatnonzero(dataset.labels == dataset.class_names.index(name)):
        samples = dataset.waveform(index).float()
        spectrum = torch.stft(samples, 512, 256, window=torch.hann_window(512), return_complex=True)
        steps.append(spectrum.abs()[4:].argmax(0).diff())
    steps = torch.cat(steps).float()
    small = steps[steps.abs() <= 8]  # without the jumps back to where a glide begins
    assert sign * small.mean() > 0.3


def test_errors(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").touch()
    with pytest.raises(FileExistsError, match="not an empty folder"):
        generate_sounds(tmp_path / "full", 1, 1)
    with pytest.raises(ValueError, match="clips_per_class"):
        generate_sounds(tmp_path / "a", 0, 1)
    with pytest.raises(ValueError, match="seconds"):
        generate_sounds(tmp_path / "a", 1, 1, seconds=(3.0, 1.0))
    with pytest.raises(ValueError, match="sample_rate"):
        generate_sounds(tmp_path / "a", 1, 1, sample_rate=4000)
