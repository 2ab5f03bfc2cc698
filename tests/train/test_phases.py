"""Coarse-to-fine: phases, what is carried from one to the next, and what they cost."""

import copy
import json
import os
import signal
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from fastast.train import PhaseConfig, Recipe, RunDirectory, fit, load_model, loop
from fastast.train.build import build_method
from fastast.train.phases import adapt_state, parameter_names, phase_recipe

MEASURED = {
    "seconds",
    "clips_per_s",
    "tokens_per_s",
    "audio_hours_per_s",
    "data_wait",
    "peak_memory_gib",
}


def change(recipe, section, **settings):
    return replace(recipe, **{section: replace(getattr(recipe, section), **settings)})


@pytest.fixture
def phased(recipe):
    """Three phases of a model with everything that depends on time."""
    recipe = change(recipe, "frontend", compression=[1.0])
    recipe = change(recipe, "train", epochs=2, log_every=1, average="ema", log_clips=True)
    recipe.phases = [
        PhaseConfig(compression=4, by="frame_shift", steps=5),
        PhaseConfig(compression=2, by="patch", epochs=1, resize="pi", keep_moments=True),
        PhaseConfig(optim={"lr": 1e-3}, epochs=2),
    ]
    return recipe


@pytest.fixture
def fixed(recipe):
    """The recipe with an AST of fixed input size."""
    recipe = change(recipe, "frontend", compression=[1.0], fixed_seconds=0.815)
    recipe = change(recipe, "train", epochs=1, log_every=1, batch_tokens=240)
    model = replace(recipe.model, name="ast_tiny", stride=(16, 8), max_time_patches=None)
    return replace(recipe, model=model)


@pytest.fixture
def gliding(recipe):
    """Three epochs from a quarter of the frames to all of them, of several resolutions each; then
    a phase of two resolutions, each clip at either."""
    recipe = change(recipe, "frontend", compression=[1.0, 1.6])
    recipe = change(recipe, "train", log_every=1, log_clips=True)
    recipe.phases = [PhaseConfig(compression=4, to=1, epochs=3), PhaseConfig(epochs=1)]
    return recipe


def kept(run_dir):
    return load_model(run_dir)[0].model.state_dict()


def numbers(run_dir):
    """All that was logged but what a clock or the system measures."""
    return [
        {key: value for key, value in record.items() if key not in MEASURED}
        for record in RunDirectory(run_dir).metrics()
    ]


def assert_same_runs(one, two):
    assert numbers(one) == numbers(two)
    weights = kept(one), kept(two)
    assert all(torch.equal(weights[1][name], value) for name, value in weights[0].items())


def test_a_run_goes_through_its_phases(phased, tmp_path):
    fit(phased, tmp_path, quiet=True)
    run = RunDirectory(tmp_path)
    phases = run.metrics("phase")
    assert [(phase["by"], phase["compression"]) for phase in phases] == [
        ("frame_shift", 4),
        ("patch", 2),
        ("frame_shift", 1),
    ]
    assert phases[0]["steps"] == 5 and phases[1]["epochs"] == 1 and phases[2]["epochs"] == 2
    epochs = run.metrics("epoch")
    assert [epoch["epoch"] for epoch in epochs] == list(range(len(epochs)))
    assert [epoch["phase"] for epoch in epochs] == sorted(epoch["phase"] for epoch in epochs)
    for phase in phases:
        mine = [epoch for epoch in epochs if epoch["phase"] == phase["phase"]]
        for name in ("clips", "audio_hours", "flops", "seconds"):
            assert phase[name] == pytest.approx(sum(epoch[name] for epoch in mine))
        assert phase["peak_memory_gib"] > 0
    # The same clips are fewer tokens, and so less work, the coarser they are.
    per_clip = [phase["flops"] / phase["clips"] for phase in phases]
    assert per_clip[0] < per_clip[1] < per_clip[2]
    # The learning rate begins anew, with a peak of its own.
    rates = {phase: [] for phase in range(3)}
    for record in run.metrics("train"):
        ended = [phase for phase in phases if phase["step"] < record["step"]]
        rates[len(ended)].append(record["lr"])
    assert all(rates[phase][0] < max(rates[phase]) for phase in (0, 2))
    assert max(rates[0]) > 1e-3 and max(rates[2]) <= 1e-3
    _, recipe, _ = load_model(tmp_path)
    assert recipe.phases == [] and recipe.frontend.compression == [1.0]


