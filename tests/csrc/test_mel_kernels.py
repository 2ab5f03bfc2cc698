"""The filterbank's kernels, for every instruction set and for a GPU's blocks, without torch or GPU.

The code is called through ``csrc/mel/testing/harness.cpp``, which CMake builds here. The GPU's
algorithm runs on the CPU from the same source: a block's threads do their work in random order
between two barriers, on shared memory that begins as NaN. ``make sanitize`` runs these tests with
the address and the undefined-behaviour sanitizers.
"""

import ctypes
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from fastast.ops.mel_filterbank import (
    MelPlan,
    Padding,
    dither_keys,
    frame_segments,
    mel_filterbank_reference,
)
from fastast.segments import TokenBudget

ROOT = Path(__file__).resolve().parents[2]
SANITIZE = os.environ.get("FASTAST_SANITIZE") == "1"

CPU_KERNELS = ("kAvx512Kernel", "kAvx2Kernel", "kBaselineKernel")
RUNNERS = (*CPU_KERNELS, "blocks", "warps")
"""Everything that computes a filterbank."""

LOG_TOLERANCE = 2e-3
"""Of float32 against float64 log-mel values, for sounds that fill the spectrum."""


class Task(ctypes.Structure):
    """csrc/mel/task.h"""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("waveforms",)),
        ("num_samples", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("sample_offsets", "frame_shift", "frame_offsets")),
        ("num_clips", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("window", "mel_bins", "mel_taps", "mel_starts")),
        *((name, ctypes.c_void_p) for name in ("dither_keys", "out")),
        ("num_rows", ctypes.c_int64),
        *((name, ctypes.c_int32) for name in ("window_length", "num_mels", "num_taps")),
        *((name, ctypes.c_int32) for name in ("fft_size", "padding")),
        *((name, ctypes.c_float) for name in ("dither", "preemphasis", "floor", "offset")),
        *((name, ctypes.c_float) for name in ("log_scale", "mean", "scale")),
        *((name, ctypes.c_bool) for name in ("remove_dc", "magnitude")),
        *((name, ctypes.c_bool) for name in ("int16_samples", "bfloat16_out")),
    ]


@pytest.fixture(scope="session")
def library():
    """The harness, built anew where the sources have changed."""
    tools = {name: shutil.which(name) or Path(sys.executable).parent / name for name in ("cmake",)}
    if not Path(tools["cmake"]).exists() or not shutil.which(os.environ.get("CXX", "c++")):
        pytest.skip("no cmake or no C++ compiler")
    build = ROOT / "build" / ("harness-sanitized" if SANITIZE else "harness")
    configure = [tools["cmake"], "-S", ROOT, "-B", build, "-DFASTAST_CUDA=OFF"]
    configure += [f"-DPython_EXECUTABLE={sys.executable}"]
    if SANITIZE:
        flags = "-fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer"
        configure += [f"-DCMAKE_CXX_FLAGS={flags} -g -O1", "-DCMAKE_BUILD_TYPE=None"]
    # The compiler itself must not run under the sanitizer.
    environment = {key: value for key, value in os.environ.items() if key != "LD_PRELOAD"}
    for command in (configure, [tools["cmake"], "--build", build, "--target", "mel_harness"]):
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    loaded = ctypes.CDLL(str(build / "mel_harness.so"))
    loaded.cpu_kernel_name.restype = ctypes.c_char_p
    loaded.run_warps.restype = ctypes.c_bool
    assert loaded.task_bytes() == ctypes.sizeof(Task)
    return loaded


