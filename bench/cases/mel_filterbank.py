"""Log-mel frames of waveforms: ours compiled and in PyTorch's own operations, torchaudio, Kaldi.

The peers take a clip at a time. On a CPU each case is run with one thread and with all.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry

from bench.registry import Case, Contender, Settings, Work, benchmark
from fastast import Segments
from fastast.ops import MelPlan, frame_segments, mel_filterbank, mel_filterbank_reference
from fastast.ops.mel_filterbank import portable_mel_filterbank

SAMPLE_RATE = 16000


@benchmark(
    "ops/mel_filterbank",
    "Kaldi's filterbank with AST's options: 16 kHz, 128 mel bins, windows of 25 ms.",
)
def cases(settings: Settings) -> Iterator[Case]:
    on_cpu = settings.device.type == "cpu"
    clips = 8 if on_cpu else 256
    draw = random.Random(0)
    ragged = [(draw.randint(1600, 20 * SAMPLE_RATE), draw.randint(10, 40)) for _ in range(clips)]
    batches = {
        "clips of 10 s every 10 ms": [(10 * SAMPLE_RATE, 10)] * clips,
        "clips of 0.1 to 20 s every 10 to 40 ms": ragged,
    }
    for name, batch in batches.items():
        for threads in sorted({1, torch.get_num_threads()}) if on_cpu else [None]:
            plural = "s" * (threads != 1)
            yield Case(
                name if threads is None else f"{name}, {threads} thread{plural}",
                torch.float32,
                settings.timed_size,
                {"samples": [n for n, _ in batch], "frame_shift_ms": [ms for _, ms in batch]},
                partial(_build, settings.device, batch, threads),
            )


def _build(device: torch.device, batch: list[tuple[int, int]], threads: int | None) -> Work:
    generator = torch.Generator().manual_seed(0)
    plan = MelPlan.kaldi(SAMPLE_RATE)
    lengths, shifts_ms = zip(*batch, strict=True)
    shifts = [SAMPLE_RATE * ms // 1000 for ms in shifts_ms]
    clips = [0.1 * torch.randn(length, generator=generator).to(device) for length in lengths]
    frames = frame_segments(lengths, shifts, plan)
    rows = int(frames.host_offsets[-1])
    packed = (
        torch.cat(clips),
        torch.tensor([0, *lengths]).cumsum(0).to(device),
        torch.tensor(shifts, dtype=torch.int32, device=device),
        frames.to(device),
        plan.to(device),
        rows,
    )
    raw = _operator_arguments(*packed)
    alone = list(zip(clips, shifts_ms, strict=True))
    count_flops = flop_registry[torch.ops.fastast.mel_filterbank]

    def contender(name: str, why: str, function: Callable[[], Tensor]) -> Contender:
        def step() -> Tensor:
            before = torch.get_num_threads()
            try:
                torch.set_num_threads(threads or before)
                return function()
            finally:
                torch.set_num_threads(before)

        return Contender(
            name,
            why,
            lambda: {"out": step()},
            step,
            flops=count_flops(*raw, out_val=None),
            bytes=4 * (sum(lengths) + rows * plan.num_mels),
            tokens=rows,
        )

    contenders = [
        contender("fastast", "one launch for the whole batch", lambda: mel_filterbank(*packed)),
        contender(
            "fastast, portable",
            "the same operator in PyTorch's own operations: what runs where nothing was compiled",
            lambda: portable_mel_filterbank(*raw),
        ),
    ]
    if find_spec("torchaudio"):
        contenders.append(
            contender(
                "torchaudio",
                "compliance.kaldi.fbank, which the papers' code calls for every clip",
                lambda: torch.cat([_torchaudio(*clip) for clip in alone]),
            )
        )
    if find_spec("kaldi_native_fbank") and device.type == "cpu":
        contenders.append(
            contender(
                "kaldi-native-fbank",
                "Kaldi's C++ code, a clip at a time, with the copies that its Python interface "
                "asks for; one thread",
                lambda: torch.cat([_kaldi_native(*clip) for clip in alone]),
            )
        )
    return Work(
        tuple(contenders),
        lambda dtype: {"out": mel_filterbank_reference(*packed, dtype=dtype)},
    )


def _operator_arguments(
    waveforms: Tensor,
    sample_offsets: Tensor,
    frame_shift: Tensor,
    frames: Segments,
    plan: MelPlan,
    num_rows: int,
) -> tuple:
    names = ("fft_size", "padding", "dither", "remove_dc", "preemphasis", "magnitude", "floor")
    return (
        *(waveforms, sample_offsets, frame_shift, frames.offsets),
        *(getattr(plan, name) for name in MelPlan.TABLES),
        *(None, num_rows),
        *(getattr(plan, name) for name in (*names, "offset", "log_scale", "mean", "std")),
        False,
    )


def _torchaudio(clip: Tensor, frame_shift_ms: int) -> Tensor:
    from torchaudio.compliance import kaldi

    return kaldi.fbank(
        clip[None],
        sample_frequency=SAMPLE_RATE,
        num_mel_bins=128,
        frame_shift=float(frame_shift_ms),
        htk_compat=True,
        use_energy=False,
        window_type="hanning",
        dither=0.0,
    )


def _kaldi_native(clip: Tensor, frame_shift_ms: int) -> Tensor:
    import kaldi_native_fbank
    import numpy as np

    options = kaldi_native_fbank.FbankOptions()
    options.frame_opts.samp_freq = SAMPLE_RATE
    options.frame_opts.frame_shift_ms = frame_shift_ms
    options.frame_opts.window_type = "hanning"
    options.frame_opts.dither = 0.0
    options.mel_opts.num_bins = 128
    options.mel_opts.low_freq = 20.0
    options.mel_opts.high_freq = 0.0
    options.use_energy = False
    bank = kaldi_native_fbank.OnlineFbank(options)
    bank.accept_waveform(SAMPLE_RATE, clip.numpy())
    bank.input_finished()
    rows = [bank.get_frame(i) for i in range(bank.num_frames_ready)]
    return torch.from_numpy(np.stack(rows))
