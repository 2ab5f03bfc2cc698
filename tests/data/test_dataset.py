import pickle
import zlib

import numpy as np
import pytest
import soundfile
import torch

from fastast.data import IGNORED_TARGET, AudioDataset, AudioError, LeftOut, Manifest, audio_info
from fastast.data.dataset import CACHE_BYTES
from fastast.random import random_bits
from tests.data.helpers import RATE, tone, write_audio
from tests.testing import write_tone


def test_from_folder(tmp_path):
    write_audio(tmp_path / "dog" / "b.wav")
    write_audio(tmp_path / "dog" / "more" / "a.FLAC", 1000)
    write_audio(tmp_path / "cat" / "c.ogg", 2000, 16000)
    write_audio(tmp_path / "cat" / "d.mp3", 1600, 16000)
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
    write_audio(tmp_path / "cat" / "a.wav")
    (tmp_path / "dog").mkdir()
    with pytest.raises(ValueError, match=r"dog has no audio files \(\.wav"):
        AudioDataset.from_folder(tmp_path, RATE)
    (tmp_path / "dog" / "b.wav").write_text("not audio")
    with pytest.raises(AudioError, match=r"b\.wav"):
        AudioDataset.from_folder(tmp_path, RATE)


def test_arguments_are_checked(tmp_path):
    write_audio(tmp_path / "a.wav")
    manifest = Manifest(["a.wav"], [(0,)], ["x"], tmp_path)
    with pytest.raises(ValueError, match="manifest is empty"):
        AudioDataset(Manifest([], [], []), RATE)
    with pytest.raises(ValueError, match="bad_files must be 'stop' or 'skip', got True"):
        AudioDataset(manifest, RATE, bad_files=True)
    with pytest.raises(ValueError, match="sample_rate must be positive"):
        AudioDataset(manifest, 0)


def test_subset_keeps_ids_and_clips(tones):
    part = tones.subset([7, 3]).subset([1, 0])
    assert part.clip_ids.tolist() == [3, 7]
    assert list(part.paths) == [tones.paths[3], tones.paths[7]]
    assert part.labels.tolist() == tones.labels[[3, 7]].tolist()
    assert torch.equal(part.waveform(1), tones.waveform(7))
    assert part.lengths[1] == tones.lengths[7]
    with pytest.raises(ValueError, match="indices is empty"):
        tones.subset([])


def test_cache(tones):
    again = AudioDataset.from_folder(tones.paths[0].parents[1], RATE, cache=False)
    assert tones.waveform(0) is tones.waveform(0) is tones.subset([0]).waveform(0)
    assert again.waveform(0) is not again.waveform(0)
    assert torch.equal(again.waveform(0), tones.waveform(0))


def test_cache_is_off_by_default_for_large_data(tones, monkeypatch):
    monkeypatch.setattr("fastast.data.dataset.CACHE_BYTES", int(tones.lengths.sum()) * 2 - 1)
    again = AudioDataset.from_folder(tones.paths[0].parents[1], RATE)
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
    (tmp_path / "c").rename(tmp_path / "a")
    assert AudioDataset.from_folder(tmp_path, 8000).digest() == first
    write_tone(tmp_path / "a" / "x.wav", 400, 0.2)
    assert AudioDataset.from_folder(tmp_path, 8000).digest() != first


LABELS = [(2,), (0, 3), (), (1, 2, 3), (3,), (0, 1), (), (3,)]


@pytest.fixture
def several(tmp_path):
    """Clips with any number of labels, among four classes and one that is never used."""
    files = [f"{number}.wav" for number in range(len(LABELS))]
    for number, file in enumerate(files):
        write_audio(tmp_path / file, 400 + number)
    return Manifest(files, LABELS, list("abcde"), tmp_path, multi_label=True)


def multi_hot(labels):
    return torch.tensor([[float(c in clip) for c in range(5)] for clip in labels])


def test_several_labels(several):
    dataset = AudioDataset(several, RATE)
    rows = [3, 2, 0, 3, 7]
    targets = dataset.targets(rows)
    assert targets.dtype == torch.float32
    assert torch.equal(targets, multi_hot([LABELS[row] for row in rows]))
    assert dataset.targets([]).shape == (0, 5)
    assert dataset.label_counts().tolist() == [2, 2, 2, 4, 0]
    part = dataset.subset([6, 5, 3, 1])
    assert torch.equal(part.targets([1, 2, 0]), multi_hot([(0, 1), (1, 2, 3), ()]))
    assert part.label_counts().tolist() == [2, 2, 1, 2, 0]
    values = np.array([1.0, 10.0, 100.0, 1000.0, 5.0])
    assert dataset.sum_over_labels(values).tolist() == [100, 1001, 0, 1110, 1000, 11, 0, 1000]
    with pytest.raises(ValueError, match=r"use targets\(rows\)"):
        _ = dataset.labels


