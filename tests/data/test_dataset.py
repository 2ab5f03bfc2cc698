import numpy as np
import pytest
import soundfile
import torch

from fastast.data import AudioDataset, AudioError
from fastast.data.dataset import CACHE_BYTES
from tests.data.helpers import RATE, tone
from tests.testing import write_tone


def write(path, samples=800, rate=RATE):
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, tone(samples, rate), rate)


def test_from_folder(tmp_path):
    write(tmp_path / "dog" / "b.wav")
    write(tmp_path / "dog" / "more" / "a.FLAC", 1000)
    write(tmp_path / "cat" / "c.ogg", 2000, 16000)
    write(tmp_path / "cat" / "d.mp3", 1600, 16000)
    (tmp_path / "cat" / "notes.txt").write_text("not audio")
    (tmp_path / ".git").mkdir()
    dataset = AudioDataset.from_folder(tmp_path, RATE)
    assert dataset.class_names == ["cat", "dog"]
    assert [path.name for path in dataset.paths] == ["c.ogg", "d.mp3", "b.wav", "a.FLAC"]
    assert dataset.labels.tolist() == [0, 0, 1, 1]
    assert dataset.lengths.tolist() == [1000, 800, 800, 1000]
    for index in range(len(dataset)):
        assert len(dataset.waveform(index)) == dataset.lengths[index]


def test_from_folder_errors(tmp_path):
    with pytest.raises(ValueError, match="is not a folder"):
        AudioDataset.from_folder(tmp_path / "gone", RATE)
    with pytest.raises(ValueError, match="has no folders"):
        AudioDataset.from_folder(tmp_path, RATE)
    write(tmp_path / "cat" / "a.wav")
    (tmp_path / "dog").mkdir()
    with pytest.raises(ValueError, match=r"dog has no audio files \(\.wav"):
        AudioDataset.from_folder(tmp_path, RATE)
    (tmp_path / "dog" / "b.wav").write_text("not audio")
    with pytest.raises(AudioError, match=r"b\.wav"):
        AudioDataset.from_folder(tmp_path, RATE)


def test_constructor_errors(tmp_path):
    write(tmp_path / "a.wav")
    with pytest.raises(ValueError, match="paths is empty"):
        AudioDataset([], [], ["x"], RATE)
    with pytest.raises(ValueError, match="one class per file"):
        AudioDataset([tmp_path / "a.wav"], [0, 0], ["x"], RATE)
    with pytest.raises(ValueError, match=r"labels must lie in \[0, 1\)"):
        AudioDataset([tmp_path / "a.wav"], [1], ["x"], RATE)


def test_subset_keeps_ids_and_clips(tones):
    part = tones.subset([7, 3]).subset([1, 0])
    assert part.clip_ids.tolist() == [3, 7]
    assert part.paths == [tones.paths[3], tones.paths[7]]
    assert part.labels.tolist() == tones.labels[[3, 7]].tolist()
    assert torch.equal(part.waveform(1), tones.waveform(7))
    assert part.lengths[1] == tones.lengths[7]
    with pytest.raises(ValueError, match="indices is empty"):
        tones.subset([])


def test_cache(tones):
    again = AudioDataset(tones.paths, tones.labels, tones.class_names, RATE, cache=False)
    assert tones.waveform(0) is tones.waveform(0) is tones.subset([0]).waveform(0)
    assert again.waveform(0) is not again.waveform(0)
    assert torch.equal(again.waveform(0), tones.waveform(0))


def test_cache_is_off_by_default_for_large_data(tones, monkeypatch):
    monkeypatch.setattr("fastast.data.dataset.CACHE_BYTES", int(tones.lengths.sum()) * 2 - 1)
    again = AudioDataset(tones.paths, tones.labels, tones.class_names, RATE)
    assert again.waveform(0) is not again.waveform(0)
    assert CACHE_BYTES == 2**30


def test_file_that_changed(tones):
    soundfile.write(tones.paths[5], tone(100), RATE)
    with pytest.raises(AudioError, match=f"{tones.paths[5].name}.* now has 100"):
        tones.waveform(5)


def test_split(tones):
    train, validation = tones.split(0.2, seed=1)
    assert sorted([*train.clip_ids, *validation.clip_ids]) == list(range(40))
    assert np.bincount(validation.labels).tolist() == [4, 4]
    again = tones.split(0.2, seed=1)[1]
    assert again.clip_ids.tolist() == validation.clip_ids.tolist()
    other = tones.split(0.2, seed=2)[1]
    assert other.clip_ids.tolist() != validation.clip_ids.tolist()


def test_split_leaves_something_on_both_sides(tones):
    train, validation = tones.subset([0, 1]).split(0.9)
    assert len(train) == len(validation) == 1
    with pytest.raises(ValueError, match="less than one clip"):
        tones.split(0.01)
    with pytest.raises(ValueError, match="between 0 and 1"):
        tones.split(1.0)


def test_new_files_do_not_reshuffle_a_split(tmp_path):
    """Else clips that were trained on would turn up in the test set."""
    for label in ("a", "b"):
        (tmp_path / label).mkdir()
        for index in range(1, 31):
            write_tone(tmp_path / label / f"{index:02}.wav", 400, 0.1)
    before = AudioDataset.from_folder(tmp_path, 8000).split(0.2)
    write_tone(tmp_path / "a" / "00.wav", 400, 0.1)
    after = AudioDataset.from_folder(tmp_path, 8000).split(0.2)
    for old, new in zip(before, after, strict=True):
        assert len(set(old.names) - set(new.names)) <= 1  # a fifth of 31 rounds to 6 as well


def test_hidden_files_are_passed_over(tmp_path):
    (tmp_path / "a").mkdir()
    write_tone(tmp_path / "a" / "x.wav", 400, 0.1)
    (tmp_path / "a" / "._x.wav").write_bytes(b"resource fork")
    assert AudioDataset.from_folder(tmp_path, 8000).names == ["a/x.wav"]


def test_digest_tells_data_sets_apart(tmp_path):
    for label in ("a", "b"):
        (tmp_path / label).mkdir()
        write_tone(tmp_path / label / "x.wav", 400, 0.1)
    first = AudioDataset.from_folder(tmp_path, 8000).digest()
    assert AudioDataset.from_folder(tmp_path, 8000).digest() == first
    (tmp_path / "a").rename(tmp_path / "c")
    assert AudioDataset.from_folder(tmp_path, 8000).digest() != first
