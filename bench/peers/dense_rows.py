"""ElasticAST the paper's way: clips packed into padded rows, and a dense mask.

Feng et al., 2024, section 2.2. Clips are taken in order and put into the open row until the next
would bring it beyond the row's limit (next-fit); rows are padded to the longest; attention within
a row is explicit, with a boolean mask ``[B', N', N']`` that separates the clips; a query per clip
pools the row under a second mask.

Better than the original in two ways that cost it nothing here: the layout is made on the host
before the step, and patches are embedded for all clips at once.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from bench.peers.attention import explicit_attention
from bench.peers.elastic import clip_patches, embed, encode, pool
from bench.peers.padding import Padding
from fastast import ElasticAST

ROW_LIMIT = 2048
"""Tokens of a row, the paper's default."""


def next_fit(lengths: Sequence[int], limit: int = ROW_LIMIT) -> list[list[int]]:
    """Lengths of the clips in each row: in order, one open row, a new one when a clip overflows it.

    Raises:
        ValueError: a clip longer than a row.
    """
    rows: list[list[int]] = []
    for length in lengths:
        if length > limit:
            raise ValueError(f"a clip of {length} tokens does not fit a row of {limit}")
        if not rows or sum(rows[-1]) + length > limit:
            rows.append([])
        rows[-1].append(length)
    return rows


class RowLayout:
    """Where the tokens of a batch sit.

    Args:
        lengths: tokens of each clip.
        device: of the model.
        limit: tokens of a row.

    Attributes:
        padding: of the rows; ``padding.shape`` is ``(B', N')``.
        clip: int64 ``[B', N']``, the token's clip, counted from 0 in each row; -1 on padding.
        queries: int64 ``[most clips in a row]``, 0, 1, ...
        taken: int64 ``[clips]``, each clip's place in the flat ``[B' * queries]`` list of results.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        device: torch.device | str = "cpu",
        limit: int = ROW_LIMIT,
    ) -> None:
        rows = next_fit(lengths, limit)
        self.padding = Padding([sum(row) for row in rows], device)
        clip = torch.cat(
            [torch.arange(len(row)).repeat_interleave(torch.tensor(row)) for row in rows]
        )
        self.clip = self.padding.pad(clip.to(device) + 1) - 1
        counts = torch.tensor([len(row) for row in rows])
        queries = torch.arange(int(counts.max()))
        self.queries = queries.to(device)
        self.taken = (queries < counts[:, None]).flatten().nonzero().squeeze(1).to(device)

    def attention_mask(self) -> Tensor:
        """bool ``[B', N', N']``: same clip, and the key is no padding."""
        same = self.clip[:, :, None] == self.clip[:, None, :]
        return same & (self.clip >= 0)[:, None, :]

    def pool_mask(self) -> Tensor:
        """bool ``[B', queries, N']``: the key is of the query's clip."""
        return self.queries[:, None] == self.clip[:, None, :]


class DenseRows(nn.Module):
    """An ElasticAST's parameters, run as the paper describes.

    Args:
        model: ours, with attention pooling.
        limit: tokens of a row.
    """

    def __init__(self, model: ElasticAST, limit: int = ROW_LIMIT) -> None:
        super().__init__()
        self.model, self.limit = model, limit

    def layout(
        self, frames: Sequence[int], device: torch.device | str = "cpu"
    ) -> tuple[RowLayout, Tensor, Tensor]:
        """Row layout of clips of so many frames, and each token's place in frequency and time."""
        geometry = self.model.geometry
        widths = [geometry.time_patches(count) for count in frames]
        layout = RowLayout([geometry.freq_patches * w for w in widths], device, self.limit)
        freq = torch.cat([torch.arange(geometry.freq_patches).repeat_interleave(w) for w in widths])
        time = torch.cat([torch.arange(w).repeat(geometry.freq_patches) for w in widths])
        return layout, *(layout.padding.pad(place.to(device)) for place in (freq, time))

    def forward(
        self, clips: Sequence[Tensor], layout: tuple[RowLayout, Tensor, Tensor] | None = None
    ) -> Tensor:
        """Logits ``[clips, classes]`` in input order.

        Args:
            clips: spectrograms ``[T_i, num_mels]``.
            layout: of their lengths, see :meth:`layout`; made here if missing.
        """
        if layout is None:
            layout = self.layout([len(clip) for clip in clips], clips[0].device)
        model, (rows, freq, time) = self.model, layout
        size = model.geometry.patch_size
        patches = rows.padding.pad(torch.cat([clip_patches(clip, size) for clip in clips]))
        mask = rows.attention_mask()[:, None]
        x = encode(model, embed(model, patches, freq, time), mask, explicit_attention)
        query = model.pool.query.expand(len(x), len(rows.queries), -1)
        pooled = pool(model.pool, x, query, rows.pool_mask()[:, None], explicit_attention)
        return model.head(model.norm(pooled.flatten(0, 1)[rows.taken]))
