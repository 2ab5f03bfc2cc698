"""A training step of ElasticAST on mixed time resolutions: packed, the paper's rows, padded."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench import flops
from bench.batches import mixed_resolution_frames
from bench.peers.attention import sdpa_attention
from bench.peers.clip_by_clip import ClipByClip
from bench.peers.dense_rows import ROW_LIMIT, DenseRows
from bench.peers.elastic import Attention
from bench.peers.padded import Padded
from bench.registry import Case, Contender, Settings, Work, benchmark
from fastast import ElasticAST, Spectrograms, create_model

CLASSES = 527
"""Of AudioSet."""


@dataclass(frozen=True)
class Step:
    """One way to train one model on one batch; the optimiser is left out.

    Args:
        model: ours, whose parameters are trained.
        run: the model on the contender's inputs.
        inputs: of ``run``, geometry included; made before the step, as a loader would.
        labels: int64 ``[clips]``.
        tokens, scored, pooling: what the contender computes, see :func:`flops.elastic_step`.
    """

    model: ElasticAST
    run: nn.Module
    inputs: tuple
    labels: Tensor
    tokens: int
    scored: int
    pooling: int

    @property
    def flops(self) -> int:
        """Of forward and backward, see :mod:`bench.flops`."""
        return flops.elastic_step(
            self.model, self.tokens, self.scored, self.pooling, len(self.labels)
        )

    def loss(self) -> tuple[Tensor, Tensor]:
        """Cross-entropy and logits."""
        logits = self.run(*self.inputs)
        return F.cross_entropy(logits, self.labels), logits

    def train(self, amp: torch.dtype | None = None) -> dict[str, Tensor]:
        """Forward, loss and backward; the loss, the logits and all gradients by name.

        Args:
            amp: dtype of autocast; ``None`` for none.
        """
        with torch.autocast(self.labels.device.type, amp, enabled=amp is not None):
            loss, logits = self.loss()
        loss.backward()
        results = {"loss": loss.detach(), "logits": logits.detach()}
        results |= {name: p.grad for name, p in self.model.named_parameters()}
        self.model.zero_grad(set_to_none=True)
        return results


def packed_step(model: ElasticAST, clips: list[Tensor], labels: Tensor) -> Step:
    """Ours: one stream of the clips' own tokens."""
    inputs = Spectrograms.from_list(clips)
    grid = model.geometry.grid(inputs.segments).to(clips[0].device)
    lengths = [int(model.geometry.num_tokens(len(clip))) for clip in clips]
    dim, heads = model.head.in_features, model.pool.num_heads
    pooling = flops.pool_folded(dim, heads, sum(lengths), len(clips))
    return Step(model, model, (inputs, grid), labels, sum(lengths), flops.pairs(lengths), pooling)


def dense_rows_step(
    model: ElasticAST, clips: list[Tensor], labels: Tensor, limit: int = ROW_LIMIT
) -> Step:
    """The paper's: padded rows of at most ``limit`` tokens and a dense mask."""
    run = DenseRows(model, limit)
    layout = run.layout([len(clip) for clip in clips], clips[0].device)
    rows, width = layout[0].padding.shape
    queries = rows * len(layout[0].queries)
    pooling = flops.pool_projected(
        model.head.in_features, rows * width, queries, queries, queries * width
    )
    return Step(
        model, run, (clips, layout), labels, rows * width, flops.pairs([width] * rows), pooling
    )


def padded_step(
    model: ElasticAST, clips: list[Tensor], labels: Tensor, attention: Attention = sdpa_attention
) -> Step:
    """Every clip padded to the longest, fused attention with a key mask."""
    run = Padded(model, attention)
    frames = nn.utils.rnn.pad_sequence(clips, batch_first=True)
    mask = run.key_mask([len(clip) for clip in clips], frames.device)
    length = int(model.geometry.num_tokens(frames.shape[1]))
    tokens = len(clips) * length
    pooling = flops.pool_projected(model.head.in_features, tokens, 1, len(clips), tokens)
    return Step(
        model, run, (frames, mask), labels, tokens, flops.pairs([length] * len(clips)), pooling
    )


def reference(
    model: ElasticAST, clips: list[Tensor], labels: Tensor, dtype: torch.dtype
) -> dict[str, Tensor]:
    """What a step must give, clip by clip: float64 is the truth; lower is what rounding does."""
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    model = copy.deepcopy(model).to(exact)
    clips = [clip.to(exact) for clip in clips]
    step = Step(model, ClipByClip(model), (clips,), labels, 0, 0, 0)
    return step.train(None if dtype == exact else dtype)


def batch(
    frames: list[int], num_mels: int, device: torch.device | str, classes: int = CLASSES
) -> tuple[list[Tensor], Tensor]:
    """Random clips ``[T_i, num_mels]``, normalised as the front end's output is, and labels."""
    generator = torch.Generator().manual_seed(0)
    clips = [0.5 * torch.randn(count, num_mels, generator=generator) for count in frames]
    labels = torch.randint(classes, (len(frames),), generator=generator)
    return [clip.to(device) for clip in clips], labels.to(device)


CONTENDERS: tuple[tuple[str, str, Callable[..., Step]], ...] = (
    ("fastast", "one stream of the clips' own tokens", packed_step),
    (
        "dense rows",
        "the paper's: clips packed into rows of at most 2048 tokens, explicit masked attention",
        dense_rows_step,
    ),
    (
        "padded SDPA",
        "without the paper: clips padded to the longest, PyTorch's fused attention, a key mask",
        padded_step,
    ),
)


@benchmark(
    "e2e/elastic_ast",
    "A training step (forward, cross-entropy, backward; no optimiser) of ElasticAST on twelve "
    "AudioSet-like clips of mixed time resolution.",
)
def cases(settings: Settings) -> Iterator[Case]:
    dtype, size, frames = settings.timed_dtype, settings.timed_size, mixed_resolution_frames()
    yield Case(
        "mixed resolutions, 12 clips",
        dtype,
        size,
        {"frames": frames, "num_mels": 128, "patch_size": [16, 16], "classes": CLASSES},
        partial(_build, settings.device, dtype, size, frames),
    )


def _build(device: torch.device, dtype: torch.dtype, size: str, frames: list[int]) -> Work:
    torch.manual_seed(0)
    model = create_model(f"elastic_ast_{size}", CLASSES).to(device)
    clips, labels = batch(frames, model.geometry.num_mels, device)
    amp = None if dtype == torch.float32 else dtype

    def contender(name: str, why: str, make: Callable[..., Step]) -> Contender:
        step = make(model, clips, labels)

        def timed() -> None:
            step.train(amp)

        return Contender(
            name,
            why,
            partial(step.train, amp),
            timed,
            flops=step.flops,
            tokens=step.tokens,
        )

    return Work(
        tuple(contender(*entry) for entry in CONTENDERS),
        partial(reference, model, clips, labels),
    )
