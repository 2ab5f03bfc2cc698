import pytest

from fastast.data.datasets import librispeech


@pytest.fixture
def root(tree):
    tree.audio("LibriSpeech/train-clean-100/1034/121119/1034-121119-0000.flac")
    tree.audio("LibriSpeech/train-clean-100/103/1240/103-1240-0000.flac")
    tree.audio("LibriSpeech/train-clean-100/103/1241/103-1241-0000.flac")
    tree.text("LibriSpeech/train-clean-100/103/1240/103-1240.trans.txt", "103-1240-0000 CHAPTER")
    tree.audio("LibriSpeech/train-other-500/20/205/20-205-0000.flac")
    tree.audio("LibriSpeech/dev-clean/84/121123/84-121123-0000.flac")
    return tree.root


def test_unlabelled(root):
    splits = librispeech(root)
    assert list(splits) == ["train", "validation"]
    assert splits["train"].files == [
        "train-clean-100/103/1240/103-1240-0000.flac",
        "train-clean-100/103/1241/103-1241-0000.flac",
        "train-clean-100/1034/121119/1034-121119-0000.flac",
        "train-other-500/20/205/20-205-0000.flac",
    ]
    assert not splits["train"].labelled and splits["train"].class_names == []
    assert splits["validation"].files == ["dev-clean/84/121123/84-121123-0000.flac"]
    assert splits["train"].root == root / "LibriSpeech"
    assert len(librispeech(root / "LibriSpeech", parts=["train-other-500"])["train"]) == 1


def test_speakers(root):
    splits = librispeech(root, label="speaker")
    assert list(splits) == ["train"]
    assert splits["train"].class_names == ["20", "103", "1034"]
    assert splits["train"].labels == [(1,), (1,), (2,), (0,)]


def test_errors(root):
    with pytest.raises(ValueError, match="label must be one of 'none', 'speaker', got 'word'"):
        librispeech(root, label="word")
    with pytest.raises(ValueError, match="parts must be one of 'train-clean-100', .*, got 'train'"):
        librispeech(root, parts=["train"])
    with pytest.raises(ValueError, match="has no audio in train-clean-360"):
        librispeech(root, parts=["train-clean-360"])
    with pytest.raises(ValueError, match="has no audio in train-clean-100 or train-clean-360 or"):
        librispeech(root / "LibriSpeech" / "dev-clean")
