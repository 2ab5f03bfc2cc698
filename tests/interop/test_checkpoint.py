"""Files of others: opened without executing anything, and recognised."""

import argparse
import os
import pickle

import pytest
import torch
from safetensors.torch import save_file

from fastast import create_model, to_reference
from fastast.interop.checkpoint import family_of, read_checkpoint


@pytest.fixture
def ast():
    torch.manual_seed(0)
    small = {"dim": 64, "depth": 1, "num_heads": 1, "input_frames": 160}
    return to_reference(create_model("ast_tiny", 4, **small))


class Harmful:
    """What calls a function when it is unpickled."""

    def __reduce__(self):
        return os.system, ("echo harm > harmed",)


def same(found, expected):
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], value) for key, value in expected.items())


@pytest.mark.parametrize("wrapping", [None, "model", "state_dict", "model_state"])
def test_wrappings(ast, tmp_path, wrapping):
    weights = {f"module.{key}": value for key, value in ast.items()}
    whole = weights if wrapping is None else {wrapping: weights, "epoch": 3}
    torch.save(whole, tmp_path / "published.pth")
    same(read_checkpoint(tmp_path / "published.pth").weights, ast)


def test_a_command_line_beside_the_weights(ast, tmp_path):
    torch.save({"model": ast, "args": argparse.Namespace(lr=1.0)}, tmp_path / "mae.pth")
    same(read_checkpoint(tmp_path / "mae.pth").weights, ast)


def test_folder_of_transformers(ast, tmp_path):
    save_file(ast, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_text('{"max_length": 160}')
    found = read_checkpoint(tmp_path)
    same(found.weights, ast)
    assert found.config == {"max_length": 160} and found.metadata == {"format": "pt"}


def test_nothing_is_executed(ast, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"model": ast, "extra": Harmful()}, tmp_path / "harmful.pth")
    with pytest.raises(ValueError, match=r"harmful\.pth would call \w+\.system .*left closed"):
        read_checkpoint(tmp_path / "harmful.pth")
    (tmp_path / "raw.bin").write_bytes(pickle.dumps(Harmful(), protocol=2))
    with pytest.raises(ValueError, match=r"raw\.bin"):
        read_checkpoint(tmp_path / "raw.bin")
    assert not (tmp_path / "harmed").exists()


def test_files_that_are_of_no_use(ast, tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        read_checkpoint(tmp_path / "none.pth")
    with pytest.raises(ValueError, match=r"model\.onnx is none of \.pth"):
        read_checkpoint(tmp_path / "model.onnx")
    with pytest.raises(ValueError, match="neither model.safetensors nor pytorch_model.bin"):
        read_checkpoint(tmp_path)
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(ValueError, match=r"list\.pth holds no weights by name"):
        read_checkpoint(tmp_path / "list.pth")
    torch.save(ast, tmp_path / "whole.pth")
    save_file(ast, tmp_path / "whole.safetensors")
    for name in ("whole.pth", "whole.safetensors"):
        whole = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(whole[: len(whole) // 2])
        with pytest.raises(ValueError, match=name.replace(".", r"\.")):
            read_checkpoint(tmp_path / name)


def test_families_by_their_keys(ast):
    assert family_of(ast) == "ast"
    assert family_of({f"module.{key}" for key in ast}) == "ast"
    assert family_of([*ast, "mask_embed"]) == "ssast"
    with pytest.raises(ValueError) as error:
        family_of(["v.pos_embed", "v.cls_token", "mlp.weight", "decoder.0.weight"])
    for part in ("ast lacks mlp_head.1.weight", "ssast lacks mask_embed", "decoder, mlp, v"):
        assert part in str(error.value)
    with pytest.raises(ValueError, match="no known family.*the 1 keys begin with layer"):
        family_of(["layer.weight"])
