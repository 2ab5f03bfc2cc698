"""Which kernels run with which launch, by architecture, head size and precision.

Chosen by measurement where one was made, else from what the compiler reports (registers, spills,
shared memory); nothing is tuned when a program runs, so that the same input takes the same path on
every machine of a kind.
"""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Launch:
    """The shape of one launch.

    Attributes:
        rows: that a program holds.
        step: rows that it walks over at a time; as many as it holds if it has all of them at once.
        num_warps: of a program.
        num_stages: of its pipeline of loads.
        maxnreg: registers per thread that the assembler may use, where it would take more than it
            needs and so halve the programs on a multiprocessor.
    """

    rows: int
    step: int
    num_warps: int
    num_stages: int
    maxnreg: int | None = None


@dataclass(frozen=True)
class Config:
    """The launches for one architecture, head size and precision; of the one-pass kernels for
    blocks of each size, in order. Longer segments take the tiled kernels."""

    whole_forward: tuple[Launch, ...]
    whole_backward: tuple[Launch, ...]
    forward: Launch
    backward_queries: Launch
    backward_keys: Launch


def pick(launches: tuple[Launch, ...], max_length: int) -> Launch | None:
    """The smallest block that holds a segment; ``None`` if none does."""
    return next((launch for launch in launches if max_length <= launch.rows), None)


BLOCK = Launch(64, 64, 4, 1)
TILE = Launch(64, 32, 4, 3)

# Hopper, as measured on an H200 (bench/results/nvidia-h200/launches.json, drawn up by
# `python -m bench.launches`). Warpgroup matmuls take 64 rows per four warps, and small programs win
# at every length: five or more of them share a multiprocessor, so that one waits for memory while
# another computes. 128 rows would read half as much from the L2 cache, but take the registers of
# several programs. Segments of 65 to 128 rows have their keys and values on chip at once in the
# backward, 128 registers to a thread so that two programs fit: five matmuls instead of the seven of
# two kernels, each tensor read once instead of twice. That last launch was chosen by the compiler's
# report alone and is still to be timed.
HOPPER = {
    32: Config((BLOCK,), (BLOCK, Launch(128, 32, 8, 2, maxnreg=128)), TILE, TILE, TILE),
    64: Config((BLOCK,), (BLOCK, Launch(128, 32, 8, 2, maxnreg=128)), TILE, TILE, TILE),
    128: Config((BLOCK,), (BLOCK,), TILE, TILE, TILE),
}

# Not measured yet: the launches that proved themselves on Hopper, where they spill nothing.
BLACKWELL = {
    block_d: replace(config, whole_backward=(BLOCK,)) for block_d, config in HOPPER.items()
}
# Ampere, Ada and consumer Blackwell: matmuls of one warp, whose operands pass through registers,
# and 99 KiB of shared memory on most of them.
WARP_MATMUL = {
    32: BLACKWELL[32],
    64: BLACKWELL[64],
    128: replace(BLACKWELL[128], backward_keys=Launch(64, 32, 4, 1)),
}

# Full float32 runs on the ordinary arithmetic units, for which the compiler unrolls whole matmuls:
# only small steps and many warps keep their operands in registers.
WHOLE = (Launch(64, 64, 8, 1),)
STEP_16 = Launch(64, 16, 8, 1)
FLOAT32 = {
    32: Config((Launch(64, 64, 16, 1),), WHOLE, STEP_16, Launch(64, 16, 4, 1), STEP_16),
    64: Config((), WHOLE, STEP_16, STEP_16, STEP_16),
}


def config_for(arch: int, block_d: int, itemsize: int) -> Config:
    """The launches for a padded head size and a number of bytes per element."""
    if itemsize == 4:
        table = FLOAT32
    elif arch == 90:
        table = HOPPER
    else:
        table = BLACKWELL if arch in (100, 103) else WARP_MATMUL
    return table[max(32, block_d)]
