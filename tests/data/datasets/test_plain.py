import json

import pytest

from fastast.data.datasets import ast_json, csv_table, folder


def test_folder_without_splits(tree):
    tree.audio("dog/a.wav", "cat/b.wav")
    splits = folder(tree.root)
    assert list(splits) == ["train"]
    assert splits["train"].files == ["cat/b.wav", "dog/a.wav"]


@pytest.mark.parametrize(
    ("names", "keys"),
    [
        (("train",), ["train"]),
        (("train", "test"), ["train", "test"]),
        (("train", "eval", "val"), ["train", "validation", "test"]),
        (("test", "train", "validation"), ["train", "validation", "test"]),
    ],
)
def test_folder_with_splits(tree, names, keys):
    tree.text("README.md", "")
    for name in names:
        tree.audio(f"{name}/dog/a.wav", f"{name}/cat/b.wav", ".hidden/x/a.wav")
    if len(names) > 1:
        tree.audio("spare/a.wav")
    splits = folder(tree.root)
    assert list(splits) == keys
    assert all(manifest.class_names == ["cat", "dog"] for manifest in splits.values())


def test_train_may_be_a_class(tree):
    tree.audio("bus/a.wav", "train/inner city/a.wav", "car/a.wav")
    splits = folder(tree.root)
    assert splits["train"].class_names == ["bus", "car", "train"]


def test_folder_errors(tree):
    with pytest.raises(ValueError, match="gone is not a folder"):
        folder(tree.root / "gone")
    tree.audio("test/dog/a.wav", "val/dog/a.wav")
    with pytest.raises(ValueError, match="has test and val, but no folder train"):
        folder(tree.root)
    tree.audio("train/dog/a.wav", "train/cat/a.wav")
    with pytest.raises(ValueError, match=r"train and validation have different classes: \['cat'\]"):
        folder(tree.root)


def test_one_table(tree):
    tree.text(
        "a.csv",
        "path,label,split\na.wav,dog,train\nb.wav,cat,valid\nc.wav,dog,eval\nd.wav,cow,train\n",
    )
    splits = csv_table(tree.root / "a.csv")
    assert list(splits) == ["train", "validation", "test"]
    assert all(manifest.class_names == ["cat", "cow", "dog"] for manifest in splits.values())
    assert splits["train"].files == ["a.wav", "d.wav"] and splits["train"].labels == [(2,), (1,)]
    assert splits["validation"].files == ["b.wav"] and splits["test"].labels == [(2,)]
    assert splits["train"].root == tree.root
    assert csv_table(tree.root / "a.csv", audio="clips")["test"].root == tree.root / "clips"
    tree.text("b.csv", "path,label\na.wav,dog\n")
    assert list(csv_table(tree.root / "b.csv")) == ["train"]


def test_tables_in_a_folder(tree):
    tree.text("train.csv", "path,labels\na.wav,dog|cow\nb.wav,ant\n")
    tree.text("val.csv", "path,labels\nc.wav,cow\n")
    tree.text("test.csv", "path,labels\nd.wav,bee|dog\n")
    splits = csv_table(tree.root)
    assert list(splits) == ["train", "validation", "test"]
    assert all(manifest.class_names == ["ant", "bee", "cow", "dog"] for manifest in splits.values())
    assert [manifest.labels for manifest in splits.values()] == [[(2, 3), (0,)], [(2,)], [(1, 3)]]


def test_csv_errors(tree):
    with pytest.raises(ValueError, match="has no train.csv"):
        csv_table(tree.root)
    tree.text("a.csv", "path,label,split\na.wav,dog,train\nb.wav,dog,holiday\n")
    with pytest.raises(ValueError, match="a.csv: split of b.wav must be train, .* got 'holiday'"):
        csv_table(tree.root / "a.csv")


def test_ast_json(tree):
    tree.text("labels.csv", "index,mid,display_name\n0,/m/0,dog\n1,/m/1,cat\n")
    for name, mids in (("train", "/m/0,/m/1"), ("eval", "/m/1")):
        data = {"data": [{"wav": "x/a.wav", "labels": mids}]}
        tree.text(f"datafiles/{name}.json", json.dumps(data))
    paths = {"labels": "labels.csv", "train": "datafiles/train.json", "test": "datafiles/eval.json"}
    splits = ast_json(tree.root, **paths)
    assert list(splits) == ["train", "test"]
    assert splits["train"].labels == [(0, 1)] and splits["test"].labels == [(1,)]
    assert splits["test"].root == tree.root and splits["test"].multi_label
    with pytest.raises(ValueError, match="has no datafiles/valid.json"):
        ast_json(tree.root, **paths, validation="datafiles/valid.json")
    with pytest.raises(ValueError, match="exactly one per clip"):
        ast_json(tree.root, **paths, multi_label=False)
