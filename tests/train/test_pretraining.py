"""Runs without labels, and fine-tuning that starts from them."""

import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from fastast.interop import from_reference
from fastast.models import SSASTPretraining, create_model
from fastast.tokens import resize_positions
from fastast.train import (
    ModelConfig,
    PhaseConfig,
    RunDirectory,
    build_method,
    evaluate_over,
    fit,
    load_data,
    load_model,
    loop,
)
from fastast.train.init import start_from
from fastast.train.predict import predict_files
from tests.interop.test_vit import vit_weights
from tests.train.test_fit import weights, with_train


@pytest.fixture
def pretraining(recipe):
    """The recipe of tests/conftest.py, to pre-train a patch model of two narrow blocks."""
    model = replace(recipe.model, name="ssast_patch_tiny", patch_size=(8, 8), max_time_patches=None)
    return replace(
        recipe,
        data=replace(recipe.data, max_seconds=0.9),
        frontend=replace(recipe.frontend, compression=[1.0]),
        model=model,
        train=replace(recipe.train, method="ssast", batch_tokens=400, log_every=1),
    )


@pytest.fixture
def fine_tuning(pretraining):
    """The same model at a finer stride, on shorter clips, to be told where it starts from."""
    return replace(
        pretraining,
        data=replace(pretraining.data, max_seconds=0.5),
        model=replace(pretraining.model, stride=(6, 4)),
        train=replace(pretraining.train, method="supervised"),
    )


def two_steps(recipe):
    """Stops after the second step."""
    return with_train(recipe, epochs=50, max_tokens=recipe.train.batch_tokens + 1)


def starting(recipe, path):
    return replace(recipe, model=replace(recipe.model, init=str(path)))


def test_two_steps_of_each(pretraining, fine_tuning, tmp_path):
    fit(two_steps(pretraining), tmp_path / "pre", quiet=True)
    (epoch,) = RunDirectory(tmp_path / "pre").metrics("epoch")
    assert epoch["step"] == 2
    for name in ("loss", "accuracy", "discriminative", "generative", "clips"):
        assert epoch[f"validation_{name}"] > 0
    parts = epoch["validation_discriminative"] + 10 * epoch["validation_generative"]
    assert epoch["validation_loss"] == pytest.approx(parts, rel=1e-5)

    method, loaded, class_names = load_model(tmp_path / "pre")
    assert isinstance(method.model, SSASTPretraining) and class_names == ["high", "low"]
    data = load_data(loaded.data).test
    (row,) = evaluate_over(method, loaded, data, lengths=[0.4])["lengths"]
    assert row["clips"] == len(data) and 0 <= row["accuracy"] <= 1
    with pytest.raises(ValueError, match="pre-trained without labels.*fine-tune it first"):
        predict_files(method, loaded, data.paths[:1], "cpu")

    recipe = two_steps(starting(fine_tuning, tmp_path / "pre"))
    fit(recipe, tmp_path / "fine", quiet=True)
    assert RunDirectory(tmp_path / "fine").metrics("epoch")[-1]["step"] == 2
    shutil.rmtree(tmp_path / "pre")  # not needed any more
    assert load_model(tmp_path / "fine")[0].model.positions.grid == (5, 11)
    fit(recipe, tmp_path / "fine", resume=True, quiet=True)


def test_weights_are_taken_over(pretraining, fine_tuning, tmp_path):
    fit(with_train(pretraining, epochs=1), tmp_path, quiet=True)
    before = weights(tmp_path)
    fine_tuning.frontend = replace(fine_tuning.frontend, mean=0.0, std=1.0)
    for path in (tmp_path, tmp_path / "model.safetensors"):
        model = build_method(fine_tuning, 2).model
        new = {name: value.clone() for name, value in model.state_dict().items()}
        start_from(model, fine_tuning.model.name, path)
        for name, value in model.state_dict().items():
            if name == "positions.table":
                adapted = resize_positions(
                    before[name], (4, 11), model.positions.grid, prefix=2, shrink="cut"
                )
                assert torch.equal(value, adapted)
            elif name.startswith(("norm.", "head.")):
                assert torch.equal(value, new[name])
            else:
                assert torch.equal(value, before[name]), name


def published(model):
    """The model's weights as SSAST's authors would publish them."""
    found = {}
    for name, value in model.state_dict().items():
        if name == "prefix":
            found["v.cls_token"], found["v.dist_token"] = value[None].split(1, 1)
        elif name == "positions.table":
            found["v.pos_embed"] = value[None]
        elif name == "mask_token":
            found["mask_embed"] = value[None, None]
        elif name == "patch_embed.proj.weight":
            found["v.patch_embed.proj.weight"] = value.unflatten(1, (1, 8, 8))
        elif name.startswith(("discriminate", "generate")):
            found[f"{name[0].replace('d', 'c')}predlayer.{name.split('.', 1)[1]}"] = value
        else:
            found["v." + name.removeprefix("trunk.")] = value
    found["p_input_fdim"] = torch.tensor(model.geometry.num_mels)
    found["p_input_tdim"] = torch.tensor(model.input_frames)
    return {f"module.{name}": value for name, value in found.items()}


