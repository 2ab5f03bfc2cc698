import numpy as np
import pytest

from fastast.data import AudioDataset
from fastast.data.datasets import fsdd


@pytest.fixture(scope="module")
def root(shared_dir):
    return shared_dir / "data" / "fsdd"


@pytest.mark.parametrize(("task", "classes"), [("digit", 10), ("speaker", 6)])
def test_official_split(root, task, classes):
    splits = fsdd(root, task=task)
    assert list(splits) == ["train", "test"]
    train, test = (AudioDataset(manifest, 8000) for manifest in splits.values())
    assert len(train) == 2700 and len(test) == 300
    assert not set(train.names) & set(test.names)
    assert train.label_counts().tolist() == [2700 // classes] * classes
    assert test.label_counts().tolist() == [300 // classes] * classes
    for index in (0, 123, 299):
        digit, speaker, take = test.paths[index].stem.split("_")
        assert int(take) < 5
        assert test.class_names[test.labels[index]] == (digit if task == "digit" else speaker)
        assert len(test.waveform(index)) == test.lengths[index]


def test_leave_one_speaker_out(root):
    splits = fsdd(root / "recordings", leave_out="theo")
    train, test = splits["train"], splits["test"]
    assert len(train) == 2500 and len(test) == 500
    assert all("_theo_" in file for file in test.files)
    assert not any("_theo_" in file for file in train.files)
    assert np.bincount([label for (label,) in test.labels]).tolist() == [50] * 10


def test_errors(root, tmp_path):
    with pytest.raises(ValueError, match="leave_out must be one of \\['george'"):
        fsdd(root, leave_out="nobody")
    with pytest.raises(ValueError, match="leave_out needs task='digit'"):
        fsdd(root, task="speaker", leave_out="theo")
    with pytest.raises(ValueError, match="task must be"):
        fsdd(root, task="gender")
    with pytest.raises(ValueError, match="has no files"):
        fsdd(tmp_path)
