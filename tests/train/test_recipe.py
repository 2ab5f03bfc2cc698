"""What a recipe says about its front end, and what is made of it."""

from dataclasses import fields, replace

import pytest
import yaml

from fastast.ops import MelPlan
from fastast.train import FrontendConfig, Recipe
from fastast.train.build import build_filterbank, fixed_frames, framing_of
from fastast.train.recipe import FILTERBANK_SETTINGS

RATES = {"kaldi": 16000, "htsat": 32000, "epic_sounds": 24000}


def recipe_of(rate, **frontend):
    recipe = Recipe()
    return replace(
        recipe,
        data=replace(recipe.data, sample_rate=rate),
        frontend=FrontendConfig(**frontend),
    )


@pytest.mark.parametrize("preset", MelPlan.PRESETS)
def test_a_preset_alone_is_that_preset(preset):
    recipe = recipe_of(RATES[preset], preset=preset)
    expected, plan = getattr(MelPlan, preset)(), build_filterbank(recipe).plan
    for name in (field.name for field in fields(MelPlan)):
        ours, theirs = getattr(plan, name), getattr(expected, name)
        assert ours.equal(theirs) if hasattr(ours, "equal") else ours == theirs, name
    assert recipe.frontend.frame_shift_ms == MelPlan.PRESETS[preset]
    assert recipe.frontend.num_mels == plan.num_mels
    assert framing_of(recipe) == expected.framing
    # Written out and read again, it is complete and the same.
    settings = yaml.safe_load(yaml.safe_dump(recipe.to_dict()))
    assert Recipe.from_dict(settings) == recipe
    assert settings["frontend"]["low_freq"] == plan.low_freq


def test_every_setting_reaches_the_filterbank():
    changed = {
        "num_mels": 40,
        "frame_length_ms": 20.0,
        "frame_shift_ms": 8.0,
        "low_freq": 60.0,
        "high_freq": -200.0,
        "window_type": "povey",
        "preemphasis": 0.5,
        "remove_dc_offset": False,
        "snip_edges": False,
        "use_power": False,
        "dither": 2.0**-15,
    }
    assert tuple(changed) == FILTERBANK_SETTINGS
    recipe = recipe_of(8000, **changed, mean=-3.0, std=2.0)
    plan = build_filterbank(recipe).plan
    settings = {name: value for name, value in changed.items() if name != "frame_shift_ms"}
    expected = MelPlan.kaldi(8000, mean=-3.0, std=2.0, **settings)
    for name in (field.name for field in fields(MelPlan)):
        ours, theirs = getattr(plan, name), getattr(expected, name)
        assert ours.equal(theirs) if hasattr(ours, "equal") else ours == theirs, name
    # 1 s every 64 samples, counted as Kaldi does without snipping edges.
    assert fixed_frames(recipe, 1.0, 8.0) == (8000 + 32) // 64


def test_the_window_of_htsat_is_in_milliseconds():
    for rate, window in ((16000, 512), (32000, 1024), (48000, 1536)):
        recipe = recipe_of(rate, preset="htsat", high_freq=0.0)
        assert framing_of(recipe).window_length == window


def test_older_recipes_are_kaldis():
    """Of runs that began before there was a choice."""
    settings = Recipe().to_dict()
    for name in ("preset", *FILTERBANK_SETTINGS[3:], "dither_in_evaluation"):
        del settings["frontend"][name]
    assert Recipe.from_dict(settings) == Recipe()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"preset": "librosa"}, "frontend.preset must be one of kaldi, htsat, epic_sounds"),
        ({"window_type": "hann"}, "frontend.window_type must be one of hanning, povey"),
        (
            {"preset": "htsat", "dither": 1e-4},
            "frontend.dither is a setting of the preset kaldi, and frontend.preset is htsat: leave",
        ),
        ({"preset": "epic_sounds", "snip_edges": True}, "frontend.snip_edges is a setting of"),
        ({"frame_shift_ms": 0.0}, "frontend.frame_shift_ms must be positive"),
        ({"frame_length_ms": -1.0}, "frontend.frame_length_ms must be positive"),
    ],
)
def test_settings_that_there_are_not(settings, message):
    with pytest.raises(ValueError, match=message):
        FrontendConfig(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"preset": "htsat"}, "frontend, at data.sample_rate=16000: .* high_freq=14000.0 must"),
        ({"low_freq": 9000.0}, "low_freq=9000.0 and high_freq=None must satisfy"),
        ({"num_mels": 300}, "num_mels=300 must lie between 1 and 256"),
        ({"preemphasis": 1.5}, "preemphasis must lie between 0 and 1"),
        ({"dither": -1.0}, "dither must not be negative"),
        ({"mean": 1.0}, "mean=1.0 and std=None: pass both, or neither"),
    ],
)
def test_settings_that_contradict_each_other(settings, message):
    with pytest.raises(ValueError, match=message):
        build_filterbank(recipe_of(16000, **settings))
