"""What a masked autoencoder needs to know of a batch: who is seen, who is restored, and where.

Audio-MAE (Huang et al., "Masked Autoencoders that Listen", NeurIPS 2022, section 3) encodes the
patches of a clip that are not masked, puts what it has made of them back into their places among
mask tokens, and decodes all of them to restore those that were masked. That makes three lists of
tokens, of which two follow from a mask that is drawn on the device::

    all patches   a b c d e f | g h i j        clips of 6 and 4 patches, b c d f g i masked
    encoded       * a e | * h j                in the stream of the encoder, with class tokens
    decoded       a . . . e . | . h . j        in the stream of the decoder
    hidden        b c d f | g i                in the stream of the loss

*How many* patches of a clip are in each follows from its size, so all :class:`~fastast.Segments`,
and the windows of the decoder's attention, are made on the host and travel with the batch;
:meth:`MaskedGrid.split` finds *which*, with two sums and two searches, and waits for nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastast.ops.window_grids import WindowBudget, WindowGrids
from fastast.segments import Segments, TokenBudget
from fastast.tokens.grid import PatchGeometry, PatchGrid
from fastast.tokens.masking import Mask, UnstructuredMask


@dataclass(frozen=True)
class MaskedGeometry(PatchGeometry):
    """How spectrograms are cut into patches, how many of them are masked, and how they are decoded.

    Pairs are ``(frequency, time)``.

    Args:
        mask: which patches are masked.
        window: patches along the side of the decoder's windows. Default: it has none.
        shift: by which the windows of every second block are displaced.
        decode_prefix: whether the decoder sees class tokens as well, between which windows cannot
            be cut.

    Raises:
        ValueError: windows between class tokens, and what :class:`PatchGeometry` raises.
    """

    mask: Mask = UnstructuredMask(0.8)
    window: int | None = None
    shift: tuple[int, int] = (0, 0)
    decode_prefix: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.window is not None and self.decode_prefix and self.prefix:
            raise ValueError("windows hold patches alone: set decode_prefix=False")

    @property
    def unmasked(self) -> PatchGeometry:
        """The same patches, without more."""
        return PatchGeometry(**{part.name: getattr(self, part.name) for part in _PLAIN})

    def grid(
        self,
        frames: Segments | Sequence[int],
        budget: TokenBudget | None = None,
        keep: Sequence[np.ndarray] | None = None,
        pool: Sequence[int] | np.ndarray | None = None,
    ) -> MaskedGrid:
        """Lists the tokens of a batch. Runs on the host, in the loader.

        Args:
            frames, budget, pool: as of :meth:`PatchGeometry.grid`.
            keep: must be None: patches are left out by the mask alone.

        Raises:
            ValueError: the tokens do not fit the budget, or patches are to be dropped.
        """
        if keep is not None:
            raise ValueError("a masked autoencoder hides patches by its mask: drop no tokens")
        full = super().grid(frames, budget, pool=pool)
        lengths = full.segments.host_offsets.diff().numpy().astype(np.int64)
        patches = np.maximum(lengths - self.prefix, 0)
        width = patches // self.freq_patches
        kept = self.mask.num_kept(self.freq_patches, width)
        seen, hidden = kept + self.prefix * (kept > 0), patches - kept
        limits = None if budget is None else _limits(self, budget)
        plain = self.unmasked
        if self.decode_prefix or not self.prefix:
            decoded = PatchGrid(full.segments, *full._tables(), geometry=plain)
        else:
            decoded = replace(plain, prefix=0).grid(frames, budget, pool=pool)
        windows = ()
        if self.window is not None:
            sizes = np.stack([self.freq_patches * (width > 0), width], 1)
            windows = tuple(
                WindowGrids.from_sizes(
                    sizes, self.window, shift, limits and WindowBudget(budget.tokens, most)
                )
                for shift, most in zip(
                    self._shifts, limits.windows if limits else (None,) * 2, strict=True
                )
            )
        return MaskedGrid(
            full.segments,
            *full._tables(),
            geometry=self,
            encoded=Segments.from_lengths(seen, limits and limits.encoded),
            encoded_rows=limits.encoded.tokens if limits else max(int(seen.sum()), 1),
            hidden=Segments.from_lengths(hidden, limits and limits.hidden),
            hidden_rows=limits.hidden.tokens if limits else max(int(hidden.sum()), 1),
            decoded=decoded,
            windows=windows,
        )

    @property
    def _shifts(self) -> tuple[tuple[int, int], tuple[int, int]]:
        return (0, 0), self.shift


_PLAIN = fields(PatchGeometry)


class _Limits(NamedTuple):
    """Sizes that hold whatever clips fit a budget."""

    encoded: TokenBudget
    hidden: TokenBudget
    windows: tuple[int, ...]


@lru_cache(maxsize=64)
def _limits(geometry: MaskedGeometry, budget: TokenBudget) -> _Limits:
    freq, prefix = geometry.freq_patches, geometry.prefix
    width = np.arange(1, max((budget.max_length - prefix) // freq, 1) + 1)
    rows = freq * width + prefix
    kept = geometry.mask.num_kept(freq, width)

    def most(amount: np.ndarray) -> int:
        """Bound on what clips of those widths can add up to.

        If a clip has at most ``slope`` for each of its rows and ``rest`` besides, all have at most
        ``slope * tokens + rest * clips``.
        """
        slope = np.linspace(0, (amount / rows).max(), 101)
        rest = (amount - slope[:, None] * rows).max(1)
        return max(int((slope * budget.tokens + rest * budget.clips).min() + 1e-6), 1)

    def sizes(amount: np.ndarray) -> TokenBudget:
        return TokenBudget(most(amount), budget.clips, max(int(amount.max()), 1))

    windows = ()
    if geometry.window is not None:
        windows = tuple(
            most(
                np.array(
                    [
                        WindowGrids.from_sizes([(freq, count)], geometry.window, shift).num_windows
                        for count in width.tolist()
                    ]
                )
            )
            for shift in geometry._shifts
        )
    return _Limits(sizes(kept + prefix), sizes(freq * width - kept), windows)


class Split(NamedTuple):
    """Which rows are which, once a mask is drawn.

    Attributes:
        encoded: the list of the tokens that are encoded.
        source: int64 ``[grid.decoded.num_rows]``, the row of that list that belongs in each place
            of the decoder's; -1 where a mask token does.
        hidden: the list of the patches that are to be restored.
        hidden_rows: int64 ``[grid.hidden_rows]``, their places in the decoder's list;
            ``grid.decoded.num_rows`` on dead rows.
    """

    encoded: PatchGrid
    source: Tensor
    hidden: PatchGrid
    hidden_rows: Tensor


@dataclass(frozen=True)
class MaskedGrid(PatchGrid):
    """All tokens of a batch, and what masked encoding needs besides. Made by
    :meth:`MaskedGeometry.grid`.

    Attributes:
        encoded: segments of the tokens that are not masked, class tokens included.
        encoded_rows: of their stream, dead ones included.
        hidden: segments of the patches that are masked.
        hidden_rows: of their stream, dead ones included.
        decoded: the decoder's list: all patches, with class tokens or without.
        windows: of its attention, as they are and displaced; or none.
    """

    encoded: Segments
    encoded_rows: int
    hidden: Segments
    hidden_rows: int
    decoded: PatchGrid
    windows: tuple[WindowGrids, ...]

    def split(self, masked: Tensor) -> Split:
        """Finds which rows are encoded, decoded and restored.

        Args:
            masked: bool ``[self.num_rows]``, from the geometry's own mask: as many of a clip's
                patches as it masks of a clip of that size.

        Raises:
            ValueError: ``masked`` of another shape or dtype.
        """
        if masked.dtype != torch.bool or masked.shape != (self.num_rows,):
            raise ValueError(
                f"masked must be torch.bool of shape [{self.num_rows}], one per row of the grid, "
                f"got {masked.dtype} of shape {list(masked.shape)}"
            )
        encoded, _ = self.visible(masked, self.encoded, self.encoded_rows)
        kept = self.segments.row_mask(self.num_rows) & ~masked
        rows, alive = self._rows_of_decoded()
        is_hidden = masked[rows] & alive
        source = torch.where(kept[rows] & alive, kept.cumsum(0)[rows] - 1, -1)
        hidden, hidden_rows = self.decoded.visible(~is_hidden, self.hidden, self.hidden_rows)
        return Split(encoded, source, hidden, hidden_rows)

    def _rows_of_decoded(self) -> tuple[Tensor, Tensor]:
        """Each decoded row's row in this list, and whether there is one."""
        count, decoded = self.decoded.num_rows, self.decoded.segments
        rows = torch.arange(count, device=self.freq.device)
        alive = decoded.row_mask(count)
        if self.decoded.geometry.prefix == self.geometry.prefix:
            return rows, alive
        # The clips up to a row's own each have class tokens in this list, unless they are empty.
        clip = decoded.row_ids(count).clamp(max=max(decoded.num_segments - 1, 0))
        ahead = self.segments.offsets[1:] - decoded.offsets[1:]
        rows = rows + ahead[clip]
        return rows.clamp(max=max(self.num_rows - 1, 0)), alive

    def to(self, device: torch.device | str, non_blocking: bool = False) -> MaskedGrid:
        """The same list on another device."""
        return self._map(lambda x: x.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> MaskedGrid:
        """Page-locks the tables, so that :meth:`to` can overlap with computation."""
        return self._map(lambda x: x.pin_memory())

    def _map(self, change: Callable[[Any], Any]) -> MaskedGrid:
        changed = {
            part.name: change(getattr(self, part.name))
            for part in fields(self)
            if part.name not in ("geometry", "encoded_rows", "hidden_rows", "windows")
        }
        return replace(self, windows=tuple(map(change, self.windows)), **changed)
