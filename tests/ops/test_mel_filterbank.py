"""The filterbank against torchaudio, formulas in NumPy and golden numbers, and as an op."""

import json
import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from fastast.ops.mel_filterbank import (
    MelPlan,
    dense_mel_filterbank,
    dither_keys,
    frame_samples,
    frame_segments,
    hop_from_ms,
    mel_filterbank,
    mel_filterbank_reference,
    portable_mel_filterbank,
)
from fastast.ops.mel_plan import ENERGY_FLOOR, WINDOWS
from fastast.segments import Segments, TokenBudget
from tests.ops import mel_oracle
from tests.testing import formula, poisoned_memory, rms

kaldi = pytest.importorskip("torchaudio.compliance.kaldi")

LOG_TOLERANCE = 2e-3
"""Of float32 against float64 log-mel values, for sounds that fill the spectrum."""

PLAN = MelPlan.kaldi()

PLANS = {
    "kaldi": PLAN,
    "mirrored": MelPlan.kaldi(8000, 40, snip_edges=False, window_type="povey"),
    "magnitude": MelPlan.kaldi(
        22050, 64, use_power=False, preemphasis=0.0, remove_dc_offset=False, window_type="hamming"
    ),
    "unrounded": MelPlan.kaldi(num_mels=23, round_to_power_of_two=False, window_type="blackman"),
    "dithered": MelPlan.kaldi(dither=1e-3),
    "htsat": MelPlan.htsat(),
    "epic_sounds": MelPlan.epic_sounds(mean=-9.0, std=2.0),
}
"""Every option of a plan, and every way of laying out frames."""


def torchaudio_fbank(clip: Tensor, plan: MelPlan, frame_shift_ms: float = 10.0) -> Tensor:
    return kaldi.fbank(
        clip[None],
        sample_frequency=plan.sample_rate,
        num_mel_bins=plan.num_mels,
        frame_shift=frame_shift_ms,
        htk_compat=True,
        use_energy=False,
        window_type="hanning",
        dither=0.0,
        low_freq=plan.low_freq,
        high_freq=plan.high_freq,
    )


def noise(*lengths: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [0.1 * torch.randn(length, generator=generator) for length in lengths]


def arguments(
    clips: Sequence[Tensor], shifts: int | Sequence[int], plan: MelPlan = PLAN, budget=None
) -> tuple[Tensor, Tensor, Tensor, Segments, MelPlan]:
    """What `mel_filterbank` takes, for a list of clips and a plan without dither."""
    lengths = [len(clip) for clip in clips]
    shifts = [shifts] * len(clips) if isinstance(shifts, int) else list(shifts)
    frames = frame_segments(lengths, shifts, plan, budget)
    empty = frames.num_segments - len(clips)
    offsets = torch.tensor([0] + lengths + [0] * empty).cumsum(0)
    frame_shift = torch.tensor(shifts + [1] * empty, dtype=torch.int32)
    return torch.cat(list(clips)), offsets, frame_shift, frames, plan


def assert_energies_close(actual: Tensor, expected: Tensor, plan: MelPlan = PLAN) -> None:
    """For tonal sounds, whose empty mel bins hold the rounding errors of the full ones."""
    if plan.mean is not None:
        actual, expected = (x.double() * 2 * plan.std + plan.mean for x in (actual, expected))
    # A float32 logarithm as large as 24 is rounded by up to 1e-6.
    actual, expected = ((x.double() / plan.log_scale).exp() for x in (actual, expected))
    largest = expected.amax(dim=1, keepdim=True)
    tolerance = 1e-6 * largest + 2e-6 * expected + max(plan.floor, plan.offset)
    assert ((actual - expected).abs() <= tolerance).all()


def ordinary(sample_rate: int, seconds: float = 0.5) -> Tensor:
    """A rising voice-like sound in noise."""
    time = torch.arange(int(sample_rate * seconds), dtype=torch.float64) / sample_rate
    phase = 2 * math.pi * (120 * time + 200 * time.square())
    harmonics = sum((order * phase).sin() / order for order in range(1, 20))
    (hiss,) = noise(len(time))
    return (0.2 * harmonics + 0.3 * hiss).float()


@pytest.mark.parametrize("frame_shift_ms", range(10, 41, 2))
@pytest.mark.parametrize("num_mels", [64, 128])
@pytest.mark.parametrize("sample_rate", [16000, 32000, 44100])
def test_equals_torchaudio(sample_rate, num_mels, frame_shift_ms):
    plan = MelPlan.kaldi(sample_rate, num_mels)
    clip = ordinary(sample_rate)
    args = arguments([clip], hop_from_ms(frame_shift_ms, sample_rate), plan)
    theirs = torchaudio_fbank(clip, plan, frame_shift_ms)
    theirs64 = torchaudio_fbank(clip.double(), plan, frame_shift_ms)  # but its weights are float32
    reference = mel_filterbank_reference(*args)
    ours = mel_filterbank(*args)
    assert ours.shape == theirs.shape and ours.dtype == torch.float32
    torch.testing.assert_close(reference, theirs64, rtol=0, atol=1e-3)
    torch.testing.assert_close(ours.double(), reference, rtol=0, atol=LOG_TOLERANCE)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=LOG_TOLERANCE)


