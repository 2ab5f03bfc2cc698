"""Packing changes nothing: a model sees each clip as if it were alone."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastast import (
    AST,
    SSAST,
    ASiT,
    ASiTPretraining,
    AudioMAE,
    ElasticAST,
    FlexiAST,
    Segments,
    Spectrograms,
    SSASTPretraining,
    TokenBudget,
    create_model,
    create_pretraining_model,
    list_models,
)
from tests.testing import poisoned_memory

CLASSES, MELS = 5, 16
SIZE = {"num_mels": MELS, "patch_size": (4, 4), "dim": 24, "depth": 2, "num_heads": 3}
LENGTHS = [17, 40, 8, 17, 90, 4, 33]  # frames
FRAME_BUDGET = TokenBudget(tokens=300, clips=10, max_length=100)
TOKEN_BUDGET = TokenBudget(tokens=400, clips=10, max_length=150)
MODELS = {
    "elastic-attention": lambda: ElasticAST(CLASSES, max_time_patches=16, **SIZE),
    "elastic-mean": lambda: ElasticAST(CLASSES, max_time_patches=16, pool="mean", **SIZE),
    "ast": lambda: AST(CLASSES, input_frames=40, stride=(4, 3), **SIZE),
    "ssast-mean": lambda: SSAST(CLASSES, input_frames=40, stride=(4, 3), **SIZE),
    "ssast-cls": lambda: SSAST(CLASSES, input_frames=40, stride=(4, 4), pool="cls", **SIZE),
    "audio-mae": lambda: AudioMAE(CLASSES, drop_path=0.0, **SIZE),
    "asit": lambda: ASiT(CLASSES, input_frames=40, stride=(4, 3), **SIZE),
    "flexi": lambda: FlexiAST(CLASSES, input_frames=40, **SIZE),
}


@pytest.fixture(params=MODELS.values(), ids=MODELS)
def model(request) -> nn.Module:
    """A small model in float64, with weights large enough for every part to matter."""
    torch.manual_seed(0)
    model = request.param()
    for parameter in model.parameters():
        nn.init.normal_(parameter, mean=float(parameter.ndim == 1), std=0.2)
    return model.double()


def clips_of(lengths: list[int]) -> list[Tensor]:
    torch.manual_seed(1)
    return [torch.randn(length, MELS, dtype=torch.float64) for length in lengths]


def logits_of(model: nn.Module, clips: list[Tensor], budgeted: bool) -> Tensor:
    """Logits of the clips as one batch; with budgets, NaN lies in the dead frames."""
    if not budgeted:
        return model(Spectrograms.from_list(clips))
    inputs = in_budget(clips)
    grid = model.geometry.grid(inputs.segments, TOKEN_BUDGET)
    return model(inputs, grid)[: len(clips)]


def in_budget(clips: list[Tensor]) -> Spectrograms:
    segments = Segments.from_lengths([len(clip) for clip in clips], FRAME_BUDGET)
    frames = torch.full((FRAME_BUDGET.tokens, MELS), torch.nan, dtype=torch.float64)
    frames[: segments.host_offsets[-1]] = torch.cat(clips)
    return Spectrograms(frames, segments)


def gradients(model: nn.Module, logits: Tensor, targets: Tensor) -> list[Tensor]:
    loss = F.cross_entropy(logits, targets, reduction="sum")
    return list(torch.autograd.grad(loss, list(model.parameters())))


every_layout = pytest.mark.parametrize("budgeted", [False, True], ids=["exact", "budget"])


@every_layout
def test_packed_equals_one_at_a_time(model, budgeted):
    clips = clips_of(LENGTHS)
    targets = torch.arange(len(clips)) % CLASSES
    alone = torch.cat([model(clip[None]) for clip in clips])
    grads = gradients(model, alone, targets)
    # Every parameter counts, so that none is compared as zeros with zeros. (What a bias adds to
    # all keys cancels in the softmax, so a third of the qkv bias has no gradient.)
    assert all(grad.abs().max() > 1e-6 for grad in grads)

    for seed in range(3):
        order = torch.randperm(len(clips), generator=torch.Generator().manual_seed(seed))
        logits = logits_of(model, [clips[i] for i in order], budgeted)
        torch.testing.assert_close(logits, alone[order], rtol=1e-9, atol=1e-9)
        packed = gradients(model, logits, targets[order])
        torch.testing.assert_close(packed, grads, rtol=1e-9, atol=1e-9)


@every_layout
@torch.inference_mode()
def test_clips_do_not_see_each_other(model, budgeted):
    clips = clips_of(LENGTHS)
    logits = logits_of(model, clips, budgeted)
    for changed in (0, 4, len(clips) - 1):
        others = [i for i in range(len(clips)) if i != changed]
        new = list(clips)
        new[changed] = 10 * torch.randn_like(clips[changed])
        same_length = logits_of(model, new, budgeted)
        assert torch.equal(same_length[others], logits[others])
        assert not torch.equal(same_length[changed], logits[changed])

        new[changed] = torch.randn(24, MELS, dtype=torch.float64)
        other_length = logits_of(model, new, budgeted)
        torch.testing.assert_close(other_length[others], logits[others], rtol=1e-9, atol=1e-9)


def trained_one_step(model: nn.Module, loss) -> dict[str, Tensor]:
    model = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    loss(model).backward()
    optimizer.step()
    return model.state_dict()


def test_a_training_step_never_reads_dead_rows(model):
    clips = clips_of([17, 40, 2, 17, 90, 4, 33])  # the third is shorter than a patch
    targets = torch.tensor([0, 1, -100, 3, 4, 0, 1])

    def plain(model):
        return F.cross_entropy(logits_of(model, clips, False), targets, ignore_index=-100)

    inputs = in_budget(clips)
    padded_targets = F.pad(targets, (0, FRAME_BUDGET.clips - len(clips)), value=-100)

    def padded(model):
        grid = model.geometry.grid(inputs.segments, TOKEN_BUDGET)
        return F.cross_entropy(model(inputs, grid), padded_targets, ignore_index=-100)

    expected = trained_one_step(model, plain)
    with poisoned_memory():
        actual = trained_one_step(model, padded)
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)
    assert all(x.isfinite().all() for x in actual.values())


@torch.inference_mode()
def test_ragged_and_dense_input_agree(model):
    batch = torch.stack(clips_of([40] * 3))
    logits = model(batch)
    assert torch.equal(logits, model(Spectrograms.from_list(list(batch))))
    assert torch.equal(logits, model(batch, model.geometry.grid([40] * 3)))


def test_feature_rows_are_those_of_the_grid(model):
    features, grid = model.forward_features(Spectrograms.from_list(clips_of(LENGTHS)))
    assert features.shape == (grid.num_rows, SIZE["dim"])
    assert grid.segments.lengths.tolist() == [model.geometry.num_tokens(n) for n in LENGTHS]


def test_dropped_patches_are_never_computed(model):
    """A model on half of the patches does not change with the frames of the other half."""
    clip = clips_of([40])[0]
    height, width = model.geometry.freq_patches, model.geometry.time_patches(40)
    early = [f * width + t for f in range(height) for t in range(width // 2)]
    grid = model.geometry.grid([40], keep=[torch.tensor(early).numpy()])
    logits = model(clip[None], grid)
    last_frame = model.geometry.stride[1] * (width // 2 - 1) + model.geometry.patch_size[1]
    changed = clip.clone()
    changed[last_frame:] = torch.nan
    assert torch.equal(model(changed[None], grid), logits)
    assert not torch.allclose(model(clip[None]), logits)


@pytest.mark.parametrize("pool", ["attention", "mean"])
def test_clips_longer_than_the_table_work(pool):
    torch.manual_seed(0)
    model = ElasticAST(CLASSES, max_time_patches=4, pool=pool, **SIZE).double()
    clips = clips_of([200, 12, 23, 65])
    logits = model(Spectrograms.from_list(clips))
    assert logits.isfinite().all()
    alone = torch.cat([model(clip[None]) for clip in clips])
    torch.testing.assert_close(logits, alone, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("lengths", [[2], [0, 1], [2, 40], [40, 2]], ids=str)
@torch.inference_mode()
def test_clips_too_short_for_a_token(model, lengths):
    """They have logits that mean nothing, and change no other clip's."""
    clips = clips_of(lengths)
    logits = model(Spectrograms.from_list(clips))
    assert logits.shape == (len(clips), CLASSES) and logits.isfinite().all()
    for row, clip in zip(logits, clips, strict=True):
        if len(clip) >= 4:
            torch.testing.assert_close(row, model(clip[None])[0], rtol=1e-9, atol=1e-9)


