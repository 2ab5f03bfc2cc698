"""Log-mel features of files."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torchaudio

from fastast import MelFilterbank
from fastast.data import LeftOut, read_audio, write_wav
from fastast.ops import MelPlan
from fastast.train import FrontendConfig, Recipe
from fastast.train.features import extract_features, output_names
from tests.testing import write_tone


def recipe_of(**frontend) -> Recipe:
    recipe = Recipe()
    data = replace(recipe.data, sample_rate=8000)
    return replace(recipe, data=data, frontend=replace(recipe.frontend, **frontend))


def test_equals_torchaudio(tmp_path):
    path = tmp_path / "tone.wav"
    write_tone(path, 440, 0.71)
    recipe = recipe_of(num_mels=40, frame_shift_ms=12.5, compression=[2.0, 1.2])
    (found,) = extract_features([path], recipe)
    expected = torchaudio.compliance.kaldi.fbank(
        read_audio(path, 8000)[None] / 32768,
        htk_compat=True,
        sample_frequency=8000,
        use_energy=False,
        window_type="hanning",
        num_mel_bins=40,
        dither=0.0,
        frame_shift=15.0,
    )
    assert (found.path, found.frame_shift_ms, found.sample_rate) == (str(path), 15.0, 8000)
    assert found.frames.dtype == np.float32
    torch.testing.assert_close(torch.from_numpy(found.frames), expected, rtol=0, atol=2e-3)


def test_normalises_as_the_recipe_says(tmp_path):
    path = tmp_path / "tone.wav"
    write_tone(path, 440, 0.3)
    (raw,) = extract_features([path], recipe_of())
    (normalised,) = extract_features([path], recipe_of(mean=-4.0, std=3.0))
    np.testing.assert_allclose(normalised.frames, (raw.frames + 4) / 6, atol=1e-5)


@pytest.mark.parametrize("preset", MelPlan.PRESETS)
def test_equals_the_filterbank_of_any_preset(tmp_path, preset):
    path, rate = tmp_path / "tone.wav", 32000
    write_tone(path, 440, 0.3, rate)
    recipe = replace(recipe_of(), frontend=FrontendConfig(preset=preset))
    recipe.data.sample_rate = rate
    (found,) = extract_features([path], recipe)
    settings = {} if preset == "htsat" else {"sample_rate": rate}
    expected = MelFilterbank(preset=preset, **settings)([read_audio(path, rate)])
    np.testing.assert_array_equal(found.frames, expected.frames.numpy())


def test_dither_is_drawn_only_if_asked_and_the_same_for_every_file(tmp_path):
    for name in ("a.wav", "b.wav"):
        write_tone(tmp_path / name, 440, 0.3)
    files = [tmp_path / "a.wav", tmp_path / "b.wav"]
    plain, unasked, asked = (
        [each.frames for each in extract_features(files, recipe_of(**settings))]
        for settings in ({}, {"dither": 0.1}, {"dither": 0.1, "dither_in_evaluation": True})
    )
    np.testing.assert_array_equal(plain[0], unasked[0])
    np.testing.assert_array_equal(asked[0], asked[1])
    assert not np.array_equal(plain[0], asked[0])


def test_files_without_features_are_named(tmp_path):
    write_tone(tmp_path / "good.wav", 440, 0.3)
    (tmp_path / "bad.wav").write_bytes(b"not audio")
    write_wav(tmp_path / "short.wav", torch.ones(199, dtype=torch.int16), 8000)
    names = ["bad.wav", "good.wav", "missing.wav", "short.wav"]
    found = list(extract_features([tmp_path / name for name in names], recipe_of()))
    assert [isinstance(each, LeftOut) for each in found] == [True, False, True, True]
    assert [each.path for each in found] == [str(tmp_path / name) for name in names]
    assert "no such file" in found[2].reason
    assert "24.9 ms, less than a frame" in found[3].reason


def test_output_names_keep_folders_apart():
    assert output_names(["/x/a/1.wav", "/x/b/1.flac"]) == ["a/1", "b/1"]
    assert output_names(["/x/a/one.take.wav"]) == ["one.take"]
    with pytest.raises(ValueError, match="/x/1.wav and /x/1.flac would both be written to '1'"):
        output_names(["/x/1.wav", "/x/1.flac"])