class Batch:
    """Clips, their frames and a plan, ready for the kernels."""

    def __init__(self, clips, shifts, plan, budget=None, bfloat16=False):
        lengths = [len(clip) for clip in clips]
        shifts = [shifts] * len(clips) if isinstance(shifts, int) else list(shifts)
        self.plan = plan
        self.frames = frame_segments(lengths, shifts, plan, budget)
        empty = self.frames.num_segments - len(clips)
        self.waveforms = torch.cat(list(clips))
        self.sample_offsets = torch.tensor([0] + lengths + [0] * empty).cumsum(0)
        self.sample_offsets[len(clips) :] = sum(lengths)
        self.frame_shift = torch.tensor(shifts + [0] * empty, dtype=torch.int32)
        self.keys = dither_keys(1, 2, torch.arange(len(self.frame_shift))) if plan.dither else None
        self.num_rows = budget.tokens if budget else int(self.frames.host_offsets[-1])
        self.dtype = torch.bfloat16 if bfloat16 else torch.float32

    def run(self, library, runner, seed=0):
        """The runner's output; it must write every row of a buffer of NaN."""
        out = torch.full((self.num_rows, self.plan.num_mels), math.nan, dtype=self.dtype)
        plan, scale = self.plan, 0.5 / (self.plan.std or 0.5)
        task = Task(
            waveforms=self.waveforms.data_ptr(),
            num_samples=len(self.waveforms),
            sample_offsets=self.sample_offsets.data_ptr(),
            frame_shift=self.frame_shift.data_ptr(),
            frame_offsets=self.frames.host_offsets.data_ptr(),
            num_clips=len(self.frame_shift),
            **{name: getattr(plan, name).data_ptr() for name in MelPlan.TABLES},
            dither_keys=self.keys.data_ptr() if plan.dither else None,
            out=out.data_ptr(),
            num_rows=self.num_rows,
            num_mels=plan.num_mels,
            num_taps=len(plan.mel_taps),
            mean=plan.mean or 0.0,
            scale=scale,
            int16_samples=self.waveforms.dtype == torch.int16,
            bfloat16_out=self.dtype == torch.bfloat16,
            **{
                name: getattr(plan, name)
                for name in ("window_length", "fft_size", "padding", "dither", "preemphasis")
                + ("floor", "offset", "log_scale", "remove_dc", "magnitude")
            },
        )
        if runner == "blocks":
            library.run_blocks(ctypes.byref(task), seed)
            return out
        if runner == "warps":
            if not library.run_warps(ctypes.byref(task)):
                pytest.skip(f"blocks transform {plan.fft_size} points")
            return out
        for index in range(len(CPU_KERNELS)):
            name = library.cpu_kernel_name(index)
            if name and name.decode() == runner:
                library.run_cpu(ctypes.byref(task), index, seed + 1)
                return out
        pytest.skip(f"this machine cannot run {runner}")

    def reference(self):
        return mel_filterbank_reference(
            self.waveforms,
            self.sample_offsets,
            self.frame_shift.clamp(min=1),
            self.frames,
            self.plan,
            self.num_rows,
            dither_keys=self.keys,
        )


