"""Published weights as runs, and runs as the originals have them."""

import json
import sys
from argparse import Namespace

import pytest
import torch
from safetensors import safe_open

from fastast import create_model, create_pretraining_model, from_reference, to_reference
from fastast.cli import main
from fastast.train import load_model
from fastast.train.convert import convert, export
from tests.testing import write_tone

SMALL = {"dim": 64, "depth": 2, "num_heads": 1}
STATISTICS = {"mean": -4.0, "std": 4.0}
MODELS = {
    "ast": lambda: create_model("ast_tiny", 4, input_frames=160, **SMALL),
    "elastic_ast": lambda: create_model("elastic_ast_tiny", 4, max_time_patches=12, **SMALL),
    "flexi_ast": lambda: create_model("flexi_ast_tiny", 4, input_frames=160, **SMALL),
    "audio_mae": lambda: create_model("audio_mae_tiny", 4, position_wrap=64, **SMALL),
    "hts_at": lambda: create_model(
        "hts_at_tiny", 4, dim=16, depths=(1,) * 4, num_heads=(1,) * 4, fit="stretch"
    ),
}


@pytest.fixture
def published(tmp_path):
    def write(family, classes=4):
        torch.manual_seed(1)
        model = MODELS[family]().eval()
        with torch.no_grad():  # far from what initialisation leaves alike
            for parameter in model.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
        torch.save(to_reference(model), tmp_path / f"{family}.pth")
        return tmp_path / f"{family}.pth"

    return write


@pytest.mark.parametrize("family", MODELS)
def test_a_converted_run_is_the_original(published, tmp_path, family):
    path = published(family)
    options = {} if family == "hts_at" else STATISTICS
    config = {"stride": (10, 10)} if family == "ast" else {}
    if family == "audio_mae":  # which has the keys of a ViT
        options = options | {"family": family}
    _, notes = convert(path, tmp_path / "run", config=config, accept_license=True, **options)
    assert notes["family"] == family
    method, recipe, names = load_model(tmp_path / "run")
    assert names == ["0", "1", "2", "3"] and recipe.model.name == f"{family}_tiny"
    original = from_reference(torch.load(path, weights_only=True), family, config)
    frames = torch.randn(2, 160, original.geometry.num_mels)
    with torch.inference_mode():
        expected = original(frames)
        torch.testing.assert_close(method.model(frames), expected, rtol=1e-5, atol=1e-5)
    with safe_open(tmp_path / "run" / "model.safetensors", "pt") as file:
        metadata = file.metadata()
    assert {"recipe", "class_names", "license", "source", "source_sha256"} < set(metadata)
    # And back: the same bits.
    export(tmp_path / "run", tmp_path / "back.pth")
    back = torch.load(tmp_path / "back.pth", weights_only=True)
    before = torch.load(path, weights_only=True)
    assert back.keys() == before.keys()
    assert all(torch.equal(back[key], value) for key, value in before.items())


def test_an_autoencoder_starts_other_runs(tmp_path):
    from fastast.train.init import start_from

    kind = {"position_wrap": 64, "attention": "global", "decoder_dim": 32, "decoder_depth": 1}
    model = create_pretraining_model("audio_mae_tiny", **kind, **SMALL)
    # As published: beside the command line, under "model".
    file = {"model": to_reference(model), "args": Namespace(epochs=33)}
    torch.save(file, tmp_path / "mae.pth")
    with pytest.raises(ValueError, match="pass --accept-license"):
        convert(tmp_path / "mae.pth", tmp_path / "run")
    recipe, _ = convert(tmp_path / "mae.pth", tmp_path / "run", accept_license=True)
    assert recipe.train.method == "audio_mae" and recipe.audio_mae.attention == "global"
    found = load_model(tmp_path / "run")[0].model.state_dict()
    assert all(torch.equal(found[key], value) for key, value in model.state_dict().items())
    for source in ("run", "mae.pth"):
        fine = create_model("audio_mae_tiny", 3, position_wrap=64, **SMALL)
        start_from(fine, "audio_mae_tiny", tmp_path / source)
        assert torch.equal(fine.patch_embed.proj.weight, model.patch_embed.proj.weight)


def test_pretraining_starts_other_runs(tmp_path):
    from fastast.train.init import start_from

    model = create_pretraining_model("ssast_patch_tiny", input_frames=160, **SMALL)
    torch.save(to_reference(model), tmp_path / "ssast.pth")
    recipe, _ = convert(tmp_path / "ssast.pth", tmp_path / "run")
    assert recipe.train.method == "ssast"
    found = load_model(tmp_path / "run")[0].model.state_dict()
    assert all(torch.equal(found[key], value) for key, value in model.state_dict().items())
    fine = create_model("ssast_patch_tiny", 3, input_frames=160, stride=(16, 16), **SMALL)
    start_from(fine, "ssast_patch_tiny", tmp_path / "run")
    assert torch.equal(fine.trunk.norm.weight, model.trunk.norm.weight)


