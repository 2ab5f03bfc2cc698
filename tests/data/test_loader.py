import gc
import multiprocessing
import subprocess
import sys
import threading
import weakref
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from fastast import TokenBudget
from fastast.data import (
    AudioError,
    Crop,
    Mixup,
    PackedLoader,
    Packing,
    Planner,
    Sampler,
    mixed_frame_shifts,
)
from fastast.ops import Framing, Padding
from fastast.tokens import PatchGeometry, kept_patches
from tests.data.helpers import RATE, tensors

WINDOW = 200
GEOMETRY = PatchGeometry(num_mels=64, patch_size=(16, 8))
MIXED = mixed_frame_shifts(10.0)


DELIVERY = ("rank", "fixed_shapes", "workers", "prefetch", "pin_memory", "bad_files")


def make(dataset, **kwargs):
    delivery = {name: kwargs.pop(name) for name in DELIVERY if name in kwargs}
    kwargs = {"budget": TokenBudget(200, 8, 64), "framing": Framing(WINDOW)} | kwargs
    geometry = kwargs.pop("geometry", GEOMETRY)
    return PackedLoader(Planner(dataset, geometry, **kwargs), **delivery)


IN_ORDER = {"sampler": Sampler(shuffle=False), "packing": Packing("next_fit")}


def by_clip(batches):
    """What each visit came with: hop, target, samples, places of patches, and what is mixed in."""
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
                batch.targets[i].tolist(),
                batch.waveforms[samples[i] : samples[i + 1]].tolist(),
                batch.grid.freq[tokens].tolist(),
                batch.grid.time[tokens].tolist(),
                (batch.grid.first_frame[tokens] - batch.frames.host_offsets[i]).tolist(),
                partner_of(batch, i),
            )
    return found


def partner_of(batch, i):
    if batch.mix_weight is None:
        return None
    begin, end = batch.partner_offsets[i : i + 2].tolist()
    return float(batch.mix_weight[i]), batch.partner_waveforms[begin:end].tolist()


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


EVERYTHING = {
    "frame_shift_ms": MIXED,
    "token_drop": 0.3,
    "crop": Crop((0.2, 0.8), "cyclic"),
    "mixup": Mixup(0.5),
    "seed": 5,
}


def test_draws_do_not_depend_on_batches_workers_or_ranks(tones):
    expected = by_clip(make(tones, **EVERYTHING).epoch(2))
    assert len(expected) == 40
    variants = {
        "order": IN_ORDER,
        "shapes": {"fixed_shapes": True},
        "budget": {"budget": TokenBudget(70, 3, 64)},
        "packing": {"packing": Packing("next_fit")},
        "one process": {"workers": 1},
        "two processes": {"workers": 2},
    }
    for name, variant in variants.items():
        assert by_clip(make(tones, **EVERYTHING | variant).epoch(2)) == expected, name
    for packing in (Packing(ranks=3), Packing(ranks=2, accumulate=2)):
        found = {}
        for rank in range(packing.ranks):
            mine = by_clip(make(tones, **EVERYTHING, packing=packing, rank=rank).epoch(2))
            assert not found.keys() & mine.keys()
            found |= mine
        assert found == expected


def test_draws_do_not_depend_on_other_clips(tones):
    settings = {name: value for name, value in EVERYTHING.items() if name != "mixup"}
    expected = by_clip(make(tones, **settings).epoch(2))
    part = by_clip(make(tones.subset([30, 4, 11]), **settings).epoch(2))
    assert part == {clip: expected[clip] for clip in (30, 4, 11)}


def test_an_epoch_can_be_taken_up_at_any_step(tones):
    loader = make(tones, **EVERYTHING, packing=Packing(accumulate=2))
    whole = [tensors(batch) for batch in loader.epoch(1)]
    assert len(whole) == loader.num_batches(1) == 2 * loader.num_steps(1)
    for first in range(loader.num_steps(1) + 1):
        rest = [tensors(batch) for batch in loader.epoch(1, first)]
        assert len(rest) == len(whole) - 2 * first
        for a, b in zip(rest, whole[2 * first :], strict=True):
            assert all(torch.equal(a[name], b[name]) for name in a)


