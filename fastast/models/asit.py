"""ASiT: the ViT that learns from a teacher what a spectrogram was before it was corrupted.

Atito, Awais, Wang, Plumbley and Kittler, "ASiT: Audio Spectrogram vIsion Transformer for General
Audio Representation". A class token precedes each clip's patches, which do not overlap.
:class:`ASiTPretraining` has what the three objectives need after the trunk: a light decoder, and
two heads that assign classes without names, to each patch and to the clip. :class:`ASiT` is a
classifier; the two share embedding, class token, positions and trunk, which the one hands to the
other with :meth:`ASiT.start_from`.

The paper's attention heads are 128 channels wide: 3 in the small model and 6 in the base. Its
published code has twice as many (``num_heads``).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastast.models import flops
from fastast.models.flops import Flops
from fastast.models.grid_vit import GridClassifier, GridViT, mean_of_class_tokens
from fastast.models.registry import register_model
from fastast.segments import Spectrograms
from fastast.tokens import PatchGrid

ASIT_SIZES = {
    "small": {"dim": 384, "depth": 12, "num_heads": 3},
    "base": {"dim": 768, "depth": 12, "num_heads": 6},
}
"""The paper's sizes (section 4.4, effect of the model size)."""


class ASiT(GridClassifier):
    """Classifier for spectrograms, fine-tuned from pre-trained weights as an AST is (section 4.2).

    It reads the class token. Clips of other lengths than ``input_frames`` are accepted: shorter
    ones use the middle of the table of positions, longer ones are laid over it, just as the table
    is adapted to them in :meth:`start_from`.

    Args:
        num_classes: of the logits.
        input_frames: frames of the longest clips.
        num_mels: mel bins of the input.
        patch_size: ``(mel bins, frames)``.
        stride: between patches. The default is AST's, whose settings the paper fine-tunes with.
        dim, depth, num_heads, mlp_ratio: of the trunk.
        time_pool, time_pooling: of frames before patches are cut, see :class:`PatchGeometry`.

    Raises:
        ValueError: ``input_frames`` shorter than a patch, or a ``dim`` that ``num_heads`` does
            not divide.
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
        num_heads: int = 6,
        mlp_ratio: float = 4.0,
        time_pool: int = 1,
        time_pooling: Literal["average", "max"] = "average",
    ) -> None:
        super().__init__(
            num_classes,
            input_frames=input_frames,
            num_mels=num_mels,
            patch_size=patch_size,
            stride=stride,
            distilled=False,
            dim=dim,
            depth=depth,
            num_heads=num_heads,
            mlp_ratio=mlp_ratio,
            time_pool=time_pool,
            time_pooling=time_pooling,
        )


class Assigned(NamedTuple):
    """What :meth:`ASiTPretraining.assign` makes of the rows of a token stream.

    Attributes:
        local_vectors: ``[rows, bottleneck]`` of length 1, what the local classes are compared with.
        local_logits: ``[rows, local_classes]``, their cosines. Those of class tokens and dead rows
            mean nothing.
        global_vectors: ``[segments, bottleneck]``, of the class tokens.
        global_logits: ``[segments, global_classes]``.
    """

    local_vectors: Tensor
    local_logits: Tensor
    global_vectors: Tensor
    global_logits: Tensor


class ASiTPretraining(GridViT):
    """The model as it is pre-trained, student and teacher alike.

    Args:
        input_frames, num_mels, patch_size, dim, depth, num_heads, mlp_ratio: as of :class:`ASiT`;
            patches do not overlap.
        hidden: width of the two hidden layers of each head.
        bottleneck: width of the layer after them.
        local_classes: that patches are assigned to (K, section 3.2).
        global_classes: that clips are assigned to (C).
        as_code: the heads of the published code. The two share all layers but the last, and the
            decoder is narrower: hidden layers of ``dim``, a bottleneck of 128 with a GELU after it.

    Attributes:
        bottlenecks: the layers before the classes: those of the clips, then those of the patches
            unless they are the same.
        decoder: restores the pixels of each patch from its token.
    """

    shorter = "middle"

    def __init__(
        self,
        *,
        input_frames: int = 592,
        num_mels: int = 128,
        patch_size: tuple[int, int] = (16, 16),
        dim: int = 768,
        depth: int = 12,
        num_heads: int = 6,
        mlp_ratio: float = 4.0,
        hidden: int = 2048,
        bottleneck: int = 256,
        local_classes: int = 1024,
        global_classes: int = 8192,
        as_code: bool = False,
    ) -> None:
        super().__init__(
            input_frames=input_frames,
            num_mels=num_mels,
            patch_size=patch_size,
            stride=patch_size,
            distilled=False,
            dim=dim,
            depth=depth,
            num_heads=num_heads,
            mlp_ratio=mlp_ratio,
        )
        self.bottlenecks = nn.ModuleList(
            _mlp(dim, hidden, bottleneck) for _ in range(1 if as_code else 2)
        )
        self.local_classes = Directions(bottleneck, local_classes)
        self.global_classes = Directions(bottleneck, global_classes)
        pixels = patch_size[0] * patch_size[1]
        if as_code:
            self.decoder = nn.Sequential(*_mlp(dim, dim, 128), nn.GELU(), Pixels(128, pixels))
        else:
            self.decoder = nn.Sequential(*_mlp(dim, hidden, bottleneck), Pixels(bottleneck, pixels))
        self.init_weights()

    def forward(self, inputs: Spectrograms | Tensor, grid: PatchGrid | None = None) -> Assigned:
        """The classes of the patches and of the clips.

        Args:
            inputs: :class:`~fastast.Spectrograms`, or dense ``[clips, frames, num_mels]``.
            grid: the token list, from ``model.geometry.grid(...)``; made here if missing.
        """
        return self.assign(*self.forward_features(inputs, grid))

    def assign(self, features: Tensor, grid: PatchGrid) -> Assigned:
        """The classes that tokens ``[rows, dim]`` after the trunk are assigned to."""
        clips = _unit(self.bottlenecks[0](mean_of_class_tokens(features, grid)))
        patches = _unit(self.bottlenecks[-1](features))
        return Assigned(patches, self.local_classes(patches), clips, self.global_classes(clips))

    def embed(self, inputs: Spectrograms | Tensor, grid: PatchGrid | None = None) -> Tensor:
        """The class token of each clip after the trunk: ``[clips, dim]``, in input order."""
        return mean_of_class_tokens(*self.forward_features(inputs, grid))

    def assigning_flops(self, tokens: Sequence[int] | np.ndarray) -> Flops:
        """Of :meth:`assign`, for clips of so many tokens each; see :mod:`fastast.models.flops`."""
        tokens = np.asarray(tokens, np.int64)
        rows, clips = int(tokens.sum()), int((tokens > 0).sum())
        total = _linears(self.bottlenecks[-1], rows) + _linears(self.bottlenecks[0], clips)
        for classes, count in ((self.local_classes, rows), (self.global_classes, clips)):
            total += flops.linear(count, classes.weight.shape[1], classes.weight.shape[0])
        return Flops(total, 0)

    def decoder_flops(self, tokens: Sequence[int] | np.ndarray) -> Flops:
        """Of the decoder, for clips of so many tokens each."""
        rows, last = int(np.sum(tokens)), self.decoder[-1]
        total = _linears(self.decoder, rows)
        return Flops(total + flops.linear(rows, last.weight.shape[1], last.weight.shape[0]), 0)


class Directions(nn.Module):
    """A linear layer whose rows have length 1: of unit vectors it gives the cosines.

    That is weight normalisation with its lengths fixed at 1, as in DINO. The weights keep a length
    of their own, which the result does not depend on.

    Shape:
        ``[rows, dim] -> [rows, classes]``.
    """

    def __init__(self, dim: int, classes: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(classes, dim))
        nn.init.trunc_normal_(self.weight, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, F.normalize(self.weight, dim=1))


class Pixels(nn.Module):
    """A transposed convolution whose stride is its size: each token becomes a patch, and all pixels
    have the same bias.

    Shape:
        ``[rows, dim] -> [rows, pixels]``.
    """

    def __init__(self, dim: int, pixels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(pixels, dim))
        self.bias = nn.Parameter(torch.zeros(1))
        nn.init.trunc_normal_(self.weight, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias.expand(self.weight.shape[0]))


def _mlp(dim: int, hidden: int, out: int) -> nn.Sequential:
    """Three linear layers, a GELU after each of the first two."""
    return nn.Sequential(
        nn.Linear(dim, hidden),
        nn.GELU(),
        nn.Linear(hidden, hidden),
        nn.GELU(),
        nn.Linear(hidden, out),
    )


def _unit(x: Tensor) -> Tensor:
    """Rows scaled to length 1, in float32 or more."""
    return F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=1)


def _linears(layers: nn.Sequential, rows: int) -> int:
    """The forward of those layers that are linear."""
    found = [layer for layer in layers if isinstance(layer, nn.Linear)]
    return sum(flops.linear(rows, layer.in_features, layer.out_features) for layer in found)


def _build(model: type[GridViT], size: dict[str, int], *num_classes: int, **kwargs) -> GridViT:
    return model(*num_classes, **(size | kwargs))


for _size, _trunk in ASIT_SIZES.items():
    register_model(
        f"asit_{_size}",
        partial(_build, ASiT, _trunk),
        pretraining=partial(_build, ASiTPretraining, _trunk),
    )
