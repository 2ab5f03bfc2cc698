"""fastast.compat.kaldi.fbank against the function whose signature it has."""

import inspect
import math

import pytest
import torch

from fastast.compat import kaldi
from fastast.compat.kaldi import fbank

torchaudio_kaldi = pytest.importorskip("torchaudio.compliance.kaldi")


def stereo(length: int = 8000) -> torch.Tensor:
    generator = torch.Generator().manual_seed(length)
    return 0.1 * torch.randn(2, length, generator=generator)


def test_signature():
    theirs = inspect.signature(torchaudio_kaldi.fbank).parameters
    ours = dict(inspect.signature(fbank).parameters)
    seed = ours.pop("seed")
    assert seed.kind == inspect.Parameter.KEYWORD_ONLY
    assert [(p.name, p.default, p.kind) for p in ours.values()] == [
        (p.name, p.default, p.kind) for p in theirs.values()
    ]


AST = {
    "htk_compat": True,
    "sample_frequency": 16000,
    "use_energy": False,
    "window_type": "hanning",
    "num_mel_bins": 128,
    "dither": 0.0,
    "frame_shift": 10,
}
"""How AST and its descendants call it."""

OPTIONS = [
    {},
    AST,
    {"channel": 0},
    {"channel": 1},
    {"window_type": "hamming"},
    {"window_type": "rectangular"},
    {"window_type": "blackman", "blackman_coeff": 0.3},
    {"snip_edges": False},
    {"snip_edges": False, "frame_shift": 40.0},
    {"snip_edges": False, "frame_shift": 7.3, "frame_length": 10},
    {"frame_length": 32.0, "frame_shift": 12.5},
    {"remove_dc_offset": False},
    {"preemphasis_coefficient": 0.0},
    {"preemphasis_coefficient": 1.0},
    {"use_power": False},
    {"round_to_power_of_two": False},
    {"high_freq": -400.0, "low_freq": 60.0},
    {"high_freq": 7000.0},
    {"sample_frequency": 22050.0, "num_mel_bins": 64},
    {"sample_frequency": 44100, "num_mel_bins": 128},
    {"use_energy": True},
    {"use_energy": True, "energy_floor": 0.0},
    {"use_energy": True, "energy_floor": 20.0, "htk_compat": True},
    {"use_energy": True, "raw_energy": False, "htk_compat": True},
    {"subtract_mean": True},
    {"subtract_mean": True, "use_energy": True, "snip_edges": False},
    {"min_duration": 0.4},
    {"min_duration": 0.6},
    {"vtln_low": 200.0, "vtln_high": -100.0},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_equals_torchaudio(options):
    for clip in (stereo(), 2**15 * stereo(7777)):
        theirs, ours = torchaudio_kaldi.fbank(clip, **options), fbank(clip, **options)
        assert ours.dtype == torch.float32 and ours.shape == theirs.shape
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-3)
        theirs, ours = (f(clip.double(), **options) for f in (torchaudio_kaldi.fbank, fbank))
        assert ours.dtype == torch.float64
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-3)  # weights are float32 there


@pytest.mark.parametrize("options", [{}, {"use_power": False}, {"snip_edges": False}])
def test_without_the_logarithm(options):
    theirs, ours = (
        f(stereo(), use_log_fbank=False, **options) for f in (torchaudio_kaldi.fbank, fbank)
    )
    # Ours is the exponential of a float32 logarithm: 2e-5 as measured.
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-7)
    silence = fbank(torch.zeros(1, 400), use_log_fbank=False, **options)
    assert (silence < 1e-30).all()


@pytest.mark.parametrize("options", [{}, AST, {"use_power": False, "use_energy": True}])
def test_gradient_equals_torchaudios(options):
    gradients = []
    for function in (torchaudio_kaldi.fbank, fbank):
        clip = stereo(1600).requires_grad_()
        out = function(clip, channel=1, **options)
        gradients += torch.autograd.grad(out.sin().sum(), clip)
    theirs, ours = gradients
    # 1e-4 of the deviation is float32's, in both; in float64 they agree to 3e-5.
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-3 * theirs.std().item())


def test_tables_are_made_once_and_serve_training_after_inference():
    kaldi.kaldi_plan.cache_clear()
    clip = stereo().double()
    with torch.inference_mode():
        expected = fbank(clip, **AST)
    fbank(clip.requires_grad_(), **AST).sum().backward()
    assert clip.grad.any()
    assert torch.equal(fbank(stereo().double(), **AST), expected)
    assert kaldi.kaldi_plan.cache_info().misses == 1


def test_short_clips_have_no_frames():
    for length, frames in ((0, 0), (1, 0), (399, 0), (400, 1), (559, 1), (560, 2)):
        assert fbank(stereo(length), **AST).shape == (frames, 128)
    mirrored = fbank(stereo(200), snip_edges=False, **AST)
    assert mirrored.shape == (1, 128) and mirrored.isfinite().all()


def test_dither_comes_from_the_seed():
    clip = stereo()
    first, second = fbank(clip, dither=1e-3), fbank(clip, dither=1e-3)
    other = fbank(clip, dither=1e-3, seed=1)
    assert torch.equal(first, second) and not torch.equal(first, other)
    state = torch.get_rng_state()
    fbank(clip, dither=1e-3)
    assert torch.equal(torch.get_rng_state(), state)
    # As loud as torchaudio's, on average: the means of 998 frames of other noise differ by 0.06 in
    # the worst bin, and by 0.10 in the worst of 60 draws.
    silence = torch.zeros(1, 160_000)
    theirs, ours = (f(silence, dither=0.01).mean(0) for f in (torchaudio_kaldi.fbank, fbank))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0.2)
    exact = fbank(silence.double(), dither=0.01, use_energy=True)
    torch.testing.assert_close(
        fbank(silence, dither=0.01, use_energy=True).double(), exact, rtol=0, atol=2e-3
    )


def test_errors():
    clip = stereo()
    for call, message in (
        (lambda: fbank(clip, vtln_warp=1.1), "vtln_warp=1.1 is not supported"),
        (lambda: fbank(clip[0]), r"waveform must be \[channels, samples\]"),
        (lambda: fbank(clip.short()), "divided by 32768"),
        (lambda: fbank(clip, channel=2), "waveform has 2 channels"),
        (lambda: fbank(clip, window_type="hann"), "window_type must be one of"),
        (lambda: fbank(clip, frame_shift=0.01), "shorter than one sample"),
        (lambda: fbank(clip, high_freq=9000.0), "half of sample_rate"),
        (lambda: fbank(clip, dither=-1.0), "dither must not be negative"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_zero_is_the_floor():
    out = fbank(torch.zeros(1, 4000), **AST)
    torch.testing.assert_close(out, torch.full_like(out, math.log(2**-23)), rtol=0, atol=1e-6)