@pytest.mark.parametrize("by", ["frame_shift", "average", "max", "patch"])
def test_every_compression_of_ast(fixed, tmp_path, by):
    fixed.phases = [PhaseConfig(compression=4, by=by, steps=1), PhaseConfig(steps=1)]
    fixed.frontend.mean, fixed.frontend.std = -5.0, 3.0
    coarse, fine = (build_method(phase_recipe(fixed, number), 2).model for number in range(2))
    tokens = [
        model.geometry.num_tokens(model.input_frames) - model.geometry.prefix
        for model in (coarse, fine)
    ]
    assert tokens == [4, 20]
    assert (coarse.geometry.patch_size == fine.geometry.patch_size) == (by != "patch")
    fit(fixed, tmp_path, quiet=True)
    phases = RunDirectory(tmp_path).metrics("phase")
    assert [phase["steps"] for phase in phases] == [1, 1]
    assert kept(tmp_path)["positions.table"].shape == (22, 32)


def test_the_next_phase_begins_with_the_adapted_weights(phased, tmp_path, monkeypatch):
    found = []
    step = loop._Training._train_step

    def stepping(training, batches):
        if training.step in (0, 5):
            state = training.method.model.state_dict()
            found.append({name: value.clone() for name, value in state.items()})
            found.append(copy.deepcopy(training.optimizer.state_dict()))
        if training.step == 5:
            found.append(RunDirectory(tmp_path).load_checkpoint())
        step(training, batches)

    monkeypatch.setattr(loop._Training, "_train_step", stepping)
    fit(phased, tmp_path, quiet=True)
    begun, optimizer, state = found[2:]
    assert state["phase"] == 0 and state["phase_over"]
    whole = Recipe.from_dict(state["recipe"])
    adapted = adapt_state(state, whole, 1, 2)
    assert all(torch.equal(begun[name], value) for name, value in adapted["model"].items())
    assert begun["patch_embed.proj.weight"].shape == (32, 16 * 16)
    # The optimiser's means were taken along, in the shapes of the weights.
    method = build_method(phase_recipe(whole, 1), 2)
    names = parameter_names(method, phase_recipe(whole, 1))
    shapes = {name: parameter.shape for name, parameter in method.named_parameters()}
    assert len(optimizer["state"]) == len(names) == len(shapes)
    for index, entry in optimizer["state"].items():
        assert entry["exp_avg"].shape == entry["exp_avg_sq"].shape == shapes[names[index]]
        assert entry["exp_avg_sq"].min() >= 0 and entry["step"] == 5
    assert found[1]["state"] == {}


def test_moments_begin_anew_unless_asked_for(phased, tmp_path, monkeypatch):
    phased.phases[1].keep_moments = False
    states = []
    step = loop._Training._train_step

    def stepping(training, batches):
        states.append(len(training.optimizer.state))
        step(training, batches)

    monkeypatch.setattr(loop._Training, "_train_step", stepping)
    fit(phased, tmp_path, quiet=True)
    assert states[5] == 0 and states[6] > 0


@pytest.mark.parametrize("at", [2, 5, 6, 12])
def test_a_run_stopped_in_any_phase_resumes(phased, tmp_path, monkeypatch, at):
    fit(phased, tmp_path / "whole", quiet=True)
    train_step = loop._Training._train_step
    steps = []

    def stepping(training, batches):
        steps.append(1)
        if len(steps) == at:
            os.kill(os.getpid(), signal.SIGTERM)
        train_step(training, batches)

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(loop._Training, "_train_step", stepping)
        fit(phased, tmp_path / "cut", quiet=True)
    assert RunDirectory(tmp_path / "cut").load_checkpoint()["step"] == at
    fit(phased, tmp_path / "cut", resume=True, quiet=True)
    assert_same_runs(tmp_path / "whole", tmp_path / "cut")


