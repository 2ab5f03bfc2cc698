"""From a plan to packed batches: decoding, in the background or in processes of its own.

Neither the number of processes nor the order in which they finish has any influence on a batch:
what is in it is settled by the plan (:mod:`fastast.data.plan`).
"""

from __future__ import annotations

import os
import signal
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from multiprocessing import parent_process
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, get_worker_info

from fastast.data.audio import AudioError
from fastast.data.batch import IGNORED_TARGET, Batch, BatchBudget, Clip, collate
from fastast.data.dataset import AudioDataset
from fastast.data.manifest import LeftOut
from fastast.data.plan import BatchPlan, Planner
from fastast.data.sampling import cut
from fastast.tokens import PatchGeometry, kept_lists


class PackedLoader:
    """Deals the clips of a data set into batches of real tokens, epoch by epoch.

    Args:
        planner: what the batches hold.
        rank: which of ``planner.packing.ranks`` processes this one is.
        fixed_shapes: give all batches the same shapes, from the planner's budget, so that one
            compiled or captured graph serves them.
        workers: processes that decode. 0: a background thread, which is enough where clips are
            short or few, and can keep what it decoded in memory.
        prefetch: batches that the thread, or each process, makes ahead.
        pin_memory: page-lock the batches, for asynchronous copies to a GPU.
        bad_files: what to do with a clip that cannot be decoded: ``"stop"`` with an error, or
            ``"skip"`` it and list it in :attr:`Batch.left_out`.

    Raises:
        ValueError: an argument out of range.
    """

    def __init__(
        self,
        planner: Planner,
        *,
        rank: int = 0,
        fixed_shapes: bool = False,
        workers: int = 0,
        prefetch: int = 2,
        pin_memory: bool = False,
        bad_files: Literal["stop", "skip"] = "stop",
    ) -> None:
        if not 0 <= rank < planner.packing.ranks:
            raise ValueError(f"rank must lie in [0, {planner.packing.ranks}), got {rank}")
        if workers < 0:
            raise ValueError(f"workers must not be negative, got {workers}")
        if prefetch < 1:
            raise ValueError(f"prefetch must be at least 1 batch, got {prefetch}")
        if bad_files not in ("stop", "skip"):
            raise ValueError(f"bad_files must be 'stop' or 'skip', got {bad_files!r}")
        self.planner = planner
        self.rank = rank
        self.workers = workers
        self.prefetch = prefetch
        self.pin_memory = pin_memory
        sizes = planner.fixed_sizes() if fixed_shapes else None
        self._make = _BatchMaker(planner, sizes, bad_files)
        self._orders: list[BatchPlan] = []
        self._processes: DataLoader | None = None

    @property
    def dataset(self) -> AudioDataset:
        """The clips."""
        return self.planner.dataset

    def num_steps(self, epoch: int) -> int:
        """Steps of an epoch, the same on every rank. It differs between epochs, as the order
        does."""
        return self.planner.plan(epoch).num_steps

    def num_batches(self, epoch: int) -> int:
        """Batches of an epoch that this rank computes."""
        return self.num_steps(epoch) * self.planner.packing.accumulate

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[Batch]:
        """This rank's batches of an epoch, ``planner.packing.accumulate`` for each step.

        The same call yields the same batches. The work ahead ends with the iteration, also when
        that is cut short.

        Args:
            epoch: number of the epoch.
            first_step: leave out the steps before it, to go on where an epoch was broken off.

        Raises:
            AudioError: a file that cannot be decoded, when its batch is due, if ``bad_files`` is
                ``"stop"``.
        """
        orders = self.planner.plan(epoch).batches_of(self.rank, first_step)
        return self._from_processes(orders) if self.workers else self._from_thread(orders)

    def close(self) -> None:
        """Ends the processes, which else live as long as the loader; an epoch starts new ones."""
        self._processes = None

    def silent_batch(self) -> Batch:
        """A batch without clips, of silence that counts for nothing."""
        nothing = np.zeros(0, np.int64)
        columns = [nothing] * 5 + [None] + [nothing] * 3
        return self._make[BatchPlan(0, self.planner.geometries[0], *columns)]

    def _from_thread(self, orders: list[BatchPlan]) -> Iterator[Batch]:
        pending: deque[Future[Batch]] = deque()

        def make(order: BatchPlan) -> Batch:
            batch = _unless_error(self._make[order])
            return batch.pin_memory() if self.pin_memory else batch

        with ThreadPoolExecutor(1, "fastast-loader") as pool:
            try:
                for order in orders:
                    pending.append(pool.submit(make, order))
                    if len(pending) > self.prefetch:
                        yield pending.popleft().result()
                while pending:
                    yield pending.popleft().result()
            finally:
                for future in pending:
                    future.cancel()

    def _from_processes(self, orders: list[BatchPlan]) -> Iterator[Batch]:
        if self._processes is None:
            self._processes = self._new_processes()
        self._orders[:] = orders
        yield from map(_unless_error, self._processes)

    def _new_processes(self) -> DataLoader:
        return DataLoader(
            self._make,
            sampler=self._orders,
            batch_size=None,
            num_workers=self.workers,
            prefetch_factor=self.prefetch,
            pin_memory=self.pin_memory,
            persistent_workers=True,
            # They share the data set's memory, and begin without threads (`_in_a_process`).
            multiprocessing_context="fork",
            worker_init_fn=_in_a_process,
            # It draws a seed for the processes in each epoch: not from the run's random numbers.
            generator=torch.Generator(),
        )


