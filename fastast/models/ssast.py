"""SSAST: the AST that is pre-trained without labels, on square patches or on whole frames.

Gong, Lai, Chung and Glass, "SSAST: Self-Supervised Audio Spectrogram Transformer", AAAI 2022.
:class:`SSASTPretraining` restores masked patches, :class:`SSAST` classifies; they share embedding,
class tokens, positions and trunk, which the one hands to the other with :meth:`SSAST.start_from`.
Patches are pre-trained without overlap and fine-tuned with it, so that the table of positions is
adapted in between, as it is for clips of another length.
"""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from fastast.models import flops
from fastast.models.flops import Flops
from fastast.models.grid_vit import (
    GridClassifier,
    GridViT,
    mean_of_class_tokens,
    mean_of_patches,
)
from fastast.models.registry import register_model
from fastast.models.vit import TRUNK_SIZES, TrunkSize, as_stream
from fastast.segments import Spectrograms
from fastast.tokens import PatchGrid


class SSAST(GridClassifier):
    """Classifier for spectrograms, fine-tuned from pre-trained weights.

    Clips of other lengths than ``input_frames`` are accepted: shorter ones use the middle of the
    table of positions, longer ones are laid over it, just as the table is adapted to them in
    :meth:`start_from`.

    Args:
        num_classes: of the logits.
        input_frames: frames of the longest clips.
        num_mels: mel bins of the input.
        patch_size: ``(mel bins, frames)``; default 16 by 16. The frame models have patches of all
            mel bins and two frames.
        stride: between patches. SSAST fine-tunes patches at ``(10, 10)``, frames one by one.
        dim, depth, num_heads, mlp_ratio: of the trunk.
        pool: what is classified of a clip: the ``"mean"`` of its patches, or its class tokens
            (``"cls"``).
        time_pool, time_pooling: of frames before patches are cut, see :class:`PatchGeometry`.

    Raises:
        ValueError: an unknown ``pool``, ``input_frames`` shorter than a patch, or a ``dim`` that
            ``num_heads`` does not divide.
    """

    shorter = "middle"

    def __init__(
        self,
        num_classes: int,
        *,
        input_frames: int = 1024,
        num_mels: int = 128,
        patch_size: tuple[int, int] = (16, 16),
        stride: tuple[int, int] = (10, 10),
        dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        pool: str = "mean",
        time_pool: int = 1,
        time_pooling: Literal["average", "max"] = "average",
    ) -> None:
        if pool not in ("mean", "cls"):
            raise ValueError(f"pool must be 'mean' or 'cls', got {pool!r}")
        super().__init__(
            num_classes,
            input_frames=input_frames,
            num_mels=num_mels,
            patch_size=patch_size,
            stride=stride,
            dim=dim,
            depth=depth,
            num_heads=num_heads,
            mlp_ratio=mlp_ratio,
            time_pool=time_pool,
            time_pooling=time_pooling,
        )
        self.pool = pool

    def _pooled(self, features: Tensor, grid: PatchGrid) -> Tensor:
        pooled = mean_of_patches if self.pool == "mean" else mean_of_class_tokens
        return pooled(features, grid)


class Restored(NamedTuple):
    """What :class:`SSASTPretraining` makes of the rows of a token stream.

    Attributes:
        features: ``[rows, dim]``, tokens after the trunk.
        patches: ``[rows, patch_freq * patch_time]``, the patches as they were; zeros on prefix and
            dead rows.
    """

    features: Tensor
    patches: Tensor


class SSASTPretraining(GridViT):
    """The model as it is pre-trained: a mask token, and two heads of two layers each.

    Args:
        input_frames, num_mels, dim, depth, num_heads, mlp_ratio, time_pool, time_pooling: as of
            :class:`SSAST`.
        patch_size: ``(mel bins, frames)``.
        stride: between patches. By default they do not overlap, so that no masked patch can be
            copied from its neighbours.

    Attributes:
        discriminate: head whose outputs are compared with the patches that were masked.
        generate: head whose outputs are to equal them.
    """

    shorter = "middle"

    def __init__(
        self,
        *,
        input_frames: int = 1024,
        num_mels: int = 128,
        patch_size: tuple[int, int] = (16, 16),
        stride: tuple[int, int] | None = None,
        dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        time_pool: int = 1,
        time_pooling: Literal["average", "max"] = "average",
    ) -> None:
        super().__init__(
            input_frames=input_frames,
            num_mels=num_mels,
            patch_size=patch_size,
            stride=stride or patch_size,
            dim=dim,
            depth=depth,
            num_heads=num_heads,
            mlp_ratio=mlp_ratio,
            time_pool=time_pool,
            time_pooling=time_pooling,
        )
        self.mask_token = nn.Parameter(torch.empty(dim))
        pixels = patch_size[0] * patch_size[1]
        self.discriminate = _head(dim, pixels)
        self.generate = _head(dim, pixels)
        self.init_weights()
        nn.init.normal_(self.mask_token, std=dim**-0.5)  # Xavier's, as in the original

    def forward(
        self, inputs: Spectrograms | Tensor, masked: Tensor, grid: PatchGrid | None = None
    ) -> Restored:
        """Encodes the clips with some of their patches replaced by the mask token.

        Args:
            inputs: :class:`~fastast.Spectrograms`, or dense ``[clips, frames, num_mels]``.
            masked: bool ``[grid.num_rows]``, the patches to replace.
            grid: the token list, from ``model.geometry.grid(...)``; made here if missing.
        """
        frames, grid = as_stream(inputs, grid, self.geometry)
        patches = self.patch_embed.cut(frames, grid)
        embedded = self.patch_embed.proj(patches)
        embedded = torch.where(masked[:, None], self.mask_token.to(embedded.dtype), embedded)
        features = self.trunk(self.assemble(embedded, grid), grid.segments)
        return Restored(features, patches)

    def head_flops(self, rows: int) -> Flops:
        """Of one of the heads, on so many rows; see :mod:`fastast.models.flops`."""
        hidden, out = self.discriminate[0], self.discriminate[2]
        inner = flops.linear(rows, hidden.in_features, hidden.out_features)
        return Flops(inner + flops.linear(rows, out.in_features, out.out_features), 0)

    def embed(self, inputs: Spectrograms | Tensor, grid: PatchGrid | None = None) -> Tensor:
        """The mean of each clip's patches after the trunk: ``[clips, dim]``, in input order."""
        return mean_of_patches(*self.forward_features(inputs, grid))


def _head(dim: int, pixels: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, pixels))


def _build(
    model: type[GridViT], frames: bool, size: TrunkSize, *num_classes: int, **kwargs
) -> GridViT:
    settings = asdict(size) | kwargs
    if frames:  # patches of all mel bins and two frames, which fine-tuning moves by one
        settings.setdefault("patch_size", (kwargs.get("num_mels", 128), 2))
        if model is SSAST:
            settings.setdefault("stride", (settings["patch_size"][0], 1))
    return model(*num_classes, **settings)


for _size, _trunk in TRUNK_SIZES.items():
    for _kind, _frames in (("patch", False), ("frame", True)):
        register_model(
            f"ssast_{_kind}_{_size}",
            partial(_build, SSAST, _frames, _trunk),
            pretraining=partial(_build, SSASTPretraining, _frames, _trunk),
        )
