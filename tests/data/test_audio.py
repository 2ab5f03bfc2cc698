import multiprocessing
import pickle
import sys

import numpy as np
import pytest
import soundfile
import soxr
import torch

from fastast.data import AudioError, AudioInfo, audio_info, read_audio, write_wav
from fastast.data.audio import part_frames, resampled_length
from tests.data.helpers import tone


def test_16_bit_mono_is_read_bit_for_bit(tmp_path):
    samples = torch.randint(-32768, 32768, (1000,), dtype=torch.int16)
    write_wav(tmp_path / "a.wav", samples, 8000)
    assert audio_info(tmp_path / "a.wav") == AudioInfo(1000, 8000, 1)
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
        info = audio_info(path)
        length = resampled_length(info.frames, info.sample_rate, wanted)
        assert len(read_audio(path, wanted)) == length


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


FORMATS = {
    "wav": ("PCM_16", 44100),
    "flac": ("PCM_24", 44100),
    "ogg": ("VORBIS", 44100),
    "opus": ("OPUS", 48000),
    "mp3": ("MPEG_LAYER_III", 44100),
}


@pytest.mark.parametrize("suffix", FORMATS)
def test_part_is_cut_out_of_the_whole(tmp_path, suffix):
    subtype, rate = FORMATS[suffix]
    path = tmp_path / f"a.{suffix}"
    noise = np.random.default_rng(0).uniform(-0.5, 0.5, 4 * rate + 123)
    container = "OGG" if suffix == "opus" else None
    soundfile.write(path, noise, rate, subtype=subtype, format=container)
    whole = read_audio(path, rate)
    # No later, because libvorbis finds a place in the last page of a file 1 ms beside it.
    for begin, end in ((0.0, 0.5), (0.3, 0.7000012), (1.00001, 2.9)):
        part = read_audio(path, rate, begin, end)
        expected = whole[round(begin * rate) : round(end * rate)]
        assert part.shape == expected.shape
        assert (part.int() - expected.int()).abs().max() <= 1  # an MP3 decoder's rounding


def test_part_is_cut_before_it_is_resampled(tmp_path):
    noise = np.random.default_rng(0).uniform(-0.5, 0.5, 44100).astype(np.float32)
    soundfile.write(tmp_path / "a.wav", np.stack([noise, -noise / 2], 1), 44100, subtype="FLOAT")
    part = read_audio(tmp_path / "a.wav", 16000, 0.1, 0.43)
    expected = soxr.resample(noise[4410:18963] / 4, 44100, 16000, quality="HQ")
    assert part.shape == expected.shape
    assert np.abs(part.numpy() - 32768 * expected).max() < 0.51


def test_part_that_reaches_beyond_the_end(tmp_path):
    samples = torch.arange(1000, dtype=torch.int16)
    write_wav(tmp_path / "a.wav", samples, 1000)
    assert torch.equal(read_audio(tmp_path / "a.wav", 1000, 0.9, 2.0), samples[900:])
    assert torch.equal(read_audio(tmp_path / "a.wav", 1000, 0.9), samples[900:])
    assert torch.equal(read_audio(tmp_path / "a.wav", 1000, 0.9, np.inf), samples[900:])
    for part in ((1.0, 2.0), (3.0, None), (0.5, 0.5001)):
        with pytest.raises(AudioError, match=r"a\.wav: has no samples from .* it is 1 s long"):
            read_audio(tmp_path / "a.wav", 1000, *part)


def test_length_of_a_part_is_known_from_the_header(tmp_path):
    rng = np.random.default_rng(0)
    for rate in (8000, 11025, 44100):
        path = tmp_path / f"{rate}.flac"
        soundfile.write(path, tone(rate + 7, rate), rate)
        begin = rng.uniform(0, 0.9, 20)
        end = begin + rng.uniform(0.01, 0.5, 20)
        start, stop = part_frames(rate + 7, rate, begin, end)
        for row, length in enumerate(resampled_length(stop - start, rate, 16000)):
            assert len(read_audio(path, 16000, begin[row], end[row])) == length


def test_part_needs_only_what_lies_before_its_end(tmp_path):
    """A sign that it is sought, and that the rest is not decoded."""
    path = tmp_path / "a.flac"
    noise = np.random.default_rng(0).uniform(-0.5, 0.5, 400_000)
    soundfile.write(path, noise, 8000)
    whole = read_audio(path, 8000)
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 3 // 4])
    assert torch.equal(read_audio(path, 8000, 20.0, 21.0), whole[160_000:168_000])
    for part in ((30.0, 45.0), (45.0, 46.0)):
        with pytest.raises(AudioError, match="decoded"):
            read_audio(path, 8000, *part)


