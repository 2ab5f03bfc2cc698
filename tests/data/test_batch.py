import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from fastast import TokenBudget
from fastast.data import BatchBudget, Clip, collate
from fastast.nn.mel_filterbank import MelFilterbank
from fastast.ops import Framing, Padding
from fastast.tokens import PatchGeometry, StructuredMask, UnstructuredMask, kept_lists, patchify
from tests.data.helpers import RATE, tensors

WINDOW = 200
FRAMING = Framing(WINDOW)
GEOMETRY = PatchGeometry(num_mels=64, patch_size=(16, 8), prefix=1)


def clip(samples, clip_id=0, frame_shift=80, keep=None):
    waveform = torch.arange(1, samples + 1, dtype=torch.int16)
    return Clip(waveform, clip_id % 3, clip_id, frame_shift, keep)


def pack(clips, geometry=GEOMETRY, **kwargs):
    return collate(clips, geometry, **({"framing": FRAMING, "sample_rate": RATE} | kwargs))


def test_clips_lie_end_to_end():
    batch = pack([clip(4000, 5), clip(2000, 7, frame_shift=160)])
    assert batch.waveforms.dtype == torch.int16 and len(batch.waveforms) == 6000
    assert batch.sample_offsets.tolist() == [0, 4000, 6000]
    assert batch.waveforms[4000:].tolist() == list(range(1, 2001))
    assert batch.frame_shift.tolist() == [80, 160]
    assert batch.frames.lengths.tolist() == [1 + 3800 // 80, 1 + 1800 // 160] == [48, 12]
    assert batch.frame_rows == 60
    assert batch.grid.segments.lengths.tolist() == [1 + 4 * 6, 1 + 4 * 1]
    assert batch.targets.tolist() == [2, 1] and batch.clip_ids.tolist() == [5, 7]
    assert batch.num_clips == 2 and batch.audio_seconds == 0.75
    assert batch.sample_offsets.dtype == batch.targets.dtype == batch.clip_ids.dtype == torch.int64
    assert batch.frame_shift.dtype == torch.int32


@pytest.mark.parametrize("samples", [0, 1, 199, 200, 759, 760])
def test_short_clip_is_extended_to_one_patch(samples):
    batch = pack([clip(samples)])
    assert batch.sample_offsets.tolist() == [0, 7 * 80 + 200]
    assert batch.frames.lengths.tolist() == [8]
    assert batch.grid.segments.lengths.tolist() == [5]
    assert not batch.waveforms[samples:].any()
    assert batch.audio_seconds == samples / RATE


def test_one_sample_more_than_needed_is_left_alone():
    assert pack([clip(761)]).sample_offsets.tolist() == [0, 761]


def test_kept_patches():
    batch = pack([clip(4000, keep=np.array([0, 7, 23])), clip(1000)])
    assert batch.grid.segments.lengths.tolist() == [4, 5]
    assert batch.grid.freq[1:4].tolist() == [0, 1, 3] and batch.grid.time[1:4].tolist() == [0, 1, 5]


def test_fixed_shapes():
    budget = BatchBudget.for_tokens(
        TokenBudget(tokens=128, clips=6, max_length=64),
        GEOMETRY,
        framing=FRAMING,
        max_frame_shift=160,
    )
    shapes = set()
    for clips in ([clip(4000)], [clip(300, i, 160) for i in range(6)], [clip(8000), clip(900)]):
        batch = pack(clips, budget=budget)
        shapes.add(str({name: tensor.shape for name, tensor in tensors(batch).items()}))
        empty = slice(len(clips), None)
        assert len(batch.targets) == 6 and batch.num_clips == len(clips)
        assert (batch.targets[empty] == -100).all() and (batch.clip_ids[empty] == -1).all()
        assert (batch.frame_shift[empty] == 1).all()
        assert (batch.sample_offsets[len(clips) :] == batch.sample_offsets[-1]).all()
        assert (batch.frames.max_length, batch.grid.segments.max_length) == (
            budget.frames.max_length,
            64,
        )
        exact = pack(clips)
        for name in ("first_frame", "freq", "time", "clip_width", "prefix_id"):
            ours, theirs = getattr(batch.grid, name), getattr(exact.grid, name)
            assert torch.equal(ours[: len(theirs)], theirs)
    assert len(shapes) == 1


def test_filterbank_and_patches_follow_the_tables():
    """A batch of fixed shape yields each clip's own patches, and zeros where no clip is."""
    filterbank = MelFilterbank(RATE, 64)
    assert filterbank.plan.window_length == WINDOW
    clips = [clip(4000, 5), clip(300, 2), clip(6000, 7, frame_shift=160)]
    budget = BatchBudget.for_tokens(
        TokenBudget(80, 5, 64), GEOMETRY, framing=FRAMING, max_frame_shift=160
    )
    batch = pack(clips, budget=budget)
    packed = filterbank(
        batch.waveforms, batch.sample_offsets, batch.frame_shift, batch.frames, batch.frame_rows
    )
    tokens = patchify(packed.frames, batch.grid, GEOMETRY)
    assert packed.frames.shape == (budget.frames.tokens, 64) and tokens.shape[0] == 80
    rows = batch.grid.segments.host_offsets.tolist()
    for i, one in enumerate(clips):
        alone = F.pad(one.waveform, (0, max(0, 760 - len(one.waveform))))
        frames = filterbank([alone], frame_shift=[one.frame_shift]).frames
        patches = F.unfold(frames.T[None, None], (16, 8), stride=(16, 8))[0].T
        torch.testing.assert_close(tokens[rows[i] + 1 : rows[i + 1]], patches)
    assert not tokens[rows[3] :].any()


FILTERBANKS = {
    "kaldi": MelFilterbank(RATE, 64),
    "mirrored": MelFilterbank(RATE, 64, snip_edges=False),
    "htsat": MelFilterbank(RATE, preset="htsat", window_length=256, high_freq=0.0),
    "epic_sounds": MelFilterbank(RATE, 64, preset="epic_sounds", fft_size=256),
}


@pytest.mark.parametrize("dense_frames", [None, 20])
@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize("name", FILTERBANKS)
def test_batches_have_the_frames_that_the_filterbank_makes(name, fixed, dense_frames):
    """Of any padding, at every length about which a formula may err, for every frame shift."""
    filterbank = FILTERBANKS[name]
    framing = filterbank.plan.framing
    window = framing.window_length
    for shift in (7, 80, 96, 320):
        lengths = [0, 1, 2, window // 2, window - 1, window, window + 1, 8 * shift - 1, 8 * shift]
        lengths += [8 * shift + 1, 8 * shift + window - 1, 8 * shift + window]
        if dense_frames:  # the planner cuts longer ones
            most = int(framing.least_samples(dense_frames, shift))
            lengths = [min(length, most) for length in [*lengths, most - 1, most]]
        clips = [clip(length, number, shift) for number, length in enumerate(lengths)]
        budget = None
        if fixed and dense_frames:
            tokens = TokenBudget(len(clips) * 9, len(clips), 9)
            budget = BatchBudget.for_dense(
                tokens, dense_frames, framing=framing, max_frame_shift=shift
            )
        elif fixed:
            budget = BatchBudget.for_tokens(
                TokenBudget(2000, len(clips), 400),
                GEOMETRY,
                framing=framing,
                max_frame_shift=shift,
            )
        batch = pack(clips, framing=framing, budget=budget, dense_frames=dense_frames)
        offsets = batch.sample_offsets.tolist()
        waveforms = [batch.waveforms[a:b] for a, b in zip(offsets[:-1], offsets[1:], strict=True)]
        made = filterbank(waveforms, frame_shift=shift).segments.lengths
        assert torch.equal(batch.frames.lengths, made)
        assert made.min() == (1 if dense_frames else 8)
        for waveform, length in zip(waveforms, lengths, strict=True):
            assert len(waveform) >= length
            if len(waveform) > length:  # what was extended has not a frame too many
                assert framing.num_frames(len(waveform) - 1, shift) < made.min()
        packed = filterbank(
            batch.waveforms, batch.sample_offsets, batch.frame_shift, batch.frames, batch.frame_rows
        )
        assert packed.frames.isfinite().all()


@pytest.mark.parametrize("fixed", [False, True])
def test_dense_frames(fixed):
    """The grid lists the patches of [S, T, num_mels]; the frame stream is not padded."""
    budget = None
    if fixed:
        budget = BatchBudget.for_dense(
            TokenBudget(4 * 13, 4, 13), 30, framing=FRAMING, max_frame_shift=80
        )
    keep = np.array([0, 1, 5])
    clips = [clip(2520), clip(1000, keep=keep), clip(10)]
    batch = pack(clips, dense_frames=30, budget=budget)
    assert batch.dense_frames == 30
    assert batch.frames.lengths[:3].tolist() == [30, 11, 1]
    assert batch.frame_rows == (120 if fixed else 42)
    assert len(batch.waveforms) == (4 * 2520 if fixed else 2520 + 1000 + 200)
    assert batch.grid.segments.lengths[:3].tolist() == [13, 4, 13]
    whole = GEOMETRY.grid([30, 30, 30], keep=[np.arange(12), keep, np.arange(12)])
    assert torch.equal(batch.grid.first_frame[:30], whole.first_frame)
    assert torch.equal(batch.grid.freq[:30], whole.freq)


@settings(deadline=None)  # a shared machine may pause at any time
@given(
    lengths=st.lists(st.integers(0, 20000), min_size=1, max_size=12),
    shifts=st.lists(st.sampled_from([40, 80, 96, 200, 320]), min_size=12, max_size=12),
    drop=st.sampled_from([None, *map(UnstructuredMask, (0.1, 0.5, 0.9)), StructuredMask(0.3, 0.3)]),
    step=st.sampled_from([5, 8, 11]),
    prefix=st.integers(0, 2),
    padding=st.sampled_from(Padding),
    pool=st.sampled_from([1, 1, 3]),
)
def test_budget_holds_whatever_fits_its_tokens(lengths, shifts, drop, step, prefix, padding, pool):
    geometry = PatchGeometry(64, (16, 8), (10, step), prefix, time_pool=pool)
    framing = Framing(WINDOW, padding)
    clips = []
    for index, (samples, shift) in enumerate(zip(lengths, shifts, strict=False)):
        least = int(framing.least_samples(geometry.min_frames(), shift))
        frames = int(framing.num_frames(max(samples, least), shift))
        times, keep = geometry.time_patches(frames), None
        if drop is not None:
            (keep,) = kept_lists(drop, geometry, [times], [index], seed=0, epoch=0)
        clips.append(clip(samples, index, shift, keep))
    exact = pack(clips, geometry, framing=framing)
    tokens = exact.grid.segments.lengths
    budget = BatchBudget.for_tokens(
        TokenBudget(int(tokens.sum()), len(clips), int(tokens.max())),
        geometry,
        framing=framing,
        max_frame_shift=max(shifts[: len(clips)]),
        drop=drop,
    )
    batch = pack(clips, geometry, framing=framing, budget=budget)  # raises if a stream does not fit
    assert torch.equal(batch.grid.first_frame, exact.grid.first_frame)
    if drop is None:  # nothing but the frames after each clip's last patch is spare
        spare = budget.frames.tokens - int(exact.frames.lengths.sum())
        assert spare <= len(clips) * (8 * pool - 1 + step * pool)


def test_errors():
    with pytest.raises(ValueError, match="clips is empty"):
        pack([])
    budget = BatchBudget.for_tokens(
        TokenBudget(40, 2, 40), GEOMETRY, framing=FRAMING, max_frame_shift=80
    )
    with pytest.raises(ValueError, match="samples but the budget allows"):
        pack([clip(20000), clip(20000)], budget=budget)
    with pytest.raises(ValueError, match="budget"):
        pack([clip(300), clip(300), clip(300)], budget=budget)


def test_to_moves_every_tensor():
    batch = pack([clip(4000), clip(1000)])
    host = {name for name in tensors(batch) if name.endswith("host_offsets")}
    for name, tensor in tensors(batch.to("meta")).items():
        assert tensor.is_meta != (name in host), name


@pytest.mark.gpu
def test_pinned_batch_moves_to_the_gpu():
    batch = pack([clip(4000), clip(1000)])
    moved = tensors(batch.pin_memory().to("cuda", non_blocking=True))
    torch.cuda.synchronize()
    for name, tensor in tensors(batch).items():
        assert torch.equal(moved[name].cpu(), tensor)
