"""From a data set to packed batches, epoch by epoch.

Everything random is a function of (seed, epoch, clip): the order of an epoch, each clip's frame
shift, which of its patches are kept. Other budgets or orders change which clips share a batch,
and nothing about the clips. An epoch can be planned without decoding a file, because lengths come
from the headers.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch

from fastast.data.batch import Batch, BatchBudget, Clip, collate, padded_samples
from fastast.data.dataset import AudioDataset
from fastast.data.frames import samples_for
from fastast.data.packing import next_fit
from fastast.ops.mel_filterbank import frame_counts, hop_from_ms
from fastast.random import random_bits, random_uniform
from fastast.segments import TokenBudget
from fastast.tokens import PatchGeometry, kept_patches, random_keep


class PackedLoader:
    """Deals the clips of a data set into batches of real tokens.

    Each epoch visits every clip once, in an order of its own; next-fit packing fills batches up
    to the budget. Within a batch clips stand in order of their token count, longest first, so
    that equal lengths adjoin and can be computed together; targets and clip ids stand in the same
    order.

    Args:
        dataset: the clips.
        geometry: how spectrograms are cut into patches.
        budget: tokens and clips of a batch, and tokens of the longest clip.
        window: of a frame, in samples.
        frame_shift_ms: of the frames. Given several, every clip draws one anew in each epoch
            (mixed-resolution training, ElasticAST section 3.4): see
            :func:`~fastast.data.mixed_frame_shifts`.
        max_seconds: keep only the beginning of longer clips.
        dense_frames: for models of fixed input length: cut all clips to so many frames, and have
            the spectrograms of shorter ones padded to it (:attr:`Batch.dense_frames`). Batches
            then have as many clips as the budget holds, and no dead rows when they are full.
        token_drop: share of each clip's patches to drop, as ElasticAST's code does (0.1) and its
            paper does not. Packing counts the patches that remain.
        shuffle: draw the order of each epoch. Otherwise it is the data set's.
        seed: of all draws.
        fixed_shapes: give all batches the same shapes, from ``budget``, so that one compiled or
            captured graph serves them.
        prefetch: batches that a background thread makes ahead.
        pin_memory: page-lock the batches, for asynchronous copies to a GPU.

    Raises:
        ValueError: an argument out of range, or a clip that is longer than ``budget.max_length``
            at its finest resolution.
    """

    def __init__(
        self,
        dataset: AudioDataset,
        geometry: PatchGeometry,
        *,
        budget: TokenBudget,
        window: int,
        frame_shift_ms: float | Sequence[float] = 10.0,
        max_seconds: float | None = None,
        dense_frames: int | None = None,
        token_drop: float = 0.0,
        shuffle: bool = True,
        seed: int = 0,
        fixed_shapes: bool = False,
        prefetch: int = 2,
        pin_memory: bool = False,
    ) -> None:
        self.dataset = dataset
        self.geometry = geometry
        self.budget = budget
        self.window = window
        self.max_seconds = max_seconds
        self.dense_frames = dense_frames
        self.token_drop = token_drop
        self.shuffle = shuffle
        self.seed = seed
        self.prefetch = prefetch
        self.pin_memory = pin_memory
        if window < 1:
            raise ValueError(f"window must be at least 1 sample, got {window}")
        if not 0 <= token_drop < 1:
            raise ValueError(f"token_drop must lie in [0, 1), got {token_drop}")
        if max_seconds is not None and max_seconds <= 0:
            raise ValueError(f"max_seconds must be positive, got {max_seconds}")
        if dense_frames is not None and dense_frames < geometry.min_frames():
            raise ValueError(
                f"dense_frames ({dense_frames}) is less than a patch "
                f"({geometry.min_frames()} frames)"
            )
        if prefetch < 1:
            raise ValueError(f"prefetch must be at least 1 batch, got {prefetch}")

        choices = [frame_shift_ms] if isinstance(frame_shift_ms, int | float) else frame_shift_ms
        if not len(choices):
            raise ValueError("frame_shift_ms is empty: give at least one frame shift")
        self.frame_shifts = np.array(
            [hop_from_ms(ms, dataset.sample_rate) for ms in choices], np.int32
        )
        if dense_frames is not None:
            self.budget = self._dense_budget(budget, dense_frames)
        self._check_longest()
        self.fixed_sizes = self._fixed_sizes() if fixed_shapes else None

    def epoch(self, epoch: int) -> Iterator[Batch]:
        """The batches of an epoch. The same call yields the same batches.

        A background thread works ahead; it ends with the iteration, also when that is cut short.

        Raises:
            AudioError: a file that cannot be decoded, when its batch is due.
        """
        plan = self._plan(epoch)
        pending: deque[Future[Batch]] = deque()
        with ThreadPoolExecutor(1, "fastast-loader") as pool:
            try:
                for rows in plan.batches:
                    pending.append(pool.submit(self._load, plan, rows))
                    if len(pending) > self.prefetch:
                        yield pending.popleft().result()
                while pending:
                    yield pending.popleft().result()
            finally:
                for future in pending:
                    future.cancel()

    def num_batches(self, epoch: int) -> int:
        """Batches of an epoch. It differs between epochs, as the order does."""
        return len(self._plan(epoch).batches)

    def _plan(self, epoch: int) -> _Plan:
        clip_ids = torch.from_numpy(self.dataset.clip_ids)
        draw = random_uniform(self.seed, epoch, clip_ids, "resolution", 1)[:, 0].double().numpy()
        frame_shift = self.frame_shifts[(draw * len(self.frame_shifts)).astype(np.int64)]
        num_samples = self._cut_samples(frame_shift)
        patches = self._num_patches(num_samples, frame_shift)
        tokens = self._num_tokens(patches)

        order = np.arange(len(self.dataset))
        if self.shuffle:
            keys = random_bits(self.seed, epoch, clip_ids, "order", 1)[:, 0]
            order = np.argsort(keys.numpy(), kind="stable")
        batch_of = next_fit(tokens[order], self.budget.tokens, self.budget.clips)
        batches = np.split(order, np.flatnonzero(np.diff(batch_of)) + 1)
        by_length = [rows[np.argsort(-tokens[rows], kind="stable")] for rows in batches]
        return _Plan(epoch, by_length, num_samples, frame_shift, patches)

    def _cut_samples(self, frame_shift: np.ndarray | int) -> np.ndarray:
        """Samples of each clip that are used, before a short one is extended: ``[clips]``."""
        samples = self.dataset.lengths
        if self.max_seconds is not None:
            samples = np.minimum(samples, int(self.max_seconds * self.dataset.sample_rate))
        if self.dense_frames is not None:
            most = samples_for(self.dense_frames, self.window, frame_shift)
            samples = np.minimum(samples, most)
        return samples

    def _num_patches(self, num_samples: np.ndarray, frame_shift: np.ndarray | int) -> np.ndarray:
        """Patches of each clip, dropped ones included: ``[clips]``, all at least 1."""
        if self.dense_frames is not None:
            frames = np.full(len(num_samples), self.dense_frames)
        else:
            least = self.geometry.min_frames()
            padded = padded_samples(num_samples, least, self.window, frame_shift)
            frames = frame_counts(padded, self.window, frame_shift)
        return self.geometry.freq_patches * self.geometry.time_patches(frames)

    def _num_tokens(self, patches: np.ndarray | int) -> np.ndarray | int:
        """Rows of the token stream that a clip takes: the patches it keeps and the prefix."""
        return kept_patches(patches, self.token_drop) + self.geometry.prefix

    def _dense_budget(self, budget: TokenBudget, dense_frames: int) -> TokenBudget:
        """The part of a budget that clips of equal size can fill."""
        patches = self.geometry.freq_patches * self.geometry.time_patches(dense_frames)
        length = int(self._num_tokens(patches))
        clips = min(budget.clips, budget.tokens // length)
        if clips < 1 or length > budget.max_length:
            raise ValueError(
                f"a clip of dense_frames={dense_frames} has {length} tokens but the budget allows "
                f"{min(budget.tokens, budget.max_length)}; raise it or lower dense_frames"
            )
        return TokenBudget(clips * length, clips, length)

    def _fixed_sizes(self) -> BatchBudget:
        longest_shift = int(self.frame_shifts.max())
        if self.dense_frames is not None:
            return BatchBudget.for_dense(
                self.budget, self.dense_frames, window=self.window, max_frame_shift=longest_shift
            )
        return BatchBudget.for_tokens(
            self.budget,
            self.geometry,
            window=self.window,
            max_frame_shift=longest_shift,
            token_drop=self.token_drop,
        )

    def _check_longest(self) -> None:
        finest = int(self.frame_shifts.min())
        tokens = self._num_tokens(self._num_patches(self._cut_samples(finest), finest))
        longest = int(tokens.argmax())
        if tokens[longest] > self.budget.max_length:
            raise ValueError(
                f"{self.dataset.paths[longest]} has {tokens[longest]} tokens but the budget allows "
                f"{self.budget.max_length}; raise TokenBudget.max_length, or cut clips with "
                "max_seconds"
            )

    def _load(self, plan: _Plan, rows: np.ndarray) -> Batch:
        """Decodes and packs one batch. Runs in the background thread."""
        batch = collate(
            [self._clip(plan, row) for row in rows.tolist()],
            self.geometry,
            window=self.window,
            sample_rate=self.dataset.sample_rate,
            epoch=plan.epoch,
            budget=self.fixed_sizes,
            dense_frames=self.dense_frames,
        )
        return batch.pin_memory() if self.pin_memory else batch

    def _clip(self, plan: _Plan, row: int) -> Clip:
        clip_id = int(self.dataset.clip_ids[row])
        keep = None
        if self.token_drop:
            patches = int(plan.patches[row])
            keep = random_keep(patches, self.token_drop, self.seed, plan.epoch, clip_id)
        return Clip(
            waveform=self.dataset.waveform(row)[: plan.num_samples[row]],
            target=int(self.dataset.labels[row]),
            clip_id=clip_id,
            frame_shift=int(plan.frame_shift[row]),
            keep=keep,
        )


@dataclass(frozen=True)
class _Plan:
    """What an epoch will do, settled from lengths alone. All but ``batches`` are ``[clips]``."""

    epoch: int
    batches: list[np.ndarray]
    num_samples: np.ndarray
    frame_shift: np.ndarray
    patches: np.ndarray
