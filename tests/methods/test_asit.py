"""ASiT's pre-training: two views of each clip, a teacher without gradients, centres that move."""

import copy
import math
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.flop_counter import FlopCounterMode

import fastast.nn.packed_attention
from fastast import ASiTPretraining, MelFilterbank, Spectrograms, TokenBudget
from fastast.data import collate
from fastast.data.batch import BatchBudget, Clip
from fastast.frontend import MelFrontend
from fastast.methods import MaskedDistillation
from fastast.tokens import GMML, patchify
from tests.testing import poisoned_memory

RATE, MELS, PATCH = 8000, 16, (4, 8)
CODE = {
    "local_tokens": "all",
    "reconstruction_weight": 2.0,
    "teacher_temp_epochs": 3,
    "corruption": GMML(ratio=(0.5, 0.7)),
}
OPTIONS = [{}, {"as_code": True} | CODE]
NAMED = pytest.mark.parametrize("options", OPTIONS, ids=["paper", "code"])

# Views of both clips differ in length, those of the first in frame shift, too.
SECONDS, SHIFTS = [0.5, 0.3, 0.2, 0.4, 0.09, 0.5], [80, 128, 80, 80, 80, 80]


def build(as_code=False, corruption=None, gain_db=0.0, **options):
    torch.manual_seed(0)
    size = {"num_mels": MELS, "patch_size": PATCH, "dim": 24, "depth": 2, "num_heads": 3}
    classes = {"hidden": 20, "bottleneck": 12, "local_classes": 10, "global_classes": 14}
    model = ASiTPretraining(input_frames=40, **size, **classes, as_code=as_code)
    frontend = MelFrontend(MelFilterbank(RATE, num_mels=MELS, mean=-6.0, std=3.0), gain_db=gain_db)
    corruption = corruption or GMML()
    return MaskedDistillation(model, frontend, corruption, seed=3, **options)


def batch_of(method, views=range(6), *, epoch=0, budget=None, offset=0):
    """Views of noise of any lengths, by their numbers; 2 i and 2 i + 1 are of one clip."""
    clips = []
    for view in views:
        rng = np.random.default_rng(offset + view)
        samples = int(SECONDS[view] * RATE)
        waveform = torch.from_numpy((3000 * rng.standard_normal(samples)).astype(np.int16))
        clips.append(Clip(waveform, -100, 7 * view + offset, SHIFTS[view]))
    framing = method.frontend.filterbank.plan.framing
    geometry = method.model.geometry
    if budget is not None:
        sizes = {"framing": framing, "max_frame_shift": max(SHIFTS)}
        budget = BatchBudget.for_tokens(budget, geometry, **sizes)
    return collate(clips, geometry, framing=framing, sample_rate=RATE, epoch=epoch, budget=budget)


BUDGET = TokenBudget(tokens=160, clips=8, max_length=40)


def gradients(method):
    found = {name: p.grad.clone() for name, p in method.named_parameters() if p.grad is not None}
    method.zero_grad()
    return found