KINDS = {"ast_tiny": AST, "elastic_ast_tiny": ElasticAST, "flexi_ast_tiny": FlexiAST}


def test_models_by_name():
    assert list_models() == sorted(list_models())
    assert {"ast_tiny", "ast_small", "ast_base"} <= set(list_models("ast_*"))
    assert all(name.startswith("elastic_ast_") for name in list_models("elastic_*"))
    for name, kind in KINDS.items():
        model = create_model(name, num_classes=7, depth=1, num_mels=32)
        assert isinstance(model, kind)
        assert len(model.trunk.blocks) == 1 and model.head.out_features == 7
        assert model.trunk.blocks[0].attn.qkv.in_features == 192
        assert model.geometry.num_mels == 32


@pytest.mark.parametrize("size", ["tiny", "small", "base"])
def test_ssast_by_name(size):
    patches = create_model(f"ssast_patch_{size}", num_classes=7, depth=1)
    assert isinstance(patches, SSAST) and patches.positions.grid == (12, 101)
    frames = create_model(f"ssast_frame_{size}", num_classes=7, depth=1, num_mels=64)
    assert frames.positions.grid == (1, 1023) and frames.geometry.patch_size == (64, 2)
    for model, kind, grid in ((patches, "patch", (8, 64)), (frames, "frame", (1, 512))):
        num_mels = model.geometry.num_mels
        name = f"ssast_{kind}_{size}"
        pretraining = create_pretraining_model(name, depth=1, num_mels=num_mels)
        assert isinstance(pretraining, SSASTPretraining) and pretraining.positions.grid == grid
        model.start_from(pretraining)
        assert torch.equal(model.patch_embed.proj.weight, pretraining.patch_embed.proj.weight)


