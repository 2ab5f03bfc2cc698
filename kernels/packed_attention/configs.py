"""Which kernels run with which launch, by architecture, head size and precision.

Chosen from what the compiler reports (registers, spills, shared memory) and from arithmetic on the
hardware's limits; nothing is tuned when a program runs, so that the same input takes the same path
on every machine of a kind.
"""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Launch:
    """The shape of one launch.

    Attributes:
        rows: that a program holds.
        step: rows that it walks over at a time; all of them in the one-pass kernels.
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


BLOCK_64 = Launch(64, 64, 4, 1)
BLOCK_128 = Launch(128, 128, 8, 1)

# Hopper. Warpgroup matmuls take 64 rows per four warps. The forward holds 128 rows: with 64, the L2
# cache (about 5.5 TB/s), from which every program reads all keys and values, would end it at 350
# TFLOP/s for heads of 64. At 128 registers two such programs share a multiprocessor, one's softmax
# under the other's matmuls. The backward has more arithmetic per byte and more in registers: 64
# rows, and 32 queries at a time beside two accumulators, leave room for two to five programs.
HOPPER = {
    32: Config(
        (BLOCK_64, BLOCK_128),
        (BLOCK_64, BLOCK_128),
        Launch(128, 64, 8, 3, maxnreg=128),
        Launch(64, 64, 4, 2),
        Launch(64, 32, 4, 2),
    ),
    64: Config(
        (BLOCK_64, BLOCK_128),
        (BLOCK_64, BLOCK_128),
        Launch(128, 64, 8, 3, maxnreg=128),
        Launch(64, 64, 4, 2),
        Launch(64, 32, 4, 2),
    ),
    # Heads of 128 fill the registers: one program of 128 rows, no pipeline for two accumulators.
    128: Config(
        (BLOCK_64, BLOCK_128),
        (BLOCK_64, BLOCK_128),
        Launch(128, 64, 8, 2),
        Launch(64, 32, 4, 2),
        Launch(64, 32, 4, 1),
    ),
}

# Datacentre Blackwell: accumulators lie in tensor memory; 128 rows of softmax spill in the forward,
# and in the one-pass backward for heads of 64. Otherwise as on Hopper.
BLACKWELL = {
    block_d: replace(config, forward=Launch(64, 64, 4, 2)) for block_d, config in HOPPER.items()
}
BLACKWELL[64] = replace(BLACKWELL[64], whole_backward=(BLOCK_64,))

# Ampere, Ada and consumer Blackwell: matmuls of one warp, whose operands pass through registers,
# and 99 KiB of shared memory on most of them. Blocks of 128 rows spill where they hold two matrices
# of scores (the backward) of heads above 32, or one of heads above 64; keys come 32 at a time for
# the same reason.
WARP_MATMUL = {
    32: Config(
        (BLOCK_64, BLOCK_128),
        (BLOCK_64, BLOCK_128),
        Launch(64, 64, 4, 2),
        Launch(64, 32, 4, 2),
        Launch(64, 32, 4, 2),
    ),
    64: Config(
        (BLOCK_64, BLOCK_128),
        (BLOCK_64,),
        Launch(64, 32, 4, 3),
        Launch(64, 32, 4, 2),
        Launch(64, 32, 4, 2),
    ),
    128: Config(
        (BLOCK_64,),
        (BLOCK_64,),
        Launch(64, 32, 4, 2),
        Launch(64, 32, 4, 2),
        Launch(64, 32, 4, 1),
    ),
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
