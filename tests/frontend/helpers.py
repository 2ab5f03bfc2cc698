"""What the tests of the front end share."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fastast.segments import Segments, Spectrograms, TokenBudget

KEYS = {"seed": 5, "epoch": 2}


def ids(*numbers: int) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int64)


def offsets_of(*lengths: int) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0)


def pad_dead(stream: Tensor, rows: int) -> Tensor:
    """The stream with ``rows`` dead rows more, full of what must not get through."""
    garbage = math.nan if stream.is_floating_point() else 12345
    return torch.cat([stream, stream.new_full((rows, *stream.shape[1:]), garbage)])


def spectrograms_of(clips: Sequence[Tensor], budget: TokenBudget | None = None) -> Spectrograms:
    """Clips end to end, and NaN on dead rows."""
    frames, lengths = torch.cat(list(clips)), [len(clip) for clip in clips]
    segments = Segments.from_lengths(lengths, budget)
    return Spectrograms(pad_dead(frames, budget.tokens - len(frames) if budget else 0), segments)


def same_in_every_batch(batches: Callable[[list[int], bool], list[Tensor]], clips: int) -> None:
    """Asserts that a clip comes out the same, bit for bit, whatever its batch.

    Args:
        batches: what comes out of a batch of the clips of these numbers, in this order, and
            whether the batch is to have dead rows and empty segments at its end.
        clips: how many there are.
    """
    reference = batches(list(range(clips)), False)
    assert len(reference) == clips
    orders = [[clip] for clip in range(clips)]
    orders += [list(range(clips))[::-1], list(range(1, clips)), [clips - 1, 0]]
    for order in orders:
        for padded in (False, True):
            for clip, actual in zip(order, batches(order, padded), strict=True):
                assert torch.equal(actual, reference[clip]), f"clip {clip} in {order}, {padded=}"


def compiles_once(step: Callable, batches: Sequence[tuple]) -> None:
    """Asserts that the compiled function equals the plain one and serves all batches.

    Args:
        step: takes the entries of a batch and returns tensors.
        batches: the first ones compile; each later one must do with what there is.
    """
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for turn, arguments in enumerate(batches):
        with torch.compiler.set_stance("fail_on_recompile" if turn else "default"):
            actual = compiled(*arguments)
        for a, b in zip(actual, step(*arguments), strict=True):
            assert torch.equal(a, b)


def same_on_gpu(step: Callable, arguments: tuple) -> None:
    """Asserts that the function gives the same on a GPU, and does not wait for it."""
    on_gpu = [x.to("cuda") for x in arguments]
    step(*on_gpu)  # whatever is set up once
    torch.cuda.set_sync_debug_mode("error")
    try:
        actual = step(*on_gpu)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for a, b in zip(actual, step(*arguments), strict=True):
        torch.testing.assert_close(a.cpu(), b, rtol=1e-6, atol=1e-6)
