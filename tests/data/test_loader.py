import threading

import numpy as np
import pytest
import torch

from fastast import TokenBudget
from fastast.data import AudioError, PackedLoader, mixed_frame_shifts
from fastast.tokens import PatchGeometry
from tests.data.helpers import RATE, tensors

WINDOW = 200
GEOMETRY = PatchGeometry(num_mels=64, patch_size=(16, 8))
MIXED = mixed_frame_shifts(10.0)


def make(dataset, **kwargs):
    kwargs = {"budget": TokenBudget(200, 8, 64), "window": WINDOW} | kwargs
    return PackedLoader(dataset, GEOMETRY, **kwargs)


def by_clip(batches):
    """What each clip came with: hop, target, samples and the places of its patches."""
    found = {}
    for batch in batches:
        samples = batch.sample_offsets.tolist()
        rows = batch.grid.segments.host_offsets.tolist()
        for i in range(batch.num_clips):
            tokens = slice(rows[i], rows[i + 1])
            clip = int(batch.clip_ids[i])
            assert clip not in found
            found[clip] = (
                int(batch.frame_shift[i]),
                int(batch.targets[i]),
                batch.waveforms[samples[i] : samples[i + 1]].tolist(),
                batch.grid.freq[tokens].tolist(),
                batch.grid.time[tokens].tolist(),
                (batch.grid.first_frame[tokens] - batch.frames.host_offsets[i]).tolist(),
            )
    return found


def loader_threads():
    return [thread for thread in threading.enumerate() if "fastast-loader" in thread.name]


@pytest.mark.parametrize("fixed_shapes", [False, True])
def test_every_clip_once_within_the_budget(tones, fixed_shapes):
    loader = make(tones, frame_shift_ms=MIXED, token_drop=0.1, fixed_shapes=fixed_shapes)
    for epoch in range(3):
        batches = list(loader.epoch(epoch))
        assert all(batch.epoch == epoch for batch in batches)
        assert len(batches) == loader.num_batches(epoch)
        found = by_clip(batches)
        assert sorted(found) == list(range(40))
        for batch in batches:
            lengths = batch.grid.segments.lengths
            assert lengths.sum() <= 200 and 1 <= batch.num_clips <= 8
            assert lengths.tolist() == sorted(lengths.tolist(), reverse=True)
        for clip, (_, target, samples, *_) in found.items():
            assert target == tones.labels[clip]
            assert samples[: tones.lengths[clip]] == tones.waveform(clip).tolist()
        seconds = sum(batch.audio_seconds for batch in batches)
        assert seconds == pytest.approx(tones.lengths.sum() / RATE)


def test_draws_do_not_depend_on_budget_order_or_subset(tones):
    same = {"frame_shift_ms": MIXED, "token_drop": 0.3, "seed": 5}
    expected = by_clip(make(tones, **same).epoch(2))
    variants = (
        make(tones, **same, shuffle=False),
        make(tones, **same, fixed_shapes=True),
        make(tones, **same, budget=TokenBudget(70, 3, 64)),
    )
    for loader in variants:
        assert by_clip(loader.epoch(2)) == expected
    part = by_clip(make(tones.subset([30, 4, 11]), **same).epoch(2))
    assert part == {clip: expected[clip] for clip in (30, 4, 11)}


def test_epochs_and_seeds_differ_and_repeat(tones):
    def run(epoch, seed=0):
        loader = make(tones, frame_shift_ms=MIXED, token_drop=0.3, seed=seed)
        return [tensors(batch) for batch in loader.epoch(epoch)]

    first, again = run(0), run(0)
    assert all(
        torch.equal(a[name], b[name]) for a, b in zip(first, again, strict=True) for name in a
    )
    ids = [
        torch.cat([batch["clip_ids"] for batch in run(*key)]).tolist()
        for key in ((0, 0), (1, 0), (0, 1))
    ]
    shifts = [
        torch.cat([batch["frame_shift"] for batch in run(*key)]).tolist()
        for key in ((0, 0), (1, 0), (0, 1))
    ]
    assert ids[0] != ids[1] and ids[0] != ids[2] and ids[1] != ids[2]
    assert shifts[0] != shifts[1] and shifts[0] != shifts[2]


def test_without_shuffling_batches_follow_the_data_set(tones):
    batches = list(make(tones, shuffle=False).epoch(0))
    seen = [sorted(batch.clip_ids.tolist()) for batch in batches]
    assert sum(seen, []) == list(range(40))


