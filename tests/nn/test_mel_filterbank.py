"""The filterbank module: its three forms of input, its tables, and its place in a compiled step."""

import copy

import pytest
import torch

from fastast.nn.mel_filterbank import MelFilterbank
from fastast.ops.mel_filterbank import dense_mel_filterbank, dither_keys
from fastast.ops.mel_plan import MelPlan, frame_segments
from fastast.segments import Spectrograms, TokenBudget

LENGTHS = [8000, 300, 5000]


@pytest.fixture
def clips():
    generator = torch.Generator().manual_seed(0)
    return [0.1 * torch.randn(length, generator=generator) for length in LENGTHS]


def test_list_equals_stream_equals_dense(clips):
    filterbank = MelFilterbank()
    listed = filterbank(clips)
    assert isinstance(listed, Spectrograms)
    assert listed.segments.lengths.tolist() == [48, 0, 29]

    offsets = torch.tensor([0, *LENGTHS]).cumsum(0)
    streamed = filterbank(torch.cat(clips), offsets)
    assert torch.equal(streamed.frames, listed.frames)

    for clip, spectrogram in zip(clips, listed.unpack(), strict=True):
        assert torch.equal(filterbank(clip[None])[0], spectrogram)


def test_frame_shift_of_each_clip(clips):
    filterbank = MelFilterbank(frame_shift_ms=20.0)
    assert filterbank.frame_shift == 320
    default = filterbank(clips)
    assert default.segments.lengths.tolist() == [24, 0, 15]
    assert torch.equal(filterbank(clips, frame_shift=320).frames, default.frames)
    mixed = filterbank(clips, frame_shift=[160, 160, 320])
    assert mixed.segments.lengths.tolist() == [48, 0, 15]
    assert torch.equal(mixed.unpack()[2], default.unpack()[2])
    as_tensor = filterbank(clips, frame_shift=torch.tensor([160, 160, 320]))
    assert torch.equal(as_tensor.frames, mixed.frames)
    assert filterbank(clips[0][None], frame_shift=160).shape == (1, 48, 128)


def test_geometry_from_the_loader(clips):
    filterbank = MelFilterbank()
    budget = TokenBudget(tokens=100, clips=4, max_length=64)
    frames = frame_segments(LENGTHS, 160, filterbank.plan, budget)
    offsets = torch.tensor([0, *LENGTHS, 0]).cumsum(0)
    out = filterbank(torch.cat(clips), offsets, frames=frames, num_rows=100)
    assert out.frames.shape == (100, 128) and out.segments is frames
    assert torch.equal(out.frames[:77], filterbank(clips).frames)
    assert (out.frames[77:] == 0).all()


def test_settings_reach_the_plan():
    filterbank = MelFilterbank(
        32000, 64, frame_length_ms=32.0, low_freq=50.0, high_freq=14000.0, mean=-4.0, std=2.0
    )
    plan = filterbank.plan
    assert (plan.sample_rate, plan.num_mels, plan.window_length) == (32000, 64, 1024)
    assert (plan.fft_size, plan.low_freq, plan.high_freq) == (1024, 50.0, 14000.0)
    assert plan.normalized(0.0) == 1.0
    waveforms = torch.randn(2, 4000)
    expected = (MelFilterbank(32000, 64, frame_length_ms=32.0, low_freq=50.0, high_freq=14000.0))(
        waveforms
    )
    torch.testing.assert_close(filterbank(waveforms), (expected + 4.0) / 4.0)


def test_presets(clips):
    for preset, rate, num_mels, shift, frames in (
        ("kaldi", 16000, 128, 160, [48, 0, 29]),
        ("htsat", 32000, 64, 320, [26, 1, 16]),
        ("epic_sounds", 24000, 128, 120, [67, 3, 42]),
    ):
        filterbank = MelFilterbank(preset=preset)
        plan = getattr(MelPlan, preset)()
        assert (filterbank.plan.sample_rate, filterbank.plan.num_mels) == (rate, num_mels)
        assert filterbank.frame_shift == shift
        spectrograms = filterbank(clips)
        assert spectrograms.segments.lengths.tolist() == frames
        dense = dense_mel_filterbank(clips[2][None], shift, plan)[0]
        assert torch.equal(spectrograms.unpack()[2], dense)
    small = MelFilterbank(48000, 32, preset="htsat", frame_shift_ms=5.0, low_freq=100.0)
    assert small.frame_shift == 240 and small.plan.low_freq == 100.0
    assert small(clips[0][None]).shape == (1, 34, 32)


def test_bfloat16_output(clips):
    expected = MelFilterbank()(clips).frames
    filterbank = MelFilterbank(dtype=torch.bfloat16)
    assert torch.equal(filterbank(clips).frames, expected.bfloat16())
    dense = filterbank(clips[0][None])
    assert torch.equal(dense[0], expected[:48].bfloat16())