@pytest.mark.parametrize(
    ("sample_rate", "num_mels"), [(8000, 40), (16000, 23), (22050, 80), (48000, 128)]
)
def test_equals_torchaudio_at_other_rates(sample_rate, num_mels):
    plan = MelPlan.kaldi(sample_rate, num_mels)
    clip = ordinary(sample_rate)
    ours = mel_filterbank(*arguments([clip], hop_from_ms(10, sample_rate), plan))
    torch.testing.assert_close(ours, torchaudio_fbank(clip, plan), rtol=0, atol=LOG_TOLERANCE)


@pytest.mark.parametrize(("low_freq", "high_freq"), [(0.0, 8000.0), (50.0, 7000.0)])
def test_equals_torchaudio_in_a_narrower_band(low_freq, high_freq):
    plan = MelPlan.kaldi(low_freq=low_freq, high_freq=high_freq)
    (clip,) = noise(4000)
    ours = mel_filterbank(*arguments([clip], 160, plan))
    torch.testing.assert_close(ours, torchaudio_fbank(clip, plan), rtol=0, atol=LOG_TOLERANCE)


def oracle(clip: Tensor, hop: int, name: str) -> Tensor:
    """The frames of one of `PLANS`, by the formulas in NumPy."""
    x, plan = clip.double().numpy(), PLANS[name]
    band = plan.low_freq, plan.high_freq
    bank = mel_oracle.kaldi_bank(plan.sample_rate, plan.num_mels, plan.fft_size, *band)
    hann = mel_oracle.hann(plan.window_length, periodic=False)
    if name == "kaldi":
        out = mel_oracle.kaldi(x, hop, bank, hann)
    elif name == "mirrored":
        out = mel_oracle.kaldi(x, hop, bank, hann**0.85, snip_edges=False)
    elif name == "magnitude":
        hamming = 0.08 + 0.92 * hann
        out = mel_oracle.kaldi(x, hop, bank, hamming, preemphasis=0, remove_dc=False, power=1)
    elif name == "unrounded":
        out = mel_oracle.kaldi(x, hop, bank, np.blackman(plan.window_length))
    elif name == "htsat":
        out = mel_oracle.htsat(x, hop)
    else:
        out = (mel_oracle.epic_sounds(x, hop) + 9) / 4
    return torch.from_numpy(out)


UNDITHERED = [name for name in PLANS if name != "dithered"]