def test_one_label(tones):
    assert tones.targets([5, 30]).tolist() == tones.labels[[5, 30]].tolist()
    assert tones.targets([5]).dtype == torch.int64
    assert tones.label_counts().tolist() == [20, 20]


def test_without_labels(tones):
    dataset = AudioDataset(Manifest.from_files(tones.paths), RATE)
    assert dataset.labels.tolist() == dataset.targets(range(40)).tolist() == [IGNORED_TARGET] * 40
    assert dataset.label_counts().tolist() == []
    rest, part = dataset.split(0.25, seed=3)
    assert (len(rest), len(part)) == (30, 10)
    assert sorted([*rest.clip_ids, *part.clip_ids]) == list(range(40))


def test_bad_files(tmp_path):
    names = ["gone.wav", "a.wav", "damaged.wav", "b.wav", "empty.wav"]
    write_audio(tmp_path / "a.wav", 800)
    write_audio(tmp_path / "b.wav", 900)
    (tmp_path / "damaged.wav").write_bytes(b"not audio")
    soundfile.write(tmp_path / "empty.wav", np.zeros(0), RATE)
    known = LeftOut("c.wav", "lost in the mail")
    labels = [(0,), (1,), (0,), (2,), (0,)]
    manifest = Manifest(names, labels, ["x", "y", "z"], tmp_path, left_out=[known])

    with pytest.raises(AudioError, match=r"gone\.wav: there is no such file"):
        AudioDataset(manifest, RATE)
    dataset = AudioDataset(manifest, RATE, bad_files="skip")
    assert dataset.names == ["a.wav", "b.wav"]
    assert dataset.clip_ids.tolist() == [1, 3]
    assert dataset.labels.tolist() == [1, 2]
    assert dataset.lengths.tolist() == [len(dataset.waveform(0)), len(dataset.waveform(1))]
    assert dataset.left_out[0] == known
    paths, reasons = zip(*dataset.left_out[1:], strict=True)
    assert paths == tuple(str(tmp_path / names[row]) for row in (0, 2, 4))
    assert [reason.split(" (")[0] for reason in reasons] == [
        "there is no such file",
        "cannot be decoded",
        "has no samples",
    ]
    assert dataset.subset([0]).left_out == []
    with pytest.raises(ValueError, match=r"none of 2 clips.*/gone\.wav: there is no such file"):
        AudioDataset(manifest.subset([0, 2]), RATE, bad_files="skip")


@pytest.mark.parametrize("bad_files", ["stop", "skip"])
def test_short_clips_are_left_out(tones, bad_files):
    manifest = Manifest.from_folder(tones.paths[0].parents[1])
    kept = np.flatnonzero(tones.lengths >= 0.5 * RATE)
    dataset = AudioDataset(manifest, RATE, bad_files=bad_files, min_seconds=0.5)
    assert 0 < len(kept) < 40
    assert dataset.clip_ids.tolist() == kept.tolist()
    assert len(dataset.left_out) == 40 - len(kept)
    assert "less than min_seconds (0.5)" in dataset.left_out[0].reason
    assert AudioDataset(manifest, RATE, min_seconds=min(tones.lengths) / RATE).left_out == []


def test_parts_of_files(tmp_path):
    rng = np.random.default_rng(0)
    files, begin, end = [], [], []
    for name, rate in (("a.wav", 44100), ("b.flac", 8000)):
        write_audio(tmp_path / name, 3 * rate, rate)
        for _ in range(10):
            files.append(name)
            begin.append(rng.uniform(0, 2.5))
            end.append(rng.choice([begin[-1] + rng.uniform(0.1, 1), np.inf]))
    dataset = AudioDataset(Manifest(files, [()] * 20, [], tmp_path, begin=begin, end=end), 16000)
    picked = dataset.subset([3, 15])
    for row in range(20):
        assert len(dataset.waveform(row)) == dataset.lengths[row]
        expected = (min(end[row], 3.0) - begin[row]) * 16000
        assert abs(dataset.lengths[row] - expected) <= 2
    assert torch.equal(picked.waveform(1), dataset.waveform(15))

    manifest = Manifest(["b.flac"] * 2, [()] * 2, [], tmp_path, begin=[1.0, 5.0], end=[2.0, 6.0])
    with pytest.raises(AudioError, match="has no samples from 5 s to 6 s: it is 3 s long"):
        AudioDataset(manifest, RATE)
    rest = AudioDataset(manifest, RATE, bad_files="skip")
    assert rest.lengths.tolist() == [8000]
    assert rest.left_out[0].reason.startswith("has no samples from 5 s")


def test_header_of_a_file_is_read_once(tmp_path, monkeypatch):
    write_audio(tmp_path / "a.wav", 8000)
    write_audio(tmp_path / "b.wav", 8000)
    opened = []

    def spy(source, rate):
        opened.append(source)
        return audio_info(source, rate)

    monkeypatch.setattr("fastast.data.dataset.audio_info", spy)
    files = ["a.wav", "b.wav", "a.wav"]
    AudioDataset(Manifest(files, [()] * 3, [], tmp_path, begin=[0, 0, 0.5], end=[0.5, 1, 1]), RATE)
    assert sorted(opened) == [str(tmp_path / "a.wav"), str(tmp_path / "b.wav")]


