"""SSAST's pre-training: ragged batches, one graph, and nothing that a clip's neighbours change."""

from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.flop_counter import FlopCounterMode

import fastast.nn.packed_attention
from fastast.methods import MaskedSpectrogramModeling
from fastast.random import purpose_key
from fastast.tokens import ClusteredMask, UnstructuredMask
from fastast.train import build_method, load_data, make_loader
from fastast.train.loop import measure_statistics
from tests.testing import poisoned_memory


@pytest.fixture
def pretraining(recipe):
    """The recipe of tests/conftest.py, to pre-train a patch model of two narrow blocks."""
    return replace(
        recipe,
        data=replace(recipe.data, max_seconds=0.9),
        model=replace(
            recipe.model, name="ssast_patch_tiny", patch_size=(8, 8), max_time_patches=None
        ),
        train=replace(recipe.train, method="ssast", batch_tokens=250),
    )


def build(recipe):
    data = load_data(recipe.data).train
    recipe = measure_statistics(recipe, data)
    torch.manual_seed(0)
    method = build_method(recipe, 2)
    return method, recipe, data


def loader_of(recipe, data, method, **options):
    return make_loader(recipe, data, method.model.geometry, training=True, **options)


def one_by_one(recipe, data, method):
    """A loader of the same clips, each alone in its batch."""
    alone = replace(recipe, train=replace(recipe.train, batch_clips=1))
    return {int(batch.clip_ids[0]): batch for batch in loader_of(alone, data, method).epoch(0)}


def gradients(method):
    found = {name: p.grad.clone() for name, p in method.named_parameters()}
    method.zero_grad()
    return found


OPTIONS = [
    {},
    {"negatives": "predictions", "separate_masks": True, "clusters_as_code": True},
]


