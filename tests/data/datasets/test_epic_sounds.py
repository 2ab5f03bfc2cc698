import numpy as np
import pytest
import torch

from fastast.data import AudioDataset
from fastast.data.datasets import epic_sounds
from tests.data.helpers import tone, write_audio

HEADER = (
    "annotation_id,participant_id,video_id,start_timestamp,stop_timestamp,start_sample,"
    "stop_sample,description,class,class_id\n"
)
TRAIN = """P01_01_0,P01,P01_01,00:00:00.466,00:00:01.315,11184,31560,"rustle, of paper",rustle,1
P01_01_1,P01,P01_01,00:00:01.000,00:00:01.500,24000,36000,tap,metal / wood collision,0
P01_02_0,P01,P01_02,00:00:00.000,00:00:00.500,0,12001,tap,metal / wood collision,0
P01_99_0,P01,P01_99,00:00:00.000,00:00:00.500,0,12000,tap,metal / wood collision,0
"""
VALIDATION = "P01_02_7,P01,P01_02,00:00:00.100,00:00:00.400,2400,9600,rustling,rustle,1\n"


@pytest.fixture
def root(tree):
    tree.text("epic-sounds-annotations/EPIC_Sounds_train.csv", HEADER + TRAIN)
    tree.text("epic-sounds-annotations/EPIC_Sounds_validation.csv", HEADER + VALIDATION)
    return tree.root


def check_splits(splits):
    train, validation = splits["train"], splits["validation"]
    assert list(splits) == ["train", "validation"]
    assert train.class_names == validation.class_names == ["metal / wood collision", "rustle"]
    assert train.names == ["P01_01_0", "P01_01_1", "P01_02_0"]
    assert train.labels == [(1,), (0,), (0,)]
    assert [clip.path for clip in train.left_out] == ["P01_99_0"]
    assert validation.names == ["P01_02_7"] and validation.labels == [(1,)]
    return AudioDataset(train, 24000), AudioDataset(validation, 24000)


def test_hdf5(root):
    import h5py

    recordings = {"P01_01": tone(48000, 24000), "P01_02": tone(24000, 24000, 300.0)}
    with h5py.File(root / "EPIC_audio.hdf5", "w") as file:
        for video, samples in recordings.items():
            file[video] = samples.astype(np.float32)
    splits = epic_sounds(root)
    assert splits["train"].files[0] == "EPIC_audio.hdf5:P01_01"
    train, validation = check_splits(splits)
    assert train.lengths.tolist() == [20376, 12000, 12001]
    for dataset, row, video, start, stop in (
        (train, 0, "P01_01", 11184, 31560),
        (train, 2, "P01_02", 0, 12001),
        (validation, 0, "P01_02", 2400, 9600),
    ):
        expected = np.rint(recordings[video][start:stop].astype(np.float32) * 32768)
        assert torch.equal(dataset.waveform(row), torch.from_numpy(expected).short())


def test_loose_files(root):
    write_audio(root / "audio" / "P01" / "P01_01.wav", 96000, 48000)
    write_audio(root / "audio" / "P01" / "P01_02.flac", 24000, 24000)
    splits = epic_sounds(root)
    assert splits["train"].files[::2] == ["audio/P01/P01_01.wav", "audio/P01/P01_02.flac"]
    train, _ = check_splits(splits)
    assert train.lengths.tolist() == [20376, 12000, 12001]


def test_errors(root, tree):
    with pytest.raises(ValueError, match="none of the 4 clips of EPIC_Sounds_train.csv has an aud"):
        epic_sounds(root)
    with pytest.raises(ValueError, match="has no EPIC_Sounds_train.csv or epic-sounds-annot"):
        epic_sounds(root / "epic-sounds-annotations" / "x")
    name = "EPIC_Sounds_validation.csv"
    for text, message in (
        (HEADER + VALIDATION.replace("rustle", "hiss"), f"{name}, line 2: class_id 1 is 'hiss'"),
        (HEADER + VALIDATION.replace("2400", "2.4"), f"{name}, line 2: start_sample must be a num"),
        (HEADER + VALIDATION.replace(",rustle,1", ",wind,3"), r"class_id must be 0, 1, 2, .*1, 3"),
        ("class,class_id\nrustle,1\n", f"{name}: has no column 'start_sample'"),
    ):
        tree.text(f"epic-sounds-annotations/{name}", text)
        with pytest.raises(ValueError, match=message):
            epic_sounds(root)
