"""The filterbank against torchaudio, against its own specification, and as an op."""

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from fastast.ops.mel_filterbank import (
    ENERGY_FLOOR,
    MelPlan,
    dense_mel_filterbank,
    frame_segments,
    hop_from_ms,
    mel_filterbank,
    mel_filterbank_reference,
    mel_triangles,
)
from fastast.segments import Segments, TokenBudget
from tests.testing import poisoned_memory

kaldi = pytest.importorskip("torchaudio.compliance.kaldi")

LOG_TOLERANCE = 2e-3
"""Of float32 against float64 log-mel values, for sounds that fill the spectrum."""

PLAN = MelPlan.kaldi()


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
    """What `mel_filterbank` takes, for a list of clips."""
    lengths = [len(clip) for clip in clips]
    shifts = [shifts] * len(clips) if isinstance(shifts, int) else list(shifts)
    frames = frame_segments(lengths, shifts, plan, budget)
    empty = frames.num_segments - len(clips)
    offsets = torch.tensor([0] + lengths + [0] * empty).cumsum(0)
    frame_shift = torch.tensor(shifts + [1] * empty, dtype=torch.int32)
    return torch.cat(list(clips)), offsets, frame_shift, frames, plan


def assert_energies_close(actual: Tensor, expected: Tensor) -> None:
    """For tonal sounds, whose empty mel bins hold the rounding errors of the full ones."""
    # A float32 logarithm as large as 24 is rounded by up to 1e-6.
    actual, expected = actual.double().exp(), expected.double().exp()
    largest = expected.amax(dim=1, keepdim=True)
    tolerance = 1e-6 * largest + 2e-6 * expected + ENERGY_FLOOR
    assert ((actual - expected).abs() <= tolerance).all()


@pytest.mark.parametrize(
    ("sample_rate", "num_mels"),
    [(8000, 40), (16000, 23), (16000, 64), (16000, 80), (16000, 128), (32000, 64), (32000, 128)]
    + [(44100, 128)],
)
def test_equals_torchaudio(sample_rate, num_mels):
    plan = MelPlan.kaldi(sample_rate, num_mels)
    hop = hop_from_ms(10.0, sample_rate)
    (clip,) = noise(sample_rate)
    args = arguments([clip], hop, plan)
    theirs = torchaudio_fbank(clip, plan)
    theirs64 = torchaudio_fbank(clip.double(), plan)  # but its weights are float32
    reference = mel_filterbank_reference(*args)
    ours = mel_filterbank(*args)
    assert ours.shape == theirs.shape and ours.dtype == torch.float32
    torch.testing.assert_close(reference, theirs64, rtol=0, atol=1e-3)
    torch.testing.assert_close(ours.double(), reference, rtol=0, atol=LOG_TOLERANCE)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2 * LOG_TOLERANCE)


@pytest.mark.parametrize("frame_shift_ms", range(10, 41))
def test_equals_torchaudio_at_every_frame_shift(frame_shift_ms):
    (clip,) = noise(8000)
    ours = mel_filterbank(*arguments([clip], hop_from_ms(frame_shift_ms, 16000)))
    theirs = torchaudio_fbank(clip, PLAN, frame_shift_ms)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2 * LOG_TOLERANCE)


@pytest.mark.parametrize(("low_freq", "high_freq"), [(0.0, 8000.0), (50.0, 7000.0)])
def test_equals_torchaudio_in_a_narrower_band(low_freq, high_freq):
    plan = MelPlan.kaldi(low_freq=low_freq, high_freq=high_freq)
    (clip,) = noise(4000)
    ours = mel_filterbank(*arguments([clip], 160, plan))
    torch.testing.assert_close(ours, torchaudio_fbank(clip, plan), rtol=0, atol=4e-3)


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
    # A triangle narrower than the FFT's resolution; AST was trained with it.
    assert mel_triangles(16000, 128, 512, 20.0, 8000.0)[3].sum() == 0
    assert len(PLAN.mel_taps) == 504
    (clip,) = noise(4000)
    assert (mel_filterbank(*arguments([clip], 160))[:, 3] == math.log(ENERGY_FLOOR)).all()


@pytest.mark.parametrize("sample_rate", [8000, 16000, 32000, 44100, 48000])
def test_a_bin_feeds_two_mel_bins_at_most(sample_rate):
    weights = mel_triangles(sample_rate, 64, 512, 20.0, sample_rate / 2)
    assert (weights > 0).sum(dim=0).max() <= 2
    assert (weights.sum(dim=0) <= 1 + 1e-12).all()


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
        torch.testing.assert_close(ours, torchaudio_fbank(clip, PLAN), rtol=0, atol=4e-3)
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
    assert plan.normalized(0.0) == pytest.approx(0.467, abs=1e-3)
    assert PLAN.normalized(0.0) == 0.0


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


TINY = MelPlan.kaldi(1000, 3, frame_length_ms=12.0, mean=-4.0, std=4.5)


def test_reference_gradients():
    waveforms, *args = arguments([clip.double() for clip in noise(40, 11, 29)], [5, 5, 9], TINY)
    waveforms = torch.cat([waveforms, waveforms[:3]]).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x: mel_filterbank_reference(x, *args, num_rows=12), waveforms
    )