def test_published_weights_are_taken_over(pretraining, fine_tuning, tmp_path):
    for recipe in (pretraining, fine_tuning):
        recipe.frontend = replace(recipe.frontend, mean=0.0, std=1.0)
        recipe.model = replace(recipe.model, dim=64, num_heads=1)
    source = build_method(pretraining, 2).model
    torch.save(published(source), tmp_path / "ssast.pth")
    assert from_reference(published(source), "ssast").input_frames == source.input_frames
    model = build_method(fine_tuning, 2).model
    start_from(model, fine_tuning.model.name, tmp_path / "ssast.pth")
    trunk = source.trunk.state_dict()
    assert all(torch.equal(value, trunk[name]) for name, value in model.trunk.state_dict().items())


@pytest.fixture
def image_net():
    """The weights of a ViT of 4 x 4 patches of 16 x 16."""
    return {name: value.float() for name, value in vit_weights(patch=16).items()}


@pytest.mark.parametrize("name", ["vit.pth", "vit.bin", "vit.safetensors"])
def test_files_of_image_weights(image_net, name, tmp_path):
    if name == "vit.safetensors":
        save_file(image_net, tmp_path / name, {"format": "pt"})  # as timm's
    elif name == "vit.pth":
        torch.save({"model": image_net}, tmp_path / name)  # as DeiT's authors'
    else:
        torch.save(image_net, tmp_path / name)
    model = create_model("elastic_ast_tiny", 2, dim=64, depth=2, num_heads=1)
    start_from(model, "elastic_ast_tiny", tmp_path / name)
    assert torch.equal(model.trunk.norm.weight, image_net["norm.weight"])


def test_runs_start_from_images(recipe, image_net, tmp_path):
    torch.save(image_net, tmp_path / "vit.pth")
    size = {"patch_size": (16, 16), "dim": 64, "num_heads": 1, "init": str(tmp_path / "vit.pth")}
    elastic = two_steps(replace(recipe, model=replace(recipe.model, **size)))
    fit(elastic, tmp_path / "elastic", quiet=True)
    size |= {"name": "ast_tiny", "stride": (16, 16), "distilled": False, "max_time_patches": None}
    front = replace(recipe.frontend, compression=[1.0], fixed_seconds=0.5)
    fixed = two_steps(replace(recipe, model=replace(recipe.model, **size), frontend=front))
    fit(fixed, tmp_path / "ast", quiet=True)
    fit(starting(elastic, tmp_path / "elastic"), tmp_path / "again", quiet=True)
    start = image_net["patch_embed.proj.weight"].sum(1).flatten(1)
    for run in ("elastic", "ast", "again"):
        kernel = weights(tmp_path / run)["patch_embed.proj.weight"]
        assert 0 < (kernel - start).abs().max() < 0.02  # in steps of 0.002 at most


def test_pretraining_resumes_bit_for_bit(pretraining, tmp_path):
    recipe = with_train(pretraining, epochs=2, checkpoint_minutes=0.0)
    fit(recipe, tmp_path / "whole", quiet=True)

    class KilledError(Exception):
        pass

    def die(self, *args, before=torch.optim.AdamW.step, **kwargs):
        die.steps += 1
        if die.steps == steps + 2:  # within the second epoch
            raise KilledError
        return before(self, *args, **kwargs)

    die.steps = 0
    whole = RunDirectory(tmp_path / "whole").metrics("epoch")
    steps = whole[0]["step"]
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KilledError):
        patch.setattr(torch.optim.AdamW, "step", die)
        fit(recipe, tmp_path / "cut", quiet=True)
    fit(recipe, tmp_path / "cut", resume=True, quiet=True)
    cut = RunDirectory(tmp_path / "cut").metrics("epoch")
    for name in ("epoch", "step", "tokens", "loss", "validation_loss", "validation_accuracy"):
        assert [record[name] for record in whole] == [record[name] for record in cut]
    expected, found = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.fixture
def phased(pretraining):
    """Two steps on a quarter of the frames of clips padded to 10.24 s, then two on all of them."""
    phases = [PhaseConfig(compression=4, epochs=1, steps=2), PhaseConfig(epochs=1, steps=2)]
    return replace(
        with_train(pretraining, batch_clips=2, batch_tokens=1100),
        frontend=replace(pretraining.frontend, fixed_seconds=10.25),
        phases=phases,
    )


