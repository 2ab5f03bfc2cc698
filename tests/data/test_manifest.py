import json
from pathlib import Path

import numpy as np
import pytest

from fastast.data import Manifest
from fastast.data.files import find_audio
from fastast.data.manifest import read_csv


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def same(a: Manifest, b: Manifest) -> bool:
    seconds = [
        np.array_equal(x, y) for x, y in ((a.begin, b.begin), (a.end, b.end)) if x is not None
    ]
    keys = ("files", "labels", "class_names", "multi_label", "names", "source_rate")
    return all(seconds) and all(getattr(a, key) == getattr(b, key) for key in keys)


def test_from_folder(tmp_path):
    for file in ("dog/b.wav", "dog/more/a.FLAC", "cat/c.ogg", "cat/.x.wav", ".git/x.wav"):
        write(tmp_path / file, "")
    write(tmp_path / "cat" / "notes.txt", "")
    manifest = Manifest.from_folder(tmp_path)
    assert manifest.files == manifest.names == ["cat/c.ogg", "dog/b.wav", "dog/more/a.FLAC"]
    assert manifest.labels == [(0,), (1,), (1,)]
    assert manifest.class_names == ["cat", "dog"]
    assert manifest.root == tmp_path and not manifest.multi_label


def test_folders_behind_links_are_searched(tmp_path):
    write(tmp_path / "disk" / "a" / "x.wav", "")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "b").symlink_to(tmp_path / "disk", target_is_directory=True)
    (tmp_path / "disk" / "a" / "circle").symlink_to(tmp_path / "disk", target_is_directory=True)
    assert find_audio(tmp_path / "data") == ["b/a/x.wav"]


def test_from_files(tmp_path):
    manifest = Manifest.from_files([tmp_path / "a.wav", "b.wav"])
    assert manifest.files == [str(tmp_path / "a.wav"), "b.wav"]
    assert manifest.labels == [(), ()] and manifest.class_names == [] and not manifest.labelled


def test_names_of_parts():
    manifest = Manifest(
        ["a.wav", "a.wav", "a.wav"], [()] * 3, [], begin=[0, 0.25, 0], end=[np.inf, 1.5, 1]
    )
    assert manifest.names == ["a.wav", "a.wav@0.250-1.500", "a.wav@0.000-1.000"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"labels": [(0,)]}, "labels must be of 2 clips, as files is, got 1"),
        ({"labels": [0, 1]}, r"labels must be tuples of indices into class_names, such as \(3,\)"),
        ({"labels": [[0], [1]]}, "labels must be tuples"),
        ({"labels": [(0,), (2,)]}, r"labels must lie in \[0, 2\).*but b.wav has \(2,\)"),
        ({"labels": [(0,), (-1,)]}, r"labels must lie in .*but b.wav has \(-1,\)"),
        ({"labels": [(0,), ()]}, r"exactly one per clip.*but b.wav has \(\)"),
        ({"labels": [(0,), (0, 1)]}, r"exactly one per clip.*but b.wav has \(0, 1\)"),
        ({"labels": [(0, 1), (0, 1)]}, r"exactly one per clip.*but a.wav has \(0, 1\)"),
        ({"names": ["x", "x"]}, "names must be unique, but 'x'"),
        ({"files": ["a.wav", "a.wav"]}, "names must be unique, but 'a.wav'"),
        ({"class_names": ["p", "p"]}, "class_names must be unique, but 'p'"),
        ({"begin": [0, 1]}, "begin and end must be given together"),
        ({"begin": [0, 1], "end": [1, 1]}, "0 <= begin < end, but b.wav has 1 and 1"),
        ({"begin": [-1, 1], "end": [1, 2]}, "0 <= begin < end, but a.wav has -1 and 1"),
        ({"begin": [np.nan, 1], "end": [1, 2]}, "but a.wav has nan and 1"),
        ({"begin": [0], "end": [1, 2]}, "begin must be of 2 clips"),
    ],
)
def test_fields_are_checked(fields, message):
    good = {"files": ["a.wav", "b.wav"], "labels": [(0,), (1,)], "class_names": ["p", "q"]}
    Manifest(**good)
    with pytest.raises(ValueError, match=message):
        Manifest(**good | fields)


def test_csv_with_one_label(tmp_path):
    path = write(
        tmp_path / "lists" / "a.csv",
        "\ufeffpath, label, seconds\r\n"
        'x/1.wav, "dog, big", 3\r\n'
        "\r\n"
        "/elsewhere/2.wav,cat,4\r\n"
        "x.hdf5:P01,cat; not two,5\r\n",
    )
    manifest = Manifest.from_csv(path)
    assert manifest.root == tmp_path / "lists"
    assert manifest.files == ["x/1.wav", "/elsewhere/2.wav", "x.hdf5:P01"]
    assert manifest.class_names == ["cat", "cat; not two", "dog, big"]
    assert manifest.labels == [(2,), (0,), (1,)] and not manifest.multi_label
    assert manifest.begin is None and manifest.end is None
    assert Manifest.from_csv(path, root="/data").root.as_posix() == "/data"
    names = ["dog, big", "mouse", "cat; not two", "cat"]
    assert Manifest.from_csv(path, class_names=names).labels == [(0,), (3,), (2,)]