def _unless_error(made: Batch | AudioError) -> Batch:
    if isinstance(made, AudioError):
        try:
            raise made
        finally:
            # The error's traceback holds this frame. If this frame held the error, both would stay
            # until a garbage collection, and so would the loader, which the traceback holds too.
            del made
    return made


class _BatchMaker:
    """Decodes and packs batches. A sequence over plans, as DataLoader asks for.

    Errors about files are returned, because DataLoader would make others of them.
    """

    def __init__(
        self, planner: Planner, sizes: dict[PatchGeometry, BatchBudget] | None, bad_files: str
    ) -> None:
        self.dataset = planner.dataset
        self.framing, self.dense_frames = planner.framing, planner.dense_frames
        self.drop, self.seed = planner.drop, planner.seed
        self.mixing = planner.mixup is not None
        self.mix_targets = planner.mixup is not None and planner.mixup.targets
        self.shortest_shift = int(planner.frame_shifts.min())
        self.views = planner.views
        self.sizes = sizes
        self.skip_bad = bad_files == "skip"

    def __getitem__(self, order: BatchPlan) -> Batch | AudioError:
        left_out: list[LeftOut] = []
        try:
            keeps = self._kept(order)
            found = [self._clip(order, index, keep, left_out) for index, keep in enumerate(keeps)]
        except AudioError as error:
            return error
        clips = [clip for clip in found if clip is not None]
        return collate(
            clips or [self._filler()] * self.views,
            order.geometry,
            framing=self.framing,
            sample_rate=self.dataset.sample_rate,
            epoch=order.epoch,
            budget=self.sizes and self.sizes[order.geometry],
            dense_frames=self.dense_frames,
            mixing=self.mixing,
            left_out=left_out,
        )

    def _kept(self, order: BatchPlan) -> list[np.ndarray | None]:
        """Each clip's patches that become tokens; None for all."""
        if self.drop is None:
            return [None] * len(order.rows)
        times = order.patches // order.geometry.freq_patches
        keys = {"seed": self.seed, "epoch": order.epoch}
        return kept_lists(self.drop, order.geometry, times, order.keys, **keys)

    def _clip(
        self, order: BatchPlan, index: int, keep: np.ndarray | None, left_out: list[LeftOut]
    ) -> Clip | None:
        row, key = int(order.rows[index]), int(order.keys[index])
        num_samples = int(order.num_samples[index])
        waveform = self._read(row, left_out)
        if waveform is None:
            return None
        clip = Clip(
            waveform=cut(waveform, int(order.begin[index]), num_samples),
            target=self._target(row),
            clip_id=key,
            frame_shift=int(order.frame_shift[index]),
            keep=keep,
            time_pool=None if order.time_pool is None else int(order.time_pool[index]),
        )
        partner = int(order.partners[index])
        # One that cannot be read is listed when its own turn comes.
        if partner >= 0 and (other := self._read(partner, [])) is not None:
            share = float(order.mix_weight[index])
            if self.mix_targets:
                clip.target.mul_(share).add_(self._target(partner), alpha=1 - share)
            return replace(clip, partner=other[:num_samples], mix_weight=share)
        return clip

    def _read(self, row: int, left_out: list[LeftOut]) -> Tensor | None:
        try:
            return self.dataset.waveform(row)
        except AudioError as error:
            if not self.skip_bad:
                raise
            left_out.append(LeftOut(str(error.path), error.what))
            return None

    def _target(self, row: int) -> Tensor:
        """What the clip is: a class, or a row of numbers where clips have several or are mixed."""
        target = self.dataset.targets([row])[0]
        if self.mixing and not self.dataset.multi_label:
            shares = torch.zeros(len(self.dataset.class_names))
            if target >= 0:  # it is negative where a clip has no label
                shares[target] = 1.0
            return shares
        return target

    def _filler(self) -> Clip:
        """Silence that counts for nothing, for a batch none of whose clips could be read."""
        waveform = torch.zeros(0, dtype=torch.int16)
        target = torch.zeros_like(self._target(0))
        if target.ndim == 0:
            target.fill_(IGNORED_TARGET)
        keep = None if self.drop is None else np.zeros(1, np.int64)
        return Clip(waveform, target, -1, self.shortest_shift, keep)


def _in_a_process(_: int) -> None:
    # A scheduler may ask every process of a job to stop. Training does, and needs these until then.
    # DataLoader, and Python at its exit, ask by SIGTERM too, and Python then waits without limit:
    # the parent is obeyed. Who asks, only sigwaitinfo tells. It needs the signal blocked in all
    # threads; there is one so far, and others inherit that.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_leave_when_told, args=(parent_process().pid,), daemon=True).start()
    # What a process decodes is not there for the others, nor in the next epoch.
    get_worker_info().dataset.dataset.forget()


def _leave_when_told(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)