def test_pretraining_in_phases_resumes_bit_for_bit(phased, tmp_path, monkeypatch):
    fit(phased, tmp_path / "whole", quiet=True)
    run = RunDirectory(tmp_path / "whole")
    phases = run.metrics("phase")
    assert [phase["steps"] for phase in phases] == [2, 2]
    # 256 and 1,023 frames in four rows of patches of 8 x 8, and two class tokens.
    assert [phase["tokens"] / phase["clips"] for phase in phases] == [130, 510]
    assert load_model(tmp_path / "whole")[0].model.positions.grid == (4, 127)
    assert 510 / 130 < phases[1]["flops"] / phases[0]["flops"] < (510 / 130) ** 2

    train_step, steps = loop._Training._train_step, 0

    def stepping(training, batches):  # is killed in each phase, and between the two
        nonlocal steps
        steps += 1
        if steps in (2, 4, 6):
            raise KeyboardInterrupt
        train_step(training, batches)

    recipe = with_train(phased, checkpoint_minutes=0.0)
    monkeypatch.setattr(loop._Training, "_train_step", stepping)
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            fit(recipe, tmp_path / "cut", resume=True, quiet=True)
    fit(recipe, tmp_path / "cut", resume=True, quiet=True)
    cut = RunDirectory(tmp_path / "cut")
    for kind in ("train", "phase", "epoch"):
        for name in ("step", "tokens", "loss", "lr", "flops", "validation_loss"):
            one, two = ([record.get(name) for record in each.metrics(kind)] for each in (run, cut))
            assert one == two, (kind, name)
    expected, found = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_bf16(pretraining, tmp_path):
    loss = {}
    for bf16 in (False, True):
        fit(with_train(pretraining, epochs=1, bf16=bf16), tmp_path / str(bf16), quiet=True)
        loss[bf16] = RunDirectory(tmp_path / str(bf16)).metrics("epoch")[0]["loss"]
    assert loss[True] == pytest.approx(loss[False], rel=0.02)


def test_learns_without_labels(pretraining, tmp_path):
    pretraining.data = replace(
        pretraining.data,
        kind="joint",
        options={"parts": [{"kind": "folder", "root": "."}]},
        validation=0.2,
    )
    fit(with_train(pretraining, epochs=15), tmp_path, quiet=True)
    records = RunDirectory(tmp_path).metrics("epoch")
    assert records[-1]["validation_loss"] < 0.8 * records[0]["validation_loss"]
    assert load_model(tmp_path)[2] == []


def test_what_does_not_fit_says_so(pretraining, fine_tuning, recipe, tmp_path):
    fit(two_steps(pretraining), tmp_path / "pre", quiet=True)
    wrong = starting(fine_tuning, tmp_path / "pre")
    wrong.model = replace(wrong.model, patch_size=(8, 4), stride=(8, 4))
    with pytest.raises(ValueError, match=r"model\.init: .*patch_size \(8, 4\) differs"):
        fit(wrong, tmp_path / "fine", quiet=True)
    wrong.model = replace(wrong.model, patch_size=(8, 8), depth=3)
    with pytest.raises(ValueError, match=r"trunk\.blocks\.2.* same dim, depth and num_heads"):
        fit(wrong, tmp_path / "fine", quiet=True)
    with pytest.raises(ValueError, match="does not exist"):
        fit(starting(fine_tuning, tmp_path / "none"), tmp_path / "fine", quiet=True)
    (tmp_path / "bad.pth").write_bytes(b"noise")
    with pytest.raises(ValueError, match=r"bad\.pth cannot be read"):
        fit(starting(fine_tuning, tmp_path / "bad.pth"), tmp_path / "fine", quiet=True)
    with pytest.raises(ValueError, match=r"patch_size \(16, 8\) differs"):
        fit(starting(recipe, tmp_path / "pre"), tmp_path / "fine", quiet=True)
    hts_at = starting(recipe, tmp_path / "pre")
    hts_at.model = ModelConfig(name="hts_at_tiny", init=str(tmp_path / "pre"))
    hts_at.frontend = replace(hts_at.frontend, num_mels=64)
    with pytest.raises(ValueError, match="hts_at_tiny does not start from other models"):
        fit(hts_at, tmp_path / "fine", quiet=True)
    torch.save({"something": torch.zeros(1)}, tmp_path / "other.bin")
    with pytest.raises(
        ValueError, match=r"model\.init: .*other\.bin: the weights are of no known family"
    ):
        fit(starting(recipe, tmp_path / "other.bin"), tmp_path / "fine", quiet=True)
    with pytest.raises(ValueError, match=r"train\.metric is mAP, but train\.method ssast learns"):
        fit(with_train(pretraining, metric="mAP"), tmp_path / "other", quiet=True)
