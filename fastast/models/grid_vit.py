"""A ViT over the patches of a fixed grid: what AST, FlexiAST and SSAST have in common.

A class token and, but for some, a distillation token (DeiT) precede each clip's patches; one table
holds a learned position for each of these tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastast.models import flops
from fastast.models.flops import Flops
from fastast.models.vit import PatchEmbed, Trunk, as_stream, init_vit_weights
from fastast.nn import MeanPool
from fastast.segments import Spectrograms
from fastast.tokens import GridPositions, PatchGeometry, PatchGrid, resize_positions


class GridViT(nn.Module):
    """Patch embedding, class tokens, positions and trunk. What follows is the subclass's.

    Args:
        input_frames: frames of the clips whose patches the table of positions has.
        num_mels: mel bins of the input.
        patch_size: ``(mel bins, frames)``.
        stride: between patches.
        distilled: whether clips have a distillation token beside the class token.
        dim, depth, num_heads, mlp_ratio: of the trunk.
        time_pool, time_pooling: of frames before patches are cut, see :class:`PatchGeometry`.

    Raises:
        ValueError: ``input_frames`` shorter than a patch, or a ``dim`` that ``num_heads`` does
            not divide.
    """

    shorter = "stretch"
    """What shorter clips make of the table, see :class:`~fastast.tokens.GridPositions`."""

    def __init__(
        self,
        *,
        input_frames: int,
        num_mels: int,
        patch_size: tuple[int, int],
        stride: tuple[int, int],
        distilled: bool = True,
        dim: int,
        depth: int,
        num_heads: int,
        mlp_ratio: float,
        time_pool: int = 1,
        time_pooling: Literal["average", "max"] = "average",
    ) -> None:
        super().__init__()
        self.geometry = PatchGeometry(
            num_mels, patch_size, stride, 1 + distilled, time_pool, time_pooling
        )
        self.input_frames = input_frames
        time_patches = self.geometry.time_patches(input_frames)
        if time_patches < 1:
            raise ValueError(
                f"input_frames ({input_frames}) is shorter than a patch "
                f"({self.geometry.patch_frames} frames)"
            )
        self.patch_embed = PatchEmbed(self.geometry, dim)
        self.prefix = nn.Parameter(torch.empty(self.geometry.prefix, dim))  # cls, dist
        self.positions = self._make_positions(time_patches, dim)
        self.trunk = Trunk(dim, depth, num_heads, mlp_ratio=mlp_ratio)

    def _make_positions(self, time_patches: int, dim: int) -> nn.Module:
        prefix, freq_patches = self.geometry.prefix, self.geometry.freq_patches
        return GridPositions(prefix, freq_patches, time_patches, dim, shorter=self.shorter)

    def init_weights(self) -> None:
        """Initialises all weights as ViT does; for the end of a subclass's ``__init__``."""
        nn.init.trunc_normal_(self.prefix, std=0.02)
        self.apply(init_vit_weights)

    def forward_features(
        self, inputs: Spectrograms | Tensor, grid: PatchGrid | None = None
    ) -> tuple[Tensor, PatchGrid]:
        """Token features ``[rows, dim]`` after the trunk, and the list of what each row is."""
        frames, grid = as_stream(inputs, grid, self.geometry)
        return self.trunk(self.tokens(frames, grid), grid.segments), grid

    def tokens(self, frames: Tensor, grid: PatchGrid) -> Tensor:
        """What the trunk reads of a stream of frames: class tokens and patches, with positions,
        ``[rows, dim]``."""
        return self.assemble(self.patch_embed(frames, grid), grid)

    def encoding_flops(self, tokens: Sequence[int] | np.ndarray) -> Flops:
        """Of all up to the trunk's end, for clips of so many tokens each, the class tokens
        included; see :mod:`fastast.models.flops`."""
        tokens = np.asarray(tokens, np.int64)
        total, clips = int(tokens.sum()), int((tokens > 0).sum())
        first = flops.embedding(self.patch_embed, total - self.geometry.prefix * clips)
        return Flops(first + flops.blocks(self.trunk, total, flops.pairs(tokens)), first)

    def assemble(self, embedded: Tensor, grid: PatchGrid) -> Tensor:
        """Patch embeddings with class tokens and positions, both ``[rows, dim]``."""
        prefix = F.embedding(grid.prefix_id.clamp(min=0), self.prefix).to(embedded.dtype)
        tokens = torch.where((grid.prefix_id >= 0)[:, None], prefix, embedded)
        return tokens + self.positions(grid)