def test_ranks_take_equal_steps(tones):
    packing = Packing(ranks=3, accumulate=2)
    loaders = [make(tones, packing=packing, rank=rank) for rank in range(3)]
    for epoch in range(3):
        ranks = [list(loader.epoch(epoch)) for loader in loaders]
        assert {len(batches) for batches in ranks} == {2 * loaders[0].num_steps(epoch)}
        assert sum(batch.num_clips for batches in ranks for batch in batches) == 40
        plan = loaders[0].planner.plan(epoch)
        for step, tokens in enumerate(plan.step_tokens):
            batches = [batch for rank in ranks for batch in rank[2 * step : 2 * step + 2]]
            real = [batch for batch in batches if batch.num_clips]
            assert sum(batch.num_tokens for batch in real) == tokens
        assert all(
            float(batch.loss_denominator) == max(batch.num_clips, 1)
            for batches in ranks
            for batch in batches
        )


def test_fewer_clips_than_ranks(tones):
    """A rank without clips still takes its step, with one that counts for nothing."""
    packing = Packing(ranks=4)
    batches = [
        batch
        for rank in range(4)
        for batch in make(tones.subset([0, 1, 2]), packing=packing, rank=rank).epoch(0)
    ]
    assert sorted(batch.num_clips for batch in batches) == [0, 1, 1, 1]
    empty = next(batch for batch in batches if not batch.num_clips)
    assert empty.clip_ids.tolist() == [-1] and empty.targets.tolist() == [-100]
    assert empty.num_tokens > 0 and not empty.waveforms.any()


def test_processes_give_up_what_they_have_when_an_epoch_ends_early(tones):
    loader = make(tones, workers=2, budget=TokenBudget(64, 2, 64))
    expected = [tensors(batch) for batch in make(tones, budget=TokenBudget(64, 2, 64)).epoch(1)]
    next(iter(loader.epoch(0)))
    found = [tensors(batch) for batch in loader.epoch(1)]
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert all(torch.equal(a[name], b[name]) for name in a)


def test_processes_leave_the_random_state_alone(tones):
    torch.manual_seed(3)
    before = torch.get_rng_state()
    list(make(tones, workers=1).epoch(0))
    assert torch.equal(torch.get_rng_state(), before)


def test_processes_end_with_the_loader_or_before(tones):
    loader = make(tones, workers=2)
    first = [tensors(batch) for batch in loader.epoch(0)]
    old = multiprocessing.active_children()
    assert len(old) == 2
    loader.close()
    assert not multiprocessing.active_children()
    again = [tensors(batch) for batch in loader.epoch(0)]
    for a, b in zip(again, first, strict=True):
        assert all(torch.equal(a[name], b[name]) for name in a)
    new = multiprocessing.active_children()
    assert len(new) == 2 and {p.pid for p in new}.isdisjoint(p.pid for p in old)
    del loader
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_frees_the_loader_without_the_garbage_collector(tones, workers):
    """It calls finalizers in any order, and DataLoader's processes do not end in every one."""
    tones.paths[7].write_bytes(b"")
    tones.forget()
    gc.disable()
    try:
        with pytest.raises(AudioError) as error:
            list(make(tones, workers=workers).epoch(0))
        freed = weakref.ref(error.value)
        del error
        assert freed() is None
    finally:
        gc.enable()
    assert not multiprocessing.active_children() and not loader_threads()


def test_processes_end_when_their_parent_asks_and_not_before(tones):
    loader = make(tones, workers=1)
    list(loader.epoch(0))
    (process,) = multiprocessing.active_children()
    for name in ("TERM", "INT"):
        subprocess.run(["kill", f"-{name}", str(process.pid)], check=True)
    assert len(list(loader.epoch(1))) == loader.num_batches(1)
    process.terminate()
    process.join(30)
    assert process.exitcode == 0


LEAVING = """
import gc, sys
from fastast import TokenBudget
from fastast.data import AudioDataset, PackedLoader, Planner
from fastast.ops import Framing
from fastast.tokens import PatchGeometry

data, geometry = AudioDataset.from_folder(sys.argv[1], 8000), PatchGeometry(64, (16, 8))
planner = Planner(data, geometry, budget=TokenBudget(200, 8, 64), framing=Framing(200))
loader = PackedLoader(planner, workers=int(sys.argv[2]))
batches = loader.epoch(0)
next(batches)
"""