@pytest.mark.parametrize("name", UNDITHERED)
def test_equals_the_formulas(name):
    plan = PLANS[name]
    for clip, hop in ((noise(9000)[0], 320), (noise(6001)[0], 167), (noise(2100)[0], 1500)):
        expected = oracle(clip, hop, name)
        args = arguments([clip], hop, plan)
        reference, ours = mel_filterbank_reference(*args), mel_filterbank(*args)
        torch.testing.assert_close(reference, expected, rtol=0, atol=1e-9)
        torch.testing.assert_close(ours.double(), expected, rtol=0, atol=LOG_TOLERANCE)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(UNDITHERED),
    st.lists(st.tuples(st.integers(0, 3000), st.integers(40, 1500)), min_size=1, max_size=5),
    st.sampled_from([torch.float32, torch.int16, torch.bfloat16, torch.float64]),
    st.integers(0, 5),
    st.integers(0, 2**31),
)
def test_any_shapes_shifts_and_dtypes(name, geometry, dtype, spare, seed):
    lengths, shifts = ([pair[i] for pair in geometry] for i in range(2))
    clips = noise(*lengths, seed=seed)
    if dtype == torch.int16:
        clips = [(clip * 2**15).to(dtype) for clip in clips]
        expected = [oracle(c.double() / 2**15, h, name) for c, h in zip(clips, shifts, strict=True)]
    else:
        clips = [clip.to(dtype) for clip in clips]
        read = [clip.float() for clip in clips]
        expected = [oracle(c, h, name) for c, h in zip(read, shifts, strict=True)]
    expected = torch.cat(expected)
    args = arguments(clips, shifts, PLANS[name])
    num_rows = len(expected) + spare
    reference = mel_filterbank_reference(*args, num_rows)
    ours = mel_filterbank(*args, num_rows)
    assert reference.shape == ours.shape == (num_rows, PLANS[name].num_mels)
    assert not reference[len(expected) :].any() and not ours[len(expected) :].any()
    torch.testing.assert_close(reference[: len(expected)], expected, rtol=0, atol=1e-6)
    assert_energies_close(ours[: len(expected)], expected, PLANS[name])


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1000, 96000),
    st.integers(1, 128),
    st.floats(4.0, 50.0),
    st.lists(st.tuples(st.integers(0, 2000), st.integers(1, 900)), min_size=1, max_size=3),
    st.fixed_dictionaries(
        {
            "window_type": st.sampled_from(WINDOWS),
            "snip_edges": st.booleans(),
            "remove_dc_offset": st.booleans(),
            "use_power": st.booleans(),
            "preemphasis": st.floats(0.0, 1.0),
        }
    ),
)
def test_any_rate_and_setting(sample_rate, num_mels, frame_length_ms, geometry, options):
    window = int(sample_rate * frame_length_ms * 0.001)
    num_mels = min(num_mels, max(1, window // 2))
    plan = MelPlan.kaldi(
        sample_rate, num_mels, frame_length_ms=frame_length_ms, low_freq=0.0, **options
    )
    lengths, shifts = zip(*[(n, max(h, n // 20, 1)) for n, h in geometry], strict=True)
    args = arguments(noise(*lengths), shifts, plan)
    truth, ours = mel_filterbank_reference(*args), mel_filterbank(*args)
    assert ours.shape == truth.shape
    assert_energies_close(ours, truth, plan)
    for length, hop, frames in zip(lengths, shifts, args[3].lengths.tolist(), strict=True):
        if length >= window:
            theirs = kaldi._get_strided(torch.empty(length), window, hop, options["snip_edges"])
            assert frames == len(theirs)


@pytest.mark.parametrize("case", ["htsat_audioset_1024frames", "htsat_audioset_10s"])
def test_htsat_equals_the_published_front_end(case, shared_dir):
    folder = shared_dir / "fixtures/ssl_family"
    index = json.loads((folder / "fixtures.json").read_text())
    entry = next(entry for entry in index["cases"] if entry["name"] == case)
    stored = np.load(folder / entry["file"])
    clips, length = entry["inputs"]["shape"]
    tone = 0.3 * np.sin(2 * np.pi * 440 * np.arange(length) / 32000)
    waveforms = formula("wave", clips * length).reshape(clips, length) * 5 + tone
    out = dense_mel_filterbank(torch.from_numpy(waveforms).float(), 320, MelPlan.htsat()).numpy()
    assert out.shape == (clips, stored["n_frames"], 64)
    probe = formula("probe", 64) * 50 / np.sqrt(64)
    for name, value in {
        "logmel_first8": out[:, :8],
        "logmel_bin_mean": out.mean(1, dtype=np.float64),
        "logmel_bin_std": out.std(1, dtype=np.float64),
        "logmel_frame_probe": out @ probe,
    }.items():
        rule = entry["arrays"][name]
        np.testing.assert_allclose(
            value, stored[name], rule["rtol"], rule["atol"], err_msg=f"{case} {name}"
        )


def test_short_clips_are_mirrored_as_often_as_needed():
    """Where librosa refuses: clips much shorter than the window."""
    for name in ("mirrored", "htsat", "epic_sounds"):
        for length in (1, 2, 3, 17):
            (clip,) = noise(length)
            ours = mel_filterbank(*arguments([clip], 100, PLANS[name]))
            assert len(ours) == (length + 50) // 100 if name == "mirrored" else 1
            assert_energies_close(ours, oracle(clip, 100, name), PLANS[name])


def test_int16_samples_are_scaled():
    (clip,) = noise(4000)
    quantised = (clip * 2**15).to(torch.int16)
    ours = mel_filterbank(*arguments([quantised], 160))
    assert torch.equal(ours, mel_filterbank(*arguments([quantised.float() / 2**15], 160)))
    assert torch.equal(
        mel_filterbank_reference(*arguments([quantised], 160)),
        mel_filterbank_reference(*arguments([quantised.double() / 2**15], 160)),
    )


def test_empty_mel_bin_of_the_ast_front_end():
    (clip,) = noise(4000)
    empty = mel_filterbank(*arguments([clip], 160))[:, 3]
    torch.testing.assert_close(empty, torch.full_like(empty, math.log(ENERGY_FLOOR)))


SINE = torch.sin(2 * math.pi * 1000 / 16000 * torch.arange(8000, dtype=torch.float64)).float()


@pytest.mark.parametrize(
    "clip",
    [
        pytest.param(torch.zeros(4000), id="silence"),
        pytest.param(torch.full((4000,), 0.5), id="DC 0.5"),
        pytest.param(torch.full((4000,), 0.3), id="DC 0.3"),
        pytest.param(SINE, id="sine"),
        pytest.param(SINE * 2**15, id="sine in int16's range"),
        pytest.param(noise(8000)[0] * 2**15 + 10000, id="noise on DC in int16's range"),
    ],
)
def test_tonal_clips(clip):
    args = arguments([clip], 160)
    assert_energies_close(mel_filterbank(*args), mel_filterbank_reference(*args))


def sine(hertz: float, level: float) -> Tensor:
    """Ten seconds; in the scale of int16, of whole numbers."""
    time = torch.arange(160000, dtype=torch.float64) / 16000
    samples = level * torch.sin(2 * math.pi * hertz * time)
    return (samples.round() if level > 1 else samples).float()


HISS = noise(160000)[0]
SOUNDS = {
    "noise": (HISS, 16000, 128),
    "noise in int16's range": (HISS * 2**15, 16000, 128),
    "silence": (torch.zeros(16000), 16000, 128),
    "DC 0.5": (torch.full((16000,), 0.5), 16000, 128),
    "DC 0.3": (torch.full((16000,), 0.3), 16000, 128),
    "DC in int16's range": (torch.full((16000,), 9830.4), 16000, 128),
    "sine of 1 kHz": (sine(1000, 1.0), 16000, 128),
    "sine of 440 Hz in int16's range": (sine(440, 32767.0), 16000, 128),
    "noise on DC in int16's range": (HISS * 2**15 + 10000, 16000, 128),
    "400 samples": (HISS[:400], 16000, 128),
    "401 samples": (HISS[:401], 16000, 128),
    "560 samples": (HISS[:560], 16000, 128),
    "64 bins": (HISS, 16000, 64),
    "32 kHz": (HISS, 32000, 128),
    "32 kHz, 64 bins": (HISS, 32000, 64),
    "44.1 kHz": (HISS, 44100, 128),
}


@pytest.mark.parametrize("name", SOUNDS)
def test_at_least_as_accurate_as_torchaudio(name):
    """In root mean square, of logarithms and of energies; a largest error is a throw of dice."""
    clip, sample_rate, num_mels = SOUNDS[name]
    plan = MelPlan.kaldi(sample_rate, num_mels)
    for frame_shift_ms in range(10, 41, 2) if name == "noise" else (10,):
        args = arguments([clip], hop_from_ms(frame_shift_ms, sample_rate), plan)
        truth = mel_filterbank_reference(*args)
        ours = mel_filterbank(*args).double()
        theirs = torchaudio_fbank(clip, plan, frame_shift_ms).double()
        assert rms(ours - truth) <= rms(theirs - truth)
        top = truth.amax(1, keepdim=True)
        energies = [(x - top).exp() for x in (ours, theirs, truth)]
        assert rms(energies[0] - energies[2]) <= rms(energies[1] - energies[2])


def test_silence_is_the_floor():
    out = mel_filterbank(*arguments([torch.zeros(4000)], 160))
    torch.testing.assert_close(out, torch.full_like(out, math.log(2**-23)), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("length", "frames"), [(0, 0), (399, 0), (400, 1), (401, 1), (560, 2)])
def test_short_clips(length, frames):
    (clip,) = noise(length)
    args = arguments([clip], 160)
    ours = mel_filterbank(*args)
    assert ours.shape == (frames, 128)
    if frames:
        torch.testing.assert_close(ours, torchaudio_fbank(clip, PLAN), rtol=0, atol=LOG_TOLERANCE)
    torch.testing.assert_close(
        ours.double(), mel_filterbank_reference(*args), rtol=0, atol=LOG_TOLERANCE
    )


LENGTHS = [16000, 399, 401, 0, 12345, 400, 3000, 0, 30000]
SHIFTS = [160, 160, 240, 160, 163, 320, 640, 7, 480]


def test_a_clip_does_not_depend_on_its_batch():
    clips = noise(*LENGTHS)
    args = arguments(clips, SHIFTS)
    together = mel_filterbank(*args)
    alone = [
        mel_filterbank(*arguments([clip], shift)) for clip, shift in zip(clips, SHIFTS, strict=True)
    ]
    assert torch.equal(together, torch.cat(alone))
    torch.testing.assert_close(
        together.double(), mel_filterbank_reference(*args), rtol=0, atol=LOG_TOLERANCE
    )


def test_dense_equals_ragged():
    clips = torch.stack(noise(*[5000] * 3))
    dense = dense_mel_filterbank(clips, 160, PLAN)
    assert torch.equal(dense.flatten(0, 1), mel_filterbank(*arguments(list(clips), 160)))
    assert dense_mel_filterbank(clips[:, :100], 160, PLAN).shape == (3, 0, 128)
    assert dense_mel_filterbank(clips[:0], 160, PLAN).shape == (0, 29, 128)


def test_nan_stays_in_its_clip():
    clips = noise(3000, 2000, 4000)
    expected = mel_filterbank(*arguments(clips, 160))
    clips[1] = torch.full_like(clips[1], math.nan)
    *args, frames, _ = arguments(clips, 160)
    out = mel_filterbank(*args, frames, PLAN)
    begin, end = frames.host_offsets[1:3]
    assert out[begin:end, 10].isnan().all()
    clean = torch.cat([out[:begin], out[end:]])
    assert torch.equal(clean, torch.cat([expected[:begin], expected[end:]]))


@pytest.mark.parametrize("capacity", [210, 1000])
def test_dead_rows_are_zeros(capacity):
    clips = noise(16000, 100, 12000)
    expected = mel_filterbank(*arguments(clips, 160))
    budget = TokenBudget(tokens=capacity, clips=8, max_length=128)
    waveforms, *args = arguments(clips, 160, budget=budget)
    poisoned = torch.cat([waveforms, torch.full((5000,), math.nan)])
    for normalised in (False, True):
        plan = MelPlan.kaldi(mean=-4.0, std=4.5) if normalised else PLAN
        for filterbank in (mel_filterbank, mel_filterbank_reference):
            with poisoned_memory():
                out = filterbank(poisoned, *args[:-1], plan, num_rows=capacity)
            assert out.shape == (capacity, 128)
            assert (out[len(expected) :] == 0).all() and out.isfinite().all()
    assert torch.equal(
        mel_filterbank(poisoned, *args, num_rows=capacity)[: len(expected)], expected
    )


def test_a_batch_of_nothing():
    budget = TokenBudget(tokens=32, clips=4, max_length=32)
    args = arguments([torch.zeros(0)], 160, budget=budget)
    for filterbank in (mel_filterbank, mel_filterbank_reference):
        assert torch.equal(filterbank(*args, num_rows=32).float(), torch.zeros(32, 128))
    no_clips = torch.zeros(500), torch.zeros(1).long(), torch.zeros(0).int()
    assert mel_filterbank(*no_clips, Segments.from_lengths([]), PLAN).shape == (0, 128)


def test_frames_may_end_a_clip_early():
    clips = noise(16000, 8000)
    *args, _, plan = arguments(clips, 160)
    whole = mel_filterbank(*arguments(clips, 160))
    cut = mel_filterbank(*args, Segments.from_lengths([50, 20]), plan)
    assert torch.equal(cut, torch.cat([whole[:50], whole[98:118]]))


def test_normalisation():
    (clip,) = noise(4000)
    mean, std = -4.2677393, 4.5689974
    plan = MelPlan.kaldi(mean=mean, std=std)
    raw = mel_filterbank(*arguments([clip], 160))
    args = arguments([clip], 160, plan)
    torch.testing.assert_close(mel_filterbank(*args), (raw - mean) / (2 * std))
    torch.testing.assert_close(
        mel_filterbank_reference(*args),
        (mel_filterbank_reference(*arguments([clip], 160)) - mean) / (2 * std),
    )


def test_float32_whatever_the_precision_in_force():
    (clip,) = noise(8000)
    expected = mel_filterbank(*arguments([clip], 160))
    precision = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(mel_filterbank(*arguments([clip], 160)), expected)
    finally:
        torch.set_float32_matmul_precision(precision)
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        rounded = mel_filterbank(*arguments([clip.to(dtype)], 160))
        assert torch.equal(rounded, mel_filterbank(*arguments([clip.to(dtype).float()], 160)))


def splitmix64(x: int) -> int:
    x = (x + 0x9E3779B97F4A7C15) % 2**64
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
    return x ^ x >> 31


def test_dither_noise():
    """Its values by the formula, and its distribution."""
    plan = MelPlan.kaldi(dither=0.5, remove_dc_offset=False)
    _, offsets, shifts, frames, _ = arguments([torch.zeros(20000), torch.zeros(400)], 160, plan)
    keys = dither_keys(3, 7, torch.tensor([11, 2**40]))
    args = torch.zeros(20400), offsets, shifts, frames.offsets, plan, 125, keys, torch.float64
    noise = frame_samples(*args) / 0.5
    assert noise.shape == (125, 400) and not noise[124:].any()
    for clip, frame, sample in ((0, 0, 0), (0, 17, 399), (0, 122, 1), (1, 0, 5)):
        key = int(keys[clip]) % 2**64
        bits = splitmix64(splitmix64(key ^ frame) ^ sample)
        radius, angle = ((bits >> 40) + 1) / 2**24, (bits >> 16) % 2**24 / 2**24
        expected = math.sqrt(-2 * math.log(radius)) * math.cos(2 * math.pi * angle)
        assert noise[frame + 123 * clip, sample] == pytest.approx(expected, abs=1e-12)
    values = noise[:124].flatten().sort().values
    quantiles = torch.special.ndtri((torch.arange(len(values)) + 0.5) / len(values))
    middle = slice(len(values) // 100, -len(values) // 100)
    assert (values - quantiles)[middle].abs().max() < 0.05
    assert values.mean().abs() < 0.02 and abs(values.std() - 1) < 0.02
    mixed = torch.corrcoef(noise[:124])
    assert (mixed - torch.eye(124)).abs().max() < 0.25  # 5 standard deviations
    neighbours = (noise[:124, 1:] * noise[:124, :-1]).mean()
    assert neighbours.abs() < 0.02


def test_dither_follows_the_clip():
    """Not its place in the batch; another epoch or seed brings other noise."""
    plan = PLANS["dithered"]
    clips, ids = noise(3000, 500, 2000), torch.tensor([5, 6, 7])
    keys = dither_keys(0, 1, ids)
    args = arguments(clips, 160, plan)
    together = mel_filterbank(*args, dither_keys=keys)
    alone = mel_filterbank(*arguments(clips[2:], 160, plan), dither_keys=keys[2:])
    assert torch.equal(together[-len(alone) :], alone)
    reference = mel_filterbank_reference(*args, dither_keys=keys)
    torch.testing.assert_close(together.double(), reference, rtol=0, atol=LOG_TOLERANCE)
    clean = mel_filterbank(*arguments(clips, 160))
    assert 1e-3 < (together - clean)[:, 10:].abs().mean() < 0.2  # -40 dB of noise
    for other in (dither_keys(0, 2, ids), dither_keys(1, 1, ids), dither_keys(0, 1, ids + 1)):
        assert not torch.equal(mel_filterbank(*args, dither_keys=other), together)


TINY = {
    "kaldi": MelPlan.kaldi(1000, 3, frame_length_ms=12.0, mean=-4.0, std=4.5),
    "mirrored": MelPlan.kaldi(1000, 3, frame_length_ms=13.0, snip_edges=False, dither=0.1),
    "htsat": MelPlan.htsat(1000, 3, window_length=12, high_freq=None),
    "epic_sounds": MelPlan.epic_sounds(1000, 3, frame_length_ms=8.0, fft_size=12),
}


@pytest.mark.parametrize("name", TINY)
def test_reference_gradients(name):
    clips = [clip.double() for clip in noise(40, 11, 29, 1)]
    waveforms, *args = arguments(clips, [5, 5, 9, 3], TINY[name])
    waveforms = torch.cat([waveforms, waveforms[:3]]).requires_grad_()
    keys = torch.arange(4)
    assert torch.autograd.gradcheck(
        lambda x: mel_filterbank_reference(x, *args, num_rows=30, dither_keys=keys), waveforms
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_flow_where_waveforms_ask_for_them(dtype):
    waveforms, *args = arguments(noise(3000, 200, 2500), [160, 160, 200])
    plain = mel_filterbank(waveforms, *args, dtype=dtype)
    waveforms.requires_grad_()
    out = mel_filterbank(waveforms, *args, dtype=dtype)
    assert out.dtype == dtype and not plain.requires_grad
    torch.testing.assert_close(out, plain, rtol=0, atol=1e-3 if dtype == torch.float32 else 0.07)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    (gradient,) = torch.autograd.grad(out, waveforms, weights.to(dtype))
    reference = mel_filterbank_reference(waveforms, *args)
    (expected,) = torch.autograd.grad(reference, waveforms, weights.to(dtype).double())
    torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-3)
    with torch.no_grad():
        assert torch.equal(mel_filterbank(waveforms, *args, dtype=dtype), plain)
    dense = torch.stack(noise(3000, 3000)).requires_grad_()
    dense_mel_filterbank(dense, 160, PLAN).sum().backward()
    assert dense.grad.isfinite().all() and dense.grad.any()


def test_reference_keeps_its_dtype_under_autocast():
    args = arguments(noise(4000), 160)
    expected = mel_filterbank_reference(*args, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(mel_filterbank_reference(*args, dtype=torch.float32), expected)


@pytest.mark.parametrize("name", ["kaldi", "magnitude", "htsat", "epic_sounds"])
def test_gradient_of_silence_is_zero(name):
    waveforms, *args = arguments([torch.zeros(1300)], 160, PLANS[name])
    mel_filterbank(waveforms.requires_grad_(), *args).sum().backward()
    assert (waveforms.grad == 0).all()


def test_gradient_of_what_no_frame_reads_is_zero():
    waveforms, *args = arguments(noise(1000, 1000), 160, budget=TokenBudget(16, 3, 8))
    waveforms = torch.cat([waveforms, torch.full((50,), math.nan)]).requires_grad_()
    mel_filterbank(waveforms, *args, num_rows=16).sum().backward()
    assert waveforms.grad[400:880].all() and not waveforms.grad[880:1000].any()
    assert not waveforms.grad[2000:].any() and waveforms.grad.isfinite().all()


def op_arguments(name: str, clips: Sequence[Tensor], spare: int = 0, bfloat16: bool = False):
    """What the operator takes, for a plan by its name."""
    waveforms, offsets, shifts, frames, plan = arguments(clips, [160, 160, 200], PLANS[name])
    tables = (plan.window, plan.mel_bins, plan.mel_taps, plan.mel_starts)
    keys = dither_keys(0, 0, torch.arange(3)) if plan.dither else None
    num_rows = int(frames.host_offsets[-1]) + spare
    options = (plan.dither, plan.remove_dc, plan.preemphasis, plan.magnitude)
    scaling = (plan.floor, plan.offset, plan.log_scale, plan.mean, plan.std)
    sizes = (num_rows, plan.fft_size, int(plan.padding))
    geometry = (waveforms, offsets, shifts, frames.offsets)
    return (*geometry, *tables, keys, *sizes, *options, *scaling, bfloat16)


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.int16])
def test_opcheck(name, dtype):
    clips = [(clip * 2**15).to(dtype) for clip in noise(900, 0, 1300)]
    torch.library.opcheck(
        torch.ops.fastast.mel_filterbank.default,
        op_arguments(name, clips, spare=3, bfloat16=dtype == torch.int16),
    )


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.int16])
def test_portable_form_equals_the_operator(name, dtype):
    """Trivial where no kernel of the device has taken the operator over."""
    clips = [(clip * 2**15).to(dtype) for clip in noise(9000, 0, 13000)]
    args = op_arguments(name, clips, spare=3)
    found, expected = portable_mel_filterbank(*args), torch.ops.fastast.mel_filterbank(*args)
    torch.testing.assert_close(found, expected, rtol=0, atol=LOG_TOLERANCE)
    alone = portable_mel_filterbank(*op_arguments(name, [clips[0], clips[1], clips[1]]))
    assert torch.equal(found[: len(alone)], alone)


@pytest.mark.parametrize("name", PLANS)
def test_bfloat16_is_the_rounded_result(name):
    args = op_arguments(name, noise(900, 0, 1300), spare=2)
    exact = torch.ops.fastast.mel_filterbank(*args)
    rounded = torch.ops.fastast.mel_filterbank(*args[:-1], True)
    assert rounded.dtype == torch.bfloat16 and torch.equal(rounded, exact.bfloat16())


@pytest.mark.parametrize("name", ["kaldi", "mirrored", "epic_sounds"])
def test_compiles_once_for_all_batches_of_a_budget(name):
    plan = PLANS[name]
    budget = TokenBudget(tokens=256, clips=4, max_length=128)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(waveforms, offsets, shifts, frames):
        return mel_filterbank(waveforms, offsets, shifts, frames, plan, num_rows=256) + 1

    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        lengths = torch.randint(0, 10000, (3,), generator=generator).tolist()
        clips = noise(*lengths, seed=seed)
        waveforms, *args, _ = arguments(clips, [160, 200, 320], plan, budget)
        waveforms = torch.cat([waveforms, torch.zeros(40000 - len(waveforms))])
        expected = mel_filterbank(waveforms, *args, plan, num_rows=256) + 1
        with torch.compiler.set_stance("fail_on_recompile" if seed else "default"):
            assert torch.equal(step(waveforms, *args), expected)


def test_flops_are_counted():
    (clip,) = noise(16000)
    with FlopCounterMode(display=False) as counter:
        mel_filterbank(*arguments([clip], 160))
    assert counter.get_total_flops() == 98 * (5 * 400 + 5 * 512 * 9 // 2 + 3 * 256 + 2 * 504)


def test_argument_errors():
    waveforms, offsets, shifts, frames, plan = arguments(noise(4000, 3000), 160)
    good = {
        "waveforms": waveforms,
        "sample_offsets": offsets,
        "frame_shift": shifts,
        "frames": frames,
        "plan": plan,
    }
    bad = [
        ({"waveforms": waveforms.int()}, "waveforms must be int16 or floating point"),
        ({"waveforms": waveforms[None]}, r"waveforms must be \[samples\]"),
        ({"plan": MelPlan.kaldi(dither=1.0)}, "dither=1.0, which is drawn from dither_keys"),
        ({"dither_keys": torch.zeros(2)}, "dither_keys must be torch.int64"),
        ({"dtype": torch.float16}, "dtype must be torch.float32 or torch.bfloat16"),
        ({"sample_offsets": offsets.int()}, "sample_offsets must be torch.int64"),
        ({"sample_offsets": offsets[:2]}, r"sample_offsets must be torch.int64 of shape \[3\]"),
        ({"frame_shift": shifts.long()}, "frame_shift must be torch.int32"),
        ({"frame_shift": shifts[:1]}, r"frame_shift must be torch.int32 of shape \[2\]"),
        ({"frame_shift": shifts.to("meta")}, "frame_shift is on meta"),
        ({"plan": plan.to("meta")}, "plan is on meta"),
        ({"frame_shift": shifts * 2}, "frames gives clip 0 23 frames"),
        ({"num_rows": 20}, "num_rows=20 is less than the 40 rows of frames"),
        ({"waveforms": waveforms[:100]}, "past the 100 samples of waveforms"),
        ({"sample_offsets": offsets + 1}, "past the 7000 samples of waveforms"),
    ]
    mel_filterbank(**good)
    with pytest.raises(ValueError, match="frames gives clip 0 23 frames"):
        mel_filterbank_reference(**{**good, "frame_shift": shifts * 2})
    for change, message in bad:
        with pytest.raises(ValueError, match=message):
            mel_filterbank(**{**good, **change})
    with pytest.raises(ValueError, match=r"waveforms must be \[clips, samples\]"):
        dense_mel_filterbank(waveforms, 160, plan)
    with pytest.raises(ValueError, match="frame_shift must be at least 1 sample"):
        dense_mel_filterbank(waveforms[None], 0, plan)
    with pytest.raises(ValueError, match=r"dither_keys must be torch.int64 of shape \[1\]"):
        dense_mel_filterbank(waveforms[None], 160, plan, dither_keys=torch.arange(2))
