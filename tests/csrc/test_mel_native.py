"""The compiled filterbank as torch's operator, against the operator in terms of PyTorch's own."""

import re
import shutil
import subprocess

import pytest
import torch

from fastast.ops import _native
from fastast.ops.mel_filterbank import (
    MelPlan,
    dither_keys,
    frame_segments,
    mel_filterbank,
    mel_filterbank_reference,
    portable_mel_filterbank,
)
from fastast.segments import TokenBudget
from tests.testing import poisoned_memory

if _native.status()["cpu"].startswith("not built"):
    pytest.skip(_native.status()["cpu"], allow_module_level=True)

LENGTHS = [16000, 399, 401, 0, 12345, 400, 3000, 0, 30000]
SHIFTS = [160, 160, 240, 160, 163, 320, 640, 7, 480]
TOLERANCE = 4e-3
"""Between two float32 computations of log-mel values."""


def arguments(plan, lengths=LENGTHS, shifts=SHIFTS, budget=None, device="cpu"):
    generator = torch.Generator().manual_seed(0)
    waveforms = 0.1 * torch.randn(sum(lengths), generator=generator)
    frames = frame_segments(lengths, shifts, plan, budget)
    empty = frames.num_segments - len(lengths)
    offsets = torch.tensor([0] + lengths + [0] * empty).cumsum(0)
    frame_shift = torch.tensor(shifts + [0] * empty, dtype=torch.int32)
    tensors = (x.to(device) for x in (waveforms, offsets, frame_shift))
    return *tensors, frames.to(device), plan.to(device)


def raw(waveforms, offsets, frame_shift, frames, plan, keys=None, **changes):
    """The operator's own arguments."""
    settings = {
        "window": plan.window,
        "mel_bins": plan.mel_bins,
        "mel_taps": plan.mel_taps,
        "mel_starts": plan.mel_starts,
        "dither_keys": keys,
        "num_rows": int(frames.host_offsets[-1]),
        "fft_size": plan.fft_size,
        "padding": int(plan.padding),
    }
    names = ("dither", "remove_dc", "preemphasis", "magnitude", "floor", "offset", "log_scale")
    settings |= {name: getattr(plan, name) for name in (*names, "mean", "std")}
    settings |= {"bfloat16": False} | changes
    return waveforms, offsets, frame_shift, frames.offsets, *settings.values()


PLANS = {
    "kaldi": MelPlan.kaldi(mean=-4.27, std=4.57),
    "dither": MelPlan.kaldi(dither=0.01, snip_edges=False),
    "htsat": MelPlan.htsat(),
    "epic_sounds": MelPlan.epic_sounds(),
}


def test_what_was_built_is_loaded():
    assert _native.status()["cpu"] == "loaded"
    if (_native.FOLDER / "_mel_cuda.so").exists() and torch.version.cuda:
        assert _native.status()["cuda"] == "loaded"


@pytest.mark.parametrize("file", ["_mel_cpu.so", "_mel_cuda.so"])
def test_of_torch_only_the_stable_interface_is_used(file):
    """Functions in C alone, which later versions of torch keep."""
    path = _native.FOLDER / file
    if not path.exists():
        pytest.skip(f"{file} was not built")
    if shutil.which("nm") is None:
        pytest.skip("no nm to list symbols with")
    listing = ["nm", "--dynamic", "--undefined-only", "--format=posix", str(path)]
    done = subprocess.run(listing, capture_output=True, text=True, check=True)
    names = [line.split()[0] for line in done.stdout.splitlines()]
    assert any(name.startswith("aoti_torch_") for name in names)
    # In mangled names a namespace is preceded by its length.
    assert not [name for name in names if re.search(r"^_Z.*(2at|3c10|4cuda|5torch)", name)]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", PLANS)
def test_equals_the_portable_operator(name, dtype, device):
    args = arguments(PLANS[name], device=device)
    keys = None
    if PLANS[name].dither:
        keys = dither_keys(3, 4, torch.arange(len(LENGTHS))).to(device)
    bfloat16 = dtype == torch.bfloat16
    ours = torch.ops.fastast.mel_filterbank(*raw(*args, keys, bfloat16=bfloat16))
    portable = portable_mel_filterbank(*raw(*args, keys))
    assert ours.dtype == dtype
    # Beside float32's errors, half a unit in the last of bfloat16's 8 digits.
    torch.testing.assert_close(
        ours.float(), portable, rtol=2**-8 if bfloat16 else 0, atol=TOLERANCE * args[-1].log_scale
    )
    reference = mel_filterbank_reference(*args, dither_keys=keys)
    assert (ours.double() - reference).abs().mean() < (2e-2 if bfloat16 else 1e-5)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_clip_does_not_depend_on_its_batch(device):
    waveforms, offsets, shifts, frames, plan = arguments(PLANS["kaldi"], device=device)
    together = mel_filterbank(waveforms, offsets, shifts, frames, plan)
    for clip, rows in enumerate(together.split(frames.lengths.tolist())):
        begin, end = offsets[clip : clip + 2].tolist()
        length = torch.tensor([0, end - begin], device=device)
        alone = frame_segments([end - begin], [SHIFTS[clip]], plan).to(device)
        part = waveforms[begin:end]
        assert torch.equal(mel_filterbank(part, length, shifts[clip : clip + 1], alone, plan), rows)