GARBAGE = """
cycle = [loader, batches]
cycle.append(cycle)
del cycle, loader, batches
gc.collect()
"""


@pytest.mark.parametrize(
    ("workers", "then"),
    [
        pytest.param(0, "", id="thread"),
        pytest.param(2, "", id="within an epoch"),
        pytest.param(2, "list(batches)", id="after an epoch"),
        pytest.param(2, "raise ValueError", id="by an error"),
        pytest.param(1, GARBAGE, id="collected as garbage"),
    ],
)
def test_python_exits_whatever_became_of_a_loader(tones, workers, then):
    folder = tones.paths[0].parents[1]
    done = subprocess.run(
        [sys.executable, "-c", LEAVING + then, folder, str(workers)],
        cwd=Path(__file__).resolve().parents[2],
        capture_output=True,
        text=True,
        timeout=120,
    )
    failed = "raise" in then
    assert done.returncode == failed, done.stderr
    assert len(done.stderr.splitlines()) == 3 * failed, done.stderr


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("bad", ["noise", "cut", "empty", "gone", "nan"])
def test_bad_files_are_skipped_and_listed(tones, bad, workers):
    victim = tones.paths[7]
    content = victim.read_bytes()
    if bad == "gone":
        victim.unlink()
    elif bad == "nan":
        soundfile = pytest.importorskip("soundfile")
        soundfile.write(victim, np.full(tones.lengths[7], np.nan), RATE, subtype="FLOAT")
    else:
        victim.write_bytes({"noise": b"?" * 500, "cut": content[:60], "empty": b""}[bad])
    tones.forget()
    loader = make(tones, workers=workers, bad_files="skip")
    batches = list(loader.epoch(0))
    assert sorted(by_clip(batches)) == [clip for clip in range(40) if clip != 7]
    left_out = [entry for batch in batches for entry in batch.left_out]
    assert [entry.path for entry in left_out] == [str(victim)] and left_out[0].reason
    with pytest.raises(AudioError, match=victim.name):
        list(make(tones, workers=workers, bad_files="stop").epoch(0))


def test_a_batch_of_bad_files_counts_for_nothing(tones):
    for path in tones.paths:
        path.write_bytes(b"")
    tones.forget()
    for fixed_shapes in (False, True):
        for batch in make(tones, fixed_shapes=fixed_shapes, bad_files="skip").epoch(0):
            assert batch.num_clips == 0 and (batch.clip_ids == -1).all()
            assert len(batch.left_out) >= 1 and float(batch.loss_denominator) >= 1


@pytest.mark.parametrize("multi_label", [False, True])
def test_mixing(tones, multi_label):
    """Partner, share and targets of each clip; nothing is mixed in where the share is 1."""
    labels = tones.labels
    if multi_label:
        tones.multi_label = True  # the same clips, each with the one class it has
    loader = make(tones, mixup=Mixup(0.5), seed=3)
    batches = list(loader.epoch(0))
    mixed = 0
    for clip, (_, target, *_, (share, partner)) in by_clip(batches).items():
        own = np.eye(2)[labels[clip]]
        if share == 1:
            assert partner == [] and target == own.tolist()
            continue
        mixed += 1
        assert 0 < share < 1
        candidates = [
            other
            for other in range(40)
            if tones.waveform(other)[: tones.lengths[clip]].tolist() == partner
        ]
        assert len(candidates) == 1
        expected = share * own + (1 - share) * np.eye(2)[labels[candidates[0]]]
        np.testing.assert_allclose(target, expected, atol=1e-6)
        assert sum(target) == pytest.approx(1)
    assert 10 <= mixed <= 30
    assert all(batch.targets.dtype == torch.float32 for batch in batches)


def test_mixing_can_leave_targets_alone(tones):
    found = by_clip(make(tones, mixup=Mixup(1.0, targets=False)).epoch(0))
    for clip, (_, target, *_, (share, _partner)) in found.items():
        assert share < 1 and target == np.eye(2)[tones.labels[clip]].tolist()


