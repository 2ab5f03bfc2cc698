import inspect

import pytest

from fastast.data.datasets import DATASETS, load_manifests


def test_load_manifests(tree):
    tree.audio("dog/a.wav")
    assert load_manifests("folder", tree.root)["train"].files == ["dog/a.wav"]
    assert load_manifests("folder", str(tree.root), {})["train"].files == ["dog/a.wav"]


def test_errors_name_what_there_is(tree):
    with pytest.raises(ValueError, match="kind must be one of folder, csv, .*, got 'urbansound'"):
        load_manifests("urbansound", tree.root)
    with pytest.raises(ValueError, match="audioset has no option subsets; its options: subset"):
        load_manifests("audioset", tree.root, {"subsets": "full"})
    with pytest.raises(ValueError, match="vggsound has no option a, b; its options: none"):
        load_manifests("vggsound", tree.root, {"b": 1, "a": 2})
    with pytest.raises(ValueError, match="ast_json needs the option train"):
        load_manifests("ast_json", tree.root, {"labels": "x.csv"})


@pytest.mark.parametrize("kind", DATASETS)
def test_every_reader_says_so_where_there_is_nothing(tree, kind):
    options = {
        "ast_json": {"labels": "a.csv", "train": "a.json"},
        "joint": {"parts": [{"kind": "folder", "root": "clips"}]},
    }.get(kind, {})
    with pytest.raises(ValueError, match=str(tree.root)):
        load_manifests(kind, tree.root / "gone", options)


@pytest.mark.parametrize("kind", DATASETS)
def test_readers_have_options_by_name_alone(kind):
    root, *options = inspect.signature(DATASETS[kind]).parameters.values()
    assert root.name == "root"
    assert all(option.kind is option.KEYWORD_ONLY for option in options)
