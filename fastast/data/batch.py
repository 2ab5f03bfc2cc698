"""A batch: waveforms end to end, and the tables that say what becomes of them.

All geometry is settled here, on the host: which samples are a clip's, how many frames it will
have, which patches of it become tokens. The device computes spectrograms and tokens from these
tables without ever asking for a size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch
from torch import Tensor

from fastast.ops.mel_plan import Framing
from fastast.segments import Segments, TokenBudget
from fastast.tokens import FoldGrid, Mask, PatchGeometry, PatchGrid

if TYPE_CHECKING:
    from fastast.data.dataset import LeftOut

IGNORED_TARGET = -100
"""Target of the empty segments of a fixed-shape batch; PyTorch's losses skip it."""


@dataclass(frozen=True)
class BatchBudget:
    """The fixed sizes of everything in a batch.

    Attributes:
        tokens: of the token stream, prefix tokens included.
        frames: of the frame stream.
        samples: of the waveform buffer.
    """

    tokens: TokenBudget
    frames: TokenBudget
    samples: int

    @classmethod
    def for_tokens(
        cls,
        tokens: TokenBudget,
        geometry: PatchGeometry,
        *,
        framing: Framing,
        max_frame_shift: int,
        drop: Mask | None = None,
    ) -> BatchBudget:
        """The least sizes that hold whatever clips fit the token budget.

        A clip of T time patches has at most ``T * stride + patch - 1`` frames (more would make
        another patch), and one of n frames at most ``n * frame_shift`` samples and the
        :meth:`~fastast.ops.Framing.spare_samples`.

        Args:
            tokens: the token budget.
            geometry: of the patches.
            framing: of the filterbank.
            max_frame_shift: in samples, the longest that occurs.
            drop: which patches are dropped. Frames are computed for all patches, so dropping makes
                the frame stream longer for the same tokens.
        """
        width, step = geometry.patch_frames, geometry.stride_frames

        def frames(num_tokens: int, clips: int) -> int:
            times = num_tokens // geometry.freq_patches
            if drop is not None:
                times = drop.most_times(geometry.freq_patches, num_tokens, clips)
            return times * step + clips * (width - 1)

        longest = frames(tokens.max_length - geometry.prefix, 1)
        total = max(longest, frames(tokens.tokens, tokens.clips))
        spare = framing.spare_samples(max_frame_shift)
        samples = total * max_frame_shift + tokens.clips * spare
        return cls(tokens, TokenBudget(total, tokens.clips, longest), samples)

    @classmethod
    def for_dense(
        cls, tokens: TokenBudget, dense_frames: int, *, framing: Framing, max_frame_shift: int
    ) -> BatchBudget:
        """The least sizes for batches of :attr:`Batch.dense_frames`; arguments as above."""
        frames = TokenBudget(tokens.clips * dense_frames, tokens.clips, dense_frames)
        samples = tokens.clips * framing.least_samples(dense_frames, max_frame_shift)
        return cls(tokens, frames, samples)


