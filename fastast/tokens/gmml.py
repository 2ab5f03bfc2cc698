r"""Group masked model learning: blocks of spectrograms replaced, and the mask of what was.

ASiT's student sees a corrupted spectrogram (Atito et al., section 3.1 and experimental setup): of
each view, either 70 % is replaced by zeros or 30 % by what another clip holds at the same place,
with equal chances. Blocks are drawn one after the other until at least that share :math:`p` of the
:math:`T \times F` pixels is covered. The paper says nothing of their sizes; in its published code,
along either axis of :math:`n` bins and with alignment :math:`a` (1, or the patch's size),

.. math::
    \text{begin} = a \lfloor U\{0, \dots, n - a - 1\} / a \rfloor, \qquad
    \text{size} = a\, \mathrm{round}\big(\min(U\{a, \dots, \lfloor 0.3 n \rfloor - 1\},
    n - \text{begin}) / a\big)

Here no block waits for the one before it. With :math:`f(i, j)` the first of many blocks, all drawn
at once, that covers a pixel (:mod:`fastast.tokens.cover`), the first :math:`k` blocks cover
:math:`N(k) = |\{f < k\}|` pixels, the loop would end at the smallest :math:`k` with
:math:`N(k) \ge p\,T F`, and the mask is :math:`f < k`. That :math:`k` is found by bisection, one
bit at a time, for all clips at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastast.random import below, purpose_key, random_bits, unit_interval
from fastast.segments import Segments, Spectrograms
from fastast.tokens.cover import cover_rank
from fastast.tokens.grid import PatchGeometry, PatchGrid
from fastast.tokens.patchify import patchify

FILLS = ("zeros", "noise", "time_stripes", "freq_stripes")

_BLOCKS = purpose_key("gmml blocks")
_NOISE = purpose_key("gmml noise")
_HEAD = 3  # draws of a clip ahead of its blocks: alien or not, share, partner

CHUNK = 2**18
"""Pixels that a CPU works on at a time, in its cache. Compiled code and other devices take all."""


class Blocks(NamedTuple):
    """What :meth:`GMML.draw` draws.

    Attributes:
        times, freqs: begins and ends of the blocks, in frames and mel bins: int64 ``[S, K]`` each.
        needed: int64 ``[S]``, pixels to cover.
        alien: bool ``[S]``, whether a clip's blocks come from another one.
        partner: int64 ``[S]``, which that would be.
    """

    times: tuple[Tensor, Tensor]
    freqs: tuple[Tensor, Tensor]
    needed: Tensor
    alien: Tensor
    partner: Tensor


class Corrupted(NamedTuple):
    """What :class:`GMML` returns.

    Attributes:
        spectrograms: with the blocks replaced; zeros on dead rows.
        mask: bool ``[rows, num_mels]``, True where a pixel was replaced; for the reconstruction
            loss.
        alien: bool ``[S]``, whether the clip's blocks come from another one.
    """

    spectrograms: Spectrograms
    mask: Tensor
    alien: Tensor


@dataclass(frozen=True)
class GMML:
    """Replaces blocks of each clip's spectrogram. Runs on the device, without waiting for it.

    Args:
        ratio: share of the pixels to replace where blocks are filled, in [0, 1). The paper's 0.7;
            or a range from which each clip draws its own uniformly: (0.5, 0.7) in the published
            code. What is covered exceeds it by a part of the last block.
        fill: ``"zeros"`` (the mean of normalised data), ``"noise"`` (each pixel by itself),
            ``"time_stripes"`` (noise, one value per frame) or ``"freq_stripes"`` (one per mel bin).
        alien_share: share of the clips whose blocks come from another clip instead.
        alien_ratio: share of their pixels to replace.
        align: blocks begin and end at multiples of so many mel bins and frames: (1, 1), or the
            patch's size. Not aligned is better in the paper (table of section 4.4).
        max_block: limit of a block's extent along either axis, as a share of it.
        noise: mean and standard deviation of the noise. By default those of data normalised as
            ``(x - mean) / (2 std)``; the published code takes those of the data before that.

    Raises:
        ValueError: a share out of range, an unknown fill, or an alignment below 1.
    """

    ratio: float | tuple[float, float] = 0.7
    fill: str = "zeros"
    alien_share: float = 0.5
    alien_ratio: float = 0.3
    align: tuple[int, int] = (1, 1)
    max_block: float = 0.3
    noise: tuple[float, float] = (0.0, 0.5)

    def __post_init__(self) -> None:
        low, high = self._range
        if not 0 <= low <= high < 1:
            raise ValueError(f"ratio must be a share in [0, 1) or a range of it, got {self.ratio}")
        if not 0 <= self.alien_ratio < 1:
            raise ValueError(f"alien_ratio must lie in [0, 1), got {self.alien_ratio}")
        if not 0 <= self.alien_share <= 1:
            raise ValueError(f"alien_share must lie in [0, 1], got {self.alien_share}")
        if not 0 < self.max_block <= 1:
            raise ValueError(f"max_block must lie in (0, 1], got {self.max_block}")
        if self.fill not in FILLS:
            raise ValueError(f"fill must be one of {FILLS}, got {self.fill!r}")
        if min(self.align) < 1:
            raise ValueError(f"align must be at least (1, 1), got {self.align}")
        most = max(high, self.alien_ratio if self.alien_share > 0 else 0.0)
        # Half as many again as cover that on average, and a few. Of shares up to 0.8, one clip in
        # thousands needs more and has to do with these, as one has that is too short for any.
        drawn = 12 + math.ceil(1.5 * _mean_blocks(most, self.max_block))
        object.__setattr__(self, "_blocks_drawn", drawn)

    @property
    def _range(self) -> tuple[float, float]:
        return self.ratio if isinstance(self.ratio, tuple) else (self.ratio, self.ratio)

    def __call__(
        self,
        spectrograms: Spectrograms,
        clip_ids: Tensor,
        *,
        partner: Tensor | None = None,
        seed: int,
        epoch: int | Tensor,
    ) -> Corrupted:
        """Corrupts a batch.

        Args:
            spectrograms: normalised, of any lengths.
            clip_ids: int64 ``[S]``, stable identifiers of the clips; of the views, where there are
                several of a clip. What is replaced depends on these and the keys below alone.
            partner: integers ``[S]``, for each clip the one of the batch that its alien blocks come
                from, at the same place (modulo its length). Default: drawn from the others that
                have frames. (The published code may also draw the clip itself.)
            seed: of the run.
            epoch: of the training.

        Raises:
            ValueError: ``clip_ids`` or ``partner`` of another length or dtype.
        """
        frames, segments = spectrograms.frames, spectrograms.segments
        num_rows, clips = frames.shape[0], segments.num_segments
        if partner is not None and (partner.is_floating_point() or partner.shape != (clips,)):
            raise ValueError(
                f"partner must be integers of shape [{clips}], one per clip, got "
                f"{partner.dtype} of shape {list(partner.shape)}"
            )
        blocks = self.draw(segments, frames.shape[1], clip_ids, seed=seed, epoch=epoch)
        if clips == 0:
            mask = torch.zeros(frames.shape, dtype=torch.bool, device=frames.device)
            return Corrupted(spectrograms, mask, blocks.alien)
        clip = segments.row_ids(num_rows).clamp(max=clips - 1)
        place = torch.arange(num_rows, device=clip.device) - segments.offsets[clip]
        alive = segments.row_mask(num_rows)
        alien = blocks.alien[clip] & alive
        partner = blocks.partner if partner is None else partner
        length = segments.lengths[partner].clamp(min=1)
        source = segments.offsets[partner][clip] + place % length[clip]
        source = torch.where(alien, source.clamp(max=num_rows - 1), 0)
        covered = self._covered(blocks, segments, frames.shape[1])
        at = clip * covered.shape[1] + (place // self.align[1]).clamp(max=covered.shape[1] - 1)

        corrupted = torch.empty_like(frames)
        mask = torch.empty(frames.shape, dtype=torch.bool, device=frames.device)
        for rows in _parts(num_rows, frames.shape[1], frames.device):
            living = alive[rows, None]
            cells = covered.flatten(0, 1).index_select(0, at[rows])
            mask[rows] = _repeat(cells, self.align[0])[:, : frames.shape[1]] & living
            value = self._fill(frames, clip_ids[clip[rows]], place[rows], seed, epoch)
            if self.fill != "zeros":
                value = torch.where(living, value, 0)
            if self.alien_share > 0:
                other = frames.index_select(0, source[rows])
                value = torch.where(alien[rows, None], other, value)
            # Dead rows are replaced as well, with zero.
            corrupted[rows] = torch.where(mask[rows] | ~living, value, frames[rows])
        return Corrupted(Spectrograms(corrupted, segments), mask, blocks.alien)

    def _covered(self, blocks: Blocks, segments: Segments, num_mels: int) -> Tensor:
        """Which cells of ``align`` bins and frames are covered by the first blocks that cover
        enough pixels: bool ``[S, rows, columns]``. A pixel is a cell where blocks are not aligned.
        """
        freq, time = self.align
        size = -(-segments.max_length // time), -(-num_mels // freq)
        covered = blocks.alien.new_empty(len(blocks.alien), *size)
        begins = time * torch.arange(size[0], dtype=torch.int32, device=covered.device)
        heights = (segments.lengths[:, None] - begins).clamp(0, time)  # less at the clip's end
        for part in _parts(len(covered), size[0] * size[1], covered.device):
            times, freqs = (
                (begin[part] // align, end[part] // align)
                for (begin, end), align in ((blocks.times, time), (blocks.freqs, freq))
            )
            rank, most = cover_rank(times, freqs, size)

            pixels = partial(_pixels, heights=heights[part], align=freq, num_mels=num_mels)
            count = _blocks_needed(rank, most, blocks.needed[part], self._blocks_drawn, pixels)
            covered[part] = rank > (most - count)[:, None, None]
        return covered

    def draw(
        self,
        segments: Segments,
        num_mels: int,
        clip_ids: Tensor,
        *,
        seed: int,
        epoch: int | Tensor,
    ) -> Blocks:
        """What is drawn for a batch, before anything is covered. Arguments as for the call."""
        clips = segments.num_segments
        if clip_ids.dtype != torch.int64 or clip_ids.shape != (clips,):
            raise ValueError(
                f"clip_ids must be torch.int64 of shape [{clips}], one per clip, got "
                f"{clip_ids.dtype} of shape {list(clip_ids.shape)}"
            )
        lengths = segments.lengths.long()
        bins = torch.full_like(lengths, num_mels)
        bits = random_bits(seed, epoch, clip_ids, _BLOCKS, _HEAD + 4 * self._blocks_drawn)
        head, bits = bits[:, :_HEAD], bits[:, _HEAD:].unflatten(1, (-1, 4))
        alien = unit_interval(head[:, 0]) < self.alien_share
        low, high = self._range
        ratio = low + (high - low) * unit_interval(head[:, 1]).double()
        ratio = torch.where(alien, self.alien_ratio, ratio)
        return Blocks(
            self._interval(lengths, self.align[1], bits[..., 0], bits[..., 1]),
            self._interval(bins, self.align[0], bits[..., 2], bits[..., 3]),
            (ratio * (lengths * num_mels)).ceil().long(),
            alien,
            another_clip(lengths, head[:, 2]),
        )

    def _interval(self, size: Tensor, align: int, *bits: Tensor) -> tuple[Tensor, Tensor]:
        """Begins and ends of the blocks along an axis of ``size [S]`` bins: ``[S, K]`` each."""
        size = size[:, None]
        begin = below(bits[0], (size - align).clamp(min=1)) // align * align
        limit = (size.double() * self.max_block).long()
        extent = align + below(bits[1], (limit - align).clamp(min=1))
        extent = torch.minimum(extent, size - begin)
        if align > 1:
            extent = (extent.double() / align).round().long() * align
        return begin, begin + extent

    def _fill(
        self, frames: Tensor, clip_ids: Tensor, place: Tensor, seed: int, epoch: int | Tensor
    ) -> Tensor:
        """What replaces each pixel, or something that is broadcast to them."""
        if self.fill == "zeros":
            return frames.new_zeros(())
        if self.fill == "freq_stripes":
            place = torch.zeros_like(place)
        key = random_bits(seed, epoch, clip_ids, _NOISE, 1)[:, 0] + place
        if self.fill == "time_stripes":
            bits = below(random_bits(seed, epoch, key, _NOISE, 1), 2**16) - 2**15
        else:
            # 16 bits are plenty for noise, so that each hash serves four pixels.
            num_mels = frames.shape[1]
            bits = random_bits(seed, epoch, key, _NOISE, -(-num_mels // 4)).view(torch.int16)
            bits = bits[:, :num_mels]
        mean, std = self.noise
        normal = torch.erfinv((bits.float() + 0.5) * 2.0**-15) * 2**0.5
        return (mean + std * normal).to(frames.dtype)


def corrupted_share(mask: Tensor, grid: PatchGrid, geometry: PatchGeometry) -> Tensor:
    """The share of each token's pixels that were replaced: float32 ``[grid.num_rows]``.

    ASiT's local loss counts the corrupted tokens (equation 5), those with a share above 0; its
    published code counts all.

    Args:
        mask: bool ``[rows, num_mels]``, of :class:`Corrupted`.
        grid: the tokens.
        geometry: of the grid.
    """
    return patchify(mask.float(), grid, geometry).mean(1)


def _mean_blocks(share: float, max_block: float) -> int:
    """Blocks that cover a share of the pixels on average.

    Along an axis of length 1, with begins from U(0, 1) and extents from U(0, m), a block covers
    the place x with probability x - x**2 / 2m up to m, less than the m / 2 from there on.
    """
    x = (np.arange(64) + 0.5) / 64
    along = np.where(x < max_block, x - x**2 / (2 * max_block), max_block / 2)
    missed = np.log1p(-np.outer(along, along))
    blocks = 0
    while -np.expm1(blocks * missed).mean() < share:
        blocks += 1
    return blocks


def _blocks_needed(
    rank: Tensor, most: int, needed: Tensor, drawn: int, pixels: Callable[[Tensor], Tensor]
) -> Tensor:
    """How many blocks it takes to cover ``needed [S]`` pixels, or all that were drawn: int16
    ``[S]``.

    Args:
        rank, most: of :func:`cover_rank`.
        needed: pixels to cover.
        drawn: number of blocks.
        pixels: how many there are in cells ``[S, rows, columns]`` that are 1, not 0.
    """
    count = torch.zeros_like(needed)
    for place in reversed(range(drawn.bit_length())):
        # If one block fewer does not do, it takes so many at least.
        trial = count + (1 << place)
        limit = (most - (trial - 1)).to(rank.dtype)[:, None, None]
        # On a CPU subtracting and clamping takes a quarter of the time of a comparison.
        covered = pixels((rank - limit).clamp_(0, 1))
        count = torch.where(covered < needed, trial, count)
    return count.clamp(max=drawn).to(rank.dtype)


def _pixels(cells: Tensor, heights: Tensor, align: int, num_mels: int) -> Tensor:
    """How many there are in the cells that are 1, not 0: integers ``[S]``.

    Args:
        cells: int16 ``[S, rows, columns]``, fewer than 2**15 columns.
        heights: frames of each row of cells ``[S, rows]``.
        align: mel bins of each column, but of the last only what is left of ``num_mels``.
    """
    columns = cells.sum(2, dtype=torch.int16).int()
    widths = align * columns - (align * cells.shape[2] - num_mels) * cells[:, :, -1]
    return (heights * widths).sum(1)


def _parts(count: int, numbers: int, device: torch.device) -> Iterator[slice]:
    """Of ``count`` things of so many numbers each, as many at a time as :data:`CHUNK` allows."""
    if device.type != "cpu" or torch.compiler.is_compiling():
        yield slice(0, count)
        return
    step = max(1, CHUNK // numbers)
    for begin in range(0, count, step):
        yield slice(begin, begin + step)


def _repeat(x: Tensor, times: int) -> Tensor:
    """Each column so many times."""
    return x if times == 1 else x[:, :, None].expand(-1, -1, times).flatten(1)


def another_clip(lengths: Tensor, bits: Tensor) -> Tensor:
    """For each clip another one that has frames, uniformly; itself if there is none."""
    if len(lengths) == 0:
        return lengths
    ranks = (lengths > 0).cumsum(0)  # from 1
    count = ranks[-1]
    rank = (ranks + below(bits, (count - 1).clamp(min=0))) % count.clamp(min=1)
    return torch.searchsorted(ranks, rank + 1).clamp(max=len(lengths) - 1)
