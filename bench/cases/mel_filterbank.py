"""Log-mel frames of waveforms: ours compiled and in PyTorch's own operations, torchaudio, Kaldi.

On a CPU each case is run with one thread and with all, and the peers take a clip at a time. On a
GPU they take all clips at once where they can, and clips of one length and shift: nothing else does
ragged batches there. Clip by clip, a GPU waits for the host: that is measured on few clips.

What it costs that clips have lengths and frame shifts of their own is measured beside: ours makes
as many frames of clips that are alike, in turn with those of the ragged batch.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry

from bench.peers.mel import BatchedFilterbank
from bench.registry import Case, Contender, Settings, Work, benchmark, peer
from fastast import Segments
from fastast.ops import MelPlan, frame_segments, mel_filterbank, mel_filterbank_reference
from fastast.ops.mel_filterbank import INT16_SCALE, portable_mel_filterbank

SAMPLE_RATE = 16000

FEW_CLIPS, MANY_CLIPS = 16, 1024
"""On a GPU."""

REFERENCE_CLIPS = 32
"""That the reference takes at a time: it keeps several copies of all frames."""


@dataclass(frozen=True)
class Batch:
    """Clips and what is to be made of them.

    Args:
        clips: samples and frame shift in ms of each.
        in_dtype: of the samples.
        out_dtype: of the frames.
        threads: of a CPU; ``None`` leaves them as they are.
    """

    clips: Sequence[tuple[int, int]]
    in_dtype: torch.dtype = torch.float32
    out_dtype: torch.dtype = torch.float32
    threads: int | None = None

    @property
    def shapes(self) -> dict:
        """Lists of samples and frame shifts, or one of each where all clips are alike."""
        listed = sorted(set(self.clips)) if len(set(self.clips)) == 1 else self.clips
        samples, shifts = zip(*listed, strict=True)
        return {
            "clips": len(self.clips),
            "samples": list(samples),
            "frame_shift_ms": list(shifts),
            "in_dtype": str(self.in_dtype).removeprefix("torch."),
            "threads": self.threads,
        }


def _equal(clips: int) -> list[tuple[int, int]]:
    return [(10 * SAMPLE_RATE, 10)] * clips


def _ragged(clips: int) -> list[tuple[int, int]]:
    draw = random.Random(0)
    return [(draw.randint(1600, 20 * SAMPLE_RATE), draw.randint(10, 40)) for _ in range(clips)]


def _cpu_batches(clips: int = 8) -> Iterator[tuple[str, Batch]]:
    for name, batch in (
        ("clips of 10 s every 10 ms", _equal(clips)),
        ("clips of 0.1 to 20 s every 10 to 40 ms", _ragged(clips)),
    ):
        for threads in sorted({1, torch.get_num_threads()}):
            yield f"{name}, {threads} thread{'s' * (threads != 1)}", Batch(batch, threads=threads)


def _gpu_batches() -> Iterator[tuple[str, Batch]]:
    equal, ragged = _equal(MANY_CLIPS), _ragged(MANY_CLIPS)
    small = torch.int16, torch.bfloat16
    yield f"{MANY_CLIPS} clips of 10 s, int16 to bfloat16", Batch(equal, *small)
    yield f"{MANY_CLIPS} clips of 10 s, float32 to float32", Batch(equal)
    ragged_name = f"{MANY_CLIPS} clips of 0.1 to 20 s every 10 to 40 ms"
    yield f"{ragged_name}, int16 to bfloat16", Batch(ragged, *small)
    yield f"{FEW_CLIPS} clips of 10 s, float32 to float32", Batch(_equal(FEW_CLIPS))


@benchmark(
    "ops/mel_filterbank",
    "Kaldi's filterbank with AST's options: 16 kHz, 128 mel bins, windows of 25 ms, every 10 ms "
    "unless the case says so.",
)
def cases(settings: Settings) -> Iterator[Case]:
    on_gpu = settings.device.type == "cuda"
    batches = _gpu_batches() if on_gpu else _cpu_batches()
    for name, batch in batches:
        yield Case(
            name,
            batch.out_dtype,
            settings.timed_size,
            batch.shapes,
            partial(build, settings.device, batch, on_gpu),
        )


def build(device: torch.device, batch: Batch, on_gpu: bool) -> Work:
    """Ours, and the peers that run on CPUs or on GPUs."""
    generator = torch.Generator(device).manual_seed(0)
    plan = MelPlan.kaldi(SAMPLE_RATE).to(device)
    lengths, shifts_ms = zip(*batch.clips, strict=True)
    shifts = [SAMPLE_RATE * ms // 1000 for ms in shifts_ms]

    def noise(num_samples: int) -> Tensor:
        samples = 0.1 * torch.randn(num_samples, generator=generator, device=device)
        if batch.in_dtype == torch.int16:
            samples = (samples / INT16_SCALE).round().clamp(-32768, 32767).to(torch.int16)
        return samples

    samples = noise(sum(lengths))
    clips = samples.split(lengths)
    packed = _pack(clips, shifts, plan)
    rows = packed[-1]
    raw = _operator_arguments(*packed, batch.out_dtype)
    work = {
        "flops": flop_registry[torch.ops.fastast.mel_filterbank](*raw, out_val=None),
        "bytes": batch.in_dtype.itemsize * sum(lengths)
        + batch.out_dtype.itemsize * rows * plan.num_mels,
        "tokens": rows,
    }

    def contender(
        name: str, why: str, function: Callable[[], Tensor], unchecked: str | None = None
    ) -> Contender:
        def step() -> Tensor:
            before = torch.get_num_threads()
            try:
                torch.set_num_threads(batch.threads or before)
                return function()
            finally:
                torch.set_num_threads(before)

        outputs = lambda: {"out": step()}  # noqa: E731
        return Contender(name, why, outputs, step, **work, unchecked=unchecked)

    contenders = [
        contender(
            "fastast",
            "one launch for the whole batch",
            lambda: mel_filterbank(*packed, dtype=batch.out_dtype),
        ),
        contender(
            "fastast, portable",
            "the same operator in PyTorch's own operations: what runs where nothing was compiled",
            lambda: portable_mel_filterbank(*raw),
        ),
    ]
    if on_gpu and len(set(batch.clips)) == 1:
        dense = samples.view(len(clips), -1)
        contenders += _batched_peers(dense, shifts[0], plan, batch, contender)
    if len(set(batch.clips)) > 1:
        for name, why, shift in _alike(sum(lengths) / rows):
            equal = _equal_clips(rows, len(clips), shift, plan)
            others = _pack(noise(sum(equal)).split(equal), [shift] * len(equal), plan)
            run = partial(mel_filterbank, *others, dtype=batch.out_dtype)
            twin = contender(name, why, run, "other clips, as many frames")
            spared = batch.in_dtype.itemsize * (sum(lengths) - sum(equal))
            contenders.append(replace(twin, bytes=work["bytes"] - spared))
    if not on_gpu or len(clips) <= FEW_CLIPS:
        contenders += _single_peers(clips, shifts_ms, on_gpu, contender)

    def expected(dtype: torch.dtype) -> dict[str, Tensor]:
        within = torch.float64 if dtype == torch.float64 else torch.float32
        parts = []
        for first in range(0, len(clips), REFERENCE_CLIPS):
            some = slice(first, first + REFERENCE_CLIPS)
            part = _pack(clips[some], shifts[some], plan)
            parts.append(mel_filterbank_reference(*part, dtype=within).to(dtype))
        return {"out": torch.cat(parts)}

    return Work(tuple(contenders), expected)


def _pack(clips: Sequence[Tensor], shifts: Sequence[int], plan: MelPlan) -> tuple:
    """The arguments of :func:`fastast.ops.mel_filterbank`, the number of rows last."""
    device = clips[0].device
    lengths = [len(clip) for clip in clips]
    frames = frame_segments(lengths, shifts, plan)
    return (
        torch.cat(list(clips)),
        torch.tensor([0, *lengths]).cumsum(0).to(device),
        torch.tensor(shifts, dtype=torch.int32, device=device),
        frames.to(device),
        plan,
        int(frames.host_offsets[-1]),
    )


def _alike(samples_per_frame: float) -> Iterator[tuple[str, str, int]]:
    """Batches of equal clips that a ragged one is compared with, and their frame shifts."""
    shift = round(samples_per_frame)
    about = f"every {1000 * shift / SAMPLE_RATE:.1f} ms"
    yield (
        "fastast, equal clips",
        f"as many frames of as many samples, but all clips alike, {about}: what raggedness costs",
        shift,
    )
    yield (
        "fastast, every 10 ms",
        "as many frames of clips alike, but every 10 ms, so that windows share more samples: what "
        "longer frame shifts cost",
        SAMPLE_RATE // 100,
    )


def _equal_clips(num_frames: int, clips: int, shift: int, plan: MelPlan) -> list[int]:
    """Samples of clips that have so many frames together, as nearly as many each as can be."""
    least, more = divmod(num_frames, clips)
    counts = [least + (clip < more) for clip in range(clips)]
    return [int(plan.framing.least_samples(count, shift)) for count in counts]


def _batched_peers(
    clips: Tensor, shift: int, plan: MelPlan, batch: Batch, contender: Callable[..., Contender]
) -> Iterator[Contender]:
    """What takes ``[clips, samples]`` at once."""
    filterbank = BatchedFilterbank(plan, shift, batch.out_dtype)
    yield peer(
        "PyTorch",
        "all clips at once: overlapping frames, batched FFT, matmul",
        lambda name, why: contender(name, why, lambda: filterbank(clips)),
    )

    def compiled(name: str, why: str) -> Contender:
        function = torch.compile(filterbank.__call__, dynamic=False, fullgraph=True)
        return contender(name, why, lambda: function(clips))

    yield peer("PyTorch, compiled", "the same under torch.compile", compiled)

    def spectrogram(name: str, why: str) -> Contender:
        from torchaudio.transforms import MelSpectrogram

        transform = MelSpectrogram(
            SAMPLE_RATE, plan.fft_size, plan.window_length, shift, n_mels=plan.num_mels,
            center=False,
        ).to(clips.device)  # fmt: skip
        scale = INT16_SCALE if clips.dtype == torch.int16 else 1.0

        def function() -> Tensor:
            return transform(clips * scale).clamp(min=plan.floor).log().to(batch.out_dtype)

        return contender(
            name,
            why,
            function,
            "another definition: no DC removal, no pre-emphasis, other mel weights, windows in the "
            "middle of the FFT's frames, frequencies before frames",
        )

    yield peer(
        "MelSpectrogram", "torchaudio's transform, all clips at once, and its logarithm",
        spectrogram,
    )  # fmt: skip


def _single_peers(
    clips: Sequence[Tensor],
    shifts_ms: Sequence[int],
    on_gpu: bool,
    contender: Callable[..., Contender],
) -> Iterator[Contender]:
    """What takes a clip at a time; not installed means not there."""
    alone = list(zip(clips, shifts_ms, strict=True))
    if find_spec("torchaudio"):
        yield contender(
            "torchaudio",
            "compliance.kaldi.fbank, which the papers' code calls for every clip",
            lambda: torch.cat([_torchaudio(*clip) for clip in alone]),
        )
    if find_spec("kaldi_native_fbank") and not on_gpu:
        yield contender(
            "kaldi-native-fbank",
            "Kaldi's C++ code, a clip at a time, with the copies that its Python interface "
            "asks for; one thread",
            lambda: torch.cat([_kaldi_native(*clip) for clip in alone]),
        )


def _operator_arguments(
    waveforms: Tensor,
    sample_offsets: Tensor,
    frame_shift: Tensor,
    frames: Segments,
    plan: MelPlan,
    num_rows: int,
    dtype: torch.dtype,
) -> tuple:
    names = ("fft_size", "padding", "dither", "remove_dc", "preemphasis", "magnitude", "floor")
    return (
        *(waveforms, sample_offsets, frame_shift, frames.offsets),
        *(getattr(plan, name) for name in MelPlan.TABLES),
        *(None, num_rows),
        *(getattr(plan, name) for name in (*names, "offset", "log_scale", "mean", "std")),
        dtype == torch.bfloat16,
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
