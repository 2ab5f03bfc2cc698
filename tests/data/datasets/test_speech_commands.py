import pytest

from fastast.data.datasets import speech_commands


@pytest.fixture
def root(tree):
    for word in ("yes", "bed"):
        tree.audio(
            *(f"{word}/{name}_nohash_{take}.wav" for name in ("0a7c", "b2f1") for take in (0, 1))
        )
    tree.audio("_background_noise_/pink_noise.wav")
    tree.text("validation_list.txt", "bed/0a7c_nohash_0.wav\nyes/0a7c_nohash_0.wav\n")
    tree.text("testing_list.txt", "yes/b2f1_nohash_0.wav\nyes/b2f1_nohash_1.wav\nyes/gone.wav\n")
    return tree.root


def test_speech_commands(root):
    splits = speech_commands(root)
    assert list(splits) == ["train", "validation", "test"]
    assert all(manifest.class_names == ["bed", "yes"] for manifest in splits.values())
    assert splits["validation"].files == ["bed/0a7c_nohash_0.wav", "yes/0a7c_nohash_0.wav"]
    assert splits["validation"].labels == [(0,), (1,)]
    assert splits["test"].files == ["yes/b2f1_nohash_0.wav", "yes/b2f1_nohash_1.wav"]
    assert splits["test"].labels == [(1,), (1,)]
    assert splits["train"].files == [
        "bed/0a7c_nohash_1.wav",
        "bed/b2f1_nohash_0.wav",
        "bed/b2f1_nohash_1.wav",
        "yes/0a7c_nohash_1.wav",
    ]
    assert [clip.path for clip in splits["test"].left_out] == ["yes/gone.wav"]
    assert splits["train"].left_out == splits["validation"].left_out == []


def test_errors(root):
    (root / "testing_list.txt").unlink()
    with pytest.raises(ValueError, match="has no testing_list.txt"):
        speech_commands(root)