@dataclass(frozen=True)
class Batch:
    """Clips of any lengths and time resolutions. Make one with :func:`collate`.

    S segments hold ``num_clips`` clips; the rest, in batches of fixed shape, is empty.

    Attributes:
        waveforms: int16 ``[samples]``, the clips end to end.
        sample_offsets: int64 ``[S + 1]``; clip ``i`` owns samples
            ``sample_offsets[i]:sample_offsets[i + 1]``.
        frame_shift: int32 ``[S]``, samples per hop of each clip; 1 on empty segments.
        frames: the stream of mel frames that the waveforms yield.
        frame_rows: rows of that stream, dead ones included.
        grid: the patches of those frames that become tokens, as the model's geometry lists them.
        dense_frames: if not None, the model's input has a fixed length: the frame stream is to be
            padded and cut to ``[S, dense_frames, num_mels]``, and ``grid`` lists patches of that.
        targets: int64 ``[S]``, class indices, -100 on empty segments; or float32 ``[S, classes]``,
            several labels or mixed ones, zero on empty segments.
        clip_ids: int64 ``[S]``, keys of the clips' random numbers; -1 on empty segments. They are
            the clips' numbers in the data set, unless a clip is drawn several times in an epoch
            (:data:`fastast.data.sampling.OCCURRENCE`).
        epoch: int64 ``[]``, the other key. A tensor, so that compiled code serves every epoch.
        loss_denominator: float32 ``[]``. The loss of a batch is the sum over its clips divided by
            this: their number, unless a step has several batches (:meth:`with_denominator`).
        partner_waveforms: int16 ``[samples]``, what is mixed into the clips, end to end; None
            where nothing ever is.
        partner_offsets: int64 ``[S + 1]``, as ``sample_offsets``.
        mix_weight: float32 ``[S]``, the clip's share of the mixture; 1 where nothing is mixed in.
        num_clips: real clips. For logs: a traced function that reads it is compiled anew for
            every value.
        audio_seconds: of real audio.
        left_out: clips that should be here but could not be read.
    """

    waveforms: Tensor
    sample_offsets: Tensor
    frame_shift: Tensor
    frames: Segments
    frame_rows: int
    grid: PatchGrid | FoldGrid
    dense_frames: int | None
    targets: Tensor
    clip_ids: Tensor
    epoch: Tensor
    loss_denominator: Tensor
    partner_waveforms: Tensor | None
    partner_offsets: Tensor | None
    mix_weight: Tensor | None
    num_clips: int
    audio_seconds: float
    left_out: tuple[LeftOut, ...] = ()

    _TENSORS: ClassVar = (
        "waveforms",
        "sample_offsets",
        "frame_shift",
        "targets",
        "clip_ids",
        "epoch",
        "loss_denominator",
        "partner_waveforms",
        "partner_offsets",
        "mix_weight",
    )

    @property
    def num_tokens(self) -> int:
        """Real tokens, prefix tokens included. For logs, as ``num_clips``."""
        return int(self.grid.segments.host_offsets[-1])

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """The same batch on another device."""
        return replace(
            self,
            frames=self.frames.to(device, non_blocking),
            grid=self.grid.to(device, non_blocking),
            **{name: x.to(device, non_blocking=non_blocking) for name, x in self._tensors()},
        )

    def pin_memory(self) -> Batch:
        """Page-locks the tensors, so that :meth:`to` can overlap with computation."""
        return replace(
            self,
            frames=self.frames.pin_memory(),
            grid=self.grid.pin_memory(),
            **{name: x.pin_memory() for name, x in self._tensors()},
        )

    def with_denominator(self, denominator: float) -> Batch:
        """The same batch, as one of several of a step.

        With the number of clips of all of them, their gradients add up to the mean over the
        step's clips.
        """
        return replace(self, loss_denominator=torch.tensor(float(denominator)))

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        named = ((name, getattr(self, name)) for name in self._TENSORS)
        return ((name, x) for name, x in named if x is not None)


@dataclass(frozen=True)
class Clip:
    """One clip on its way into a batch.

    Attributes:
        waveform: int16 ``[samples]``.
        target: class index, or a tensor of one row of :attr:`Batch.targets`.
        clip_id: key of its random numbers; -1: not a clip, only something to fill a segment.
        frame_shift: samples per hop.
        keep: sorted indices of the patches that become tokens; default all.
        partner: int16 waveform to mix in, at most as long; default none.
        mix_weight: the clip's own share of the mixture.
        time_pool: frames that are pooled to one; default the geometry's.
    """

    waveform: Tensor
    target: int | Tensor
    clip_id: int
    frame_shift: int
    keep: np.ndarray | None = None
    partner: Tensor | None = None
    mix_weight: float = 1.0
    time_pool: int | None = None


def padded_samples(
    num_samples: int | np.ndarray,
    min_frames: int,
    framing: Framing,
    frame_shift: int | np.ndarray,
) -> int | np.ndarray:
    """Samples of a clip after it is extended to ``min_frames``, see :func:`collate`."""
    return np.maximum(num_samples, framing.least_samples(min_frames, frame_shift))[()]