def test_a_glide_goes_from_coarse_to_fine(gliding, tmp_path, monkeypatch):
    shifts = []
    step = loop._Training._train_step

    def stepping(training, batches):
        used = {shift for batch in batches for shift in batch.frame_shift.tolist()}
        shifts.append((training.epoch, used))
        step(training, batches)

    monkeypatch.setattr(loop._Training, "_train_step", stepping)
    fit(gliding, tmp_path, quiet=True)
    found = [set().union(*(used for at, used in shifts if at == epoch)) for epoch in range(4)]
    # 10 ms at 8 kHz, times 4, 2 and 1, at either of the two resolutions.
    assert found == [{320, 512}, {160, 256}, {80, 128}, {80, 128}]
    epochs = RunDirectory(tmp_path).metrics("epoch")
    cost = [epoch["flops"] / epoch["clips"] for epoch in epochs]
    assert cost[0] < cost[1] < cost[2] == pytest.approx(cost[3], rel=0.1)
    assert len({epoch["validation_tokens"] for epoch in epochs}) == 1  # always at the finest
    glide, _ = RunDirectory(tmp_path).metrics("phase")
    assert (glide["compression"], glide["to"]) == (4, 1)


def test_a_glide_of_a_fixed_grid(fixed, tmp_path):
    fixed.phases = [PhaseConfig(compression=4, to=1, epochs=3)]
    fit(fixed, tmp_path, quiet=True)
    epochs = RunDirectory(tmp_path).metrics("epoch")
    tokens = torch.tensor([0, *(epoch["tokens"] for epoch in epochs)]).diff()
    # Clips of 80, 40 and 20 frames: two rows of ten, five and two patches, and two class tokens.
    per_clip = tokens / torch.tensor([epoch["clips"] for epoch in epochs])
    assert per_clip.tolist() == [6, 12, 22]
    assert kept(tmp_path)["positions.table"].shape == (22, 32)


def test_a_glide_may_compile_for_each_resolution(fixed, tmp_path, monkeypatch):
    """However few the compiler allows by default."""
    fixed.phases = [PhaseConfig(compression=4, to=1, epochs=4)]
    fixed = change(fixed, "train", compile=True)
    counter = CompileCounter()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counter))
    torch.compiler.reset()
    with torch._dynamo.config.patch(recompile_limit=2):
        fit(fixed, tmp_path, quiet=True)
    assert 2 < counter.frame_count <= 4


@pytest.mark.parametrize("at", [5, 11])
def test_a_run_stopped_while_it_glides_resumes(gliding, tmp_path, monkeypatch, at):
    fit(gliding, tmp_path / "whole", quiet=True)
    train_step = loop._Training._train_step

    def stepping(training, batches):
        if training.step + 1 == at:
            os.kill(os.getpid(), signal.SIGTERM)
        train_step(training, batches)

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(loop._Training, "_train_step", stepping)
        fit(gliding, tmp_path / "cut", quiet=True)
    fit(gliding, tmp_path / "cut", resume=True, quiet=True)
    assert_same_runs(tmp_path / "whole", tmp_path / "cut")


def test_a_glide_takes_up_the_time_table_where_the_phase_before_left_it(gliding):
    """Its first epoch is as coarse, and reads the same columns."""
    gliding = change(gliding, "frontend", mean=0.0, std=1.0)
    gliding.phases = [PhaseConfig(compression=4), PhaseConfig(compression=4, to=1, epochs=3)]
    table = torch.randn(10, 32)
    state = {"model": build_method(phase_recipe(gliding, 0), 2).model.state_dict()}
    state["model"]["positions.time"] = table
    assert torch.equal(adapt_state(state, gliding, 1, 2)["model"]["positions.time"], table)


@pytest.mark.parametrize("moment", ["before", "after", "first step"])
def test_a_run_killed_between_two_phases_resumes(phased, tmp_path, monkeypatch, moment):
    """Before the phase is entered, after it was and nothing is trained, and after steps that no
    checkpoint knows of."""
    fit(phased, tmp_path / "whole", quiet=True)
    enter, train_step = loop._Training._enter, loop._Training._train_step

    def entering(training, state):
        if moment == "before":
            raise KeyboardInterrupt
        enter(training, state)
        if moment == "after":
            raise KeyboardInterrupt

    def stepping(training, batches):
        train_step(training, batches)
        if training.phase == 1:
            training._log_steps()
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(loop._Training, "_enter", entering)
        patch.setattr(loop._Training, "_train_step", stepping)
        fit(phased, tmp_path / "cut", quiet=True)
    fit(phased, tmp_path / "cut", resume=True, quiet=True)
    assert_same_runs(tmp_path / "whole", tmp_path / "cut")


def test_a_finished_run_stays_finished(phased, tmp_path):
    fit(phased, tmp_path, quiet=True)
    before = (tmp_path / "metrics.jsonl").read_text()
    fit(phased, tmp_path, resume=True, quiet=True)
    assert (tmp_path / "metrics.jsonl").read_text() == before