def test_many_headers(tones, monkeypatch, capsys):
    """More than one task holds, and enough for a progress bar, which no terminal is there for."""
    monkeypatch.setattr("fastast.data.dataset._HEADERS_PER_TASK", 3)
    monkeypatch.setattr("fastast.data.dataset._SHOW_PROGRESS_FROM", 10)
    again = AudioDataset.from_folder(tones.paths[0].parents[1], RATE)
    assert again.lengths.tolist() == tones.lengths.tolist()
    tones.paths[25].unlink()
    with pytest.raises(AudioError, match=tones.paths[25].name):
        AudioDataset(Manifest.from_files(tones.paths), RATE)
    assert capsys.readouterr().out == ""


def test_clip_of_less_than_a_sample(tmp_path):
    write_audio(tmp_path / "a.wav", 1, 44100)
    with pytest.raises(AudioError, match="less than one sample at 8000 Hz"):
        AudioDataset(Manifest.from_files([tmp_path / "a.wav"]), RATE)


def test_hdf5(tmp_path):
    import h5py

    with h5py.File(tmp_path / "a.hdf5", "w") as file:
        file["P01"] = tone(24000, 24000)
        file["P02"] = tone(12000, 24000)
    manifest = Manifest(
        ["a.hdf5:P02", "a.hdf5:P01"], [()] * 2, [], tmp_path, begin=[0.1, 0], end=[0.2, np.inf]
    )
    with pytest.raises(AudioError, match="does not say its sample rate"):
        AudioDataset(manifest, RATE)
    manifest.source_rate = 24000
    dataset = AudioDataset(manifest, RATE)
    assert dataset.lengths.tolist() == [800, 8000]
    expected = torch.from_numpy(tone(8000, 8000) * 32768)
    assert (dataset.waveform(1) - expected)[500:-500].abs().max() < 2


def test_summary(tmp_path, several):
    assert AudioDataset(several, RATE).summary() == "8 clips, 0.00 h, 5 classes"
    write_audio(tmp_path / "a.wav", 44100 * 36, 44100)
    write_audio(tmp_path / "b.wav", 8000)
    soundfile.write(tmp_path / "c.wav", np.zeros((16000, 2)), 16000)
    files = ["a.wav", "b.wav", "c.wav", "gone.wav"]
    dataset = AudioDataset(Manifest(files, [()] * 4, [], tmp_path), RATE, bad_files="skip")
    assert dataset.summary() == (
        "3 clips, 0.01 h, 0 classes, resampled to 8000 Hz from 16000 Hz (1) and 44100 Hz (1), "
        "1 mixed down from several channels, 1 left out"
    )
    assert dataset.subset([1]).summary() == "1 clips, 0.00 h, 0 classes"


@pytest.mark.parametrize("multi_label", [False, True])
def test_split_against_brute_force(tmp_path, multi_label):
    rng = np.random.default_rng(1)
    labels = [tuple(rng.choice(4, rng.integers(0, 4), replace=False)) for _ in range(60)]
    labels = labels if multi_label else [(int(rng.integers(3)),) for _ in range(60)]
    write_audio(tmp_path / "a.wav", 8000)
    begin = np.arange(60) / 100
    manifest = Manifest(
        ["a.wav"] * 60, labels, list("abcd"), tmp_path, multi_label, begin, begin + 0.01
    )
    dataset = AudioDataset(manifest, RATE)
    keys = random_bits(
        5, 0, torch.tensor([zlib.crc32(name.encode()) for name in dataset.names]), "split", 1
    )[:, 0].tolist()
    expected = []
    for first in {clip[:1] for clip in labels}:
        members = sorted((keys[row], row) for row in range(60) if labels[row][:1] == first)
        quota = min(int(0.3 * len(members) + 0.5), len(members) - 1)
        expected += [row for _, row in members[:quota]]
    rest, part = dataset.split(0.3, seed=5)
    assert part.clip_ids.tolist() == sorted(expected)
    assert rest.clip_ids.tolist() == sorted(set(range(60)) - set(expected))


def test_paths(tones):
    paths = tones.paths
    assert len(paths) == 40 and paths[-1] == list(paths)[39] == paths[38:][1]
    assert paths[0].is_file()


def test_can_be_pickled(several):
    dataset = AudioDataset(several, RATE)
    again = pickle.loads(pickle.dumps(dataset))
    assert torch.equal(again.waveform(3), dataset.waveform(3))
    assert torch.equal(again.targets([3]), dataset.targets([3]))


def test_forget(tones):
    first = tones.waveform(0)
    tones.forget()
    assert tones.waveform(0) is not first and torch.equal(tones.waveform(0), first)
