"""What a training step of ElasticAST keeps for its backward, at full size, on fake tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from bench.batches import mixed_resolution_frames
from bench.cases.elastic_ast import (
    CLASSES,
    Step,
    batch,
    dense_rows_step,
    packed_step,
    padded_step,
    reference,
)
from bench.memory import cuda_autocast, fake_like, saved_bytes, tensors_of
from bench.peers.attention import modelled_fused_attention
from bench.registry import Case, Contender, Settings, Work, benchmark
from fastast import ElasticAST, create_model

CONTENDERS: tuple[tuple[str, str, Callable[..., Step]], ...] = (
    ("fastast", "one stream of the clips' own tokens", packed_step),
    (
        "dense rows",
        "the paper's: padded rows of at most 2048 tokens, explicit masked attention",
        dense_rows_step,
    ),
    (
        "padded fused",
        "clips padded to the longest; an ideal attention that keeps q, k, v, out and lse alone",
        partial(padded_step, attention=modelled_fused_attention),
    ),
)


@benchmark(
    "memory/elastic_ast",
    "Bytes that a training step keeps for its backward: unique storages, without parameters and "
    "inputs, counted on fake tensors, so the same on any machine. bfloat16 means autocast, whose "
    "copies of the weights are included.",
)
def cases(settings: Settings) -> Iterator[Case]:
    size, frames = settings.size or "base", mixed_resolution_frames()
    dtypes = (settings.dtype,) if settings.dtype else (torch.float32, torch.bfloat16)
    for dtype in dtypes:
        yield Case(
            "mixed resolutions, 12 clips",
            dtype,
            size,
            {"frames": frames, "num_mels": 128, "patch_size": [16, 16], "classes": CLASSES},
            partial(_build, dtype, size, frames),
        )


def _build(dtype: torch.dtype, size: str, frames: list[int]) -> Work:
    # Fake tensors have no values to compare: a small twin on short clips shows that all agree.
    torch.manual_seed(0)
    twin = ElasticAST(CLASSES, dim=48, depth=2, num_heads=2)
    clips, labels = batch(frames, twin.geometry.num_mels, "cpu")
    short = [clip[: max(16, len(clip) // 4)] for clip in clips]
    amp = None if dtype == torch.float32 else dtype
    mode = FakeTensorMode()
    with mode, torch.device("cuda"):
        model = create_model(f"elastic_ast_{size}", CLASSES)

    def contender(name: str, why: str, make: Callable[..., Step]) -> Contender:
        small, full = make(twin, short, labels), make(model, clips, labels)
        return Contender(
            name,
            why,
            partial(small.train, amp),
            saved_bytes=partial(fake_saved_bytes, full, mode, amp),
            flops=full.flops,
            tokens=full.tokens,
        )

    return Work(
        tuple(contender(*entry) for entry in CONTENDERS),
        partial(reference, twin, short, labels),
    )


def fake_saved_bytes(step: Step, mode: FakeTensorMode, amp: torch.dtype | None) -> int:
    """Bytes kept by a step of a fake model on its inputs' fake twins.

    Args:
        step: of a model made in ``mode``, on a GPU that need not exist; the inputs are real.
        mode: of the fake tensors.
        amp: dtype of autocast; ``None`` for none.
    """
    inputs, labels = (fake_like(value, mode, "cuda") for value in (step.inputs, step.labels))
    fake = replace(step, inputs=inputs, labels=labels)
    given = [*step.model.parameters(), *tensors_of(inputs), labels]
    with mode, cuda_autocast(amp):
        return saved_bytes(lambda: fake.loss()[0], given)
