"""Audio-MAE's pre-training: ragged batches, one graph, and a loss whose mean is the step's."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounterWithBackend

from bench.memory import saved_bytes
from fastast.methods import MaskedReconstruction
from fastast.methods.audio_mae import patch_errors
from fastast.tokens import StructuredMask, UnstructuredMask
from fastast.train import build_method, evaluate
from tests.methods.test_ssast import build, gradients, loader_of, one_by_one
from tests.testing import poisoned_memory


@pytest.fixture
def pretraining(recipe):
    """The recipe of tests/conftest.py, to pre-train two narrow blocks and a decoder of three."""
    return replace(
        recipe,
        model=replace(
            recipe.model, name="audio_mae_tiny", patch_size=(8, 8), max_time_patches=None
        ),
        audio_mae=replace(
            recipe.audio_mae,
            mask_ratio=0.6,
            attention="hybrid",
            decoder_dim=24,
            decoder_depth=3,
            decoder_heads=2,
            decoder_global=1,
            window=2,
        ),
        train=replace(recipe.train, method="audio_mae", batch_tokens=250),
    )


OPTIONS = [
    {},
    {"average": "patches", "targets": "plain", "attention": "global", "decoder_depth": 2},
    {"masking": "structured", "time_ratio": 0.5, "freq_ratio": 0.3, "attention": "local"},
]
every_option = pytest.mark.parametrize("options", OPTIONS, ids=["default", "patches", "structured"])


def with_options(recipe, options):
    return replace(recipe, audio_mae=replace(recipe.audio_mae, **options))


@every_option
def test_equals_the_formulas_clip_by_clip(pretraining, options):
    method, recipe, data = build(with_options(pretraining, options))
    batch = next(loader_of(recipe, data, method).epoch(0))
    grid, model = batch.grid, method.model
    frames, masked = method.frontend(batch), method.draw_mask(batch)
    restored = model.restore(frames, masked, grid)
    patches = model.patch_embed.cut(frames.frames, grid.decoded)
    decoded = grid.split(masked).source < 0
    sums, counts = [], []
    offsets = grid.decoded.segments.host_offsets.tolist()
    for begin, end in zip(offsets[:-1], offsets[1:], strict=True):
        rows = begin + decoded[begin:end].nonzero()[:, 0]
        target = patches[rows]
        if options.get("targets") != "plain":
            target = (target - target.mean(1, keepdim=True)) / (
                target.var(1, keepdim=True) + 1e-6
            ).sqrt()
        sums.append(F.mse_loss(restored[rows], target, reduction="none").mean(1).sum())
        counts.append(len(rows))
    if options.get("average") == "patches":
        expected = sum(sums) / sum(counts)
        batch = batch.with_denominator(method.loss_weight(batch))
        assert method.loss_weight(batch) == sum(counts)
    else:
        expected = sum(s / c for s, c in zip(sums, counts, strict=True)) / len(counts)
        assert method.loss_weight(batch) == batch.num_clips
    torch.testing.assert_close(method(batch)["loss"], expected, rtol=1e-5, atol=0)


@every_option
def test_gradients_are_those_of_one_clip_at_a_time(pretraining, options):
    method, recipe, data = build(with_options(pretraining, options))
    alone = one_by_one(recipe, data, method)
    batch = next(loader_of(recipe, data, method, fixed_shapes=True).epoch(0))
    weight = method.loss_weight(batch)
    loss = method(batch.with_denominator(weight))["loss"]
    loss.backward()
    together = gradients(method)
    total = 0
    for clip in batch.clip_ids[: batch.num_clips].tolist():
        part = method(alone[clip].with_denominator(weight))["loss"]
        part.backward()
        total += part.detach()
    torch.testing.assert_close(loss.detach(), total, rtol=1e-5, atol=0)
    for name, value in gradients(method).items():
        torch.testing.assert_close(together[name], value, rtol=1e-3, atol=2e-5, msg=name)


@every_option
def test_dead_rows_and_fresh_memory_are_never_read(pretraining, options):
    method, recipe, data = build(with_options(pretraining, options))
    batch = next(loader_of(recipe, data, method, fixed_shapes=True).epoch(0))
    method(batch)["loss"].backward()
    expected = gradients(method)
    with poisoned_memory():
        method(batch)["loss"].backward()
    for name, value in gradients(method).items():
        assert torch.equal(value, expected[name]), name


def test_one_graph_serves_every_batch(pretraining):
    method, recipe, data = build(with_options(pretraining, {"decoder_depth": 2}))
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
            if seen in (1, 20):
                torch.testing.assert_close(compiled, method(batch), rtol=1e-4, atol=1e-5)
        if seen >= 20:
            break
    assert counter.frame_count == 1


def test_validation_is_the_mean_over_all_hidden_patches(pretraining):
    method, recipe, data = build(with_options(pretraining, OPTIONS[1]))
    score = evaluate(method, loader_of(recipe, data, method), "cpu")
    method.eval()
    total = weight = 0
    for batch in loader_of(recipe, data, method).epoch(0):
        weight += method.loss_weight(batch)
        total += method(batch.with_denominator(1))["loss"].item()
    assert score.loss == pytest.approx(total / weight, rel=1e-5)
    assert method.loss_weight(loader_of(recipe, data, method).silent_batch()) == 0


def test_masks_change_by_epoch_and_clip(pretraining):
    method, recipe, data = build(pretraining)
    assert method.model.geometry.mask == UnstructuredMask(0.6)
    loader = loader_of(recipe, data, method)
    batch = next(loader.epoch(0))
    masks = [method.draw_mask(replace(batch, epoch=torch.tensor(epoch))) for epoch in (0, 0, 1)]
    assert torch.equal(masks[0], masks[1]) and not torch.equal(masks[0], masks[2])
    other = build(with_options(pretraining, OPTIONS[2]))[0]
    assert other.model.geometry.mask == StructuredMask(0.5, 0.3)


def test_clips_of_one_patch_and_silence_add_nothing(pretraining):
    pretraining.data.max_seconds = 0.1
    pretraining.model.patch_size = (32, 8)
    pretraining.frontend.compression = [1.0]
    method, recipe, data = build(with_options(pretraining, {"mask_ratio": 0.5}))
    loader = loader_of(recipe, data, method)
    for batch in (next(loader.epoch(0)), loader.silent_batch()):
        loss = method(batch)["loss"]
        loss.backward()
        assert loss.isfinite()
        assert all(p.grad.isfinite().all() for p in method.parameters())
    assert loss == 0


def test_half_precision(pretraining):
    method, recipe, data = build(pretraining)
    batch = next(loader_of(recipe, data, method).epoch(0))
    expected = method(batch)["loss"]
    with torch.autocast("cpu", torch.bfloat16):
        found = method(batch)["loss"]
    found.backward()
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0)
    assert all(p.grad.dtype == torch.float32 for p in method.parameters())


def test_the_loss_keeps_one_tensor():
    prediction = torch.randn(50, 64, requires_grad=True)
    patches = torch.randn(50, 64)
    for normalise in (False, True):
        kept = saved_bytes(lambda n=normalise: patch_errors(prediction, patches, n).sum(), [])
        assert kept == prediction.nbytes


def test_what_makes_no_sense_says_so(pretraining):
    method, recipe, _ = build(pretraining)
    with pytest.raises(ValueError, match="average must be one of"):
        MaskedReconstruction(method.model, None, average="all")
    for part, name, value in (
        ("train", "loss", "cross_entropy"),
        ("augment", "token_drop", 0.1),
        ("augment", "time_drop", 0.1),
        ("model", "init", "runs/x"),
        ("model", "drop_path", 0.1),
    ):
        wrong = replace(recipe, **{part: replace(getattr(recipe, part), **{name: value})})
        with pytest.raises(ValueError, match=rf"{part}\.{name} .* audio_mae: leave it out"):
            build_method(wrong, 2)
    wrong = replace(recipe, model=replace(recipe.model, name="elastic_ast_tiny"))
    with pytest.raises(ValueError, match=r"audio_mae_tiny.*to pre-train without labels"):
        build_method(wrong, 2)
    with pytest.raises(ValueError, match=r"set audio_mae\.time_ratio or"):
        replace(recipe.audio_mae, masking="structured")
    with pytest.raises(ValueError, match=r"set audio_mae\.masking to structured"):
        replace(recipe.audio_mae, time_ratio=0.3)
