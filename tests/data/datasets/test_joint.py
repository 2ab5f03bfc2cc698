import numpy as np
import pytest

from fastast.data import AudioDataset
from fastast.data.datasets import load_manifests


@pytest.fixture
def root(tree):
    tree.audio("animals/train/dog/a.wav", "animals/train/cat/b.wav", "animals/test/dog/c.wav")
    tree.audio("animals/test/cat/d.wav", "LibriSpeech/train-clean-100/7/1/7-1-0000.wav")
    tree.audio("LibriSpeech/dev-clean/8/1/8-1-0000.wav")
    tree.audio("LibriSpeech/test-clean/8/1/8-1-0000.wav", "parts/long.wav")
    tree.text("parts/clips.csv", "path,label,begin,end\nlong.wav,x,0.1,0.2\n")
    return tree.root


ANIMALS = {"kind": "folder", "root": "animals"}
SPEECH = {"kind": "librispeech", "root": "LibriSpeech", "options": {"parts": ["train-clean-100"]}}


def joint(root, *parts):
    return load_manifests("joint", root, {"parts": list(parts)})


def test_splits_that_all_have_without_labels(root):
    splits = joint(root, ANIMALS, SPEECH)
    assert sorted(splits) == ["test", "train"]  # one of the two has a validation part, too
    train = splits["train"]
    assert train.class_names == [] and not train.labelled
    speech = "LibriSpeech/train-clean-100/7/1/7-1-0000.wav"
    assert sorted(train.files) == [speech, "animals/train/cat/b.wav", "animals/train/dog/a.wav"]
    assert len(AudioDataset(train, 8000)) == 3


def test_parts_of_files_beside_whole_ones(root):
    table = {"kind": "csv", "root": "parts/clips.csv"}
    train = joint(root, {"kind": "folder", "root": "animals/train"}, table)["train"]
    assert train.begin.tolist() == [0, 0, 0.1] and train.end.tolist() == [np.inf, np.inf, 0.2]
    assert train.files[2] == "parts/long.wav"


def test_errors(root):
    with pytest.raises(ValueError, match="parts is empty"):
        joint(root)
    for wrong in ("folder", {"kind": "folder"}, ANIMALS | {"share": 1}):
        with pytest.raises(ValueError, match="parts must have kind and root"):
            joint(root, wrong)
    with pytest.raises(ValueError, match="kind must be one of"):
        joint(root, ANIMALS | {"kind": "none"})
