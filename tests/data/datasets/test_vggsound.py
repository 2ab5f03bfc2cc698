import pytest

from fastast.data.datasets import vggsound

LIST = """---g-f_I2yQ,1,people marching,test
--0PQM4-hqg,30,waterfall burbling,train
--56QUhyDQM,185,"playing tennis, singles",train
--5OkAjCI7g,40,people marching,train
--gone-gone,40,people marching,train
"""


@pytest.fixture
def root(tree):
    tree.text("vggsound.csv", LIST)
    tree.audio("audio/---g-f_I2yQ_000001.wav", "audio/--0PQM4-hqg_30.wav")
    tree.audio("audio/--56QUhyDQM.flac", "more/--5OkAjCI7g_40000_50000.wav")
    return tree.root


def test_vggsound(root):
    splits = vggsound(root)
    train, test = splits["train"], splits["test"]
    assert list(splits) == ["train", "test"]
    assert train.class_names == ["people marching", "playing tennis, singles", "waterfall burbling"]
    assert train.files == [
        "audio/--0PQM4-hqg_30.wav",
        "audio/--56QUhyDQM.flac",
        "more/--5OkAjCI7g_40000_50000.wav",
    ]
    assert train.labels == [(2,), (1,), (0,)] and not train.multi_label
    assert train.names[0] == "--0PQM4-hqg_000030"
    assert [clip.path for clip in train.left_out] == ["--gone-gone_000040"]
    assert test.files == ["audio/---g-f_I2yQ_000001.wav"] and test.labels == [(0,)]
    assert test.class_names == train.class_names and test.left_out == []


def test_errors(root, tree):
    for text, message in (
        (
            "a,1,x,train\nb,1,x,valid\n",
            "vggsound.csv, line 2: split must be one of 'train', 'test'",
        ),
        ("a,one,x,train\n", "vggsound.csv, line 1: start must be a number, got 'one'"),
        ("a,1,x\n", "vggsound.csv, line 1: has 3 fields instead of 4"),
        ("a,1,x,train\n", "none of the 1 clips of .*vggsound.csv has an audio file"),
    ):
        tree.text("vggsound.csv", text)
        with pytest.raises(ValueError, match=message):
            vggsound(root)
    with pytest.raises(ValueError, match="has no vggsound.csv or data/vggsound.csv"):
        vggsound(root / "audio")
