"""Windows, mel banks and frame positions against torchaudio, SciPy and the formulas in NumPy."""

import json

import numpy as np
import pytest
import torch

from fastast.ops.mel_plan import (
    WINDOWS,
    Framing,
    MelPlan,
    Padding,
    frame_counts,
    frame_segments,
    hop_from_ms,
    htk_triangles,
    mel_triangles,
    slaney_triangles,
    window_function,
)
from fastast.segments import TokenBudget
from tests.ops import mel_oracle
from tests.testing import formula

kaldi = pytest.importorskip("torchaudio.compliance.kaldi")

PLANS = {
    "kaldi": MelPlan.kaldi(),
    "mirrored": MelPlan.kaldi(snip_edges=False),
    "htsat": MelPlan.htsat(),
    "epic_sounds": MelPlan.epic_sounds(),
}


def torchaudio_hop(shift_ms: float, sample_rate: float) -> int:
    clip = torch.zeros(1, int(sample_rate))
    return kaldi._get_waveform_and_window_properties(
        clip, 0, sample_rate, shift_ms, 25.0, True, 0.97
    )[1]


@pytest.mark.parametrize(("sample_rate", "base", "off"), [(16000, 160, 0), (44100, 441, 177)])
def test_hops_and_counts_of_every_resolution_are_torchaudios(sample_rate, base, off):
    """All C in [1, 4] for which the hop ought to be a whole number of samples."""
    window, wrong = int(sample_rate * 0.025), 0
    clip = torch.arange(sample_rate + 77)
    for hop in range(base, 4 * base + 1):
        shift_ms = 10 * (hop / base)
        found = hop_from_ms(shift_ms, sample_rate)
        assert found == torchaudio_hop(shift_ms, sample_rate)
        wrong += found != hop
        for snip_edges, padding in ((True, Padding.NONE), (False, Padding.KALDI)):
            theirs = kaldi._get_strided(clip, window, found, snip_edges)
            assert frame_counts(len(clip), window, found, padding) == len(theirs)
    assert wrong == off  # torchaudio's own loss of a sample, which is kept


def test_hop_from_ms():
    assert hop_from_ms(12, 44100) == 529  # 529.2
    assert hop_from_ms(10, 16000) == 160
    # On the grid of resolutions C = 1, 1.001, ..., 4 the rounding is exact.
    for sample_rate in (8000, 16000, 32000, 44100, 48000):
        for step in range(1000, 4001):
            assert hop_from_ms(10 * (step / 1000), sample_rate) == sample_rate * step // 100_000
    with pytest.raises(ValueError, match="shorter than one sample"):
        hop_from_ms(0.01, 16000)


@pytest.mark.parametrize("shift", [1, 2, 7, 64, 65, 100, 300])
def test_frame_counts_are_those_of_frames_that_exist(shift):
    for length in range(700):
        for window in (64, 101):
            none = len(range(0, length - window + 1, shift)) if length >= window else 0
            centres = len(range(0, length + 1, shift)) if length else 0
            assert frame_counts(length, window, shift) == none
            assert frame_counts(length, window, shift, Padding.REFLECT) == centres
            assert frame_counts(length, window, shift, Padding.ZEROS) == centres


@pytest.mark.parametrize("padding", Padding)
@pytest.mark.parametrize("window", [1, 2, 64, 101])
def test_framing_says_how_many_samples_frames_take(padding, window):
    framing = Framing(window, padding)
    lengths = np.arange(700)
    for shift in (1, 2, 3, 7, 64, 65, 100, 300):
        counts = framing.num_frames(lengths, shift)
        assert (counts == [framing.num_frames(int(n), shift) for n in lengths]).all()
        assert (lengths <= counts * shift + framing.spare_samples(shift)).all()
        assert framing.spare_samples(shift) <= framing.spare_samples(shift + 1)
        for frames in range(1, counts.max() + 1):
            least = framing.least_samples(frames, shift)
            assert framing.num_frames(least, shift) >= frames > framing.num_frames(least - 1, shift)
            centred = padding in (Padding.REFLECT, Padding.ZEROS)
            exact = shift > 1 or frames > 1 or not centred
            assert (framing.num_frames(least, shift) == frames) == exact
        shifts = np.full(len(lengths), shift)
        assert (framing.least_samples(3, shifts) == framing.least_samples(3, shift)).all()