@NAMED
def test_equals_the_formulas_view_by_view(options):
    method = build(**options)
    for center in (method.local_center, method.global_center):
        center.normal_(std=0.1)
    with torch.no_grad():
        for parameter in method.model.parameters():  # away from the teacher
            parameter.add_(0.02 * torch.randn_like(parameter))
    batch = batch_of(method, epoch=1)
    found = method(batch)
    clean = method.frontend(batch)
    corrupted = method.corrupt(clean, batch)
    student_temp, temp = 0.1, 0.055 if method.teacher_temp_epochs == 3 else 0.07

    def alone(model, frames):
        features, grid = model.forward_features(frames[None])
        return features, model.assign(features, grid), grid

    views, parts = clean.segments.num_segments, []
    seen = corrupted.spectrograms.unpack()
    masks = Spectrograms(corrupted.mask, clean.segments).unpack()
    teachers = [alone(method.teacher, frames)[1] for frames in clean.unpack()]

    def cross(student, teacher, center):
        target = ((teacher - center) / temp).softmax(1)
        return -(target * (student / student_temp).log_softmax(1)).sum(1)

    for view in range(views):
        features, student, grid = alone(method.model, seen[view])
        pixels = patchify(masks[view].float(), grid, method.model.geometry).bool()[1:]
        target = patchify(clean.unpack()[view], grid, method.model.geometry)[1:]
        errors = (method.model.decoder(features)[1:] - target).abs()
        assert pixels.any() and not pixels.all()
        local = cross(student.local_logits, teachers[view].local_logits, method.local_center)[1:]
        counted = torch.ones(len(local), dtype=torch.bool)
        if method.local_tokens == "corrupted":
            counted = pixels.any(1)
        other = teachers[view ^ 1].global_logits
        global_ = cross(student.global_logits, other, method.global_center)
        parts.append(torch.stack([errors[pixels].mean(), local[counted].mean(), global_[0]]))
    means = torch.stack(parts).mean(0)
    weights = torch.tensor([method.reconstruction_weight, 1.0, 1.0])
    torch.testing.assert_close(found["loss"], (weights * means).sum(), rtol=1e-5, atol=1e-5)
    for name, value in zip(("reconstruction", "local", "global"), means, strict=True):
        torch.testing.assert_close(found[name], value.detach(), rtol=1e-5, atol=1e-5)

    sums = [sum(t.local_logits[1:].sum(0) for t in teachers)]
    sums += [sum(t.global_logits[0] for t in teachers)]
    patches = int((batch.grid.prefix_id < 0).sum())
    expected = torch.cat([*sums, torch.tensor([patches, views])])
    torch.testing.assert_close(found["centering"], expected, rtol=1e-5, atol=1e-5)


@NAMED
def test_a_clip_does_not_depend_on_its_neighbours(options):
    """Gradients of a batch with dead rows are those of one clip at a time, but for alien blocks."""
    method = build(**options | {"corruption": GMML(alien_share=0.0)})
    batch = batch_of(method, budget=BUDGET)
    assert batch.grid.num_rows > batch.num_tokens and len(batch.clip_ids) == 8
    loss = method(batch)["loss"]
    loss.backward()
    together, total = gradients(method), 0
    for views in ([0, 1], [2, 3], [4, 5]):
        part = method(batch_of(method, views).with_denominator(6))["loss"]
        part.backward()
        total += part.detach()
    torch.testing.assert_close(loss.detach(), total, rtol=1e-5, atol=0)
    for name, value in gradients(method).items():
        torch.testing.assert_close(together[name], value, rtol=1e-3, atol=2e-5, msg=name)


def test_alien_blocks_are_of_another_clip_and_of_its_view_of_the_same_number():
    method = build(corruption=GMML(alien_share=1.0))
    batch = batch_of(method, budget=BUDGET)
    clean = method.frontend(batch)
    seen = []
    whole = method.corruption

    def spy(spectrograms, clip_ids, *, partner, **keys):
        seen.append(partner)
        return GMML.__call__(whole, spectrograms, clip_ids, partner=partner, **keys)

    method.corruption = spy
    for epoch in range(30):
        method.corrupt(clean, replace(batch, epoch=torch.tensor(epoch)))
    partners = torch.stack(seen)[:, :6]
    view = torch.arange(6)
    assert (partners % 2 == view % 2).all() and (partners // 2 != view // 2).all()
    assert all(len(column.unique()) == 2 for column in partners.T)


@NAMED
def test_dead_rows_and_fresh_memory_are_never_read(options):
    method = build(**options)
    batch = batch_of(method, budget=BUDGET)
    method(batch)["loss"].backward()
    expected = gradients(method)
    with poisoned_memory():
        out = method(batch)
        out["loss"].backward()
    assert out["centering"].isfinite().all()
    for name, value in gradients(method).items():
        assert torch.equal(value, expected[name]), name
        assert value.abs().sum() > 0, name


def test_gradients_reach_the_student_alone_and_the_teacher_keeps_nothing():
    method = build()
    batch = batch_of(method)

    def saved(function):
        kept = {}
        pack = lambda x: kept.__setitem__(x.untyped_storage().data_ptr(), x)  # noqa: E731
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda _: None):
            function()
        return kept

    clean = method.frontend(batch)
    assert not saved(lambda: [method.teacher(clean, batch.grid)])
    before = copy.deepcopy(method.state_dict())
    method(batch)["loss"].backward()
    assert all(p.grad is None and not p.requires_grad for p in method.teacher.parameters())
    assert all(p.grad is not None for p in method.model.parameters())
    after = method.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert not method.train().teacher.training and method.model.training


