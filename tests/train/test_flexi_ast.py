"""FlexiAST in training: a patch size for each step, whatever the ranks and interruptions."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from fastast.cli import main
from fastast.data import Packing, Planner
from fastast.ops import Framing
from fastast.segments import TokenBudget
from fastast.train import (
    RunDirectory,
    build_method,
    evaluate_over,
    fit,
    load_data,
    load_model,
    make_loader,
)

SIZES = [4, (16, 8), (8, 16)]
PAIRS = [(4, 4), (16, 8), (8, 16)]


@pytest.fixture
def flexi(recipe):
    """The recipe of two narrow blocks, with a FlexiAST of patches of 8 x 8."""
    recipe.augment = replace(recipe.augment, patch_sizes=SIZES)
    recipe.model = replace(
        recipe.model,
        name="flexi_ast_tiny",
        patch_size=(8, 8),
        max_time_patches=None,
        input_frames=64,
    )
    # A clip of 0.9 s has 704 patches of 4 x 4.
    recipe.train = replace(recipe.train, epochs=2, batch_tokens=2048, log_every=1)
    return recipe


def measured(recipe):
    return replace(recipe, frontend=replace(recipe.frontend, mean=-8.0, std=4.0))


def training_loader(recipe, **changes):
    recipe = measured(recipe)
    data = load_data(recipe.data, ["train"]).train
    method = build_method(recipe, 2)
    return make_loader(recipe, data, method.model.geometry, training=True, **changes)


def sizes_of(loader, epoch):
    return [each.patch_size for each in loader.planner.plan(epoch).geometries]


def test_flexification_starts_from_a_run_of_an_ast(flexi, tmp_path):
    model = replace(
        flexi.model, name="ast_tiny", patch_size=(4, 4), stride=(8, 8), input_frames=None
    )
    ast = replace(flexi, model=replace(model, distilled=False))
    ast = replace(ast, frontend=replace(ast.frontend, compression=[1.0], fixed_seconds=0.5))
    ast.augment, ast.train = replace(ast.augment, patch_sizes=None), replace(ast.train, epochs=1)
    fit(ast, tmp_path / "ast", quiet=True)
    flexi.model = replace(flexi.model, init=str(tmp_path / "ast"))
    flexi.train = replace(flexi.train, max_steps=2)
    fit(flexi, tmp_path / "flexi", quiet=True)
    before, after = (load_model(tmp_path / name)[0].model for name in ("ast", "flexi"))
    started = build_method(measured(flexi), 2).model
    started.start_from(before)
    for name, value in started.named_parameters():  # two steps of at most 2e-3 from there
        assert (after.get_parameter(name) - value).abs().max() < 0.01


def test_trains_and_is_evaluated_at_any_size(flexi, tmp_path):
    fit(flexi, tmp_path, quiet=True)
    losses = [record["loss"] for record in RunDirectory(tmp_path).metrics("train")]
    assert len(losses) >= 4 and np.isfinite(losses).all()
    method, loaded, _ = load_model(tmp_path)
    test = load_data(loaded.data).test
    sizes = [8, (4, 4), (16, 5), (32, 16)]  # its own; one that it was trained on; others
    rows = evaluate_over(method, loaded, test, patch_sizes=sizes)["patch_sizes"]
    assert [row["at"] for row in rows] == [[8, 8], [4, 4], [16, 5], [32, 16]]
    tokens = [row["tokens"] for row in rows]
    assert tokens[1] > tokens[0] > tokens[2] > tokens[3]
    assert all(row["clips"] == len(test) and np.isfinite(row["loss"]) for row in rows)


def test_resumes_bit_for_bit(flexi, tmp_path):
    fit(flexi, tmp_path / "whole", quiet=True)

    class KilledError(Exception):
        pass

    steps = len(RunDirectory(tmp_path / "whole").metrics("train"))
    step, taken = torch.optim.AdamW.step, []

    def die(self, *args, **kwargs):
        taken.append(self)
        if len(taken) > steps // 2 + 1:  # within the second of two epochs
            raise KilledError
        return step(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KilledError):
        patch.setattr(torch.optim.AdamW, "step", die)
        often = replace(flexi, train=replace(flexi.train, checkpoint_minutes=0))
        fit(often, tmp_path / "cut", quiet=True)
    assert RunDirectory(tmp_path / "cut").load_checkpoint()["epoch_step"] > 0
    fit(flexi, tmp_path / "cut", resume=True, quiet=True)

    whole, cut = (RunDirectory(tmp_path / name).metrics("train") for name in ("whole", "cut"))
    for name in ("step", "tokens", "loss", "gradient_norm"):
        assert [record[name] for record in whole] == [record[name] for record in cut]
    expected = load_model(tmp_path / "whole")[0].model.state_dict()
    for name, value in load_model(tmp_path / "cut")[0].model.state_dict().items():
        assert torch.equal(value, expected[name]), name


def test_every_step_draws_a_size(flexi):
    """Uniformly, anew in each epoch, and without moving a clip into another batch."""
    loader = training_loader(flexi)
    drawn = [sizes_of(loader, epoch) for epoch in range(60)]
    counts = [sum(epoch.count(size) for epoch in drawn) for size in PAIRS]
    total = sum(counts)
    # Five standard deviations of a binomial count.
    assert all(abs(n - total / 3) < 5 * (total * 2 / 9) ** 0.5 for n in counts)
    assert drawn[0] == sizes_of(loader, 0) and len({tuple(epoch) for epoch in drawn}) > 30
    other = replace(flexi, train=replace(flexi.train, seed=1))
    assert drawn != [sizes_of(training_loader(other), epoch) for epoch in range(60)]
    for batch, geometry in zip(loader.epoch(3), loader.planner.plan(3).geometries, strict=True):
        assert batch.grid.geometry == geometry
    finest = replace(flexi, augment=replace(flexi.augment, patch_sizes=[4]))
    for one, other in zip(loader.epoch(3), training_loader(finest).epoch(3), strict=True):
        assert torch.equal(one.clip_ids, other.clip_ids)


def test_ranks_agree_on_the_size(flexi):
    flexi.train = replace(flexi.train, accumulate=2)
    loaders = [training_loader(flexi, rank=rank, ranks=2) for rank in range(2)]
    parts = [[batch.grid.geometry for batch in loader.epoch(0)] for loader in loaders]
    assert parts[0] == parts[1]
    assert parts[0][::2] == parts[0][1::2] == loaders[0].planner.plan(0).geometries


def test_tokens_are_counted_as_drawn(flexi):
    loader = training_loader(flexi)
    counted = [batch.num_tokens for batch in loader.epoch(0)]
    assert counted == loader.planner.plan(0).step_tokens.tolist()
    assert max(counted) <= flexi.train.batch_tokens


@pytest.mark.parametrize("drop", [0.0, 0.3])
@pytest.mark.parametrize("seconds", [None, 0.5])
def test_fixed_shapes_hold_every_batch(flexi, drop, seconds):
    flexi.augment = replace(flexi.augment, token_drop=drop)
    if seconds:
        flexi.frontend = replace(flexi.frontend, fixed_seconds=seconds, compression=[1.0])
        flexi.model = replace(flexi.model, input_frames=None)
    loader = training_loader(flexi, fixed_shapes=True)
    plain = training_loader(flexi)
    rows = {}
    for epoch in range(8):
        for fixed, bare in zip(loader.epoch(epoch), plain.epoch(epoch), strict=True):
            assert fixed.num_tokens == bare.num_tokens and fixed.num_clips == bare.num_clips
            shapes = (len(fixed.waveforms), fixed.frame_rows, fixed.grid.num_rows)
            assert rows.setdefault(fixed.grid.geometry, shapes) == shapes
    assert len(rows) == len(SIZES)
    sizes = {geometry.patch_size: shapes[2] for geometry, shapes in rows.items()}
    assert sizes[(16, 8)] < sizes[(4, 4)] <= flexi.train.batch_tokens


def test_the_tightest_frames_serve_all_sizes(flexi, tones):
    """The bound on the tokens of coarse patches holds for clips of every kind of length."""
    loader = training_loader(flexi)
    dataset = loader.planner.dataset
    planner = Planner(
        dataset,
        loader.planner.geometries[0],
        patch_sizes=[(4, 4), (32, 60)],  # clips shorter than the latter are made a patch
        budget=TokenBudget(1024, 30, 1024),
        framing=Framing(200),
        packing=Packing("next_fit"),
    )
    sizes = planner.fixed_sizes()
    for epoch in range(6):
        plan = planner.plan(epoch)
        for step, geometry in enumerate(plan.geometries):
            assert plan.step_tokens[step] <= sizes[geometry].tokens.tokens
            assert len(plan.bins[step]) <= sizes[geometry].tokens.clips


def test_a_run_compiles_once_for_each_size(flexi, tmp_path, monkeypatch):
    counter = CompileCounterWithBackend("eager")
    compile_with = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda *args, **kwargs: compile_with(*args, backend=counter, **kwargs)
    )
    torch.compiler.reset()
    # More than the compiler allows by itself.
    flexi.augment = replace(flexi.augment, patch_sizes=[*SIZES, 6, 7, 9, 10, 11, 12, 14])
    flexi.train = replace(flexi.train, compile=True, epochs=6)
    loader = training_loader(flexi)
    drawn = {size for epoch in range(6) for size in sizes_of(loader, epoch)}
    assert len(drawn) > 8
    with torch._dynamo.config.patch(recompile_limit=8):
        fit(flexi, tmp_path / "compiled", quiet=True)
    assert counter.frame_count == len(drawn)
    torch.compiler.reset()
    flexi.train = replace(flexi.train, compile=False)
    fit(flexi, tmp_path / "eager", quiet=True)
    compiled, eager = (
        [record["loss"] for record in RunDirectory(tmp_path / name).metrics("train")]
        for name in ("compiled", "eager")
    )
    assert compiled == pytest.approx(eager, rel=1e-3)


def test_the_recipe_trains(tones, tmp_path):
    recipe = Path(__file__).resolve().parents[2] / "recipes" / "flexi_ast.yaml"
    command = ["fit", str(recipe), "--data.root", str(tones), "--run-dir", str(tmp_path / "run")]
    command += ["--model.depth", "1", "--train.epochs", "2", "--train.device", "cpu"]
    assert main(command) == 0
    assert RunDirectory(tmp_path / "run").metrics("epoch")[-1]["step"] >= 2


def test_other_models_say_so(flexi, recipe, tmp_path):
    recipe = measured(recipe)
    recipe.model = replace(recipe.model, name="elastic_ast_tiny", input_frames=None)
    with pytest.raises(ValueError, match=r"for FlexiAST alone .* this is ElasticAST"):
        build_method(recipe, 2)
    recipe.augment = replace(recipe.augment, patch_sizes=None)
    method = build_method(recipe, 2)
    data = load_data(recipe.data).test
    with pytest.raises(ValueError, match=r"for FlexiAST alone .* this is ElasticAST"):
        evaluate_over(method, recipe, data, patch_sizes=[8])


@pytest.mark.parametrize("size", [(8,), (8, 8, 8), (0, 8), 0])
def test_sizes_that_are_none_say_so(flexi, size):
    flexi.augment = replace(flexi.augment, patch_sizes=[size])
    with pytest.raises(ValueError, match="a patch size must be mel bins and frames"):
        training_loader(flexi)


def test_one_source_of_the_input_length(flexi):
    flexi.frontend = replace(flexi.frontend, fixed_seconds=0.5, compression=[1.0])
    with pytest.raises(ValueError, match=r"model\.input_frames follows from frontend\.fixed_secon"):
        build_method(measured(flexi), 2)