def test_a_bad_partner_is_not_mixed_in(tones):
    loader = make(tones, mixup=Mixup(1.0), bad_files="skip")
    tones.paths[7].write_bytes(b"")
    tones.forget()
    plan = loader.planner.plan(0)
    wanted = {
        int(row) for row, partner in zip(plan.rows, plan.partners, strict=True) if partner == 7
    }
    assert wanted - {7}
    for clip, (_, target, *_, (share, partner)) in by_clip(loader.epoch(0)).items():
        if clip in wanted:
            assert share == 1 and partner == [] and sorted(target) == [0, 1]


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
    batches = list(make(tones, **IN_ORDER).epoch(0))
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
def test_each_clip_pools_as_many_frames_as_it_draws(tones, token_drop):
    pooled = {"geometry": replace(GEOMETRY, time_pool=3), "time_pools": [1, 3]}
    pooled |= {"token_drop": token_drop, "packing": Packing("next_fit")}
    loaders = [make(tones, **pooled, fixed_shapes=fixed) for fixed in (False, True)]
    drawn = np.zeros(4, int)
    for epoch in range(3):
        for batch, fixed in zip(*(loader.epoch(epoch) for loader in loaders), strict=True):
            rows = batch.grid.segments.host_offsets.tolist()
            for i, frames in enumerate(batch.frames.lengths.tolist()):
                tokens = slice(rows[i], rows[i + 1])
                (pool,) = set(batch.grid.time_pool[tokens].tolist())
                drawn[pool] += 1
                width = frames // pool // 8
                assert width >= 1 and set(batch.grid.clip_width[tokens].tolist()) == {width}
                assert rows[i + 1] - rows[i] == kept_patches(4 * width, token_drop)
                # Too short for a patch: extended to one of its own pooling.
                samples = int(batch.sample_offsets[i + 1] - batch.sample_offsets[i])
                least = Framing(WINDOW).least_samples(8 * pool, 80)
                assert samples == max(tones.lengths[batch.clip_ids[i]], least)
            assert torch.equal(fixed.clip_ids[: batch.num_clips], batch.clip_ids)
            assert torch.equal(fixed.grid.time_pool[: rows[-1]], batch.grid.time_pool)
    assert drawn.sum() == 120 and drawn[[1, 3]].min() > 30


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


@pytest.mark.parametrize("dense_frames", [None, 48])
@pytest.mark.parametrize("padding", Padding)
def test_batches_are_as_planned(tones, padding, dense_frames):
    """Planner, budget and batches count frames by the filterbank's own rule."""
    shifts = [10.0] if dense_frames else MIXED
    loader = make(
        tones,
        framing=Framing(WINDOW, padding),
        frame_shift_ms=shifts,
        dense_frames=dense_frames,
        fixed_shapes=True,
        budget=TokenBudget(200, 8, 72),
    )
    plan = loader.planner.plan(0)
    tokens = dict(zip(plan.keys.tolist(), plan.tokens.tolist(), strict=True))
    seen = 0
    for batch in loader.epoch(0):
        lengths = batch.grid.segments.lengths[: batch.num_clips].tolist()
        assert lengths == [tokens[clip] for clip in batch.clip_ids[: batch.num_clips].tolist()]
        seen += batch.num_clips
    assert seen == 40


def test_plan_reads_no_file(tones):
    loader = make(tones)
    for path in tones.paths:
        path.unlink()
    assert loader.num_batches(0) > 1


def test_error_in_the_background_reaches_the_caller(tones):
    tones.paths[33].write_bytes(b"no longer audio")
    seen = 0
    with pytest.raises(AudioError, match=tones.paths[33].name):
        for batch in make(tones, **IN_ORDER).epoch(0):
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
    made, maker = [], loader._make

    class Spy:
        def __getitem__(self, order):
            made.append(order)
            return maker[order]

    monkeypatch.setattr(loader, "_make", Spy())
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
        ({"token_drop": 1.0}, "token_drop"),
        ({"max_seconds": 0.0}, "max_seconds"),
        ({"dense_frames": 7}, "less than a patch"),
        ({"dense_frames": 160}, "dense_frames=160 has 80 tokens but the budget allows 64"),
        ({"prefetch": 0}, "prefetch"),
        ({"workers": -1}, "workers"),
        ({"rank": 1}, r"rank must lie in \[0, 1\)"),
        ({"bad_files": "ignore"}, "bad_files"),
        ({"frame_shift_ms": []}, "frame_shift_ms is empty"),
        ({"frame_shift_ms": 0.01}, "shorter than one sample"),
    ):
        with pytest.raises(ValueError, match=message):
            make(tones, **wrong)