def test_framing_of_a_plan():
    for plan in PLANS.values():
        assert plan.framing == Framing(plan.window_length, plan.padding)
        assert plan.framing.num_frames(5000, 77) == plan.num_frames(5000, 77)
    with pytest.raises(ValueError, match="window_length must be at least 1 sample, got 0"):
        Framing(0)


@pytest.mark.parametrize("name", PLANS)
def test_frame_segments(name):
    plan, lengths, shifts = PLANS[name], [16000, 1, 400, 0, 8000], [160, 160, 1, 5, 399]
    frames = frame_segments(lengths, shifts, plan)
    assert frames.lengths.tolist() == [
        plan.num_frames(length, shift) for length, shift in zip(lengths, shifts, strict=True)
    ]
    assert frames.lengths[3] == 0


def test_frame_segments_of_kaldi():
    plan = PLANS["kaldi"]
    assert frame_segments([16000, 399, 400, 0], [160, 160, 1, 1], plan).lengths.tolist() == [
        *(98, 0, 1, 0)
    ]
    assert frame_segments([16000, 560], 160, plan).lengths.tolist() == [98, 2]
    budget = TokenBudget(tokens=128, clips=3, max_length=100)
    assert frame_segments([16000], 160, plan, budget).lengths.tolist() == [98, 0, 0]
    with pytest.raises(ValueError, match="budget allows 128"):
        frame_segments([16000, 16000], 160, plan, budget)
    for bad, message in (
        (([16000], [160, 160]), "frame_shift holds 2 shifts for 1 clips"),
        (([16000], [0]), "frame_shift must be at least 1 sample"),
        (([-1], 160), "num_samples must not be negative"),
    ):
        with pytest.raises(ValueError, match=message):
            frame_segments(*bad, plan)


@pytest.mark.parametrize("length", [2, 3, 250, 400, 1102])
def test_windows(length):
    for name in WINDOWS:
        theirs = kaldi._feature_window_function(name, length, 0.3, "cpu", torch.float64)
        ours = window_function(name, length, 0.3)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-13)
        assert ours.dtype == torch.float64


