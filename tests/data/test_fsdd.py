import numpy as np
import pytest

from fastast.data import fsdd


@pytest.fixture(scope="module")
def root(shared_dir):
    return shared_dir / "data" / "fsdd"


@pytest.mark.parametrize(("task", "classes"), [("digit", 10), ("speaker", 6)])
def test_official_split(root, task, classes):
    train, test = fsdd(root, task), fsdd(root, task, "test")
    assert len(train) == 2700 and len(test) == 300
    assert len(set(train.clip_ids) | set(test.clip_ids)) == 3000
    assert np.bincount(train.labels).tolist() == [2700 // classes] * classes
    assert np.bincount(test.labels).tolist() == [300 // classes] * classes
    assert train.sample_rate == 8000
    for index in (0, 123, 299):
        digit, speaker, take = test.paths[index].stem.split("_")
        assert int(take) < 5
        assert test.class_names[test.labels[index]] == (digit if task == "digit" else speaker)
        assert len(test.waveform(index)) == test.lengths[index]


def test_leave_one_speaker_out(root):
    train = fsdd(root, split="train", leave_out="theo")
    test = fsdd(root, split="test", leave_out="theo")
    assert len(train) == 2500 and len(test) == 500
    assert all("_theo_" in path.name for path in test.paths)
    assert not any("_theo_" in path.name for path in train.paths)


def test_all(root):
    everything = fsdd(root / "recordings", split="all")
    assert len(everything) == 3000
    test = fsdd(root, split="test")
    assert [everything.paths[clip].name for clip in test.clip_ids] == [p.name for p in test.paths]


def test_errors(root, tmp_path):
    with pytest.raises(ValueError, match="leave_out must be one of \\['george'"):
        fsdd(root, leave_out="nobody")
    with pytest.raises(ValueError, match="leave_out needs task='digit'"):
        fsdd(root, "speaker", leave_out="theo")
    with pytest.raises(ValueError, match="task must be"):
        fsdd(root, "gender")
    with pytest.raises(ValueError, match="split must be"):
        fsdd(root, split="valid")
    with pytest.raises(ValueError, match="has no files"):
        fsdd(tmp_path)
