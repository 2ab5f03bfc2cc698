"""Embeddings of clips: the right vector under the right name, whatever else is in the batch."""

import sys
from dataclasses import replace

import numpy as np
import pyarrow
import pytest
import torch
from pyarrow import parquet

from fastast.data import AudioDataset, Manifest, read_audio
from fastast.train import build_method
from fastast.train import embed as module
from fastast.train.embed import Embeddings, embed, find_clips, write_embeddings
from tests.testing import write_tone


@pytest.fixture
def setting(recipe):
    recipe = replace(recipe, frontend=replace(recipe.frontend, mean=-4.0, std=4.0))
    # Embeddings take clips whole.
    recipe = replace(recipe, data=replace(recipe.data, max_seconds=0.2, min_seconds=0.5))
    torch.manual_seed(0)
    return build_method(recipe, 2).eval(), recipe


def alone(method, path) -> torch.Tensor:
    with torch.inference_mode():
        frames = method.frontend.filterbank([read_audio(path, 8000)], frame_shift=80)
        return method.model.embed(frames)[0]


def test_every_clip_as_if_alone_and_in_order(setting, tones, monkeypatch):
    monkeypatch.setattr(module, "CHUNK", 9)
    method, recipe = setting
    dataset = AudioDataset(find_clips([str(tones)]), 8000)
    chunks = list(embed(method, recipe, dataset, "cpu"))
    assert [len(chunk.names) for chunk in chunks] == [9, 9, 9, 9, 4]
    assert sum((chunk.names for chunk in chunks), []) == dataset.names
    assert chunks[0].paths[0] == str(tones / chunks[0].names[0])
    vectors = torch.cat([chunk.vectors for chunk in chunks])
    expected = torch.stack([alone(method, path) for path in dataset.paths])
    torch.testing.assert_close(vectors, expected, rtol=1e-4, atol=1e-5)


def test_processes_that_decode_change_nothing(setting, tones):
    dataset = AudioDataset(find_clips([str(tones)]), 8000, cache=False)
    (alone,), (two,) = (embed(*setting, dataset, "cpu", workers=count) for count in (0, 2))
    assert alone.names == two.names
    assert torch.equal(alone.vectors, two.vectors)


def test_what_cannot_be_decoded_is_left_out(setting, tmp_path):
    for number in range(4):
        write_tone(tmp_path / f"{number}.wav", 300 + 200 * number, 0.3)
    (tmp_path / "damaged.wav").write_bytes(b"not audio")
    manifest = find_clips([str(tmp_path)])
    dataset = AudioDataset(manifest, 8000, cache=False, bad_files="skip")
    assert [clip.path for clip in dataset.left_out] == [str(tmp_path / "damaged.wav")]
    # One more becomes unreadable after its header was read.
    (tmp_path / "1.wav").write_bytes((tmp_path / "1.wav").read_bytes()[:1000])
    (chunk,) = embed(*setting, dataset, "cpu")
    assert chunk.names == ["0.wav", "2.wav", "3.wav"]
    assert [clip.path for clip in chunk.left_out] == [str(tmp_path / "1.wav")]
    expected = torch.stack([alone(setting[0], tmp_path / name) for name in chunk.names])
    torch.testing.assert_close(chunk.vectors, expected, rtol=1e-4, atol=1e-5)


CHUNKS = [
    Embeddings(["a", "b"], ["/a", "/b"], torch.arange(6.0).reshape(2, 3)),
    Embeddings([], [], torch.empty(0, 0), ("bad",)),
    Embeddings(["c"], ["/c"], torch.full((1, 3), 9.0)),
]


def test_npz(tmp_path):
    assert write_embeddings(tmp_path / "new" / "x.npz", iter(CHUNKS)) == (3, ("bad",))
    with np.load(tmp_path / "new" / "x.npz") as found:
        assert found["embeddings"].dtype == np.float32
        assert found["embeddings"].tolist() == [[0, 1, 2], [3, 4, 5], [9, 9, 9]]
        assert found["names"].tolist() == ["a", "b", "c"]
        assert found["paths"].tolist() == ["/a", "/b", "/c"]


def test_parquet(tmp_path):
    assert write_embeddings(tmp_path / "x.parquet", iter(CHUNKS)) == (3, ("bad",))
    table = parquet.read_table(tmp_path / "x.parquet")
    kind = table.schema.field("embedding").type
    assert (kind.value_type, kind.list_size) == (pyarrow.float32(), 3)
    assert table.to_pydict() == {
        "name": ["a", "b", "c"],
        "path": ["/a", "/b", "/c"],
        "embedding": [[0, 1, 2], [3, 4, 5], [9, 9, 9]],
    }


@pytest.mark.parametrize("name", ["x.npz", "x.parquet"])
def test_a_failure_leaves_no_half_file(tmp_path, name):
    def failing():
        yield CHUNKS[0]
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        write_embeddings(tmp_path / name, failing())
    with pytest.raises(ValueError, match="nothing to write: 1 clips were left out"):
        write_embeddings(tmp_path / name, iter(CHUNKS[1:2]))
    assert list(tmp_path.iterdir()) == []


def test_wrong_output_is_refused_before_anything_is_computed(tmp_path, monkeypatch):
    def never():
        pytest.fail("nothing should be computed")
        yield

    with pytest.raises(ValueError, match=r"\.npz or \.parquet, not to .*x\.csv"):
        write_embeddings(tmp_path / "x.csv", never())
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ValueError, match="Parquet needs pyarrow"):
        write_embeddings(tmp_path / "x.parquet", never())


def test_find_clips(tones, tmp_path):
    files = [str(tones / "high" / "0.wav"), str(tones / "low" / "1.wav")]
    assert find_clips(files).files == files
    assert find_clips(files[:1]).files == files[:1]
    assert len(find_clips([str(tones)])) == 40
    Manifest.from_folder(tones).write_csv(tmp_path / "clips.csv")
    assert len(find_clips([str(tmp_path / "clips.csv")])) == 40
    with pytest.raises(ValueError, match="holds no audio files"):
        find_clips([str(tmp_path)])
