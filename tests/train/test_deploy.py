"""Models in files that need nothing of this library."""

import json

import pytest
import torch

from fastast import create_model
from fastast.cli import main
from fastast.interop.export import export_single_clip
from fastast.train import fit, load_model

SMALL = {"dim": 64, "depth": 2, "num_heads": 1}
MODELS = {
    "elastic_ast": lambda: create_model("elastic_ast_tiny", 5, max_time_patches=12, **SMALL),
    "elastic_ast_mean": lambda: create_model("elastic_ast_tiny", 5, pool="mean", **SMALL),
    "ast": lambda: create_model("ast_tiny", 5, input_frames=200, **SMALL),
    "flexi_ast": lambda: create_model("flexi_ast_tiny", 5, input_frames=200, **SMALL),
    "ssast": lambda: create_model("ssast_patch_tiny", 5, input_frames=200, **SMALL),
    "pooled": lambda: create_model("elastic_ast_tiny", 5, time_pool=2, **SMALL),
}


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_any_length(name):
    torch.manual_seed(0)
    model = MODELS[name]().train()
    program = export_single_clip(model)
    assert model.training
    names = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert not [name for name in names if "fastast" in name]
    model.eval()
    for frames in (model.geometry.min_frames(), 200, 777):
        clip = torch.randn(1, frames, 128)
        torch.testing.assert_close(program.module()(clip), model(clip), rtol=1e-5, atol=1e-6)


def test_what_cannot_be_exported():
    with pytest.raises(ValueError, match="HTSAT cannot be exported"):
        export_single_clip(create_model("hts_at_tiny", 5))
    with pytest.raises(ValueError, match="Linear cannot be exported"):
        export_single_clip(torch.nn.Linear(2, 2))


@pytest.fixture
def run(recipe, tmp_path):
    recipe.train.max_steps = 2
    fit(recipe, tmp_path / "run", quiet=True)
    return tmp_path / "run"


@torch.no_grad()
def test_torch_export(run, tmp_path, capsys):
    assert main(["export", str(run), str(tmp_path / "model.pt2")]) == 0
    assert "softmax makes probabilities" in capsys.readouterr().out
    notes = dict.fromkeys(("class_names", "filterbank", "activation"), "")
    program = torch.export.load(tmp_path / "model.pt2", extra_files=notes)
    assert json.loads(notes["class_names"]) == ["high", "low"]
    assert json.loads(notes["filterbank"])["sample_rate"] == 8000
    clip = torch.randn(1, 93, 32)
    expected = load_model(run)[0].model(clip)
    torch.testing.assert_close(program.module()(clip), expected, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_onnx(run, tmp_path):
    pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    assert main(["export", str(run), str(tmp_path / "model.onnx")]) == 0
    session = runtime.InferenceSession(tmp_path / "model.onnx")
    notes = session.get_modelmeta().custom_metadata_map
    assert json.loads(notes["class_names"]) == ["high", "low"]
    model = load_model(run)[0].model
    for frames in (8, 93, 400):
        clip = torch.randn(1, frames, 32)
        (found,) = session.run(["logits"], {"frames": clip.numpy()})
        torch.testing.assert_close(torch.from_numpy(found), model(clip), rtol=1e-4, atol=1e-5)


def test_other_files(run, tmp_path, capsys):
    assert main(["export", str(run), str(tmp_path / "model.bin")]) == 1
    assert "exported to .onnx or .pt2" in capsys.readouterr().err
