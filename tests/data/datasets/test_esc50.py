import pytest

from fastast.data.datasets import esc50

HEADER = "filename,fold,target,category,esc10,src_file,take\n"
CATEGORIES = ["dog", "rooster", "pig"]


@pytest.fixture
def root(tree):
    lines = [
        f"{fold}-{source}-A-{target}.wav,{fold},{target},{CATEGORIES[target]},True,{source},A\n"
        for fold in range(1, 6)
        for source, target in ((100032, 2), (100038, 0), (100210, 1))
    ]
    tree.text("meta/esc50.csv", HEADER + "".join(lines))
    return tree.root


@pytest.mark.parametrize("fold", range(1, 6))
def test_esc50(root, fold):
    splits = esc50(root, fold=fold)
    assert list(splits) == ["train", "test"]
    train, test = splits["train"], splits["test"]
    assert test.class_names == train.class_names == CATEGORIES
    assert test.files == [
        f"audio/{fold}-{end}.wav" for end in ("100032-A-2", "100038-A-0", "100210-A-1")
    ]
    assert test.labels == [(2,), (0,), (1,)]
    assert len(train) == 12 and not set(train.files) & set(test.files)


def test_errors(root, tree):
    with pytest.raises(ValueError, match="fold must be one of 1, 2, 3, 4, 5, got 0"):
        esc50(root, fold=0)
    with pytest.raises(ValueError, match=r"has no meta/esc50\.csv"):
        esc50(root / "meta")
    tree.text("meta/esc50.csv", HEADER + "a.wav,6,0,dog,True,1,A\n")
    with pytest.raises(ValueError, match=r"esc50\.csv, line 2: fold must be one of .*, got 6"):
        esc50(root)
    tree.text("meta/esc50.csv", HEADER + "a.wav,1,dog,0,True,1,A\n")
    with pytest.raises(ValueError, match=r"esc50\.csv, line 2: target must be a number, got 'dog'"):
        esc50(root)