@pytest.mark.parametrize("options", OPTIONS, ids=["paper", "code"])
def test_equals_the_formulas_clip_by_clip(pretraining, options):
    for name, value in options.items():
        setattr(pretraining.ssast, name, value)
    method, recipe, data = build(pretraining)
    batch = next(loader_of(recipe, data, method).epoch(0))
    grid, model = batch.grid, method.model
    frames = method.frontend(batch)
    found = method(batch)

    first = method._draw_mask(batch, method.seed)
    second = first
    if method.separate_masks:
        second = method._draw_mask(batch, method.seed ^ purpose_key("ssast generative mask"))
        assert not torch.equal(first, second)
    offsets = grid.segments.host_offsets.tolist()
    losses, right = [], []
    for begin, end in zip(offsets[:-1], offsets[1:], strict=True):
        parts = []
        for masked in (first, second):
            restored = model(frames, masked, grid)
            rows = begin + masked[begin:end].nonzero()[:, 0]
            parts.append((restored.patches[rows], restored.features[rows]))
        (x, tokens), (y, others) = parts
        scores = model.discriminate(tokens) @ x.T  # [prediction, target]
        own = torch.arange(len(x))
        if method.negatives == "targets":
            contrast = F.cross_entropy(scores, own)
            right.append((scores.argmax(1) == own).double().mean())
        else:
            contrast = F.cross_entropy(scores.T, own)
            right.append((scores.T.log_softmax(1).argmax(0) == own).double().mean())
        losses.append((contrast, F.mse_loss(model.generate(others), y)))
    contrast, generative = (torch.stack(values).mean() for values in zip(*losses, strict=True))
    expected = {
        "loss": contrast + 10 * generative,
        "discriminative": contrast,
        "generative": generative,
        "accuracy": torch.stack(right).mean(),
    }
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value.float(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("options", OPTIONS, ids=["paper", "code"])
def test_gradients_are_those_of_one_clip_at_a_time(pretraining, options):
    for name, value in options.items():
        setattr(pretraining.ssast, name, value)
    method, recipe, data = build(pretraining)
    alone = one_by_one(recipe, data, method)
    for batch in loader_of(recipe, data, method, fixed_shapes=True).epoch(0):
        loss = method(batch)["loss"]
        loss.backward()
        together = gradients(method)
        total = 0
        for clip in batch.clip_ids[: batch.num_clips].tolist():
            part = method(alone[clip].with_denominator(batch.num_clips))["loss"]
            part.backward()
            total += part.detach()
        torch.testing.assert_close(loss.detach(), total, rtol=1e-5, atol=0)
        for name, value in gradients(method).items():
            torch.testing.assert_close(together[name], value, rtol=1e-3, atol=2e-5, msg=name)


@pytest.mark.parametrize("options", OPTIONS, ids=["paper", "code"])
def test_flops_are_what_torch_counts_on_explicit_products(pretraining, options, monkeypatch):
    explicit = partial(fastast.nn.packed_attention.packed_attention_qkv, backend="reference")
    monkeypatch.setattr(fastast.nn.packed_attention, "packed_attention_qkv", explicit)
    for name, value in options.items():
        setattr(pretraining.ssast, name, value)
    method, recipe, data = build(pretraining)
    (batch, *_) = loader_of(recipe, data, method, fixed_shapes=False).epoch(0)
    frames, grid, model = method.frontend(batch), batch.grid, method.model
    masked = method._draw_mask(batch, method.seed)
    with FlopCounterMode(display=False) as counter:
        for_generation = restored = model(frames, masked, grid)
        if method.separate_masks:  # which hides as many patches of each clip
            for_generation = model(frames, masked, grid)
        loss = F.mse_loss(model.generate(for_generation.features[masked]), restored.patches[masked])
        predictions, targets = model.discriminate(restored.features[masked]), restored.patches
        counts = grid.segments.row_ids(grid.num_rows)[masked].unique(return_counts=True)[1].tolist()
        for x, y in zip(predictions.split(counts), targets[masked].split(counts), strict=True):
            loss = loss + (x @ y.T).square().sum()
        loss.backward()
    assert method.flops(batch) == pytest.approx(counter.get_total_flops(), rel=0.01)


def test_dead_rows_cost_nothing(pretraining):
    method, recipe, data = build(pretraining)
    bare, fixed = (
        [method.flops(batch) for batch in loader_of(recipe, data, method, fixed_shapes=f).epoch(0)]
        for f in (False, True)
    )
    assert bare == fixed and all(bare)


def test_dead_rows_and_fresh_memory_are_never_read(pretraining):
    method, recipe, data = build(pretraining)
    batch = next(loader_of(recipe, data, method, fixed_shapes=True).epoch(0))
    method(batch)["loss"].backward()
    expected = gradients(method)
    with poisoned_memory():
        method(batch)["loss"].backward()
    for name, value in gradients(method).items():
        assert torch.equal(value, expected[name]), name
        assert value.abs().sum() > 0, name


@pytest.mark.parametrize("name", ["ssast_patch_tiny", "ssast_frame_tiny"])
def test_one_graph_serves_every_batch(pretraining, name):
    pretraining.model.name = name
    pretraining.model.patch_size = (8, 8) if "patch" in name else None
    pretraining.ssast.separate_masks = "patch" in name
    method, recipe, data = build(pretraining)
    loader = loader_of(recipe, data, method, fixed_shapes=True)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    step = torch.compile(method, fullgraph=True, backend=counter)
    seen = 0
    for epoch in range(50):
        for batch in loader.epoch(epoch):
            compiled = step(batch)
            compiled["loss"].backward()
            seen += 1
            if seen in (1, 20, 50):
                torch.testing.assert_close(compiled, method(batch), rtol=1e-4, atol=1e-5)
        if seen >= 50:
            break
    assert seen >= 50
    assert counter.frame_count == 1


def test_masks_change_by_epoch_and_not_in_validation(pretraining):
    method, recipe, data = build(pretraining)
    loader = make_loader(recipe, data, method.model.geometry)
    masks = [method._draw_mask(next(loader.epoch(epoch)), 0) for epoch in (0, 0, 1)]
    assert torch.equal(masks[0], masks[1]) and not torch.equal(masks[0], masks[2])


def test_square_patches_are_masked_in_clusters_and_frames_one_by_one(pretraining):
    assert build(pretraining)[0].mask == ClusteredMask(400 / 512, (3, 5))
    pretraining.model.name, pretraining.model.patch_size = "ssast_frame_tiny", None
    method, *_ = build(pretraining)
    assert method.mask == UnstructuredMask(400 / 512)
    assert method.model.geometry.patch_size == (32, 2)


def test_clips_of_one_patch_add_nothing(pretraining):
    pretraining.data.max_seconds = 0.1
    pretraining.model.patch_size = (32, 8)
    pretraining.frontend.compression = [1.0]
    method, recipe, data = build(pretraining)
    recipe.ssast.mask_ratio = 0.5
    batch = next(loader_of(recipe, data, method).epoch(0))
    assert batch.grid.segments.lengths.max() == 3
    method(batch)["loss"].backward()
    assert all(p.grad.isfinite().all() for p in method.parameters())


def test_what_makes_no_sense_says_so(pretraining):
    method, recipe, _ = build(pretraining)
    with pytest.raises(ValueError, match="negatives must be 'targets' or 'predictions'"):
        MaskedSpectrogramModeling(method.model, None, method.mask, negatives="all")
    with pytest.raises(ValueError, match="generative_weight must not be negative"):
        MaskedSpectrogramModeling(method.model, None, method.mask, generative_weight=-1)
    for part, name, value in (
        ("train", "loss", "cross_entropy"),
        ("augment", "token_drop", 0.1),
        ("model", "init", "runs/x"),
    ):
        wrong = replace(recipe, **{part: replace(getattr(recipe, part), **{name: value})})
        with pytest.raises(ValueError, match=rf"{part}\.{name} .* leave it out"):
            build_method(wrong, 2)
    wrong = replace(recipe, model=replace(recipe.model, name="elastic_ast_tiny"))
    with pytest.raises(ValueError, match="ssast_patch_tiny to pre-train without labels"):
        build_method(wrong, 2)
    wrong = replace(recipe, data=replace(recipe.data, max_seconds=None))
    with pytest.raises(ValueError, match=r"set data\.max_seconds"):
        build_method(wrong, 2)
