import pytest

from fastast.data.datasets import KINETICS_SOUNDS_CLASSES, kinetics_sounds

HEADER = "label,youtube_id,time_start,time_end,split,is_cc\n"
CLASSES = ["tickling", "playing guitar"]


@pytest.fixture
def root(tree):
    train = '"playing guitar",-3B32lodo2M,59,69,train,0\ntickling,_dbcJuKJQNs,40,50,train,0\n'
    train += "abseiling,0347ZoDXyP0,95,105,train,0\ntickling,-gone-gone-,0,10,train,0\n"
    tree.text("annotations/train.csv", HEADER + train)
    tree.text("annotations/val.csv", HEADER + train.replace("train", "val"))
    tree.text("annotations/test.csv", "youtube_id,time_start,time_end,split\nx,0,10,test\n")
    tree.audio("train/playing guitar/-3B32lodo2M_000059_000069.wav")
    tree.audio("train/_dbcJuKJQNs_000040_000050.wav", "0347ZoDXyP0_000095_000105.wav")
    return tree.root


def test_kinetics_sounds(root):
    splits = kinetics_sounds(root, classes=CLASSES)
    assert list(splits) == ["train", "validation"]
    for manifest in splits.values():
        assert manifest.class_names == CLASSES
        assert manifest.files == [
            "train/playing guitar/-3B32lodo2M_000059_000069.wav",
            "train/_dbcJuKJQNs_000040_000050.wav",
        ]
        assert manifest.labels == [(1,), (0,)]
        assert [clip.path for clip in manifest.left_out] == ["-gone-gone-_000000"]


def test_test_list_with_labels(root, tree):
    tree.text("annotations/test.csv", HEADER + "tickling,_dbcJuKJQNs,40,50,test,0\n")
    test = kinetics_sounds(root, classes=CLASSES[:1])["test"]
    assert test.files == ["train/_dbcJuKJQNs_000040_000050.wav"]
    (root / "annotations" / "val.csv").rename(root / "annotations" / "validate.csv")
    assert list(kinetics_sounds(root, classes=CLASSES[:1])) == ["train", "validation", "test"]


def test_official_classes(root, tree):
    assert len(set(KINETICS_SOUNDS_CLASSES)) == 31
    lines = "".join(
        f"{name},_dbcJuKJQ{n:02},40,50,train,0\n" for n, name in enumerate(KINETICS_SOUNDS_CLASSES)
    )
    tree.text("all/train.csv", HEADER + lines)
    tree.audio(*(f"all/_dbcJuKJQ{n:02}_000040_000050.wav" for n in range(31)))
    train = kinetics_sounds(root / "all")["train"]
    assert train.labels == [(label,) for label in range(31)]


def test_errors(root, tree):
    with pytest.raises(ValueError, match="train.csv has no clip of these classes: blowing nose, "):
        kinetics_sounds(root)
    with pytest.raises(ValueError, match="has no train.csv or annotations/train.csv"):
        kinetics_sounds(root / "train")
    tree.text("annotations/train.csv", HEADER + "tickling,x,soon,50,train,0\n")
    with pytest.raises(ValueError, match="train.csv, line 2: time_start must be a number"):
        kinetics_sounds(root, classes=CLASSES)