class GridClassifier(GridViT):
    """A classifier of what the trunk makes of each clip. Subclasses say what that is.

    Args:
        num_classes: of the logits.
        **trunk: as of :class:`GridViT`.
    """

    def __init__(self, num_classes: int, *, dim: int, **trunk) -> None:
        super().__init__(dim=dim, **trunk)
        self.norm = nn.LayerNorm(dim, eps=1e-5)  # unlike the trunk's 1e-6, as in the originals
        self.head = nn.Linear(dim, num_classes)
        self.init_weights()

    def _pooled(self, features: Tensor, grid: PatchGrid) -> Tensor:
        return mean_of_class_tokens(features, grid)

    def embed(self, inputs: Spectrograms | Tensor, grid: PatchGrid | None = None) -> Tensor:
        """What the linear classifier reads of each clip: ``[clips, dim]``, in input order.

        The pooled tokens after the last norm. Arguments as of :meth:`forward`.
        """
        return self.norm(self._pooled(*self.forward_features(inputs, grid)))

    def forward(self, inputs: Spectrograms | Tensor, grid: PatchGrid | None = None) -> Tensor:
        """Logits ``[clips, num_classes]`` in input order.

        Args:
            inputs: :class:`~fastast.Spectrograms`, or dense ``[clips, frames, num_mels]``.
            grid: the token list, from ``model.geometry.grid(...)``; made here if missing.
        """
        return self.head(self.embed(inputs, grid))

    def start_from(self, other: GridViT) -> None:
        """Takes over all but norm and classifier, the table of positions adapted to this grid.

        Where this grid has fewer patches along an axis, the middle of the table is taken; where it
        has more, the table is resized bilinearly (AST, section 2.2, from images; SSAST).

        Args:
            other: a model with patches and a trunk of the same sizes, such as one that was
                pre-trained, or :func:`~fastast.from_reference` makes of a ViT; its stride, mel bins
                and ``input_frames`` may be others.

        Raises:
            ValueError: class tokens, heads, patches or trunk of another number or size.
        """
        check_source(self, other)
        check_class_tokens(self, other)
        own, theirs = (each.trunk.blocks[0].attn.num_heads for each in (self, other))
        if own != theirs:
            raise ValueError(f"num_heads ({own}) differs from the pre-trained {theirs}")
        weights = {
            name: value
            for name, value in other.state_dict().items()
            if name.startswith(("patch_embed.", "prefix", "positions.", "trunk."))
        }
        weights["positions.table"] = resize_positions(
            weights["positions.table"],
            other.positions.grid,
            self.positions.grid,
            prefix=self.geometry.prefix,
            shrink="cut",
        )
        take_over(self, weights, new=("norm.", "head."))

    def flops(self, tokens: Sequence[int] | np.ndarray) -> Flops:
        """Of clips of so many tokens each, the class tokens included; see
        :mod:`fastast.models.flops`."""
        clips = int((np.asarray(tokens) > 0).sum())
        head = flops.linear(clips, self.head.in_features, self.head.out_features)
        return self.encoding_flops(tokens) + Flops(head, 0)


def check_source(model: nn.Module, other: nn.Module) -> None:
    """Raises ValueError unless ``model`` can start from ``other``: a ViT with its patches."""
    if not isinstance(other, GridViT):
        raise ValueError(
            f"{type(model).__name__} starts from a ViT, an AST, an SSAST or an ASiT, not from "
            f"{type(other).__name__}"
        )
    own, theirs = model.geometry.patch_size, other.geometry.patch_size
    if own != theirs:
        raise ValueError(
            f"patch_size {own} differs from the pre-trained {theirs}: use patches of one size"
        )


def check_class_tokens(model: GridViT, other: GridViT) -> None:
    """Raises ValueError unless ``model`` has as many class tokens as the ``other``."""
    own, theirs = model.geometry.prefix, other.geometry.prefix
    if own != theirs:
        raise ValueError(
            f"the pre-trained model has {theirs} class tokens, this one {own}: choose one with as "
            "many (AST's distilled says whether there is a second)"
        )


@torch.no_grad()
def take_over(model: nn.Module, weights: dict[str, Tensor], *, new: tuple[str, ...]) -> None:
    """Puts pre-trained weights into a model, which has all of them but what is new.

    Args:
        model: to be filled.
        weights: by the model's names.
        new: beginnings of the names that stay as they are.

    Raises:
        ValueError: a weight is missing, too many or of another shape.
    """
    own = model.state_dict()
    wrong = [
        name
        for name in own
        if not name.startswith(new)
        and (name not in weights or weights[name].shape != own[name].shape)
    ] or sorted(weights.keys() - own.keys())
    if wrong:
        raise ValueError(
            f"{wrong[0]} is not as in the pre-trained weights: the trunk must be of the same "
            "dim, depth and num_heads"
        )
    model.load_state_dict(weights, strict=False)


def mean_of_class_tokens(features: Tensor, grid: PatchGrid) -> Tensor:
    """The mean of each clip's class tokens: ``[rows, dim] -> [clips, dim]``."""
    # Empty segments have no class tokens; any row serves, since their logits mean nothing.
    count = grid.geometry.prefix
    if grid.num_rows < count:
        features = F.pad(features, (0, 0, 0, count))
    cls = grid.segments.offsets[:-1].clamp(max=features.shape[0] - count)
    return torch.stack([F.embedding(cls + index, features) for index in range(count)]).mean(0)


def mean_of_patches(features: Tensor, grid: PatchGrid) -> Tensor:
    """The mean of each clip's tokens but the class tokens: ``[rows, dim] -> [clips, dim]``."""
    patches = torch.where((grid.prefix_id < 0)[:, None], features, 0)
    count = grid.segments.lengths[:, None]
    mean = MeanPool()(patches, grid.segments)
    return mean * (count / (count - grid.geometry.prefix).clamp(min=1))