def test_threads_change_nothing():
    args = arguments(PLANS["kaldi"], LENGTHS * 3, SHIFTS * 3)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(mel_filterbank(*args))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_dead_rows_of_poisoned_memory():
    budget = TokenBudget(tokens=700, clips=12, max_length=200)
    args = arguments(PLANS["kaldi"], budget=budget)
    with poisoned_memory():
        out = mel_filterbank(*args, budget.tokens)
    used = int(args[3].host_offsets[-1])
    assert out.shape == (700, 128) and (out[used:] == 0).all() and out.isfinite().all()


def test_strided_inputs():
    waveforms, *rest = arguments(PLANS["kaldi"])
    strided = torch.stack([waveforms, waveforms], dim=1)[:, 0]
    assert torch.equal(mel_filterbank(strided, *rest), mel_filterbank(waveforms, *rest))


@pytest.mark.parametrize(
    "plan",
    [
        pytest.param(MelPlan.kaldi(192000), id="8192 points"),
        pytest.param(MelPlan.kaldi(round_to_power_of_two=False), id="400 points"),
        pytest.param(MelPlan.kaldi(1000, 1, frame_length_ms=3.0), id="4 points"),
    ],
)
def test_other_sizes_of_the_transform_take_the_portable_way(plan):
    args = arguments(plan)
    assert torch.equal(mel_filterbank(*args), portable_mel_filterbank(*raw(*args)))


def test_frames_that_do_not_fit_are_refused_in_the_same_words():
    # mel_filterbank looks at the numbers too, but compiled code calls the operator alone.
    waveforms, offsets, shifts, frames, plan = arguments(PLANS["kaldi"], [4000, 3000], [160, 160])
    falling = offsets.clone()
    falling[1] = 8000
    rows = int(frames.host_offsets[-1])
    for bad in (
        (waveforms, offsets, shifts * 2, rows),
        (waveforms, offsets, torch.stack([shifts[0], 2 * shifts[1]]), rows),
        (waveforms, falling, shifts, rows),
        (waveforms, offsets + 1, shifts, rows),
        (waveforms, offsets - 1, shifts, rows),
        (waveforms[:100], offsets, shifts, rows),
        (waveforms, offsets, shifts, 20),
    ):
        *tensors, num_rows = bad
        with pytest.raises(ValueError) as expected:
            mel_filterbank(*tensors, frames, plan, num_rows)
        with pytest.raises(ValueError) as found:
            torch.ops.fastast.mel_filterbank(*raw(*tensors, frames, plan, num_rows=num_rows))
        assert str(found.value) == str(expected.value)


def test_other_dtypes_take_the_portable_way():
    waveforms, *rest = arguments(PLANS["kaldi"])
    args = raw(waveforms.double(), *rest)
    assert torch.equal(torch.ops.fastast.mel_filterbank(*args), portable_mel_filterbank(*args))


def test_mel_tables_are_checked():
    args = arguments(PLANS["kaldi"])
    starts = PLANS["kaldi"].mel_starts.clone()
    for place, bad in ((128, 505), (0, -1), (7, 400)):
        wrong = starts.clone()
        wrong[place] = bad
        with pytest.raises(ValueError, match="mel_starts must rise from 0 to the 504"):
            torch.ops.fastast.mel_filterbank(*raw(*args, mel_starts=wrong))
    bins = PLANS["kaldi"].mel_bins.clone()
    for bad in (-1, 257):
        bins[7] = bad
        with pytest.raises(ValueError, match=f"mel_bins holds {bad}"):
            torch.ops.fastast.mel_filterbank(*raw(*args, mel_bins=bins))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_operator(device):
    keys = dither_keys(0, 0, torch.arange(2)).to(device)
    args = arguments(PLANS["dither"], [2000, 900], [160, 200], device=device)
    torch.library.opcheck(torch.ops.fastast.mel_filterbank.default, raw(*args, keys))