def test_a_phase_ends_when_its_metric_is_passed(recipe, tmp_path):
    recipe = change(recipe, "train", epochs=9)
    recipe.phases = [PhaseConfig(until=-1.0), PhaseConfig(until=2.0, epochs=2)]
    fit(recipe, tmp_path / "run", quiet=True)
    phases = RunDirectory(tmp_path / "run").metrics("phase")
    assert [phase["epochs"] for phase in phases] == [1, 2]
    recipe = change(recipe, "data", validation=0.0)
    with pytest.raises(ValueError, match=r"phases\.until needs clips to validate on"):
        fit(recipe, tmp_path / "other", quiet=True)


def test_one_phase_as_it_stands_is_no_phase(recipe, tmp_path):
    recipe = change(recipe, "train", epochs=2, log_every=1)
    fit(recipe, tmp_path / "plain", quiet=True)
    fit(replace(recipe, phases=[PhaseConfig()]), tmp_path / "one", quiet=True)
    assert_same_runs(tmp_path / "plain", tmp_path / "one")


def test_other_phases_are_another_run(phased, tmp_path):
    phased = change(phased, "train", average="last")
    phased.phases = [PhaseConfig(steps=1), PhaseConfig(steps=1)]
    fit(phased, tmp_path, quiet=True)
    other = replace(phased, phases=[PhaseConfig(steps=1), PhaseConfig(steps=2)])
    with pytest.raises(ValueError, match="was started with other settings.*phases: "):
        fit(other, tmp_path, resume=True, quiet=True)


def test_what_augmentation_counts_in_frames_covers_as_much_time(recipe):
    recipe = change(recipe, "augment", time_mask=48, roll_frames=8)
    recipe.phases = [PhaseConfig(compression=4), PhaseConfig(compression=4, by="average")]
    found = [phase_recipe(recipe, number).augment for number in range(2)]
    assert [(augment.time_mask, augment.roll_frames) for augment in found] == [(12, 2), (48, 8)]


def test_a_short_first_phase_has_no_mean_over_later_epochs(recipe):
    recipe = change(recipe, "train", epochs=25, average="epochs", average_from=6)
    recipe.phases = [PhaseConfig(epochs=5), PhaseConfig(epochs=6), PhaseConfig()]
    averages = [phase_recipe(recipe, number).train.average for number in range(3)]
    assert averages == ["last", "epochs", "epochs"]
    recipe.phases[-1].epochs = 5
    with pytest.raises(ValueError, match="average_from .6. comes after the last"):
        phase_recipe(recipe, 2)


def test_recipes_with_phases_survive_json(phased):
    assert Recipe.from_dict(json.loads(json.dumps(phased.to_dict()))) == Recipe.from_dict(
        phased.to_dict()
    )


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"by": "pool"}, r"phases\.by must be one of frame_shift, average, max, patch"),
        ({"compression": 0}, r"phases\.compression must be positive"),
        ({"compression": 4, "to": 4}, r"phases\.to must be positive and less than .*4.*, got 4"),
        ({"compression": 4, "to": 0}, r"phases\.to must be positive"),
        ({"compression": 4, "to": 1, "by": "max"}, r"phases\.to lets the frame shift glide"),
        ({"compression": 1.5, "by": "max"}, r"must be a whole number with by: max, got 1\.5"),
        ({"epochs": 0}, r"phases\.epochs must be at least 1"),
        ({"steps": 0}, r"phases\.steps must be at least 1"),
        ({"optim": {"rate": 1}}, r"phases\.optim has no setting rate"),
        ({"resize": "cubic"}, r"phases\.resize must be one of bilinear, pi"),
    ],
)
def test_phases_that_there_are_not(settings, message):
    with pytest.raises(ValueError, match=message):
        PhaseConfig(**settings)


def test_a_glide_needs_epochs(gliding, tmp_path):
    gliding.phases[0].epochs = 1
    with pytest.raises(ValueError, match=r"phases\.to changes .* from epoch to epoch.*has one"):
        fit(gliding, tmp_path, quiet=True)


def test_unknown_settings_of_a_phase_say_so():
    with pytest.raises(ValueError, match="phases has no setting factor"):
        Recipe.from_dict({"phases": [{"factor": 4}]})
