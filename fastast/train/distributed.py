"""Several processes that train together, as torchrun starts them."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Ranks:
    """This process among those that train together. Alone, every method is a matter of course.

    Attributes:
        rank: of this process.
        size: number of processes.
        local_rank: of this process on its machine, which is the number of its GPU.
        local_size: processes on this machine.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes and prints."""
        return self.rank == 0

    def any(self, *flags: bool) -> list[bool]:
        """For each flag, whether it is set on any rank. Goes over the CPU."""
        if self.size == 1:
            return list(flags)
        tensor = torch.tensor(flags, dtype=torch.int32)
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
        return [bool(flag) for flag in tensor.tolist()]

    def sum(self, tensor: Tensor) -> Tensor:
        """The tensor, summed over the ranks."""
        if self.size > 1:
            tensor = tensor.clone()
            dist.all_reduce(tensor)
        return tensor

    def gather(self, value: Any) -> list[Any]:
        """What every rank passes, on every rank."""
        if self.size == 1:
            return [value]
        values = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def from_first(self, value: Any) -> Any:
        """What the first rank passes, on every rank."""
        if self.size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values)
        return values[0]


@contextmanager
def joined() -> Iterator[Ranks]:
    """Joins the processes that torchrun has started; without torchrun this one is alone.

    Tensors on the CPU go over gloo, those on GPUs over NCCL. A process group that exists is used
    and left as it is.
    """
    size = int(os.environ.get("WORLD_SIZE", 1))
    if dist.is_initialized():
        size = dist.get_world_size()
    if size == 1:
        yield Ranks()
        return
    local = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", size))
    mine = not dist.is_initialized()
    if mine:
        # DDP imports this module, whose functions have the process group that exists by then as a
        # default argument. It would outlive us, and with it gloo's threads: a process that exits
        # with one of them running may abort.
        import torch.distributed.nn.functional  # noqa: F401

        backend = "gloo"
        if local[0] < torch.cuda.device_count():
            torch.cuda.set_device(local[0])
            backend = "cpu:gloo,cuda:nccl"
        dist.init_process_group(backend)
    try:
        yield Ranks(dist.get_rank(), size, *local)
    finally:
        if mine:
            gc.collect()  # of DDP's cycles, which hold the process group as well
            dist.destroy_process_group()
