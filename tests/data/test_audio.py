import pickle

import numpy as np
import pytest
import soundfile
import torch

from fastast.data import AudioError, audio_info, read_audio, write_wav
from fastast.data.audio import resampled_length
from tests.data.helpers import tone


def test_16_bit_mono_is_read_bit_for_bit(tmp_path):
    samples = torch.randint(-32768, 32768, (1000,), dtype=torch.int16)
    write_wav(tmp_path / "a.wav", samples, 8000)
    assert audio_info(tmp_path / "a.wav") == (1000, 8000)
    assert torch.equal(read_audio(tmp_path / "a.wav", 8000), samples)


def test_channels_are_averaged(tmp_path):
    stereo = np.array([[1000, 3000], [-32768, -32768], [32767, -32767]], np.int16)
    soundfile.write(tmp_path / "a.wav", stereo, 8000)
    assert read_audio(tmp_path / "a.wav", 8000).tolist() == [2000, -32768, 0]


def test_float_files_are_scaled_and_clipped(tmp_path):
    soundfile.write(tmp_path / "a.wav", np.array([0.5, -0.25, 1.5, -1.5]), 8000, subtype="FLOAT")
    assert read_audio(tmp_path / "a.wav", 8000).tolist() == [16384, -8192, 32767, -32768]


def test_vorbis_overshoot_is_clipped_not_wrapped(tmp_path):
    soundfile.write(tmp_path / "a.ogg", np.sign(tone(16000, 16000)), 16000)
    decoded, _ = soundfile.read(tmp_path / "a.ogg")
    assert decoded.max() > 1  # else this file does not test it
    samples = read_audio(tmp_path / "a.ogg", 16000).double() / 32768
    torch.testing.assert_close(
        samples, torch.from_numpy(decoded).clamp(-1, 1), rtol=0, atol=1 / 32768
    )


@pytest.mark.parametrize("suffix", ["wav", "flac", "ogg", "mp3"])
@pytest.mark.parametrize("rate", [8000, 16000, 44100])
@pytest.mark.parametrize("samples", [1, 2, 1151, 1152, 20001])
def test_length_is_known_from_the_header(tmp_path, suffix, rate, samples):
    path = tmp_path / f"a.{suffix}"
    soundfile.write(path, tone(samples, rate), rate)
    for wanted in (8000, 11025, 16000):
        frames, rate_found = audio_info(path)
        assert len(read_audio(path, wanted)) == resampled_length(frames, rate_found, wanted)


def test_resampling_keeps_frequency_and_level(tmp_path):
    soundfile.write(tmp_path / "a.wav", tone(44100, 44100, 1000.0), 44100)
    samples = read_audio(tmp_path / "a.wav", 16000)
    assert samples.dtype == torch.int16 and len(samples) == 16000
    middle = slice(1000, 15000)
    expected = torch.from_numpy(tone(16000, 16000, 1000.0) * 32768)
    assert (samples - expected)[middle].abs().max() < 2


def test_resampling_does_not_alias(tmp_path):
    soundfile.write(tmp_path / "a.wav", tone(44100, 44100, 9000.0), 44100)
    assert read_audio(tmp_path / "a.wav", 16000)[1000:15000].abs().max() <= 1


def test_missing_file(tmp_path):
    for read in (audio_info, lambda path: read_audio(path, 8000)):
        with pytest.raises(AudioError, match=r"gone\.wav: there is no such file"):
            read(tmp_path / "gone.wav")
        with pytest.raises(AudioError, match="there is no such file"):
            read(tmp_path)


def test_damaged_header(tmp_path):
    (tmp_path / "a.wav").write_bytes(b"RIFF and then nothing of use" * 10)
    for read in (audio_info, lambda path: read_audio(path, 8000)):
        with pytest.raises(AudioError, match=r"a\.wav: cannot be decoded"):
            read(tmp_path / "a.wav")


@pytest.mark.parametrize("suffix", ["flac", "mp3"])
def test_file_cut_off(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    noise = np.random.default_rng(0).uniform(-0.5, 0.5, 40000)
    soundfile.write(path, noise, 8000)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(AudioError, match=r"a\.\w+: .*(decoded)"):
        read_audio(path, 8000)


def test_empty_file(tmp_path):
    soundfile.write(tmp_path / "a.wav", np.zeros(0), 8000)
    for read in (audio_info, lambda path: read_audio(path, 8000)):
        with pytest.raises(AudioError, match="has no samples"):
            read(tmp_path / "a.wav")
    (tmp_path / "b.wav").touch()
    with pytest.raises(AudioError, match="cannot be decoded"):
        audio_info(tmp_path / "b.wav")


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_not_finite(tmp_path, value):
    soundfile.write(tmp_path / "a.wav", np.array([0.0, value, 0.0]), 8000, subtype="FLOAT")
    with pytest.raises(AudioError, match="NaN or infinite"):
        read_audio(tmp_path / "a.wav", 8000)


def test_error_survives_pickling():
    error = pickle.loads(pickle.dumps(AudioError("a.wav", "is empty", "leave it out")))
    assert str(error) == "a.wav: is empty; leave it out"
