import pytest

from fastast.data import AudioDataset
from fastast.data.datasets import audioset

CLASSES = """index,mid,display_name
0,/m/09x0r,"Speech"
1,/m/05zppz,"Male speech, man speaking"
2,/m/03fwl,"Goat"
3,/t/dd00088,"Gush"
"""
HEADER = """# Segments csv created Sun Mar  5 10:54:31 2017
# num_ytids={0}, num_segs={0}, num_unique_labels=4, num_positive_labels=9
# YTID, start_seconds, end_seconds, positive_labels
"""
BALANCED = """--PJHxphWEs, 30.000, 40.000, "/m/09x0r,/t/dd00088"
--ZhevVpy1s, 50.000, 60.000, "/m/03fwl"
Y0aE2O5G5WE, 0.000, 10.000, "/m/05zppz,/m/09x0r"
-0gone-gone, 0.000, 10.000, "/m/05zppz"
"""
UNBALANCED = """---1_cCGK4M, 0.000, 10.000, "/m/03fwl"
---2_BBVHAA, 420.500, 430.500, "/m/09x0r"
"""
EVALUATION = """--4gqARaEJE, 0.000, 10.000, "/t/dd00088,/m/03fwl,/m/09x0r"
"""


@pytest.fixture
def root(tree):
    tree.text("class_labels_indices.csv", CLASSES)
    tree.text("balanced_train_segments.csv", HEADER.format(4) + BALANCED)
    tree.text("unbalanced_train_segments.csv", HEADER.format(2) + UNBALANCED)
    tree.text("eval_segments.csv", HEADER.format(1) + EVALUATION)
    tree.audio("audios/balanced_train_segments/Y--PJHxphWEs.wav")
    tree.audio("bal_train/--ZhevVpy1s.flac", "train/Y0aE2O5G5WE_0.000_10.000.wav")
    tree.audio("unbalanced/part00/---1_cCGK4M_0_10.wav", "x/---2_BBVHAA_420500_430500.flac")
    tree.audio("eval/--4gqARaEJE_000000.wav", "eval/-other-othe.wav")
    return tree.root


def test_balanced(root):
    splits = audioset(root)
    assert list(splits) == ["train", "test"]
    train = splits["train"]
    assert train.class_names == ["Speech", "Male speech, man speaking", "Goat", "Gush"]
    assert train.multi_label and splits["test"].multi_label
    assert train.names == ["--PJHxphWEs", "--ZhevVpy1s", "Y0aE2O5G5WE"]
    assert train.files == [
        "audios/balanced_train_segments/Y--PJHxphWEs.wav",
        "bal_train/--ZhevVpy1s.flac",
        "train/Y0aE2O5G5WE_0.000_10.000.wav",
    ]
    assert train.labels == [(0, 3), (2,), (0, 1)]
    assert [clip.path for clip in train.left_out] == ["-0gone-gone"]
    assert splits["test"].files == ["eval/--4gqARaEJE_000000.wav"]
    assert splits["test"].labels == [(0, 2, 3)]
    dataset = AudioDataset(train, 8000)
    assert dataset.targets([0]).tolist() == [[1, 0, 0, 1]]
    assert dataset.summary().endswith("1 left out")


def test_full(root):
    train = audioset(root, subset="full")["train"]
    assert train.names == [
        "---1_cCGK4M",
        "---2_BBVHAA",
        "--PJHxphWEs",
        "--ZhevVpy1s",
        "Y0aE2O5G5WE",
    ]
    assert train.labels[:2] == [(2,), (0,)]


def test_lists_in_a_folder_of_their_own(root):
    (root / "metadata").mkdir()
    for path in root.glob("*.csv"):
        path.rename(root / "metadata" / path.name)
    assert len(audioset(root)["train"]) == 3


def test_errors(root, tree):
    with pytest.raises(ValueError, match="subset must be one of 'balanced', 'full', got 'all'"):
        audioset(root, subset="all")
    (root / "unbalanced_train_segments.csv").unlink()
    with pytest.raises(ValueError, match="has no unbalanced_train_segments.csv"):
        audioset(root, subset="full")
    name = "balanced_train_segments.csv"
    for line, message in (
        ('--PJHxphWEs, 30.000, 40.000, "/m/nope"', f"{name}, line 4: no such class: '/m/nope'"),
        ('--PJHxphWEs, x, 40.000, "/m/09x0r"', f"{name}, line 4: start_seconds must be a number"),
        ("--PJHxphWEs, 30.000, 40.000, /m/09x0r,/m/03fwl", "line 4: has 5 fields instead of 4"),
        ('-0gone-gone, 0.000, 10.000, "/m/03fwl"', f"none of the 1 clips of {name} has an audio"),
        (BALANCED + BALANCED, f"{name}: names must be unique"),
    ):
        tree.text(name, HEADER.format(1) + line + "\n")
        with pytest.raises(ValueError, match=message):
            audioset(root)
