"""The packed trunk: a pre-norm vision transformer over a flat stream of tokens.

All the library's ViT-shaped models run on these blocks. Modules are named as in timm, so that
published weights map onto them one to one.
"""

from __future__ import annotations

import operator
import warnings
from dataclasses import asdict, dataclass
from functools import partial
from typing import Literal, TypeVar

import torch.nn.functional as F
from torch import Tensor, nn

from fastast.models.registry import register_model
from fastast.nn import PackedAttention
from fastast.segments import Segments, Spectrograms
from fastast.tokens import FoldGrid, PatchGeometry, PatchGrid, patchify, resize_patch_kernel

Grid = TypeVar("Grid", PatchGrid, FoldGrid)
"""What a geometry makes of a batch's lengths."""


@dataclass(frozen=True)
class TrunkSize:
    """Width, depth and heads of a trunk; heads are 64 channels wide at every size."""

    dim: int
    depth: int
    num_heads: int


TRUNK_SIZES = {
    "tiny": TrunkSize(192, 12, 3),
    "small": TrunkSize(384, 12, 6),
    "base": TrunkSize(768, 12, 12),
}
"""The DeiT sizes, which all four papers use (Touvron et al., 2021)."""


class Mlp(nn.Module):
    """Two linear layers with an exact (erf) GELU between them."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Attention and MLP, each after a LayerNorm and around a residual connection.

    Shape:
        ``x [rows, dim] -> [rows, dim]``. ``factors`` multiply the two branches, ``[rows, 2]``.
    """

    def __init__(
        self, dim: int, num_heads: int, mlp_ratio: float, scale: float | None = None
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = PackedAttention(dim, num_heads, scale=scale)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))

    def forward(self, x: Tensor, segments: Segments, factors: Tensor | None = None) -> Tensor:
        branch = self.attn(self.norm1(x), segments)
        x = x + (branch if factors is None else branch * factors[:, :1].to(branch.dtype))
        branch = self.mlp(self.norm2(x))
        return x + (branch if factors is None else branch * factors[:, 1:].to(branch.dtype))


class Trunk(nn.Module):
    """A stack of blocks and a final LayerNorm.

    Args:
        dim, depth, num_heads: see :data:`TRUNK_SIZES`.
        mlp_ratio: hidden width of the MLP over ``dim``.
        scale: of the attention scores; default ``head_dim ** -0.5``.

    Shape:
        ``[rows, dim] -> [rows, dim]``; rows past the last segment come out finite and meaning
        nothing.
    """

    def __init__(
        self,
        dim: int,
        depth: int,
        num_heads: int,
        *,
        mlp_ratio: float = 4.0,
        scale: float | None = None,
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(dim, num_heads, mlp_ratio, scale) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)

    def forward(self, x: Tensor, segments: Segments, drops: Tensor | None = None) -> Tensor:
        """Runs the blocks.

        Args:
            x: the stream of tokens.
            segments: of the stream.
            drops: float32 ``[segments, 2 * depth]``, what each clip's residual branches are
                multiplied by, see :func:`~fastast.nn.drop_path.drop_path_factors`.
        """
        factors = [None] * len(self.blocks)
        if drops is not None:
            clip = segments.row_ids(x.shape[0])
            drops = F.pad(drops, (0, 0, 0, 1)).unflatten(1, (-1, 2))  # the last is of dead rows
            factors = [F.embedding(clip, drop) for drop in drops.unbind(1)]
        for block, factor in zip(self.blocks, factors, strict=True):
            x = block(x, segments, factor)
        return self.norm(x)


class PatchEmbed(nn.Module):
    """Patches of a spectrogram stream, each projected to a token.

    Args:
        geometry: of the patches.
        dim: of the tokens.
        resize: how the projection is adapted to a grid of other patches (FlexiAST), see
            :func:`~fastast.tokens.resize_patch_kernel`. Default: not at all.

    Shape:
        ``frames [rows, num_mels]``, grid ``-> [grid.num_rows, dim]``.

    Raises:
        ValueError: the grid's patches are of another size, and ``resize`` is None.
    """

    def __init__(
        self,
        geometry: PatchGeometry,
        dim: int,
        *,
        resize: Literal["bilinear", "pi"] | None = None,
    ) -> None:
        super().__init__()
        self.geometry = geometry
        self.resize = resize
        self.proj = nn.Linear(geometry.patch_size[0] * geometry.patch_size[1], dim)

    def forward(self, frames: Tensor, grid: PatchGrid) -> Tensor:
        patches, own, size = self.cut(frames, grid), self.geometry.patch_size, _patch_size(grid)
        if size == own:
            return self.proj(patches)
        kernel = resize_patch_kernel(self.proj.weight.unflatten(1, own), size, self.resize)
        return F.linear(patches, kernel.flatten(1), self.proj.bias)

    def cut(self, frames: Tensor, grid: PatchGrid) -> Tensor:
        """The patches before they are projected, see :func:`~fastast.tokens.patchify`.

        Raises:
            ValueError: they are of another size, and ``resize`` is None.
        """
        own, size = self.geometry.patch_size, _patch_size(grid)
        if size != own and self.resize is None:
            raise ValueError(
                f"grid lists patches of {size}, this model's are {own}: make it with the model's "
                "own geometry, or use a FlexiAST"
            )
        return patchify(frames, grid, grid.geometry)


def _patch_size(grid: PatchGrid) -> tuple[int, int]:
    # To the compiler an integer that has changed is a variable; as an index it is a constant.
    return tuple(map(operator.index, grid.geometry.patch_size))


def as_stream(
    inputs: Spectrograms | Tensor, grid: Grid | None, geometry: PatchGeometry
) -> tuple[Tensor, Grid]:
    """Brings a model's input to a frame stream and its token list.

    Args:
        inputs: :class:`~fastast.Spectrograms`, or dense ``[clips, frames, num_mels]``.
        grid: the token list; if missing it is made here, on the host. Pass it in compiled code.
        geometry: of the model.
    """
    if isinstance(inputs, Spectrograms):
        frames, lengths = inputs.frames, inputs.segments
    else:
        if inputs.ndim != 3:
            raise ValueError(f"inputs must be [clips, frames, num_mels], got {tuple(inputs.shape)}")
        frames, lengths = inputs.flatten(0, 1), [inputs.shape[1]] * inputs.shape[0]
    if grid is None:
        grid = geometry.grid(lengths)
        _warn_of_clips_without_tokens(grid, geometry)
        grid = grid.to(frames.device)
    return frames, grid


def _warn_of_clips_without_tokens(grid: PatchGrid | FoldGrid, geometry: PatchGeometry) -> None:
    empty = (grid.segments.host_offsets.diff() == 0).nonzero().flatten().tolist()
    if empty:
        warnings.warn(
            f"clips {empty} have fewer than {geometry.min_frames()} frames, a patch's width, so "
            "no token: their logits mean nothing. Pad their waveforms, or use narrower patches.",
            stacklevel=4,
        )


def init_vit_weights(module: nn.Module) -> None:
    """Initialises linear layers as ViT does; for :meth:`torch.nn.Module.apply`."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def register_sizes(family: str, model: type[nn.Module]) -> None:
    """Registers a model class in every trunk size, as ``{family}_{size}``."""
    for size, trunk in TRUNK_SIZES.items():
        register_model(f"{family}_{size}", partial(_build, model, asdict(trunk)))


def _build(model: type[nn.Module], defaults: dict, num_classes: int, **kwargs) -> nn.Module:
    return model(num_classes, **(defaults | kwargs))