def collate(
    clips: Sequence[Clip],
    geometry: PatchGeometry,
    *,
    framing: Framing,
    sample_rate: int,
    epoch: int = 0,
    budget: BatchBudget | None = None,
    dense_frames: int | None = None,
    mixing: bool = False,
    left_out: Sequence[LeftOut] = (),
) -> Batch:
    """Packs clips into a batch, in order. Runs on the host.

    A clip too short for one patch is extended with zero samples to exactly one patch: it would
    otherwise have no token and no output, and losing a labelled clip without a word is worse than
    a little silence. Nothing else is padded.

    With ``dense_frames``, spectrograms are padded on the device, as AST does it; a clip shorter
    than a frame is extended to one.

    Args:
        clips: at least one.
        geometry: how spectrograms are cut into patches.
        framing: of the filterbank.
        sample_rate: in Hz.
        epoch: goes into the batch.
        budget: fixes all shapes; its ``tokens.clips`` is S. Default: exact sizes.
        dense_frames: see :attr:`Batch.dense_frames`.
        mixing: whether there may be partners; a run's batches are all alike in this.
        left_out: goes into the batch.

    Raises:
        ValueError: no clips, or they do not fit the budget.
    """
    if not clips:
        raise ValueError("clips is empty: a batch needs at least one")
    shifts = np.array([clip.frame_shift for clip in clips], np.int32)
    real = np.array([len(clip.waveform) for clip in clips], np.int64)
    pool = _time_pools(clips)
    min_frames = 1 if dense_frames else geometry.min_frames(pool)
    lengths = padded_samples(real, min_frames, framing, shifts)
    total = int(lengths.sum())
    capacity = budget.samples if budget else total
    num_segments = budget.tokens.clips if budget else len(clips)
    if total > capacity:
        raise ValueError(
            f"the batch needs {total} samples but the budget allows {capacity}; "
            "raise BatchBudget.samples or put fewer clips into a batch"
        )
    frames = Segments.from_lengths(
        framing.num_frames(lengths, shifts), budget.frames if budget else None
    )
    # Where the patches are cut from: the frame stream, or the dense tensor as a stream.
    source = [dense_frames] * len(clips) if dense_frames else frames.host_offsets.diff().tolist()
    keep = None
    if any(clip.keep is not None for clip in clips):
        keep = [
            np.arange(geometry.freq_patches * geometry.time_patches(length, clip.time_pool))
            if clip.keep is None
            else clip.keep
            for clip, length in zip(clips, source, strict=False)
        ]

    def column(values: Sequence[int] | np.ndarray, fill: int, dtype: type) -> Tensor:
        filled = np.full(num_segments, fill, dtype)
        filled[: len(clips)] = values
        return torch.from_numpy(filled)

    real_clips = sum(clip.clip_id >= 0 for clip in clips)
    waveforms, sample_offsets = _lay_out(
        [clip.waveform for clip in clips], lengths, capacity, num_segments
    )
    partner_waveforms = partner_offsets = mix_weight = None
    if mixing:
        partners = [waveforms[:0] if clip.partner is None else clip.partner for clip in clips]
        partner_lengths = np.array([len(partner) for partner in partners], np.int64)
        partner_waveforms, partner_offsets = _lay_out(
            partners,
            partner_lengths,
            budget.samples if budget else int(partner_lengths.sum()),
            num_segments,
        )
        mix_weight = column([clip.mix_weight for clip in clips], 1, np.float32)
    return Batch(
        waveforms=waveforms,
        sample_offsets=sample_offsets,
        frame_shift=column(shifts, 1, np.int32),
        frames=frames,
        frame_rows=budget.frames.tokens if budget else int(frames.host_offsets[-1]),
        grid=geometry.grid(source, budget.tokens if budget else None, keep, pool),
        dense_frames=dense_frames,
        targets=_stack_targets([clip.target for clip in clips], num_segments),
        clip_ids=column([clip.clip_id for clip in clips], -1, np.int64),
        epoch=torch.tensor(epoch),
        loss_denominator=torch.tensor(float(max(real_clips, 1))),
        partner_waveforms=partner_waveforms,
        partner_offsets=partner_offsets,
        mix_weight=mix_weight,
        num_clips=real_clips,
        audio_seconds=float(real.sum() / sample_rate),
        left_out=tuple(left_out),
    )


def _time_pools(clips: Sequence[Clip]) -> np.ndarray | None:
    """What each clip pools, if they say so."""
    pools = [clip.time_pool for clip in clips]
    return None if None in pools else np.array(pools, np.int64)


def _lay_out(
    pieces: Sequence[Tensor], lengths: np.ndarray, capacity: int, num_segments: int
) -> tuple[Tensor, Tensor]:
    """Pieces end to end, each followed by zeros up to its length, and where they begin."""
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    stream = torch.zeros(capacity, dtype=torch.int16)
    for piece, begin in zip(pieces, offsets.tolist(), strict=False):
        stream[begin : begin + len(piece)] = piece
    return stream, torch.from_numpy(np.pad(offsets, (0, num_segments - len(pieces)), "edge"))


def _stack_targets(targets: Sequence[int | Tensor], num_segments: int) -> Tensor:
    rows = torch.stack([torch.as_tensor(target) for target in targets])
    fill = IGNORED_TARGET if rows.ndim == 1 else 0
    empty = rows.new_full((num_segments - len(targets), *rows.shape[1:]), fill)
    return torch.cat([rows, empty])