@pytest.mark.parametrize("size, heads", [("small", 3), ("base", 6)])
def test_asit_by_name(size, heads):
    model = create_model(f"asit_{size}", num_classes=7, depth=1)
    pretraining = create_pretraining_model(f"asit_{size}", depth=1)
    assert isinstance(model, ASiT) and isinstance(pretraining, ASiTPretraining)
    assert model.positions.grid == (12, 101) and pretraining.positions.grid == (8, 37)
    assert pretraining.trunk.blocks[0].attn.num_heads == heads
    assert pretraining.local_classes.weight.shape == (1024, 256)
    assert pretraining.global_classes.weight.shape == (8192, 256)
    model.start_from(pretraining)
    assert torch.equal(model.patch_embed.proj.weight, pretraining.patch_embed.proj.weight)


@pytest.mark.parametrize(
    "build, message",
    [
        (lambda: create_model("resnet", 5), "name must be one of asit_base, .*got 'resnet'"),
        (lambda: create_pretraining_model("ast_tiny"), "to pre-train without .*got 'ast_tiny'"),
        (lambda: ElasticAST(5, pool="max"), "pool must be 'attention' or 'mean', got 'max'"),
        (lambda: SSAST(5, pool="max"), "pool must be 'mean' or 'cls', got 'max'"),
        (lambda: ElasticAST(5, dim=25, num_heads=2, depth=1), r"dim \(25\).*num_heads \(2\)"),
        (lambda: AST(5, dim=25, num_heads=2, depth=1), r"dim \(25\).*num_heads \(2\)"),
        (lambda: AST(5, input_frames=15), r"input_frames \(15\) is shorter than a patch \(16"),
        (lambda: AST(5, num_mels=8), r"exceeds num_mels \(8\)"),
        (lambda: FlexiAST(5, resize="area"), "resize must be 'pi' or 'bilinear', got 'area'"),
    ],
)
def test_wrong_models_say_so(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_wrong_input_says_so(model):
    with pytest.raises(ValueError, match=rf"frames must be \[rows, {MELS}\] \(num_mels\)"):
        model(torch.zeros(2, 40, MELS + 1, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"inputs must be \[clips, frames, num_mels\]"):
        model(torch.zeros(40, MELS, dtype=torch.float64))