def test_csv_with_parts_and_several_labels(tmp_path):
    path = write(
        tmp_path / "a.csv",
        "begin,path,labels,end,name,split,source_rate\n"
        "0.5,a.wav,dog|cat,2.25,first,train,24000\n"
        ",a.wav,,,second,test,24000\n"
        "3,a.wav, cat ;mouse;cat,,third,train,24000\n",
    )
    manifest, splits = read_csv(path)
    assert manifest.class_names == ["cat", "dog", "mouse"] and manifest.multi_label
    assert manifest.labels == [(0, 1), (), (0, 2)]
    assert manifest.begin.tolist() == [0.5, 0, 3]
    assert manifest.end.tolist() == [2.25, np.inf, np.inf]
    assert manifest.names == ["first", "second", "third"]
    assert manifest.source_rate == 24000
    assert splits == ["train", "test", "train"]


def test_csv_without_labels(tmp_path):
    manifest, splits = read_csv(write(tmp_path / "a.csv", "path\na.wav\nb.wav\n"))
    assert manifest.labels == [(), ()] and manifest.class_names == []
    assert splits == ["", ""]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("file,label\na.wav,x\n", "a.csv: has no column 'path', only file, label"),
        ("path,label,labels\na.wav,x,y\n", "a.csv: has both a column 'label' and 'labels'"),
        ("path,label\n", "a.csv: lists no clips"),
        ("", "a.csv: lists no clips"),
        ("path,label\na.wav,x\nb.wav\n", "a.csv, line 3: has 1 fields instead of 2"),
        ("path,label\na.wav,x\nb,c.wav,y\n", "a.csv, line 3: has 3 fields instead of 2"),
        ("path,label\na.wav,x\n\n,x\n", "a.csv, line 4: path is empty"),
        ("path,label\na.wav,x\nb.wav,\n", "a.csv, line 3: label is empty, but other lines"),
        ("path,begin\na.wav,x\n", "a.csv, line 2: begin and end must be seconds, got 'x'"),
        ("path,begin,end\na.wav,2,1\n", "a.csv, line 2: begin and end must fulfil"),
        ("path,end\na.wav,nan\n", "a.csv, line 2: begin and end must fulfil"),
        ("path,source_rate\na.wav,1\nb.wav,2\n", "a.csv: source_rate must be one number"),
        ("path,source_rate\na.wav,fast\n", "a.csv: source_rate must be one number"),
        ("path\na.wav\na.wav\n", "a.csv: names must be unique, but 'a.wav'"),
    ],
)
def test_csv_errors(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        Manifest.from_csv(write(tmp_path / "a.csv", text))


def test_csv_of_unknown_classes(tmp_path):
    path = write(tmp_path / "a.csv", "path,labels\na.wav,x\nb.wav,x|z|y\n")
    with pytest.raises(ValueError, match="a.csv, line 3: no such class: 'y'"):
        Manifest.from_csv(path, class_names=["x"])
    with pytest.raises(ValueError, match="gone.csv: cannot be read"):
        Manifest.from_csv(tmp_path / "gone.csv")


@pytest.mark.parametrize("multi_label", [False, True])
def test_csv_round_trip(tmp_path, multi_label):
    labels = [(1, 2), (), (0,)] if multi_label else [(2,), (0,), (0,)]
    manifest = Manifest(
        ["a, b.wav", 'say "x".wav', "x.hdf5:P01"],
        labels,
        ["z", "unused", "a, b"],
        tmp_path,
        multi_label,
        np.array([0, 1 / 3, 2]),
        np.array([1, 2 / 3, np.inf]),
        source_rate=24000,
    )
    manifest.write_csv(tmp_path / "a.csv")
    again = Manifest.from_csv(tmp_path / "a.csv", class_names=manifest.class_names)
    assert same(manifest, again) and again.root == tmp_path

    (tmp_path / "lists").mkdir()  # elsewhere, files are named in full and keep their keys
    manifest.write_csv(tmp_path / "lists" / "a.csv")
    again = Manifest.from_csv(tmp_path / "lists" / "a.csv", class_names=manifest.class_names)
    assert again.files == [f"{tmp_path}/{file}" for file in manifest.files]
    assert again.names == manifest.names and again.labels == manifest.labels


def test_csv_round_trip_without_labels(tmp_path):
    manifest = Manifest(["a.wav", "b.wav"], [(), ()], [], tmp_path, names=["x", "y"])
    manifest.write_csv(tmp_path / "a.csv")
    assert (tmp_path / "a.csv").read_text() == "path,name\na.wav,x\nb.wav,y\n"
    assert same(Manifest.from_csv(tmp_path / "a.csv"), manifest)
    (tmp_path / "lists").mkdir()
    Manifest.from_files(["x/a.wav"]).write_csv(tmp_path / "lists" / "a.csv")
    assert Manifest.from_csv(tmp_path / "lists" / "a.csv").files == [str(Path("x/a.wav").resolve())]
    with pytest.raises(ValueError, match="must not hold ';' or '|', got 'p;q'"):
        Manifest(["a"], [(0,)], ["p;q"], multi_label=True).write_csv(tmp_path / "b.csv")


CLASSES = """index,mid,display_name
0,/m/09x0r,"Speech"
1,/m/05zppz,"Male speech, man speaking"
2,/t/dd00088,Gush
"""


def write_json(path, entries):
    path.write_text(json.dumps({"data": entries}))
    return path


def test_from_ast_json(tmp_path):
    table = write(tmp_path / "class_labels_indices.csv", CLASSES)
    path = write_json(
        tmp_path / "train.json",
        [
            {"wav": "/data/a.flac", "labels": "/m/09x0r,/t/dd00088", "video_id": "a"},
            {"wav": "b.flac", "labels": " /m/05zppz ,/m/05zppz"},
            {"wav": "c.flac", "labels": ""},
        ],
    )
    manifest = Manifest.from_ast_json(path, table)
    assert manifest.files == ["/data/a.flac", "b.flac", "c.flac"]
    assert manifest.labels == [(0, 2), (1,), ()] and manifest.multi_label
    assert manifest.class_names == ["Speech", "Male speech, man speaking", "Gush"]
    assert manifest.root == tmp_path
    assert Manifest.from_ast_json(path, table, root="/x").root.as_posix() == "/x"


def test_ast_json_with_one_label(tmp_path):
    table = write(tmp_path / "classes.csv", CLASSES)
    entries = [{"wav": "a", "labels": "/t/dd00088"}, {"wav": "b", "labels": "/m/09x0r"}]
    path = write_json(tmp_path / "a.json", entries)
    manifest = Manifest.from_ast_json(path, table, multi_label=False)
    assert manifest.labels == [(2,), (0,)] and not manifest.multi_label
    write_json(path, [{"wav": "a", "labels": "/t/dd00088,/m/09x0r"}])
    with pytest.raises(ValueError, match=r"a.json: labels must be exactly one per clip"):
        Manifest.from_ast_json(path, table, multi_label=False)


def test_ast_json_errors(tmp_path):
    table = write(tmp_path / "classes.csv", CLASSES)
    path = tmp_path / "a.json"
    with pytest.raises(ValueError, match="a.json: cannot be read"):
        Manifest.from_ast_json(path, table)
    write_json(path, [{"wav": "a", "labels": "/m/09x0r"}, {"wav": "b", "labels": "/m/0,/m/1"}])
    with pytest.raises(ValueError, match=r"a.json, entry 2 of data: label '/m/0' is not in .*csv"):
        Manifest.from_ast_json(path, table)
    write_json(path, [{"wav": "a"}])
    with pytest.raises(ValueError, match="a.json, entry 1 of data: must have 'wav' and 'labels'"):
        Manifest.from_ast_json(path, table)
    path.write_text('{"data": [\n{"wav": ]}')
    with pytest.raises(ValueError, match="a.json: not JSON: .* line 2"):
        Manifest.from_ast_json(path, table)
    path.write_text("[]")
    with pytest.raises(ValueError, match="a.json: must be of the form"):
        Manifest.from_ast_json(path, table)
    write_json(path, [])
    for text, message in (
        ("index,mid,display_name\n0,/m/0,x\n2,/m/1,y\n", "line 3: index must be 1, got '2'"),
        ("index,mid\n0,/m/0\n", "has no column 'display_name'"),
    ):
        with pytest.raises(ValueError, match=message):
            Manifest.from_ast_json(path, write(table, text))


def test_subset():
    begin = np.arange(4.0)
    manifest = Manifest(
        list("abcd"), [(0,), (1,), (0,), (1,)], ["x", "y"], "/r", False, begin, begin + 1
    )
    part = manifest.subset(iter([3, 1]))
    assert part.files == ["d", "b"] and part.labels == [(1,), (1,)]
    assert part.begin.tolist() == [3, 1] and part.end.tolist() == [4, 2]
    assert part.names == [manifest.names[3], manifest.names[1]]
    assert part.class_names == ["x", "y"] and part.root == manifest.root
    assert repr(part) == "Manifest(2 clips, 2 classes, root=/r)"