@pytest.fixture
def hdf5(tmp_path):
    """Some datasets that can be read and some that cannot; the samples of the former."""
    import h5py

    samples = torch.randint(-32768, 32768, (24000,), dtype=torch.int16)
    with h5py.File(tmp_path / "a.hdf5", "w") as file:
        file["int16"] = samples.numpy()
        file["float32"] = samples.numpy() / np.float32(32768)
        file["a/float64"] = samples.numpy() / 32768
        file.create_dataset("packed", data=samples.numpy(), chunks=(1000,), compression="gzip")
        file["packed"].attrs["sample_rate"] = 12000
        file["stereo"] = np.zeros((2, 10), np.float32)
        file["int32"] = np.zeros(10, np.int32)
        file["empty"] = np.zeros(0, np.float32)
        file["nan"] = np.full(10, np.nan)
    return tmp_path / "a.hdf5", samples


@pytest.mark.parametrize("key", ["int16", "float32", "a/float64", "packed"])
def test_hdf5(hdf5, key):
    path, samples = hdf5
    rate = 12000 if key == "packed" else 24000
    assert audio_info(f"{path}:{key}", 24000) == AudioInfo(24000, rate, 1)
    assert torch.equal(read_audio(f"{path}:{key}", rate, source_rate=24000), samples)
    part = read_audio(f"{path}:{key}", rate, 0.25, 0.5, source_rate=24000)
    assert torch.equal(part, samples[rate // 4 : rate // 2])
    resampled = read_audio(f"{path}:{key}", 8000, source_rate=24000)
    expected = soxr.resample(samples.numpy() / 32768, rate, 8000, quality="HQ").clip(-1, 1)
    assert np.abs(resampled.numpy() - 32768 * expected).max() <= 1


def test_hdf5_rate_of_the_whole_file(hdf5):
    import h5py

    path, samples = hdf5
    with h5py.File(path, "a") as file:
        file.attrs["sample_rate"] = 16000
    assert audio_info(f"{path}:int16").sample_rate == 16000
    assert audio_info(f"{path}:int16", 24000).sample_rate == 16000
    assert audio_info(f"{path}:packed").sample_rate == 12000
    assert torch.equal(read_audio(f"{path}:int16", 16000), samples)


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("gone", "has no dataset gone"),
        ("a", "has no dataset a"),
        ("stereo", r"is float32 of shape \(2, 10\)"),
        ("int32", r"is int32 of shape"),
        ("empty", "has no samples"),
    ],
)
def test_hdf5_errors(hdf5, key, message):
    for read in (audio_info, lambda *args: read_audio(args[0], 8000, source_rate=args[1])):
        with pytest.raises(AudioError, match=message):
            read(f"{hdf5[0]}:{key}", 24000)


def test_hdf5_that_is_not_what_it_should_be(hdf5, tmp_path, monkeypatch):
    path, _ = hdf5
    with pytest.raises(AudioError, match=r"int16: does not say its sample rate; state it as"):
        audio_info(f"{path}:int16")
    with pytest.raises(AudioError, match="NaN or infinite"):
        read_audio(f"{path}:nan", 24000, source_rate=24000)
    with pytest.raises(AudioError, match=r"gone\.hdf5:x: there is no such file"):
        audio_info(tmp_path / "gone.hdf5:x", 24000)
    (tmp_path / "bad.h5").write_bytes(path.read_bytes()[:100])
    with pytest.raises(AudioError, match=r"bad\.h5:x: cannot be decoded"):
        audio_info(tmp_path / "bad.h5:x", 24000)
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(ImportError, match="needs h5py: pip install h5py"):
        audio_info(f"{path}:int16", 24000)


def test_hdf5_in_forked_processes(hdf5):
    path, samples = hdf5
    source = f"{path}:int16"
    read_audio(source, 24000, source_rate=24000)

    def read(start: int, out: multiprocessing.Queue) -> None:
        part = read_audio(source, 24000, start / 24000, (start + 500) / 24000, source_rate=24000)
        out.put((start, part.tolist()))

    context = multiprocessing.get_context("fork")
    out = context.Queue()
    workers = [context.Process(target=read, args=(start, out)) for start in (0, 7000, 20000)]
    for worker in workers:
        worker.start()
    for start, part in [out.get(timeout=60) for _ in workers]:
        assert part == samples[start : start + 500].tolist()
    for worker in workers:
        worker.join()