def test_dither(clips):
    filterbank = MelFilterbank(dither=1e-3)
    keys = dither_keys(0, 0, torch.arange(3))
    noisy = filterbank(clips, dither_keys=keys)
    again = filterbank(clips[2][None], dither_keys=keys[2:])
    assert torch.equal(noisy.unpack()[2], again[0])
    assert not torch.equal(noisy.frames, MelFilterbank()(clips).frames)
    with pytest.raises(ValueError, match="drawn from dither_keys"):
        filterbank(clips)
    # In evaluation mode keys are optional, and there is no noise without them.
    filterbank.eval()
    assert torch.equal(filterbank(clips).frames, MelFilterbank()(clips).frames)
    assert torch.equal(filterbank(clips[2][None])[0], MelFilterbank()(clips[2][None])[0])
    assert torch.equal(filterbank(clips, dither_keys=keys).frames, noisy.frames)


def test_a_gradient_reaches_the_waveforms(clips):
    filterbank = MelFilterbank()
    clips = [clip.requires_grad_() for clip in clips]
    filterbank(clips).frames.sum().backward()
    assert clips[0].grad.any() and not clips[1].grad.any() and clips[2].grad.isfinite().all()
    compiled = torch.compile(filterbank, fullgraph=True, backend="aot_eager")
    dense = torch.stack([clips[0].detach(), clips[0].detach().flip(0)]).requires_grad_()
    (expected,) = torch.autograd.grad(filterbank(dense).square().sum(), dense)
    (found,) = torch.autograd.grad(compiled(dense).square().sum(), dense)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("cast", ["half", "bfloat16", "double"])
def test_tables_stay_float32(cast, clips):
    filterbank = MelFilterbank()
    expected = filterbank(clips).frames
    model = getattr(torch.nn.Sequential(filterbank, torch.nn.Linear(2, 2)), cast)()
    assert model[1].weight.dtype != torch.float32
    assert filterbank.window.dtype == filterbank.mel_taps.dtype == torch.float32
    assert filterbank.mel_bins.dtype == torch.int64
    assert torch.equal(filterbank(clips).frames, expected)


def test_tables_survive_the_meta_device(clips):
    with torch.device("meta"):
        filterbank = MelFilterbank()
    expected = MelFilterbank()(clips).frames
    assert torch.equal(filterbank.to("meta").to_empty(device="cpu")(clips).frames, expected)


def test_nothing_to_save_or_train(clips):
    filterbank = MelFilterbank()
    assert not filterbank.state_dict() and not list(filterbank.parameters())
    assert len(list(filterbank.buffers())) == 4
    assert torch.equal(copy.deepcopy(filterbank)(clips).frames, filterbank(clips).frames)
    assert "sample_rate=16000" in repr(filterbank)


def test_float32_under_autocast(clips):
    filterbank = MelFilterbank()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = filterbank(clips).frames
    assert torch.equal(out, filterbank(clips).frames)


def test_compiles_whole(clips):
    filterbank = MelFilterbank()
    compiled = torch.compile(filterbank, fullgraph=True, backend="aot_eager")
    dense = torch.stack([clips[0], clips[0].flip(0)])
    assert torch.equal(compiled(dense), dense_mel_filterbank(dense, 160, filterbank.plan))

    budget = TokenBudget(tokens=128, clips=4, max_length=64)
    buffer = torch.zeros(20000)
    for turn in range(3):
        lengths = [length - 700 * turn for length in (8000, 3000, 5000)]
        offsets = torch.tensor([0, *lengths, 0]).cumsum(0)
        frames = frame_segments(lengths, 160, filterbank.plan, budget)
        buffer[: sum(lengths)] = torch.randn(sum(lengths))
        with torch.compiler.set_stance("fail_on_recompile" if turn else "default"):
            out = compiled(buffer, offsets, frames=frames, num_rows=128)
        expected = filterbank(buffer, offsets, frames=frames, num_rows=128)
        assert torch.equal(out.frames, expected.frames)


def test_errors(clips):
    filterbank = MelFilterbank()
    offsets = torch.tensor([0, *LENGTHS]).cumsum(0)
    stream = torch.cat(clips)
    for call, message in (
        (lambda: filterbank(stream), r"pass waveforms\[None\]"),
        (lambda: filterbank(clips, offsets), "leave them out"),
        (lambda: filterbank([]), "waveforms is empty"),
        (lambda: filterbank([clips[0][None]]), "1-D clips"),
        (lambda: filterbank(clips[0][None], frame_shift=[160]), "frame_shift must be one number"),
        (lambda: filterbank(stream, offsets.to("meta")), "pass frames from frame_segments"),
        (lambda: filterbank(stream, offsets, [160, 160]), "frame_shift holds 2 shifts"),
        (lambda: MelFilterbank(frame_shift_ms=0.01), "shorter than one sample"),
        (lambda: MelFilterbank(preset="librosa"), "preset must be one of"),
        (lambda: MelFilterbank(dtype=torch.float16)(clips), "dtype must be torch.float32 or"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(TypeError, match="preemphasis"):
        MelFilterbank(preset="htsat", preemphasis=0.9)