def test_windows_of_the_centred_presets_are_periodic():
    signal = pytest.importorskip("scipy.signal")
    for name, length in (("htsat", 1024), ("epic_sounds", 240)):
        expected = torch.from_numpy(signal.get_window("hann", length, fftbins=True))
        torch.testing.assert_close(PLANS[name].exact_window, expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize(
    ("ours", "oracle"),
    [
        (mel_triangles, mel_oracle.kaldi_bank),
        (htk_triangles, mel_oracle.htk_bank),
        (slaney_triangles, mel_oracle.slaney_bank),
    ],
)
@pytest.mark.parametrize(
    "settings",
    [
        (16000, 128, 512, 20.0, 8000.0),
        (32000, 64, 1024, 50.0, 14000.0),
        (24000, 128, 2048, 0.0, 12000.0),
        (44100, 40, 2048, 500.0, 900.0),
        (48000, 23, 1200, 1200.0, 24000.0),
    ],
)
def test_mel_banks(ours, oracle, settings):
    weights = ours(*settings)
    expected = torch.from_numpy(oracle(*settings))
    torch.testing.assert_close(weights, expected[:, :-1], rtol=0, atol=1e-12)
    assert (expected[:, -1] < 1e-12).all()  # what the Nyquist bin would weigh
    assert (weights > 1e-12).sum(dim=0).max() <= 2


@pytest.mark.parametrize("name", PLANS)
def test_compressed_rows_are_the_weights(name):
    plan = PLANS[name]
    dense = torch.zeros(plan.num_mels, plan.fft_size // 2)
    for mel in range(plan.num_mels):
        taps = slice(int(plan.mel_starts[mel]), int(plan.mel_starts[mel + 1]))
        dense[mel, plan.mel_bins[taps]] = plan.mel_taps[taps]
    assert torch.equal(dense, plan.exact_weights.float())
    assert torch.equal(plan.window, plan.exact_window.float())
    assert len(plan.mel_taps) == (plan.exact_weights > 0).sum()


def test_empty_mel_bin_of_the_ast_front_end():
    # A triangle narrower than the FFT's resolution; AST was trained with it.
    assert PLANS["kaldi"].exact_weights[3].sum() == 0
    assert len(PLANS["kaldi"].mel_taps) == 504


def test_preset_settings():
    sizes = {name: (plan.window_length, plan.fft_size) for name, plan in PLANS.items()}
    assert sizes["kaldi"] == (400, 512)
    assert sizes["htsat"] == (1024, 1024)
    assert sizes["epic_sounds"] == (240, 2048)
    assert PLANS["epic_sounds"].high_freq == 12000.0
    assert MelPlan.kaldi(44100).fft_size == 2048
    assert MelPlan.kaldi(44100).window_length == 1102  # 1102.5
    assert MelPlan.kaldi(high_freq=-400.0).high_freq == 7600.0
    assert MelPlan.kaldi(high_freq=0.0).high_freq == 8000.0
    assert MelPlan.kaldi(round_to_power_of_two=False).fft_size == 400


def test_htsats_tables(shared_dir):
    """The frozen front end of the published HTS-AT."""
    folder = shared_dir / "fixtures/ssl_family"
    index = json.loads((folder / "fixtures.json").read_text())
    case = next(case for case in index["cases"] if case["name"] == "htsat_frontend_32k")
    stored = np.load(folder / case["file"])
    plan = PLANS["htsat"]
    weights = np.pad(plan.exact_weights.numpy(), ((0, 0), (0, 1)))
    probe = formula("probe", 513) * 50 / np.sqrt(513)
    found = {
        "mel_sum_per_band": weights.sum(1),
        "mel_first_bin": (weights > 0).argmax(1),
        "mel_count": (weights > 0).sum(1),
        "mel_peak": weights.max(1),
        "mel_probe": weights @ probe,
        "stft_real_dc": plan.exact_window.numpy(),
    }
    for name, value in found.items():
        rule = case["arrays"][name]
        np.testing.assert_allclose(
            value, stored[name], rule.get("rtol", 0), rule.get("atol", 0), err_msg=name
        )


@pytest.mark.parametrize(
    ("make", "settings", "message"),
    [
        ("kaldi", {"num_mels": 300}, "num_mels=300 must lie between 1 and 256"),
        ("kaldi", {"num_mels": 0}, "num_mels=0"),
        ("kaldi", {"sample_rate": 8000, "high_freq": 8000.0}, "half of sample_rate=8000"),
        ("kaldi", {"low_freq": 9000.0}, "low_freq=9000"),
        ("kaldi", {"high_freq": -8000.0}, "high_freq=-8000.0 must satisfy"),
        ("kaldi", {"frame_length_ms": 0.1}, "frame_length_ms=0.1 is 1 samples"),
        ("kaldi", {"preemphasis": 97.0}, "preemphasis must lie between 0 and 1"),
        ("kaldi", {"dither": -1.0}, "dither must not be negative"),
        ("kaldi", {"window_type": "hann"}, "window_type must be one of"),
        ("kaldi", {"mean": -4.0}, "pass both, or neither"),
        ("kaldi", {"mean": -4.0, "std": 0.0}, "std must be positive"),
        (
            "kaldi",
            {"sample_rate": 8040, "num_mels": 40, "round_to_power_of_two": False},
            "fft_size=201 must be even",
        ),
        ("htsat", {"window_length": 1023}, "fft_size=1023 must be even"),
        ("htsat", {"sample_rate": 16000}, "half of sample_rate=16000"),
        ("epic_sounds", {"sample_rate": 44100}, "441 samples has no middle"),
        ("epic_sounds", {"fft_size": 128, "num_mels": 20}, "hold the 240 samples"),
    ],
)
def test_plan_errors(make, settings, message):
    with pytest.raises(ValueError, match=message):
        getattr(MelPlan, make)(**settings)


def test_tables_move_and_exact_ones_stay():
    plan = PLANS["kaldi"].to("meta")
    assert all(getattr(plan, name).device.type == "meta" for name in MelPlan.TABLES)
    assert plan.exact_weights.device.type == "cpu"
    with torch.device("meta"):
        made = MelPlan.kaldi()
    assert made.window.device.type == "cpu" and torch.equal(made.mel_taps, PLANS["kaldi"].mel_taps)


def test_normalised_value():
    plan = MelPlan.kaldi(mean=-4.2677393, std=4.5689974)
    assert plan.normalized(0.0) == pytest.approx(0.467, abs=1e-3)
    assert PLANS["kaldi"].normalized(0.5) == 0.5
