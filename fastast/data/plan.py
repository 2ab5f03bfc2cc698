"""What an epoch will do, settled from the lengths of the clips before a file is decoded.

Which clips, in which order, which part of each, at which time resolution, mixed with what; which
of them share a batch, and which rank computes it. All of it is a function of the seed and the
epoch, so a run can be taken up in the middle of an epoch by leaving out what was done, and every
rank knows what the others do without asking.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from fastast.data.batch import BatchBudget, padded_samples
from fastast.data.dataset import AudioDataset
from fastast.data.frames import samples_in
from fastast.data.packing import pack
from fastast.data.sampling import Crop, Mixup, Sampler
from fastast.ops.mel_plan import Framing, hop_from_ms
from fastast.random import random_below, random_bits
from fastast.segments import TokenBudget
from fastast.tokens import Mask, PatchGeometry, UnstructuredMask


@dataclass(frozen=True)
class Packing:
    """How clips are dealt out to batches.

    Args:
        strategy: ``"best_fit_decreasing"``, ``"first_fit"``, or ``"next_fit"`` (the order of the
            epoch, as ElasticAST does).
        window: clips looked ahead at.
        ranks: processes that train together.
        accumulate: batches whose gradients a rank adds up for one step.
    """

    strategy: str = "first_fit"
    window: int = 1024
    ranks: int = 1
    accumulate: int = 1

    def __post_init__(self) -> None:
        for name in ("window", "ranks", "accumulate"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")

    @property
    def group(self) -> int:
        """Batches of a step, over all ranks."""
        return self.ranks * self.accumulate


@dataclass(frozen=True)
class BatchPlan:
    """One batch to be. Arrays are ``[clips]``.

    Attributes:
        epoch: goes into the random numbers.
        geometry: how its spectrograms are cut into patches.
        rows: of the data set.
        keys: of the clips' random numbers.
        begin, num_samples: the part of each clip.
        frame_shift: in samples.
        time_pool: frames that are pooled to one; None: as many as the geometry says.
        patches: of each clip, before any are dropped.
        partners: rows of the clips that are mixed in, -1 for none.
        mix_weight: the clip's share of the mixture.
    """

    epoch: int
    geometry: PatchGeometry
    rows: np.ndarray
    keys: np.ndarray
    begin: np.ndarray
    num_samples: np.ndarray
    frame_shift: np.ndarray
    time_pool: np.ndarray | None
    patches: np.ndarray
    partners: np.ndarray
    mix_weight: np.ndarray


@dataclass(frozen=True)
class EpochPlan:
    """A whole epoch; what is not said here is as in :class:`BatchPlan`, ``[visits]`` each.

    Attributes:
        bins: visits of each batch; batch ``(s * accumulate + m) * ranks + r`` is the m-th of
            rank r in step s.
        geometries: of each step.
        tokens: of each visit.
    """

    epoch: int
    packing: Packing
    bins: list[np.ndarray]
    geometries: list[PatchGeometry]
    rows: np.ndarray
    keys: np.ndarray
    begin: np.ndarray
    num_samples: np.ndarray
    frame_shift: np.ndarray
    time_pool: np.ndarray | None
    patches: np.ndarray
    tokens: np.ndarray
    partners: np.ndarray
    mix_weight: np.ndarray

    @property
    def num_steps(self) -> int:
        """Steps of the epoch, the same on every rank."""
        return len(self.bins) // self.packing.group

    @property
    def step_tokens(self) -> np.ndarray:
        """Tokens of each step over all ranks, int64 ``[num_steps]``."""
        per_bin = np.array([self.tokens[visits].sum() for visits in self.bins], np.int64)
        return per_bin.reshape(-1, self.packing.group).sum(1)

    def batches_of(self, rank: int, first_step: int = 0) -> list[BatchPlan]:
        """The batches of a rank in order, ``accumulate`` for each step from ``first_step`` on."""
        first = first_step * self.packing.group + rank
        return [self._batch(index) for index in range(first, len(self.bins), self.packing.ranks)]

    def _batch(self, index: int) -> BatchPlan:
        visits = self.bins[index]
        return BatchPlan(
            self.epoch,
            self.geometries[index // self.packing.group],
            self.rows[visits],
            self.keys[visits],
            self.begin[visits],
            self.num_samples[visits],
            self.frame_shift[visits],
            None if self.time_pool is None else self.time_pool[visits],
            self.patches[visits],
            self.partners[visits],
            self.mix_weight[visits],
        )


class Planner:
    """Plans the epochs of a data set.

    Args:
        dataset: the clips.
        geometry: how spectrograms are cut into patches.
        patch_sizes: for models whose patches may have any size (FlexiAST): every step draws one of
            these, the same for all its batches on all ranks, instead of the geometry's. Batches
            are packed for whichever size gives a clip the most tokens, so that what clips a step
            holds does not depend on the draw, and larger patches leave room in the budget.
        budget: tokens and clips of a batch, and tokens of the longest clip.
        framing: of the filterbank: how many frames a clip has.
        frame_shift_ms: of the frames. Given several, every visit draws one
            (mixed-resolution training, ElasticAST section 3.4): see
            :func:`~fastast.data.mixed_frame_shifts`.
        time_pools: numbers of frames that are pooled to one, of which every visit draws one (the
            ablation of ElasticAST, section 3.5); none exceeds the geometry's ``time_pool``.
            Default: that one.
        max_seconds: keep only the beginning of longer clips.
        crop: which part of the clips to use; ``max_seconds`` then means nothing.
        dense_frames: for models of fixed input length: cut all clips to so many frames, and have
            the spectrograms of shorter ones padded to it (:attr:`Batch.dense_frames`). Batches
            then have as many clips as the budget holds, and no dead rows when they are full.
        token_drop: share of each clip's patches to drop, as ElasticAST's code does (0.1) and its
            paper does not; or a mask that says which, such as whole times and frequencies
            (Audio-MAE's fine-tuning). Packing counts the patches that remain.
        mixup: which clips to mix; default none.
        sampler: which clips an epoch visits, and whether in order.
        views: parts of each visit, with random numbers of their own, which stand side by side in
            one batch (ASiT: 2). Each counts as a clip.
        packing: how they are dealt out. Within a batch clips stand in order of their token count,
            longest first, so that equal lengths adjoin and can be computed together.
        seed: of all draws.

    Raises:
        ValueError: an argument out of range, or a clip that is longer than ``budget.max_length``
            at its finest resolution, or whose views do not fit one batch.
    """

    def __init__(
        self,
        dataset: AudioDataset,
        geometry: PatchGeometry,
        *,
        patch_sizes: Sequence[tuple[int, int]] = (),
        budget: TokenBudget,
        framing: Framing,
        frame_shift_ms: float | Sequence[float] = 10.0,
        time_pools: Sequence[int] = (),
        max_seconds: float | None = None,
        crop: Crop | None = None,
        dense_frames: int | None = None,
        token_drop: float | Mask = 0.0,
        mixup: Mixup | None = None,
        sampler: Sampler | None = None,
        views: int = 1,
        packing: Packing | None = None,
        seed: int = 0,
    ) -> None:
        self.dataset = dataset
        self.geometries = [geometry.with_patch_size(size) for size in patch_sizes] or [geometry]
        self.budget = budget
        self.framing = framing
        self.max_seconds = max_seconds
        self.crop = crop
        self.dense_frames = dense_frames
        self.mixup = mixup
        self.sampler = sampler or Sampler()
        self.views = views
        self.packing = packing or Packing()
        self.seed = seed
        if isinstance(token_drop, int | float):
            if not 0 <= token_drop < 1:
                raise ValueError(f"token_drop must lie in [0, 1), got {token_drop}")
            token_drop = UnstructuredMask(token_drop) if token_drop else None
        self.drop: Mask | None = token_drop
        if not 1 <= views <= budget.clips:
            raise ValueError(
                f"views must lie in [1, {budget.clips}], the clips of a batch, got {views}"
            )
        if max_seconds is not None and max_seconds <= 0:
            raise ValueError(f"max_seconds must be positive, got {max_seconds}")
        least = max(each.min_frames() for each in self.geometries)
        if dense_frames is not None and dense_frames < least:
            raise ValueError(f"dense_frames ({dense_frames}) is less than a patch ({least} frames)")
        choices = [frame_shift_ms] if isinstance(frame_shift_ms, int | float) else frame_shift_ms
        if not len(choices):
            raise ValueError("frame_shift_ms is empty: give at least one frame shift")
        self.frame_shifts = np.array(
            [hop_from_ms(ms, dataset.sample_rate) for ms in choices], np.int32
        )
        self.time_pools = np.array(time_pools, np.int64) if len(time_pools) else None
        if dense_frames is not None:
            self.budget = self._dense_budget(budget, dense_frames)
        whole_visits = self.budget.clips - self.budget.clips % views
        self.budget = replace(self.budget, clips=whole_visits)
        self._check_longest()
        self._last: EpochPlan | None = None

    def plan(self, epoch: int) -> EpochPlan:
        """The plan of an epoch. The last one is remembered."""
        if self._last is None or self._last.epoch != epoch:
            self._last = self._make(epoch)
        return self._last

    def fixed_sizes(self) -> dict[PatchGeometry, BatchBudget]:
        """Sizes that hold every batch of every epoch, for each patch size."""
        sizes = {"framing": self.framing, "max_frame_shift": int(self.frame_shifts.max())}
        if self.dense_frames is not None:
            frames = self.dense_frames
            return {
                each: BatchBudget.for_dense(self._dense_tokens(each), frames, **sizes)
                for each in self.geometries
            }
        sizes["drop"] = self.drop
        most = [BatchBudget.for_tokens(self.budget, each, **sizes) for each in self.geometries]
        if len(most) == 1:
            return {self.geometries[0]: most[0]}
        # The budget holds for every patch size at once, so the least number of frames does.
        frames = min(each.frames.tokens for each in most)
        longest = min(each.frames.max_length for each in most)
        return {
            each: BatchBudget.for_tokens(self._tokens_of(each, frames, longest), each, **sizes)
            for each in self.geometries
        }

    def _tokens_of(self, geometry: PatchGeometry, frames: int, longest: int) -> TokenBudget:
        """Most tokens, in these patches, of clips of so many frames in all."""
        clips, step = self.budget.clips, geometry.patch_size[1]

        def tokens(frames: int, clips: int, limit: int) -> int:
            # A clip shorter than a patch is made one, hence a patch more for each.
            patches = geometry.freq_patches * (frames // step + clips)
            return min(limit, patches + clips * geometry.prefix)

        length = tokens(longest, 1, self.budget.max_length)
        return TokenBudget(tokens(frames, clips, self.budget.tokens), clips, length)

    def _dense_tokens(self, geometry: PatchGeometry) -> TokenBudget:
        """The tokens of full batches of clips of ``dense_frames``."""
        patches = geometry.freq_patches * geometry.time_patches(self.dense_frames)
        length = int(self._num_tokens(patches, geometry))
        return TokenBudget(self.budget.clips * length, self.budget.clips, length)

    def _make(self, epoch: int) -> EpochPlan:
        visits = self.sampler.draw(self.dataset, self.seed, epoch).views(self.views)
        keys = torch.from_numpy(visits.keys)
        choice = random_below(self.seed, epoch, keys, "resolution", len(self.frame_shifts))
        frame_shift = self.frame_shifts[choice.numpy()]
        pool = self.time_pools
        if pool is not None:
            choice = random_below(self.seed, epoch, keys, "time pool", len(pool))
            pool = pool[choice.numpy()]
        lengths = self.dataset.lengths[visits.rows]
        begin, num_samples = np.zeros_like(lengths), lengths
        if self.crop is not None:
            begin, num_samples = self.crop.draw(
                lengths, visits.keys, self.dataset.sample_rate, self.seed, epoch
            )
        num_samples = self._limit(num_samples, frame_shift)
        all_patches = np.stack(
            [self._num_patches(num_samples, frame_shift, each, pool) for each in self.geometries]
        )
        all_tokens = np.stack(
            [self._num_tokens(*each) for each in zip(all_patches, self.geometries, strict=True)]
        )
        bins = self._deal(all_tokens.max(0), epoch)
        drawn = self._draw_patch_sizes(len(bins) // self.packing.group, epoch)
        drawn_for = np.zeros(len(lengths), np.int64)
        for index, in_bin in enumerate(bins):
            drawn_for[in_bin] = drawn[index // self.packing.group]
        visit = np.arange(len(lengths))
        partners, mix_weight = np.full(len(lengths), -1), np.ones(len(lengths), np.float32)
        if self.mixup is not None:
            partners, mix_weight = self.mixup.draw(visits.keys, len(self.dataset), self.seed, epoch)
        return EpochPlan(
            epoch,
            self.packing,
            bins,
            [self.geometries[size] for size in drawn],
            visits.rows,
            visits.keys,
            begin,
            num_samples,
            frame_shift,
            pool,
            all_patches[drawn_for, visit],
            all_tokens[drawn_for, visit],
            partners,
            mix_weight,
        )

    def _draw_patch_sizes(self, num_steps: int, epoch: int) -> list[int]:
        steps, count = torch.arange(num_steps), len(self.geometries)
        return random_below(self.seed, epoch, steps, "patch size", count).tolist()

    def _deal(self, tokens: np.ndarray, epoch: int) -> list[np.ndarray]:
        """Visits of each batch, longest first; the views of a clip side by side."""
        group, views = self.packing.group, np.arange(self.views)
        tokens = tokens.reshape(-1, self.views).sum(1)
        bin_of = pack(
            tokens,
            self.budget.tokens,
            self.budget.clips // self.views,
            strategy=self.packing.strategy,
            window=self.packing.window,
            group=group,
        )
        num_steps = int(bin_of.max()) // group + 1
        by_bin = np.lexsort((np.arange(len(tokens)), -tokens, bin_of))
        ends = np.cumsum(np.bincount(bin_of, minlength=num_steps * group))
        bins = np.split(by_bin, ends[:-1])
        bins = [(self.views * clips[:, None] + views).flatten() for clips in bins]
        if self.sampler.shuffle:
            # The packers make batches of long clips and batches of short ones, in order.
            places = random_bits(self.seed, epoch, torch.arange(num_steps), "steps", 1)[:, 0]
            order = np.argsort(places.numpy(), kind="stable").tolist()
            bins = [bins[step * group + place] for step in order for place in range(group)]
        return bins

    def _limit(self, num_samples: np.ndarray, frame_shift: np.ndarray | int) -> np.ndarray:
        """Samples that are used of so many."""
        if self.max_seconds is not None and self.crop is None:
            most = samples_in(self.max_seconds, self.dataset.sample_rate)
            num_samples = np.minimum(num_samples, most)
        if self.dense_frames is not None:
            most = self.framing.least_samples(self.dense_frames, frame_shift)
            num_samples = np.minimum(num_samples, most)
        return num_samples

    def _num_patches(
        self,
        num_samples: np.ndarray,
        frame_shift: np.ndarray | int,
        geometry: PatchGeometry,
        pool: np.ndarray | None,
    ) -> np.ndarray:
        """Patches of each clip, dropped ones included; all at least 1."""
        if self.dense_frames is not None:
            frames = np.full(len(num_samples), self.dense_frames)
        else:
            least = geometry.min_frames(pool)
            padded = padded_samples(num_samples, least, self.framing, frame_shift)
            frames = self.framing.num_frames(padded, frame_shift)
        return geometry.freq_patches * geometry.time_patches(frames, pool)

    def _num_tokens(self, patches: np.ndarray | int, geometry: PatchGeometry) -> np.ndarray | int:
        """Rows of the token stream that a clip takes: the patches it keeps and the prefix."""
        if self.drop is not None:
            freq = geometry.freq_patches
            patches = self.drop.num_kept(freq, patches // freq)
        return patches + geometry.prefix

    def _dense_budget(self, budget: TokenBudget, dense_frames: int) -> TokenBudget:
        """The part of a budget that clips of equal size can fill."""
        length = max(
            int(self._num_tokens(each.freq_patches * each.time_patches(dense_frames), each))
            for each in self.geometries
        )
        clips = min(budget.clips, budget.tokens // length)
        if clips < 1 or length > budget.max_length:
            raise ValueError(
                f"a clip of dense_frames={dense_frames} has {length} tokens but the budget allows "
                f"{min(budget.tokens, budget.max_length)}; raise it or lower dense_frames"
            )
        return TokenBudget(clips * length, clips, length)

    def _check_longest(self) -> None:
        finest = int(self.frame_shifts.min())
        longest = self.dataset.lengths
        if self.crop is not None:
            longest = self.crop.longest(longest, self.dataset.sample_rate)
        longest = self._limit(longest, finest)
        pool = None
        if self.time_pools is not None:
            pool = np.full(len(longest), self.time_pools.min())
        tokens = np.max(
            [
                self._num_tokens(self._num_patches(longest, finest, g, pool), g)
                for g in self.geometries
            ],
            0,
        )
        worst = int(tokens.argmax())
        limit = min(self.budget.max_length, self.budget.tokens // self.views)
        if tokens[worst] > limit:
            each = "" if self.views == 1 else f" for each of {self.views} views"
            raise ValueError(
                f"{self.dataset.paths[worst]} has {tokens[worst]} tokens but the budget allows "
                f"{limit}{each}; raise TokenBudget.max_length, or cut clips with max_seconds"
            )