def test_all_frame_shifts_occur(tones):
    loader = make(tones, frame_shift_ms=MIXED)
    shifts = [torch.cat([batch.frame_shift for batch in loader.epoch(e)]) for e in range(20)]
    counts = np.bincount(torch.cat(shifts).numpy())
    hops = [80 + 16 * step for step in range(16)]
    assert counts.sum() == counts[hops].sum() == 800
    assert counts[hops].min() > 20 and counts[hops].max() < 90


@pytest.mark.parametrize("token_drop", [0.0, 0.1])
def test_fixed_shapes_are_constant(tones, token_drop):
    loader = make(tones, frame_shift_ms=MIXED, token_drop=token_drop, fixed_shapes=True)
    shapes = {
        str([(name, tensor.shape, tensor.dtype) for name, tensor in tensors(batch).items()])
        for epoch in range(3)
        for batch in loader.epoch(epoch)
    }
    assert len(shapes) == 1


def test_max_seconds_keeps_the_beginning(tones):
    found = by_clip(make(tones, max_seconds=0.3).epoch(0))
    for clip, (_, _, samples, *_) in found.items():
        kept = min(tones.lengths[clip], 2400)
        assert len(samples) == max(kept, 760)
        assert samples[:kept] == tones.waveform(clip)[:kept].tolist()


@pytest.mark.parametrize("token_drop", [0.0, 0.5])
@pytest.mark.parametrize("fixed_shapes", [False, True])
def test_dense_frames(tones, fixed_shapes, token_drop):
    """Clips take the same number of tokens whatever their length, and fill the budget."""
    loader = make(tones, dense_frames=48, token_drop=token_drop, fixed_shapes=fixed_shapes)
    per_clip = 12 if token_drop else 24
    clips = min(8, 200 // per_clip)
    batches = list(loader.epoch(0))
    assert [batch.num_clips for batch in batches] == [8] * 5
    shapes = {str([tensor.shape for tensor in tensors(batch).values()]) for batch in batches}
    assert len(shapes) == 1 or not fixed_shapes
    for batch in batches:
        assert batch.dense_frames == 48
        assert batch.grid.segments.lengths.tolist() == [per_clip] * clips
        assert batch.grid.num_rows == per_clip * clips
        real = 1 + (torch.from_numpy(tones.lengths)[batch.clip_ids] - WINDOW) // 80
        assert torch.equal(batch.frames.lengths.long(), real.clamp(1, 48))
        assert batch.grid.first_frame.max() < 48 * clips


def test_plan_reads_no_file(tones):
    loader = make(tones)
    for path in tones.paths:
        path.unlink()
    assert loader.num_batches(0) > 1


def test_error_in_the_background_reaches_the_caller(tones):
    tones.paths[33].write_bytes(b"no longer audio")
    seen = 0
    with pytest.raises(AudioError, match=tones.paths[33].name):
        for batch in make(tones, shuffle=False).epoch(0):
            seen += batch.num_clips
    assert 0 < seen <= 33
    assert not loader_threads()


def test_stopping_early_ends_the_thread(tones):
    loader = make(tones)
    for _ in loader.epoch(0):
        assert loader_threads()
        break
    assert not loader_threads()
    batches = loader.epoch(1)
    next(batches)
    batches.close()
    assert not loader_threads()


def test_prefetch_is_bounded(tones, monkeypatch):
    loader = make(tones, prefetch=2, budget=TokenBudget(64, 1, 64))
    made = []
    load = loader._load
    monkeypatch.setattr(loader, "_load", lambda *args: (made.append(1), load(*args))[1])
    batches = loader.epoch(0)
    for taken in range(1, 6):
        next(batches)
        assert taken <= len(made) <= taken + 2
    batches.close()


def test_arguments_are_checked(tones):
    longest = tones.paths[int(tones.lengths.argmax())].name
    with pytest.raises(ValueError, match=f"{longest} has .* tokens but the budget allows 8"):
        make(tones, budget=TokenBudget(200, 8, 8))
    for wrong, message in (
        ({"window": 0}, "window"),
        ({"token_drop": 1.0}, "token_drop"),
        ({"max_seconds": 0.0}, "max_seconds"),
        ({"dense_frames": 7}, "less than a patch"),
        ({"dense_frames": 160}, "dense_frames=160 has 80 tokens but the budget allows 64"),
        ({"prefetch": 0}, "prefetch"),
        ({"frame_shift_ms": []}, "frame_shift_ms is empty"),
        ({"frame_shift_ms": 0.01}, "shorter than one sample"),
    ):
        with pytest.raises(ValueError, match=message):
            make(tones, **wrong)