def test_after_step():
    method = build(momentum=0.9, center_momentum=0.8)
    student = {name: p.clone() for name, p in method.model.named_parameters()}
    with torch.no_grad():
        for parameter in method.teacher.parameters():
            parameter.normal_()
        for center in (method.local_center, method.global_center):
            center.normal_()
    before = copy.deepcopy(method.state_dict())
    first, second = (
        method(batch_of(method, views))["centering"] for views in ((0, 1), (2, 3, 4, 5))
    )
    method.after_step(first + second, done=0.5)
    for name, value in method.teacher.named_parameters():
        expected = 0.95 * before[f"teacher.{name}"] + 0.05 * student[name]  # halfway to 1
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6)
    total = method(batch_of(method))["centering"]  # of the new teacher: only the counts are used
    for name, sums, count in (("local", slice(0, 10), -2), ("global", slice(10, 24), -1)):
        mean = (first + second)[sums] / total[count]
        expected = 0.8 * before[f"{name}_center"] + 0.2 * mean
        torch.testing.assert_close(getattr(method, f"{name}_center"), expected)
    kept = copy.deepcopy(method.state_dict())
    method.after_step(torch.zeros(26), done=1.0)  # nothing could be read, and the run is over
    assert all(torch.equal(method.state_dict()[name], value) for name, value in kept.items())


def test_state_round_trip():
    """A method that is taken up from its state goes on to the bit."""
    batches = [partial(batch_of, epoch=epoch, offset=100 * epoch) for epoch in range(4)]

    def steps(method, optimizer, batches, first=0):
        losses = []
        for index, make in enumerate(batches, first):
            out = method(make(method))
            out["loss"].backward()
            optimizer.step()
            optimizer.zero_grad()
            method.after_step(out["centering"], done=index / 4)
            losses.append(out["loss"].item())
        return losses

    def new():
        method = build(gain_db=3.0)
        return method, torch.optim.AdamW(method.model.parameters(), lr=1e-3)

    whole, optimizer = new()
    expected = steps(whole, optimizer, batches)
    cut, optimizer = new()
    steps(cut, optimizer, batches[:2])
    method, state = copy.deepcopy(cut.state_dict()), copy.deepcopy(optimizer.state_dict())
    again, optimizer = new()
    with torch.no_grad():
        for parameter in again.parameters():
            parameter.normal_()
    again.load_state_dict(method)
    optimizer.load_state_dict(state)
    assert steps(again, optimizer, batches[2:], 2) == expected[2:]
    for name, value in whole.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    assert again.global_center.abs().sum() > 0
    again.restart_teacher()
    assert not again.global_center.any()
    teacher = again.teacher.state_dict()
    assert all(torch.equal(teacher[name], x) for name, x in again.model.state_dict().items())


def test_teacher_temperature():
    method = build(teacher_temp_epochs=4)
    temps = [float(method._teacher_temp(torch.tensor(epoch))) for epoch in (0, 1, 3, 9)]
    assert temps == pytest.approx([0.04, 0.05, 0.07, 0.07])
    assert build()._teacher_temp(torch.tensor(0)) == 0.07
    batch = batch_of(method)
    early, late = (method(replace(batch, epoch=torch.tensor(e)))["local"] for e in (0, 3))
    assert early != late
    method.eval()
    assert method(batch)["local"] == build().eval()(batch)["local"]  # validation is at 0.07


