"""HTS-AT trains by the same recipes and loop as the other models."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from fastast.train import (
    AugmentConfig,
    FrontendConfig,
    ModelConfig,
    PhaseConfig,
    RunDirectory,
    build_method,
    evaluate_over,
    fit,
    load_data,
    load_model,
    make_loader,
)
from fastast.train.loop import _Training
from fastast.train.phases import phase_recipe
from fastast.train.predict import predict_files


@pytest.fixture
def recipe(recipe):
    """The recipe of the tones for an HTS-AT of four narrow stages, with all that is its own."""
    recipe.frontend = FrontendConfig(
        preset="htsat", num_mels=32, high_freq=0.0, compression=[1.0, 2.0]
    ).complete()
    recipe.augment = AugmentConfig(
        mixup=1.0,
        mixup_alpha=0.5,
        freq_mask=4,
        time_mask=0.1,
        num_freq_masks=2,
        num_time_masks=2,
    )
    recipe.model = ModelConfig(
        "hts_at_tiny",
        dim=8,
        depths=[1, 2, 1, 1],
        num_heads=[1, 2, 2, 4],
        image_size=32,
        window=4,
        drop_path=0.3,
    )
    recipe.optim = replace(
        recipe.optim, schedule="table", epoch_factors=[[0, 0.5], [1, 1.0]], warmup=0.0
    )
    recipe.train = replace(recipe.train, epochs=2, batch_tokens=1024, average="best")
    recipe.train = replace(recipe.train, average_best=2)
    return recipe


def test_learns_and_can_be_used(recipe, tmp_path):
    recipe.augment = AugmentConfig()
    recipe.train.epochs = 8
    fit(recipe, tmp_path, quiet=True)
    losses = [record["loss"] for record in RunDirectory(tmp_path).metrics("epoch")]
    assert losses[-1] < 0.5 * losses[0]
    assert len(list((tmp_path / "best").iterdir())) == 2

    method, loaded, _ = load_model(tmp_path)
    test = load_data(loaded.data).test
    rows = evaluate_over(method, loaded, test, lengths=[0.3, 0.9], compression=[1.0, 2.0])
    assert all(row["accuracy"] == 1 for part in rows.values() for row in part)
    # A chunk is 32 frames of 10 ms, and has 8 x 8 patches.
    assert rows["lengths"][0]["tokens"] == 64 * len(test)
    assert rows["lengths"][1]["tokens"] > 64 * len(test)
    assert len(predict_files(method, loaded, test.paths[:2], "cpu")) == 2


def test_resumes_bit_for_bit(recipe, tmp_path):
    """Drop path, running statistics and all: stopped within an epoch and between two."""
    fit(recipe, tmp_path / "whole", quiet=True)

    class StoppedError(Exception):
        pass

    def stop_after(steps, before=torch.optim.AdamW.step):
        def stepping(self, *args, **kwargs):
            stepping.count += 1
            if stepping.count > steps:
                raise StoppedError
            return before(self, *args, **kwargs)

        stepping.count = 0
        return stepping

    recipe.train.checkpoint_minutes = 0.0  # after every step
    torch.rand(3)  # the run depends on no state of the generator
    for steps in (1, 2):
        with pytest.MonkeyPatch.context() as patch, pytest.raises(StoppedError):
            patch.setattr(torch.optim.AdamW, "step", stop_after(steps))
            fit(recipe, tmp_path / "cut", resume=True, quiet=True)
    fit(recipe, tmp_path / "cut", resume=True, quiet=True)
    whole, cut = (load_model(tmp_path / name)[0].model.state_dict() for name in ("whole", "cut"))
    for name, value in whole.items():
        assert torch.equal(value, cut[name]), name


def test_one_graph_serves_an_epoch(recipe):
    """The whole method is captured at once: filterbank, masks, drop path, running statistics."""
    recipe.frontend.mean, recipe.frontend.std = -30.0, 10.0
    recipe.data.validation = recipe.data.test = 0.0
    torch.manual_seed(0)
    methods = [build_method(recipe, 2) for _ in range(2)]
    methods[1].load_state_dict(methods[0].state_dict())
    loader = make_loader(
        recipe,
        load_data(recipe.data).train,
        methods[0].model.geometry,
        training=True,
        fixed_shapes=True,
    )
    torch.compiler.reset()
    # Tracing alone: what a backend makes of the graph is not this test's affair.
    compiled = torch.compile(methods[1], fullgraph=True, backend="eager")
    batches = [*loader.epoch(0), *loader.epoch(1)]
    assert len(batches) > 6
    for index, batch in enumerate(batches):
        with torch._dynamo.config.patch(error_on_recompile=index > 0):
            found = compiled(batch)["loss"]
        torch.testing.assert_close(found, methods[0](batch)["loss"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(methods[0].state_dict(), methods[1].state_dict())
    torch.compiler.reset()


def test_ranks_go_on_from_the_mean_of_their_statistics(recipe):
    recipe.frontend.mean, recipe.frontend.std = -30.0, 10.0
    method = build_method(recipe, 2)
    before = {name: value.clone() for name, value in method.named_buffers()}
    # Of two ranks, the other has twice these numbers.
    ranks = SimpleNamespace(size=2, sum=lambda mine: 3 * mine)
    _Training._share_statistics(SimpleNamespace(ranks=ranks, method=method))
    changed = {n for n, value in method.named_buffers() if not torch.equal(value, before[n])}
    assert changed == {"model.bn0.running_var"}  # the mean is still 0
    assert method.model.bn0.running_var.eq(1.5).all()


def test_coarse_to_fine(recipe, tmp_path):
    """A frame shift four times as long, on an image of half the size; then as it stands."""
    recipe.frontend.compression, recipe.model.image_size = [1.0], 64
    recipe.train = replace(recipe.train, epochs=1, average="last")
    recipe.phases = [
        PhaseConfig(compression=4.0, keep_moments=True),
        PhaseConfig(keep_moments=True),
    ]
    assert phase_recipe(recipe, 0).model.image_size == 32
    assert phase_recipe(recipe, 1).model.image_size == 64
    fit(recipe, tmp_path, quiet=True)
    coarse, fine = RunDirectory(tmp_path).metrics("phase")
    assert 2 * coarse["flops"] < fine["flops"]  # most clips do not fill their last chunk


def test_masks_have_the_mean_value(recipe):
    recipe.frontend.mean, recipe.frontend.std = -30.0, 10.0
    assert build_method(recipe, 2).frontend.fill == 0


def test_settings_that_do_not_fit_say_so(recipe):
    recipe.frontend.mean, recipe.frontend.std = -30.0, 10.0
    with pytest.raises(ValueError, match="leave frontend.fixed_seconds out"):
        build_method(
            replace(recipe, frontend=replace(recipe.frontend, fixed_seconds=0.5)), num_classes=2
        )
    with pytest.raises(ValueError, match=r"num_mels \(40\) must be a multiple of 32"):
        build_method(replace(recipe, frontend=replace(recipe.frontend, num_mels=40)), num_classes=2)
    with pytest.raises(ValueError, match="frontend.preset must be one of"):
        replace(recipe.frontend, preset="librosa")