def test_the_command(published, tmp_path, capsys):
    path, run = published("elastic_ast"), str(tmp_path / "run")
    assert main(["convert", str(path), run, "--mean", "-4", "--std", "4"]) == 1
    assert "license: none stated" in capsys.readouterr().err
    labels = tmp_path / "labels.csv"
    rows = "".join(f'{row},/m/{row},"{name}"\n' for row, name in enumerate(["a, b", "c", "d", "e"]))
    labels.write_text("index,mid,display_name\n" + rows)
    command = ["convert", str(path), run, "--labels", str(labels), "--accept-license"]
    assert main(command) == 1
    assert "--mean, --std" in capsys.readouterr().err
    assert main([*command, "--mean", "-4", "--std", "4"]) == 0
    assert "elastic_ast (license: none stated), elastic_ast_tiny" in capsys.readouterr().out
    write_tone(tmp_path / "a.wav", 300, 1.0, 16000)
    assert main(["predict", run, str(tmp_path / "a.wav"), "--json", "--top", "4"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found["classes"]) == {"a, b", "c", "d", "e"}
    assert main(["convert", run, str(tmp_path / "back.safetensors"), "--to", "original"]) == 0
    assert (tmp_path / "back.safetensors").exists()


@pytest.mark.parametrize(
    "options, message",
    [
        (["--config", "{"], "--config must be JSON"),
        (["--to", "onnx"], "--to must be original or transformers"),
        (["--family", "resnet"], "family resnet"),
        (["--mean", "0"], "--mean, --std"),
    ],
)
def test_options_that_do_not_fit(published, tmp_path, capsys, options, message):
    assert main(["convert", str(published("ast")), str(tmp_path / "run"), *options]) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_settings_that_do_not_fit(published, tmp_path):
    path = published("ast")
    with pytest.raises(ValueError, match="has 4 classes, but 2 names"):
        convert(path, tmp_path / "run", class_names=["a", "b"], **STATISTICS)
    with pytest.raises(ValueError, match="HTS-AT normalises by itself"):
        convert(published("hts_at"), tmp_path / "run", **STATISTICS)
    convert(path, tmp_path / "run", **STATISTICS)
    with pytest.raises(ValueError, match=r"not to .*weights\.bin"):
        export(tmp_path / "run", tmp_path / "weights.bin")
    torch.save({"conv.weight": torch.zeros(1)}, tmp_path / "cnn.pth")
    with pytest.raises(ValueError, match=r"cnn\.pth: the weights are of no known family"):
        convert(tmp_path / "cnn.pth", tmp_path / "other")


def test_a_folder_of_transformers(published, tmp_path, capsys):
    """Written and read again; class names, normalisation and length come along."""
    run, folder = tmp_path / "run", tmp_path / "hub"
    convert(published("ast"), run, class_names=["a", "b", "c", "d"], multi_label=True, **STATISTICS)
    assert main(["convert", str(run), str(folder), "--to", "transformers"]) == 0
    config = json.loads((folder / "config.json").read_text())
    assert config["num_hidden_layers"] == 2 and config["layer_norm_eps"] == 1e-6
    assert config["problem_type"] == "multi_label_classification"
    capsys.readouterr()
    assert main(["convert", str(folder), str(tmp_path / "again")]) == 0
    (first, before, names), (second, after, same) = load_model(run), load_model(tmp_path / "again")
    assert names == same == ["a", "b", "c", "d"]
    assert (before.frontend.mean, before.frontend.std) == (after.frontend.mean, after.frontend.std)
    assert second.loss == "binary_cross_entropy"
    ours, theirs = first.model.state_dict(), second.model.state_dict()
    assert all(torch.equal(value, theirs[key]) for key, value in ours.items())


@pytest.mark.parametrize("frames", [128, 300, 1024])
def test_transformers_itself(tmp_path, frames):
    """Its own model, of random weights, gives the same logits; and opens ours."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.ASTConfig(
        hidden_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=512,
        max_length=frames,
        num_labels=5,
        layer_norm_eps=1e-6,
    )
    original = transformers.ASTForAudioClassification(config).eval()
    with torch.no_grad():
        for parameter in original.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    original.save_pretrained(tmp_path / "theirs")
    convert(tmp_path / "theirs", tmp_path / "run", **STATISTICS)
    ours = load_model(tmp_path / "run")[0].model
    inputs = torch.randn(2, frames, 128)
    with torch.inference_mode():
        expected = original(inputs).logits
        assert (ours(inputs) - expected).abs().max() < 1e-4
    export(tmp_path / "run", tmp_path / "back", family="transformers")
    back = transformers.ASTForAudioClassification.from_pretrained(tmp_path / "back").eval()
    with torch.inference_mode():
        torch.testing.assert_close(back(inputs).logits, expected, rtol=0, atol=1e-6)
    assert "transformers" in sys.modules