def test_reference_keeps_its_dtype_under_autocast():
    args = arguments(noise(4000), 160)
    expected = mel_filterbank_reference(*args, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(mel_filterbank_reference(*args, dtype=torch.float32), expected)


def test_reference_gradient_of_silence_is_zero():
    waveforms, *args = arguments([torch.zeros(1000)], 160)
    mel_filterbank_reference(
        waveforms.requires_grad_(), *args, dtype=torch.float32
    ).sum().backward()
    assert (waveforms.grad == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.int16])
def test_opcheck(dtype):
    clips = noise(900, 0, 1300)
    clips = [(clip * 2**15).to(dtype) if dtype == torch.int16 else clip for clip in clips]
    waveforms, offsets, shifts, frames, plan = arguments(clips, [160, 160, 200])
    tables = (plan.window, plan.mel_bins, plan.mel_taps, plan.mel_starts)
    numbers = (20, plan.fft_size, plan.preemphasis, -4.0, 4.5)
    torch.library.opcheck(
        torch.ops.fastast.mel_filterbank.default,
        (waveforms, offsets, shifts, frames.offsets, *tables, *numbers),
    )


def test_compiles_once_for_all_batches_of_a_budget():
    budget = TokenBudget(tokens=256, clips=4, max_length=128)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(waveforms, offsets, shifts, frames):
        return mel_filterbank(waveforms, offsets, shifts, frames, PLAN, num_rows=256) + 1

    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        lengths = torch.randint(0, 10000, (3,), generator=generator).tolist()
        clips = noise(*lengths, seed=seed)
        waveforms, *args, _ = arguments(clips, [160, 200, 320], budget=budget)
        waveforms = torch.cat([waveforms, torch.zeros(40000 - len(waveforms))])
        expected = mel_filterbank(waveforms, *args, PLAN, num_rows=256) + 1
        with torch.compiler.set_stance("fail_on_recompile" if seed else "default"):
            assert torch.equal(step(waveforms, *args), expected)


def test_flops_are_counted():
    (clip,) = noise(16000)
    with FlopCounterMode(display=False) as counter:
        mel_filterbank(*arguments([clip], 160))
    assert counter.get_total_flops() == 98 * (5 * 400 + 5 * 512 * 9 // 2 + 3 * 256 + 2 * 504)


def test_hop_from_ms_rounds_as_torchaudio():
    for sample_rate in (8000, 16000, 22050, 32000, 44100, 48000):
        for step in range(100, 4001):
            shift = 10 * (step / 1000)
            assert hop_from_ms(shift, sample_rate) == int(sample_rate * shift * 0.001)
    assert hop_from_ms(12, 44100) == 529  # 529.2
    assert hop_from_ms(10, 16000) == 160
    # On the grid of resolutions C = 1, 1.001, ..., 4 the rounding is exact.
    for sample_rate in (8000, 16000, 32000, 44100, 48000):
        for step in range(1000, 4001):
            assert hop_from_ms(10 * (step / 1000), sample_rate) == sample_rate * step // 100_000


def test_frame_segments():
    frames = frame_segments([16000, 399, 400, 0], [160, 160, 1, 1], PLAN)
    assert frames.lengths.tolist() == [98, 0, 1, 0]
    assert frame_segments([16000, 560], 160, PLAN).lengths.tolist() == [98, 2]
    budget = TokenBudget(tokens=128, clips=3, max_length=100)
    assert frame_segments([16000], 160, PLAN, budget).lengths.tolist() == [98, 0, 0]
    with pytest.raises(ValueError, match="budget allows 128"):
        frame_segments([16000, 16000], 160, PLAN, budget)
    for bad, message in (
        (([16000], [160, 160]), "frame_shift holds 2 shifts for 1 clips"),
        (([16000], [0]), "frame_shift must be at least 1 sample"),
        (([-1], 160), "num_samples must not be negative"),
    ):
        with pytest.raises(ValueError, match=message):
            frame_segments(*bad, PLAN)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_mels": 300}, "num_mels=300 must lie between 1 and 256"),
        ({"num_mels": 0}, "num_mels=0"),
        ({"sample_rate": 8000, "high_freq": 8000.0}, "half of sample_rate=8000"),
        ({"low_freq": 9000.0}, "low_freq=9000"),
        ({"frame_length_ms": 0.1}, "frame_length_ms=0.1 is 1 samples"),
        ({"preemphasis": 97.0}, "preemphasis must lie between 0 and 1"),
        ({"mean": -4.0}, "pass both, or neither"),
        ({"mean": -4.0, "std": 0.0}, "std must be positive"),
    ],
)
def test_plan_errors(settings, message):
    with pytest.raises(ValueError, match=message):
        MelPlan.kaldi(**settings)


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
        ({"waveforms": waveforms.clone().requires_grad_()}, "mel_filterbank_reference"),
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
    for change, message in bad:
        with pytest.raises(ValueError, match=message):
            mel_filterbank(**{**good, **change})
    with pytest.raises(ValueError, match=r"waveforms must be \[clips, samples\]"):
        dense_mel_filterbank(waveforms, 160, plan)
    with pytest.raises(ValueError, match="frame_shift must be at least 1 sample"):
        dense_mel_filterbank(waveforms[None], 0, plan)
