"""FlexiAST: one model, patches of any size."""

import logging

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from fastast import AST, ElasticAST, FlexiAST, Segments, Spectrograms, TokenBudget
from fastast.tokens import patchify, resize_patch_kernel, resize_positions

CLASSES, MELS, OWN = 5, 16, (4, 4)
SIZE = {"num_mels": MELS, "patch_size": OWN, "dim": 24, "depth": 2, "num_heads": 3}
PATCHES = [(4, 4), (2, 2), (3, 5), (8, 8), (4, 7), (16, 2)]
LENGTHS = [17, 40, 8, 90, 33]
every_size = pytest.mark.parametrize("size", PATCHES, ids=str)


@pytest.fixture(params=["pi", "bilinear"])
def model(request) -> FlexiAST:
    torch.manual_seed(0)
    model = FlexiAST(CLASSES, input_frames=40, resize=request.param, **SIZE)
    for parameter in model.parameters():
        nn.init.normal_(parameter, mean=float(parameter.ndim == 1), std=0.2)
    return model.double()


def clips_of(lengths: list[int]) -> list[Tensor]:
    torch.manual_seed(1)
    return [torch.randn(length, MELS, dtype=torch.float64) for length in lengths]


@every_size
def test_a_clip_alone_is_an_ast_with_resized_weights(model, size):
    """Tokens are those of a plain convolution and of the resized table."""
    for clip in clips_of(LENGTHS):
        grid = model.geometry_of(size).grid([len(clip)])
        kernel = model.patch_embed.proj.weight.unflatten(1, (1, *OWN))
        kernel = resize_patch_kernel(kernel, size, model.patch_embed.resize)
        image = clip.T[None, None]  # [1, 1, mel bins, frames]
        patches = F.conv2d(image, kernel, model.patch_embed.proj.bias, stride=size)[0]
        places = tuple(patches.shape[1:])
        table = resize_positions(
            model.positions.table, (4, 10), places, prefix=1, shrink="antialias"
        )
        expected = torch.cat([model.prefix, patches.flatten(1).T]) + table
        torch.testing.assert_close(model.tokens(clip, grid), expected, rtol=0, atol=1e-12)


@every_size
def test_packed_equals_one_at_a_time(model, size):
    clips = clips_of(LENGTHS)
    logits = model(Spectrograms.from_list(clips), patch_size=size)
    alone = torch.cat([model(clip[None], patch_size=size) for clip in clips])
    torch.testing.assert_close(logits, alone, rtol=1e-9, atol=1e-9)
    budget = TokenBudget(2000, 8, 800)
    segments = Segments.from_lengths([len(clip) for clip in clips])
    grid = model.geometry_of(size).grid(segments, budget)
    padded = model(Spectrograms(torch.cat(clips), segments), grid)
    torch.testing.assert_close(padded[: len(clips)], alone, rtol=1e-9, atol=1e-9)


@every_size
def test_every_size_trains_the_kept_weights(model, size):
    logits = model(Spectrograms.from_list(clips_of(LENGTHS)), patch_size=size)
    loss = F.cross_entropy(logits, torch.arange(len(LENGTHS)) % CLASSES)
    for name, grad in zip(
        dict(model.named_parameters()),
        torch.autograd.grad(loss, list(model.parameters())),
        strict=True,
    ):
        assert grad.isfinite().all() and grad.any(), name


def test_kept_patches_have_the_rows_of_their_places(model):
    geometry = model.geometry_of((8, 8))
    full = model.positions(geometry.grid([40]))
    kept = model.positions(geometry.grid([40], keep=[np.array([0, 3, 7])]))
    torch.testing.assert_close(kept, full[[0, 1, 4, 8]], rtol=0, atol=1e-14)


def test_its_own_size_is_an_ast():
    torch.manual_seed(0)
    flexi = FlexiAST(CLASSES, input_frames=40, distilled=True, **SIZE).double()
    ast = AST(CLASSES, input_frames=40, stride=OWN, **SIZE).double()
    ast.load_state_dict(flexi.state_dict())
    batch = torch.stack(clips_of([40, 40]))
    # AST's table is looked up with float32 weights, which are exact at its own width.
    torch.testing.assert_close(flexi(batch), ast(batch), rtol=0, atol=1e-12)


def test_positions_in_bfloat16(model):
    grid = model.geometry_of((3, 5)).grid(LENGTHS)
    exact = model.positions(grid)
    half = model.positions.to(torch.bfloat16)(grid)
    assert half.dtype == torch.bfloat16
    largest = exact.abs().max().item()
    # The table, each weight and the result are rounded once.
    torch.testing.assert_close(half.double(), exact, rtol=0, atol=3 * 2**-9 * largest)


def test_autocast_keeps_the_dtype_of_the_table(model):
    model.float()
    grid = model.geometry_of((3, 5)).grid(LENGTHS)
    with torch.autocast("cpu", torch.bfloat16):
        assert model.positions(grid).dtype == torch.float32