def test_monitor():
    method = build().eval()
    batch = batch_of(method, budget=BUDGET)
    found = method(batch)
    clean = method.frontend(batch)
    views = [method.teacher(frames[None]) for frames in clean.unpack()[:6]]
    for name, first in (("local", 1), ("global", 0)):
        logits = torch.cat([getattr(view, f"{name}_logits")[first:] for view in views])
        vectors = torch.cat([getattr(view, f"{name}_vectors")[first:] for view in views])
        mean = (logits / 0.07).softmax(1).mean(0)
        entropy = -(mean * mean.log()).sum() / math.log(len(mean))
        spread = (vectors - vectors.mean(0)).square().sum(1).mean()
        torch.testing.assert_close(found[f"{name}_entropy"], entropy, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found[f"{name}_spread"], spread, rtol=1e-4, atol=1e-5)
    with torch.no_grad():  # a teacher that has collapsed: all inputs are one vector and one class
        for layer in (method.teacher.bottlenecks[0][4], method.teacher.bottlenecks[1][4]):
            layer.weight.zero_()
            layer.bias.normal_()
        for classes in (method.teacher.local_classes, method.teacher.global_classes):
            classes.weight[0] = 0
            classes.weight[1:] = -method.teacher.bottlenecks[0][4].bias
    found = method(batch)
    for name in ("local", "global"):
        assert found[f"{name}_spread"].abs() < 1e-5
    assert found["global_entropy"] < 1e-3


def test_flops_are_what_torch_counts_on_explicit_products(monkeypatch):
    explicit = partial(fastast.nn.packed_attention.packed_attention_qkv, backend="reference")
    monkeypatch.setattr(fastast.nn.packed_attention, "packed_attention_qkv", explicit)
    for options in OPTIONS:
        method = build(**options)
        batch = batch_of(method)
        clean = method.frontend(batch)
        corrupted = method.corrupt(clean, batch)
        with FlopCounterMode(display=False) as counter:
            encoded = method.encode(clean, corrupted, batch.grid)
            parts = (encoded.errors, *method.divergence(encoded, 0.07))
            sum(part.sum() for part in parts).backward()
        assert method.flops(batch) == pytest.approx(counter.get_total_flops(), rel=0.01)
        assert method.flops(batch_of(method, budget=BUDGET)) == method.flops(batch)


@NAMED
def test_one_graph_serves_every_batch(options):
    method = build(**options, gain_db=3.0)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    step = torch.compile(method, fullgraph=True, backend=counter)
    rng = np.random.default_rng(0)
    for seen in range(12):
        pairs = rng.choice(3, rng.integers(1, 4), replace=False)
        views = [view for pair in pairs for view in (2 * pair, 2 * pair + 1)]
        batch = batch_of(method, views, epoch=seen, budget=BUDGET, offset=seen)
        compiled = step(batch)
        compiled["loss"].backward()
        if seen in (1, 11):
            torch.testing.assert_close(compiled, method(batch), rtol=1e-4, atol=1e-5)
        method.after_step(compiled["centering"], done=seen / 12)
    assert counter.frame_count == 1


def test_learns_to_restore():
    method = build()
    optimizer = torch.optim.AdamW(method.model.parameters(), lr=3e-3)
    batches = [batch_of(method, offset=100 * index) for index in range(2)]
    first = [method.eval()(batch)["reconstruction"] for batch in batches]
    for step in range(30):
        batch = replace(batches[step % 2], epoch=torch.tensor(step))
        out = method.train()(batch)
        out["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
        method.after_step(out["centering"], done=step / 30)
    last = [method.eval()(batch)["reconstruction"] for batch in batches]
    assert all(after < 0.8 * before for before, after in zip(first, last, strict=True))


def test_bf16():
    method = build()
    batch = batch_of(method)
    expected = method(batch)
    with torch.autocast("cpu", torch.bfloat16):
        found = method(batch)
    assert found["centering"].dtype == torch.float32
    for name in ("loss", "reconstruction", "local", "global"):
        torch.testing.assert_close(found[name], expected[name], rtol=0.02, atol=0.0)


def test_what_makes_no_sense_says_so():
    method = build()
    with pytest.raises(ValueError, match="has 3 segments.*two views of one clip"):
        method(batch_of(method, [0, 1, 2]))
    dense = replace(batch_of(method), dense_frames=40)
    with pytest.raises(ValueError, match="native length"):
        method(dense)
    for name, value in (
        ("local_tokens", "some"),
        ("global_weight", -1),
        ("student_temp", 0.0),
        ("teacher_temp", -1.0),
        ("teacher_temp_epochs", 0),
        ("momentum", 1.5),
        ("center_momentum", -0.1),
    ):
        with pytest.raises(ValueError, match=f"{name} must be .*got"):
            build(**{name: value})
