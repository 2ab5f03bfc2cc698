"""A training step compiles once, and then serves every ragged batch."""

import copy
import logging

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from fastast import AST, HTSAT, SSAST, ElasticAST, Segments, Spectrograms, TokenBudget
from fastast.tokens import PatchGrid

CLASSES, MELS, BATCHES = 5, 32, 50
SIZE = {"num_mels": MELS, "patch_size": (8, 8), "dim": 64, "depth": 2, "num_heads": 2}
FRAME_BUDGET = TokenBudget(tokens=2048, clips=9, max_length=220)
TOKEN_BUDGET = TokenBudget(tokens=1200, clips=9, max_length=200)
MODELS = {
    "elastic": lambda: ElasticAST(CLASSES, max_time_patches=16, **SIZE),
    "ast": lambda: AST(CLASSES, input_frames=128, stride=(8, 6), **SIZE),
    "ssast": lambda: SSAST(CLASSES, input_frames=128, stride=(8, 6), **SIZE),
}
FOLDED = {"image_size": 64, "dim": 16, "depths": (2, 2, 1), "num_heads": (1, 2, 2), "window": 4}
HTSATS = {
    # Without draws of its own, for the comparison with an eager model.
    f"hts_at-{fit}": lambda fit=fit: HTSAT(
        CLASSES, num_mels=MELS, patch_size=(8, 8), drop_path=0.0, fit=fit, **FOLDED
    )
    for fit in ("pad", "stretch")
}
every_model = pytest.mark.parametrize("build", MODELS.values(), ids=MODELS)


class Batch:
    """What a loader sends: frames, the token list, and a target per clip (-100: none)."""

    def __init__(self, model: nn.Module, lengths: list[int], budgeted: bool) -> None:
        frames = Segments.from_lengths(lengths, FRAME_BUDGET if budgeted else None)
        rows = FRAME_BUDGET.tokens if budgeted else sum(lengths)
        self.inputs = Spectrograms(torch.randn(rows, MELS), frames)
        self.grid: PatchGrid = model.geometry.grid(frames, TOKEN_BUDGET if budgeted else None)
        self.targets = torch.randint(CLASSES, (frames.num_segments,))
        self.targets[self.grid.segments.lengths == 0] = -100


def loss_of(model: nn.Module, batch: Batch) -> Tensor:
    logits = model(batch.inputs, batch.grid)
    return F.cross_entropy(logits, batch.targets, ignore_index=-100)


def step(loss: Tensor, model: nn.Module) -> list[Tensor]:
    return [loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))]


def ragged_lengths(count: int) -> list[list[int]]:
    """Batches of 2 to 8 clips of up to 2.2 s, some too short for a token."""
    rng = np.random.default_rng(0)
    return [rng.integers(4, 220, rng.integers(2, 9)).tolist() for _ in range(count)]


@pytest.fixture(autouse=True)
def fresh_compiler(caplog):
    caplog.set_level(logging.WARNING, logger="torch.__trace")  # else failures print it in full
    torch.manual_seed(0)
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def check_steps(model, backend, warm_up, lengths, budgeted) -> int:
    """Compiled steps equal eager ones, and compile nothing after the warm-up.

    Returns:
        How many graphs the warm-up compiled.
    """
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(loss_of, fullgraph=True, backend=counter)
    eager_model = copy.deepcopy(model)

    def check(batch: Batch) -> None:
        actual = step(compiled(model, batch), model)
        expected = step(loss_of(eager_model, batch), eager_model)
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)

    for warm_lengths in warm_up:
        check(Batch(model, warm_lengths, budgeted))
    graphs = counter.frame_count
    with torch._dynamo.config.patch(error_on_recompile=True):  # names the guard that failed
        for batch_lengths in lengths:
            check(Batch(model, batch_lengths, budgeted))
    assert counter.frame_count == graphs
    return graphs


@pytest.mark.parametrize("build", [*MODELS.values(), *HTSATS.values()], ids=[*MODELS, *HTSATS])
def test_one_graph_serves_a_budget(build):
    first, *others = ragged_lengths(BATCHES)
    assert check_steps(build(), "aot_eager", [first], others, budgeted=True) == 1


@every_model
def test_dynamic_shapes_compile_once_per_length_bound(build):
    """Without a budget: one graph for fixed shapes, then one per value of `max_length`."""
    model = build()
    # Two batches that differ in every size, then one for each of the larger bounds.
    warm_up = [[10, 12], [9, 11, 4, 12, 13], [30, 9, 4], [60, 30, 4], [120, 70, 4], [219, 99, 4]]
    bounds = {Batch(model, lengths, False).grid.segments.max_length for lengths in warm_up}
    lengths = ragged_lengths(BATCHES)
    assert bounds >= {Batch(model, x, False).grid.segments.max_length for x in lengths}
    graphs = check_steps(model, "aot_eager", warm_up, lengths, budgeted=False)
    assert graphs == 1 + len(bounds)


@pytest.mark.slow
def test_inductor():
    first, *others = ragged_lengths(10)
    model = MODELS["elastic"]()
    assert check_steps(model, "inductor", [first], others, budgeted=True) == 1