def test_two_patch_sizes_at_once_say_so(model):
    clip = clips_of([40])[0]
    with pytest.raises(ValueError, match="leave patch_size or grid out"):
        model(clip[None], model.geometry.grid([40]), patch_size=(2, 2))


@pytest.mark.parametrize("build", [AST, ElasticAST])
def test_other_models_refuse_other_patches(build):
    model = build(CLASSES, **SIZE)
    grid = model.geometry.with_patch_size((8, 8)).grid([40])
    with pytest.raises(ValueError, match=r"grid lists patches of \(8, 8\).*use a FlexiAST"):
        model(torch.zeros(1, 40, MELS), grid)


def test_patchify_reads_what_the_grid_lists():
    frames = clips_of([40])[0]
    model = FlexiAST(CLASSES, **SIZE)
    grid = model.geometry_of((8, 8)).grid([40])
    tokens = patchify(frames, grid, grid.geometry)
    assert torch.equal(tokens[1], frames[:8, :8].T.flatten())


def test_each_patch_size_compiles_once(caplog):
    caplog.set_level(logging.WARNING, logger="torch.__trace")
    torch.manual_seed(0)
    torch.compiler.reset()
    model = FlexiAST(CLASSES, input_frames=40, **SIZE)
    counter = CompileCounterWithBackend("aot_eager")

    def loss_of(model, inputs, grid):
        return model(inputs, grid).square().sum()

    compiled = torch.compile(loss_of, fullgraph=True, backend=counter)
    frame_budget, rng = TokenBudget(512, 6, 100), np.random.default_rng(0)

    def check(size: tuple[int, int]) -> None:
        segments = Segments.from_lengths(rng.integers(8, 90, rng.integers(2, 6)), frame_budget)
        inputs = Spectrograms(torch.randn(512, MELS), segments)
        grid = model.geometry_of(size).grid(segments, TokenBudget(2600, 6, 500))
        results = []
        for function in (compiled, loss_of):
            loss = function(model, inputs, grid)
            results.append([loss, *torch.autograd.grad(loss, list(model.parameters()))])
        torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)

    sizes = PATCHES[:4]
    for size in sizes:
        check(size)
    assert counter.frame_count == len(sizes)
    with torch._dynamo.config.patch(error_on_recompile=True):  # names the guard that failed
        for index in range(12):
            check(sizes[(5 * index + index // 4) % len(sizes)])
    assert counter.frame_count == len(sizes)
    torch.compiler.reset()


def trained(**settings) -> AST:
    torch.manual_seed(2)
    settings = SIZE | {"input_frames": 40, "stride": (4, 4), "distilled": False} | settings
    return AST(CLASSES, **settings).double()


def test_starts_from_an_ast_of_its_own_patches():
    """And answers as that one does."""
    ast, model = trained(), FlexiAST(CLASSES, input_frames=40, **SIZE).double()
    model.start_from(ast)
    clips = torch.stack(clips_of([40, 40]))
    torch.testing.assert_close(model(clips), ast(clips), rtol=0, atol=1e-12)


@pytest.mark.parametrize("resize", ["pi", "bilinear"])
def test_starts_from_an_ast_of_other_patches(resize):
    ast = trained(patch_size=(2, 2), stride=(1, 2))
    model = FlexiAST(CLASSES, input_frames=80, resize=resize, **SIZE).double()
    model.start_from(ast)
    before, after = ast.state_dict(), model.state_dict()
    kernel = resize_patch_kernel(
        before.pop("patch_embed.proj.weight").unflatten(1, (2, 2)), OWN, resize
    )
    assert torch.equal(after.pop("patch_embed.proj.weight"), kernel.flatten(1))
    table = resize_positions(
        before.pop("positions.table"), (15, 20), (4, 20), prefix=1, shrink="antialias"
    )
    assert torch.equal(after.pop("positions.table"), table)
    assert all(torch.equal(after[name], value) for name, value in before.items())  # the head, too


def test_other_classes_have_a_new_classifier():
    ast, model = trained(), FlexiAST(CLASSES + 1, input_frames=40, **SIZE).double()
    new = model.head.weight.clone()
    model.start_from(ast)
    assert torch.equal(model.head.weight, new)
    assert torch.equal(model.trunk.blocks[1].mlp.fc2.weight, ast.trunk.blocks[1].mlp.fc2.weight)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: ElasticAST(CLASSES, **SIZE), "FlexiAST starts from a ViT, .* not from ElasticAST"),
        (lambda: trained(distilled=True), "has 2 class tokens, this one 1: choose"),
        (lambda: trained(depth=1), "trunk.blocks.1.* is not as in the pre-trained weights"),
        (lambda: trained(depth=3), "trunk.blocks.2.* is not as in the pre-trained weights"),
    ],
)
def test_what_does_not_fit_says_so(make, message):
    with pytest.raises(ValueError, match=message):
        FlexiAST(CLASSES, input_frames=40, **SIZE).double().start_from(make().double())
