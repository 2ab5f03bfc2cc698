"""What a masked autoencoder restores, put together, drawn and sounded."""

from dataclasses import replace

import pytest
import torch

from fastast.cli import main
from fastast.data import LeftOut, read_audio
from fastast.tokens import PatchGeometry
from fastast.train import build_method, fit, load_model
from fastast.train.reconstruct import maskings, reconstruct
from tests.train.test_audio_mae import pretraining  # noqa: F401
from tests.train.test_fit import with_train


@pytest.fixture
def run(pretraining, tmp_path):  # noqa: F811
    pretraining.audio_mae.targets = "plain"
    fit(with_train(pretraining, max_steps=1), tmp_path / "run", quiet=True)
    return tmp_path / "run"


def test_kinds_of_masks_hide_as_much():
    for mask in maskings(0.36).values():
        assert mask.num_kept(50, 50) == pytest.approx(2500 * 0.64, abs=50)


def test_what_is_seen_stays_and_what_is_hidden_is_the_model_s(run, tones, monkeypatch):
    method, recipe, _ = load_model(run)
    files = sorted(tones.rglob("*.wav"))[:2]
    for features, made in reconstruct(method, recipe, files, 0.5):
        frames = torch.from_numpy(features.frames)
        assert frames.shape[0] % 8 == 0 and frames.shape[1] == 32
        assert [each.masking for each in made] == list(maskings(0.5))
        for each in made:
            assert torch.equal(each.restored[~each.hidden], frames[~each.hidden])
            assert (each.masked[each.hidden] == frames.min()).all()
            assert not torch.equal(each.restored, frames) and each.error > 0
        times, freqs = (made[index].hidden for index in (1, 2))
        assert (times == times[:, :1]).all() and (freqs == freqs[:1]).all()

    # A model that knows the answer restores everything.
    def oracle(inputs, masked, grid):
        return method.model.patch_embed.cut(inputs.frames, grid.decoded)

    monkeypatch.setattr(method.model, "restore", oracle)
    features, made = next(reconstruct(method, recipe, files, 0.5, max_seconds=0.1))
    assert len(features.frames) == 8
    for each in made:
        assert torch.equal(each.restored, torch.from_numpy(features.frames)) and each.error == 0


def test_command(run, tones, tmp_path, capsys):
    file = sorted(tones.rglob("*.wav"))[3]
    out = tmp_path / "out"
    assert main(["reconstruct", str(run), str(file), "--out", str(out), "--ratio", "0.4"]) == 0
    assert "time+frequency, mean squared error" in capsys.readouterr().out
    assert (out / f"{file.stem}.png").read_bytes().startswith(b"\x89PNG")
    sounds = sorted(path.name for path in out.glob("*.wav"))
    assert len(sounds) == 9 and f"{file.stem}.time.restored.wav" in sounds
    assert read_audio(str(out / sounds[0]), 8000).abs().max() == 32767
    assert main(["reconstruct", str(run), str(file), "--ratio", "1"]) == 1
    assert main(["reconstruct", str(run), str(file), "--max-seconds", "0"]) == 1


def test_what_cannot_be_restored_says_so(pretraining, tmp_path):  # noqa: F811
    recipe = replace(pretraining, frontend=replace(pretraining.frontend, mean=0.0, std=1.0))
    method = build_method(recipe, 2)
    (tmp_path / "bad.wav").write_bytes(b"noise")
    (found,) = reconstruct(method, recipe, [tmp_path / "bad.wav"], 0.5)
    assert isinstance(found, LeftOut)
    geometry = method.model.geometry
    method.model.geometry = PatchGeometry(32, (8, 8), (4, 4), 1)
    with pytest.raises(ValueError, match="patches that overlap"):
        next(reconstruct(method, recipe, [], 0.5))
    method.model.geometry = geometry
    method.model = torch.nn.Identity()
    with pytest.raises(ValueError, match="Identity restores nothing"):
        next(reconstruct(method, recipe, [], 0.5))