def noise(*lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [0.1 * torch.randn(length, generator=generator) for length in lengths]


every_runner = pytest.mark.parametrize("runner", RUNNERS)

LENGTHS = [3000, 1300, 0, 401, 2222, 400, 1, 4000]
SHIFTS = [160, 163, 7, 100, 640, 320, 50, 1001]

PLANS = {
    "kaldi": MelPlan.kaldi(),
    "kaldi-8k": MelPlan.kaldi(8000, 23),
    "kaldi-44k": MelPlan.kaldi(44100, 80),
    "kaldi-no-snip": MelPlan.kaldi(snip_edges=False, mean=-4.27, std=4.57),
    "kaldi-povey": MelPlan.kaldi(window_type="povey", use_power=False, preemphasis=0.0),
    "kaldi-no-dc": MelPlan.kaldi(remove_dc_offset=False, preemphasis=0.5),
    "dither": MelPlan.kaldi(dither=0.01),
    "htsat": MelPlan.htsat(),
    "epic_sounds": MelPlan.epic_sounds(),
    "4096": MelPlan.epic_sounds(fft_size=4096),
    "8": MelPlan.kaldi(4000, 2, frame_length_ms=1.8),
    "16": MelPlan.kaldi(4000, 3, frame_length_ms=2.3),
    "32": MelPlan.kaldi(8000, 5, frame_length_ms=4.0),
    "64": MelPlan.kaldi(8000, 17, frame_length_ms=5.0),
    "128": MelPlan.kaldi(8000, 1, frame_length_ms=16.0),
}


@every_runner
@pytest.mark.parametrize("name", PLANS)
def test_equals_the_reference(library, runner, name):
    batch = Batch(noise(*LENGTHS), SHIFTS, PLANS[name])
    out = batch.run(library, runner)
    tolerance = LOG_TOLERANCE * PLANS[name].log_scale
    torch.testing.assert_close(out.double(), batch.reference(), rtol=0, atol=tolerance)


@every_runner
@pytest.mark.parametrize("padding", Padding)
def test_mirror_images_repeat(library, runner, padding):
    plan = {
        Padding.NONE: MelPlan.kaldi(8000, 23),
        Padding.KALDI: MelPlan.kaldi(8000, 23, snip_edges=False),
        Padding.REFLECT: MelPlan.htsat(8000, 16, window_length=256, high_freq=None),
        Padding.ZEROS: MelPlan.epic_sounds(8000, 16, frame_length_ms=32.0, fft_size=256),
    }[padding]
    assert plan.padding == padding
    batch = Batch(noise(1, 2, 3, 5, 31, 100, 127, 128, 129, 255), 20, plan)
    out = batch.run(library, runner)
    torch.testing.assert_close(out.double(), batch.reference(), rtol=0, atol=1e-2)


@every_runner
def test_int16(library, runner):
    clips = [(clip * 2**15).to(torch.int16) for clip in noise(*LENGTHS)]
    plan = PLANS["kaldi-no-snip"]
    out = Batch(clips, SHIFTS, plan).run(library, runner)
    as_float = Batch([clip.float() / 2**15 for clip in clips], SHIFTS, plan).run(library, runner)
    assert torch.equal(out, as_float)


@every_runner
def test_bfloat16_is_the_rounded_result(library, runner):
    arguments = noise(*LENGTHS), SHIFTS, PLANS["kaldi"]
    out = Batch(*arguments, bfloat16=True).run(library, runner)
    assert torch.equal(out, Batch(*arguments).run(library, runner).bfloat16())


@every_runner
def test_dead_rows_are_zero(library, runner):
    budget = TokenBudget(tokens=75, clips=12, max_length=40)
    for clips in (noise(3000, 0, 1300), []):
        batch = Batch([*clips, *noise(0)], 160, PLANS["kaldi"], budget)
        out, used = batch.run(library, runner), int(batch.frames.host_offsets[-1])
        assert (out[used:] == 0).all()
        torch.testing.assert_close(out.double(), batch.reference(), rtol=0, atol=LOG_TOLERANCE)


@every_runner
@pytest.mark.parametrize("name", ["kaldi", "dither", "kaldi-no-snip", "htsat"])
def test_a_clip_does_not_depend_on_its_batch(library, runner, name):
    clips = noise(*LENGTHS)
    together = Batch(clips, SHIFTS, PLANS[name])
    rows = together.run(library, runner).split(together.frames.lengths.tolist())
    for index, (clip, shift) in enumerate(zip(clips, SHIFTS, strict=True)):
        alone = Batch([clip], shift, PLANS[name])
        if alone.keys is not None:
            alone.keys = together.keys[index : index + 1].clone()
        assert torch.equal(alone.run(library, runner), rows[index])


@pytest.mark.parametrize("name", PLANS)
def test_the_order_of_a_block_s_threads_does_not_matter(library, name):
    batch = Batch(noise(*LENGTHS), SHIFTS, PLANS[name])
    first = batch.run(library, "blocks", seed=1)
    assert torch.equal(first, batch.run(library, "blocks", seed=2))


@pytest.mark.parametrize("name", PLANS)
def test_blocks_fit_into_shared_memory(library, name):
    task = Task(fft_size=PLANS[name].fft_size, window_length=PLANS[name].window_length)
    frames = library.block_frames(ctypes.byref(task))
    assert library.block_bytes(ctypes.byref(task)) <= 48 * 1024
    # As many butterflies of radix 8 at a time as there are threads, where memory allows.
    assert frames * task.fft_size // 16 >= 256 or frames == 8 or task.fft_size == 4096


def conflicts(library, points):
    """Most points in one of 32 banks, of those that the threads of a warp ask for at once."""
    warps = [points[begin : begin + 32] for begin in range(0, len(points), 32)]
    return max(max(np.bincount([library.point_at(i) % 32 for i in warp])) for warp in warps)


@pytest.mark.parametrize("fft_size", [128, 256, 512, 1024, 2048, 4096])
def test_bank_conflicts(library, fft_size):
    points = length = fft_size // 2
    assert sorted(map(library.point_at, range(points))) == list(range(points))
    while length > 1:
        stride = length // library.radix_of(length)
        butterflies = [i for i in range(points) if i % length < stride]
        for first in range(0, length, stride):
            assert conflicts(library, [i + first for i in butterflies]) == 1
        length = stride
    bins = [library.position(k, points) for k in range(points)]
    assert sorted(bins) == list(range(points))
    assert conflicts(library, bins[: points // 2]) == 1
    assert conflicts(library, bins[:1] + bins[: points // 2 : -1]) <= 2  # their mirror images


@every_runner
def test_how_pieces_of_work_are_cut_does_not_matter(library, runner):
    batch = Batch(noise(60000, 70000), [37, 41], PLANS["kaldi-8k"])  # several chunks of rows
    assert torch.equal(batch.run(library, runner, 0), batch.run(library, runner, 6))


@every_runner
def test_dc_offset_cancels(library, runner):
    # In float32 the mean of such a frame is off by more than the floor's square root.
    constant = Batch([torch.full((2000,), 9830.4)], 160, PLANS["kaldi"])
    assert (constant.run(library, runner) == math.log(2.0**-23)).all()
    shifted = Batch([noise(4000)[0] + 64.0], 160, PLANS["kaldi"])  # the sum is rounded, once
    torch.testing.assert_close(
        shifted.run(library, runner).double(), shifted.reference(), rtol=0, atol=LOG_TOLERANCE
    )


@every_runner
def test_not_a_number_stays_in_its_frames(library, runner):
    (clip,) = noise(4000)
    clean = Batch([clip], 160, PLANS["kaldi"]).run(library, runner)
    for bad in (math.nan, math.inf):
        clip[1000] = bad
        out = Batch([clip], 160, PLANS["kaldi"]).run(library, runner)
        touched = [t for t in range(len(out)) if t * 160 <= 1000 < t * 160 + 400]
        # Mel bin 3 sums no bins.
        assert out[touched][:, [0, 1, 2, *range(4, 128)]].isnan().all()
        untouched = [t for t in range(len(out)) if t not in touched]
        assert torch.equal(out[untouched], clean[untouched])
        assert Batch([clip], 160, PLANS["kaldi"], bfloat16=True).run(library, runner).isnan().any()


def test_natural_log(library):
    x = np.concatenate([np.geomspace(1.2e-38, 3.4e38, 20001), np.linspace(0.5, 2, 20001)])
    x = np.concatenate([x.astype(np.float32), np.float32([0, np.inf, np.nan])])
    out = np.empty_like(x)
    library.natural_log(*(ctypes.c_void_p(a.ctypes.data) for a in (x, out)), len(x))
    with np.errstate(divide="ignore"):
        expected = np.log(x.astype(np.float64))
    np.testing.assert_allclose(out, expected, rtol=1.2e-7, atol=1e-8)


def test_gaussian(library):
    rng = np.random.default_rng(0)
    bits = rng.integers(2**64, size=200_000, dtype=np.uint64)
    bits[:3] = 0, 2**64 - 1, 2**40 - 1
    out = np.empty(len(bits), np.float32)
    library.gaussian(*(ctypes.c_void_p(a.ctypes.data) for a in (bits, out)), len(bits))
    radius = ((bits >> np.uint64(40)).astype(np.float64) + 1) / 2**24
    angle = (bits >> np.uint64(16) & np.uint64(0xFFFFFF)).astype(np.float64) / 2**24
    expected = np.sqrt(-2 * np.log(radius)) * np.cos(2 * np.pi * angle)
    np.testing.assert_allclose(out, expected, rtol=0, atol=2e-6)
