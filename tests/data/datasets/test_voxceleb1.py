import pytest

from fastast.data import AudioDataset
from fastast.data.datasets import voxceleb1

LIST = """3 id10003/na8-QEFmj44/00003.wav
1 id10003/tCq2LcKO6xY/00002.wav
1 id10270/5r0dWxy17C8/00001.wav
2 id10270/5r0dWxy17C8/00002.wav
3 id10270/x6uYqmx31kE/00001.wav
1 id10309/gone-gone-g/00001.wav
"""
DEV = ("id10003/na8-QEFmj44/00003.wav", "id10003/tCq2LcKO6xY/00002.wav")
TEST = tuple(
    f"id10270/{name}.wav"
    for name in ("5r0dWxy17C8/00001", "5r0dWxy17C8/00002", "x6uYqmx31kE/00001")
)


@pytest.mark.parametrize(
    ("dev", "test"), [("dev/wav/", "test/wav/"), ("wav/", "wav/"), ("", ""), ("dev/", "test/")]
)
def test_voxceleb1(tree, dev, test):
    tree.text("iden_split.txt", LIST)
    tree.audio(*(dev + name for name in DEV), *(test + name for name in TEST))
    splits = voxceleb1(tree.root)
    assert list(splits) == ["train", "validation", "test"]
    assert splits["train"].files == [dev + DEV[1], test + TEST[0]]
    assert splits["train"].labels == [(0,), (1,)]
    assert splits["train"].class_names == ["id10003", "id10270", "id10309"]
    assert splits["train"].names == ["id10003/tCq2LcKO6xY/00002.wav", TEST[0]]
    assert [clip.path for clip in splits["train"].left_out] == ["id10309/gone-gone-g/00001.wav"]
    assert splits["validation"].files == [test + TEST[1]]
    assert splits["test"].files == [dev + DEV[0], test + TEST[2]]
    assert splits["test"].labels == [(0,), (1,)]
    for manifest in splits.values():
        assert AudioDataset(manifest, 8000).lengths.min() == 800


def test_errors(tree):
    with pytest.raises(ValueError, match="has no iden_split.txt"):
        voxceleb1(tree.root)
    tree.text("iden_split.txt", LIST)
    with pytest.raises(ValueError, match="none of the 3 clips of .*iden_split.txt has an audio"):
        voxceleb1(tree.root)
    tree.text("iden_split.txt", "1 id1/x/1.wav\n\n4 id1/x/2.wav\n")
    with pytest.raises(ValueError, match="iden_split.txt, line 3: must be of the form"):
        voxceleb1(tree.root)
